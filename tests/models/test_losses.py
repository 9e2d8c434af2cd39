"""Every loss against its recording and against loops over spots, gradients too."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.clustering import Clusters, kmeans
from models.contract import SCALES, Embeddings, Prediction
from models.layers.precision import unit
from models.losses import (
    GeneDMLLoss,
    centroid_cross_entropy,
    group_loss,
    instance_loss,
    multi_scale_instance_loss,
    prediction_loss,
)


def softmax(values: list[Tensor]) -> list[Tensor]:
    total = torch.stack([value.exp() for value in values]).sum()
    return [value.exp() / total for value in values]


def slow_instance(image: Tensor, gene: Tensor, temperature: float) -> Tensor:
    """`instance_loss` by its formula, entry by entry."""
    count = len(image)
    span = range(count)
    logits = [[gene[i] @ image[j] / temperature for j in span] for i in span]
    mixed = [[(image[i] @ image[j] + gene[i] @ gene[j]) / 2 / temperature for j in span] for i in span]
    targets = [softmax(row) for row in mixed]
    losses = []
    for i in span:
        of_gene = softmax(logits[i])
        of_image = softmax([logits[j][i] for j in span])
        gene_row = -sum(targets[i][j] * of_gene[j].log() for j in span)
        image_row = -sum(targets[j][i] * of_image[j].log() for j in span)
        losses.append((gene_row + image_row) / 2)
    return torch.stack(losses)


def slow_cross_entropy(vectors: Tensor, clusters: Clusters, labels: Tensor, temperature: float) -> Tensor:
    used = [j for j in range(len(clusters.centroids)) if clusters.is_used[j]]
    losses = []
    for vector, label in zip(vectors, labels.tolist(), strict=True):
        shares = softmax([vector @ clusters.centroids[j] / temperature for j in used])
        losses.append(-shares[used.index(label)].log())
    return torch.stack(losses).mean()


def random_units(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(count, dim, generator=generator, dtype=torch.float64)).requires_grad_()


def compare(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.sum(), leaves, retain_graph=True)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), leaves, retain_graph=True), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_instance_loss_equals_the_recording(golden, tools):
    recording = tools.as_tensors(golden("contrastive"))
    gene, image = (recording[name].clone().requires_grad_() for name in ("gene", "image"))
    found = instance_loss(unit(image), unit(gene), float(recording["temperature"]))
    tools.close(found, recording["loss"])
    found.mean().backward()
    tools.close(gene.grad, recording["grad_gene"], tolerance=tools.GRADIENT_TOLERANCE)
    tools.close(image.grad, recording["grad_image"], tolerance=tools.GRADIENT_TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_instance_loss_equals_loops(count):
    image, gene = random_units(count, 5, 0), random_units(count, 5, 1)
    compare(instance_loss(image, gene, 0.2), slow_instance(image, gene, 0.2), [image, gene])


def test_multi_scale_loss_is_the_mean_over_the_scales_there_are():
    gene = random_units(6, 4, 0)
    scales = {name: random_units(6, 4, seed) for seed, name in enumerate(("target", "neighbor", "global"), start=1)}
    each = [slow_instance(image, gene, 0.3).mean() for image in scales.values()]
    compare(multi_scale_instance_loss(scales, gene, 0.3), sum(each) / 3, [gene, *scales.values()])
    one = {"target": scales["target"]}
    torch.testing.assert_close(multi_scale_instance_loss(one, gene, 0.3), each[0])


def test_group_loss_equals_the_recording(golden, tools):
    recording = tools.as_tensors(golden("cld"))
    fused = recording["mean_image"].clone().requires_grad_()
    gene = recording["gene_normalised"].clone().requires_grad_()
    head = torch.nn.Linear(fused.shape[1], fused.shape[1])
    head.load_state_dict({"weight": recording["param/0.weight"], "bias": recording["param/0.bias"]})
    features = {"image": unit(head(fused)), "gene": unit(head(gene))}
    clusters = {name: kmeans(values, int(recording["k"]), empty="zero") for name, values in features.items()}
    temperature = float(recording["temperature"])
    for name, values in features.items():
        tools.close(values, recording[f"{name}_cluster_features"])
        assert torch.equal(clusters[name].labels, recording[f"labels_{name}"].long())
        tools.close(clusters[name].centroids, recording[f"centroids_{name}"])
    image_term = centroid_cross_entropy(fused, clusters["gene"], clusters["gene"].labels, temperature)
    gene_term = centroid_cross_entropy(gene, clusters["image"], clusters["image"].labels, temperature)
    tools.close(image_term, recording["loss_image"])
    tools.close(gene_term, recording["loss_gene"])
    found = group_loss(
        fused, gene, image_clusters=clusters["image"], gene_clusters=clusters["gene"], temperature=temperature
    )
    tools.close(found, recording["loss"])
    found.backward()
    gradients = {
        "grad_mean_image": fused.grad,
        "grad_gene_normalised": gene.grad,
        "grad/0.weight": head.weight.grad,
        "grad/0.bias": head.bias.grad,
    }
    for name, gradient in gradients.items():
        tools.close(gradient, recording[name], tolerance=tools.GRADIENT_TOLERANCE)


@pytest.mark.parametrize("with_duplicates", [False, True])
def test_group_loss_equals_loops_and_leaves_dropped_clusters_out(with_duplicates):
    fused, gene = random_units(13, 4, 0), random_units(13, 4, 1)
    points = random_units(13, 4, 2).detach()
    if with_duplicates:
        points[1] = points[0].clone()
    points.requires_grad_()
    image_clusters, gene_clusters = kmeans(points, 4), kmeans(gene, 5)
    assert bool(image_clusters.is_used.all()) is not with_duplicates
    found = group_loss(fused, gene, image_clusters=image_clusters, gene_clusters=gene_clusters, temperature=0.1)
    expected = (
        slow_cross_entropy(fused, gene_clusters, gene_clusters.labels, 0.1)
        + slow_cross_entropy(gene, image_clusters, image_clusters.labels, 0.1)
    ) / 2
    compare(found, expected, [fused, gene, points])


def test_prediction_loss_is_the_mean_square():
    predicted = torch.randn(4, 6, requires_grad=True)
    expression = torch.randn(4, 6)
    compare(prediction_loss(predicted, expression), (predicted - expression).square().sum() / 24, [predicted])


def loss_config(**changes: object) -> SimpleNamespace:
    values = {
        "instance_weight": 1.0,
        "group_weight": 0.8,
        "instance_temperature": 0.07,
        "group_temperature": 0.1,
        "k": 3,
        "use_kmeans": True,
        "normalize_fused": False,
    }
    return SimpleNamespace(**(values | changes))


def random_prediction(count: int = 12) -> tuple[Prediction, Tensor]:
    torch.manual_seed(5)
    *scales, gene, fused_cluster, gene_cluster = unit(torch.randn(6, count, 8)).unbind()
    fused = 3 * torch.randn(count, 8)
    embeddings = Embeddings(dict(zip(SCALES, scales, strict=True)), gene, fused, fused_cluster, gene_cluster)
    predicted, *of_scales = torch.randn(4, count, 5).unbind()
    return Prediction(predicted, dict(zip(SCALES, of_scales, strict=True)), embeddings), torch.randn(count, 5)


def test_the_total_is_the_weighted_sum_of_the_terms():
    prediction, expression = random_prediction()
    terms = GeneDMLLoss(loss_config(instance_weight=0.5, group_weight=2.0))(prediction, expression)
    assert set(terms) == {"prediction", "instance", "group", "auxiliary", "total"}
    total = terms["prediction"] + 0.5 * terms["instance"] + 2 * terms["group"] + terms["auxiliary"]
    torch.testing.assert_close(terms["total"], total)
    auxiliary = sum((values - expression).square().mean() for values in prediction.scales.values())
    torch.testing.assert_close(terms["auxiliary"], auxiliary)


def test_terms_without_weight_or_without_embeddings_are_left_out():
    prediction, expression = random_prediction()
    terms = GeneDMLLoss(loss_config(instance_weight=0.0, group_weight=0.0, k=500))(prediction, expression)
    assert set(terms) == {"prediction", "auxiliary", "total"}
    terms = GeneDMLLoss(loss_config())(Prediction(fused=prediction.fused), expression)
    assert set(terms) == {"prediction", "total"}
    assert torch.equal(terms["total"], terms["prediction"])


def test_normalize_fused_changes_the_vectors_that_meet_the_centroids():
    prediction, expression = random_prediction()
    embeddings = prediction.embeddings
    found = GeneDMLLoss(loss_config(normalize_fused=True))(prediction, expression)["group"]
    clusters = {
        "image_clusters": kmeans(embeddings.fused_cluster, 3),
        "gene_clusters": kmeans(embeddings.gene_cluster, 3),
    }
    lengths = embeddings.fused.norm(dim=1, keepdim=True)
    expected = group_loss(embeddings.fused / lengths, embeddings.gene, temperature=0.1, **clusters)
    torch.testing.assert_close(found, expected)
    published = GeneDMLLoss(loss_config())(prediction, expression)["group"]
    torch.testing.assert_close(published, group_loss(embeddings.fused, embeddings.gene, temperature=0.1, **clusters))
    assert not math.isclose(float(found), float(published), rel_tol=1e-3)


def test_the_other_grouping_gives_finite_losses():
    prediction, expression = random_prediction()
    terms = GeneDMLLoss(loss_config(use_kmeans=False))(prediction, expression)
    assert all(torch.isfinite(term) for term in terms.values())
    default = GeneDMLLoss(loss_config())(prediction, expression)
    assert not torch.equal(terms["group"], default["group"])


def test_losses_are_float32_under_autocast():
    prediction, expression = random_prediction()
    loss = GeneDMLLoss(loss_config())
    expected = loss(prediction, expression)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(prediction, expression)
    for name, term in found.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, expected[name])


def test_fewer_spots_than_clusters_are_refused():
    prediction, expression = random_prediction()
    with pytest.raises(ValueError, match=r"12 spots cannot form 13 clusters.*Lower --k"):
        GeneDMLLoss(loss_config(k=13))(prediction, expression)
