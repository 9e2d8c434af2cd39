"""The whole model: recorded forward pass, losses and gradients; invariants that no recording can show."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from models.contract import SCALES, ModelInputs, Needs, Sizes
from models.import_reference import translate_name
from models.losses import GeneDMLLoss
from models.table import build_model

SIZES = Sizes(feature_dim=8, token_dim=8, num_genes=6, num_neighbors=5)
LENGTHS = [14, 9]


def loss_config(**changes: object) -> SimpleNamespace:
    values = {
        "instance_weight": 1.0,
        "group_weight": 0.8,
        "instance_temperature": 0.07,
        "group_temperature": 0.07,
        "k": 3,
        "use_kmeans": True,
        "normalize_fused": False,
    }
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def recording(golden, tools):
    return tools.as_tensors(golden("genedml_train"))


def recorded_loss(recording, *, k: int):
    config = loss_config(
        instance_temperature=float(recording["temperature"]),
        group_temperature=float(recording["cld_temperature"]),
        group_weight=float(recording["lambda_cld"]),
        k=k,
    )
    return GeneDMLLoss(config, empty="zero")


def recorded_forward(model, recording):
    slides = [recording["slide0_features"], recording["slide1_features"]]
    positions = torch.cat([recording["slide0_position_yx"], recording["slide1_position_yx"]]).flip(1)
    lengths = [len(slide) for slide in slides]
    rows = (recording["pid"] * lengths[0] + recording["sid"]).long()
    global_tokens = model.encode_slides(torch.cat(slides), positions, lengths, rows)
    inputs = ModelInputs(
        target_tokens=recording["tokens"],
        neighbor_features=recording["neighbor"],
        neighbor_is_valid=recording["mask"] > 0,
        global_tokens=global_tokens,
    )
    return global_tokens, model(inputs, recording["exp"])


def test_the_forward_pass_equals_the_recording(recording, tools):
    model = tools.recorded_model(recording)
    stages = {}
    model.neighbor_encoder.register_forward_hook(lambda *call: stages.update(neighbor_token=call[2]))
    model.fusion.register_forward_hook(lambda *call: stages.update(fusion_in=call[1][0], fusion_out=call[2]))
    stages["global_token"], prediction = recorded_forward(model, recording)
    embeddings = prediction.embeddings
    stages |= {
        "z_target": embeddings.scales["target"],
        "z_neighbor": embeddings.scales["neighbor"],
        "z_global": embeddings.scales["global"],
        "z_gene": embeddings.gene,
        "cluster_image": embeddings.fused_cluster,
        "cluster_gene": embeddings.gene_cluster,
        "pred_target": prediction.scales["target"],
        "pred_neighbor": prediction.scales["neighbor"],
        "pred_global": prediction.scales["global"],
        "pred_fusion": prediction.fused,
    }
    for name, found in stages.items():
        tools.close(found, recording[name])


def test_losses_and_all_gradients_equal_the_recording(golden, recording, tools):
    model = tools.recorded_model(recording)
    _, prediction = recorded_forward(model, recording)
    loss = recorded_loss(recording, k=int(recording["k"]))
    for name, vectors in (("image", prediction.embeddings.fused_cluster), ("gene", prediction.embeddings.gene_cluster)):
        clusters = loss.cluster(vectors)
        assert torch.equal(clusters.labels, recording[f"labels_{name}"].long())
        tools.close(clusters.centroids, recording[f"centroids_{name}"])
    terms = loss(prediction, recording["exp"])
    tools.close(terms["prediction"], recording["fusion_pred_loss"])
    tools.close(terms["instance"], recording["contrastive_loss"])
    tools.close(terms["group"], recording["CLD_loss"])
    tools.close(terms["total"] - terms["auxiliary"], recording["loss"])
    scales = ("target_pred_loss", "neighbor_pred_loss", "global_pred_loss")
    tools.close(terms["auxiliary"], sum(recording[name] for name in scales))
    terms["total"].backward()
    parameters = dict(model.named_parameters())
    recorded = {translate_name(name): value for name, value in tools.below(recording, "grad/").items()}
    for name, gradient in recorded.items():
        tools.close(parameters[name].grad, gradient, tolerance=tools.GRADIENT_TOLERANCE)
    without = {translate_name(str(name)) for name in golden("genedml_train")["params_without_gradient"]}
    assert set(parameters) == set(recorded) | without
    assert all(parameters[name].grad.abs().sum() > 0 for name in without), "our auxiliary heads do learn"


def test_the_auxiliary_term_changes_no_other_gradient(recording, tools):
    model = tools.recorded_model(recording)
    _, prediction = recorded_forward(model, recording)
    terms = recorded_loss(recording, k=int(recording["k"]))(prediction, recording["exp"])
    terms["auxiliary"].backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("scale_predictors.")}


def test_evaluation_of_a_slide_equals_the_recording(golden, recording, tools):
    model = tools.recorded_model(recording).eval()
    slide = tools.as_tensors(golden("genedml_eval"))
    with torch.no_grad():
        features, positions = recording["slide0_features"], recording["slide0_position_yx"].flip(1)
        inputs = ModelInputs(
            target_tokens=slide["tokens"],
            neighbor_features=slide["neighbor"],
            neighbor_is_valid=slide["mask"] > 0,
            global_tokens=model.encode_slides(features, positions, [len(features)]),
        )
        prediction = model(inputs, slide["exp"])
        terms = recorded_loss(recording, k=int(slide["val_k"]))(prediction, slide["exp"])
    for name, found in prediction.scales.items():
        tools.close(found, slide[f"pred_{name}"])
    tools.close(prediction.fused, slide["pred_fusion"])
    tools.close(terms["prediction"], slide["val_prediction_loss"])
    tools.close(terms["instance"], slide["val_contrastive_loss"])
    tools.close(terms["group"], slide["val_CLD_loss"])
    tools.close(terms["total"] - terms["auxiliary"], slide["val_loss"])


def random_batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    cells = torch.cat([torch.randperm(30, generator=generator)[:length] for length in LENGTHS])
    is_valid = torch.rand(10, 25, generator=generator) > 0.3
    is_valid[:, 12] = True
    return {
        "slide_features": draw(sum(LENGTHS), 8),
        "grid_xy": torch.stack([cells % 6, cells // 6], dim=1),
        "rows": torch.randperm(sum(LENGTHS), generator=generator)[:10],
        "target_tokens": draw(10, 7, 8),
        "neighbor_features": draw(10, 25, 8),
        "neighbor_is_valid": is_valid,
        "expression": draw(10, 6).float().abs(),
    }


def run(model, batch, *, lengths: list[int] = LENGTHS, with_expression: bool = True):
    global_tokens = None
    if model.needs.slides:
        global_tokens = model.encode_slides(batch["slide_features"], batch["grid_xy"], lengths, batch["rows"])
    inputs = ModelInputs(
        target_tokens=batch["target_tokens"],
        neighbor_features=batch["neighbor_features"] if model.needs.neighbors else None,
        neighbor_is_valid=batch["neighbor_is_valid"] if model.needs.neighbors else None,
        global_tokens=global_tokens,
    )
    return model(inputs, batch["expression"] if with_expression else None)


def build(tools, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build_model(tools.model_config(**changes), SIZES)


DROPOUTS = {f"{part}_dropout": 0.4 for part in ("neighbor", "global", "fusion", "gene", "gene_mlp", "predictor")}


def test_two_evaluations_are_bit_equal_and_two_training_passes_are_not(tools):
    model = build(tools, **DROPOUTS)
    batch = random_batch()
    assert not torch.equal(run(model, batch).fused, run(model, batch).fused)
    model.eval()
    first, second = run(model, batch), run(model, batch)
    assert set(first.by_scale()) == {"fused", *SCALES}
    for name, values in first.by_scale().items():
        assert torch.equal(values, second.by_scale()[name])
    assert torch.equal(first.embeddings.gene, second.embeddings.gene)


def test_the_mode_switch_is_that_of_torch(tools):
    model = build(tools, **DROPOUTS)
    for module in model.modules():
        assert type(module).train is torch.nn.Module.train and type(module).eval is torch.nn.Module.eval
    assert not any(module.training for module in model.eval().modules())


def test_permuting_the_spots_of_a_slide_permutes_the_prediction(tools):
    model = build(tools).eval()
    batch = random_batch()
    count = LENGTHS[0]
    whole = {name: batch[name][:count] for name in ("slide_features", "grid_xy")}
    generator = torch.Generator().manual_seed(1)
    whole |= {
        "target_tokens": torch.randn(count, 7, 8, generator=generator),
        "neighbor_features": torch.randn(count, 25, 8, generator=generator),
        "neighbor_is_valid": torch.ones(count, 25, dtype=torch.bool),
        "expression": torch.rand(count, 6, generator=generator),
    }
    order = torch.randperm(count, generator=generator)
    permuted = {name: values[order] for name, values in whole.items()}
    expected = run(model, whole | {"rows": None}, lengths=[count])
    found = run(model, permuted | {"rows": None}, lengths=[count])
    assert set(found.by_scale()) == {"fused", *SCALES}
    for name, values in found.by_scale().items():
        torch.testing.assert_close(values, expected.by_scale()[name][order], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.embeddings.fused, expected.embeddings.fused[order], atol=1e-5, rtol=0)


def test_the_prediction_of_a_spot_does_not_depend_on_the_other_spots_asked_for(tools):
    model = build(tools).eval()
    batch = random_batch()
    everything = run(model, batch).fused
    part = {name: values[3:5] for name, values in batch.items() if name not in ("slide_features", "grid_xy")}
    found = run(model, batch | part, with_expression=False)
    torch.testing.assert_close(found.fused, everything[3:5], atol=1e-5, rtol=0)
    assert found.embeddings is None


@pytest.mark.parametrize("pooled_dim", [None, 12])
@pytest.mark.parametrize("scales", [(True, True), (False, True), (True, False), (False, False)])
def test_every_parameter_gets_a_finite_gradient_in_every_ablation(tools, scales, pooled_dim):
    use_neighbor, use_global = scales
    config = tools.model_config(use_neighbor=use_neighbor, use_global=use_global)
    torch.manual_seed(0)
    model = build_model(config, dataclasses.replace(SIZES, feature_dim=pooled_dim or SIZES.feature_dim))
    batch = random_batch()
    if pooled_dim is not None:
        for name in ("slide_features", "neighbor_features"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, pooled_dim - 8), value=0.3)
    prediction = run(model, batch)
    assert ("neighbor" in prediction.scales, "global" in prediction.scales) == scales
    assert set(prediction.scales) == set(prediction.embeddings.scales) == set(model.scale_predictors)
    GeneDMLLoss(loss_config())(prediction, batch["expression"])["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_scale_that_is_switched_off_has_no_influence(tools):
    model = build(tools, use_neighbor=False, use_global=False)
    assert model.needs == Needs(tokens=True, neighbors=False, slides=False)
    batch = random_batch()
    inputs = {name: batch[name] for name in ("target_tokens", "neighbor_features", "neighbor_is_valid")}
    found = model(ModelInputs(**inputs, global_tokens=torch.randn(10, 8)))
    assert torch.equal(found.fused, run(model, batch).fused)


def test_a_tiny_model_overfits_one_batch(tools):
    model = build(tools, seed=3, neighbor_depth=1, global_depth=2)
    batch = random_batch()
    loss = GeneDMLLoss(loss_config())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(120):
        terms = loss(run(model, batch), batch["expression"])
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    assert history[-1]["prediction"] < 0.03 < 0.3 < history[0]["prediction"]
    assert history[-1]["total"] < 0.35 * history[0]["total"]
    assert history[-1]["auxiliary"] < 0.3 * history[0]["auxiliary"]


@pytest.mark.parametrize("train", [True, False])
def test_bf16_autocast_is_finite_and_near_float32(tools, train):
    model = build(tools).train(train)
    batch = random_batch()
    batch["neighbor_is_valid"][4] = False
    expected = run(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, batch)
        terms = GeneDMLLoss(loss_config())(found, batch["expression"])
    assert found.fused.dtype == found.embeddings.fused.dtype == torch.float32
    assert (found.fused - expected.fused).abs().max() < 0.05
    terms["total"].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_caches_are_taken_as_they_are(tools, autocast):
    model = build(tools).eval()
    narrow = random_batch(torch.float16)
    floating = ("slide_features", "target_tokens", "neighbor_features")
    wide = narrow | {name: narrow[name].float() for name in floating}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(run(model, narrow).fused, run(model, wide).fused, atol=1e-2, rtol=0)


def test_the_sizes_come_from_the_configuration(tools):
    sizes = Sizes(feature_dim=16, token_dim=16, num_genes=9, num_neighbors=5)
    model = build_model(tools.model_config(projection_dim=20, global_depth=4), sizes)
    assert model.projection.weight.shape == (20, 16) and len(model.global_encoder.layers) == 4
    assert model.fused_predictor[6].weight.shape == (9, 20)
    with pytest.raises(ValueError, match=r"Unknown model 'gene-dml'.*gene_dml, mean, ridge"):
        build_model(tools.model_config(name="gene-dml"), SIZES)
