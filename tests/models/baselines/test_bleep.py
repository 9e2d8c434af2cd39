"""BLEEP against a slow, obvious version: the loss and its gradients, the look-up; and what its checkpoint holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.baselines.bleep import NUM_NEAREST, TEMPERATURE, WIDTH, bleep_loss
from models.contract import ModelInputs, Sizes
from models.table import build_model
from utils.checkpoint import load_weights
from utils.config import Model

DIM, GENES, SPOTS = 10, 6, 80
SIZES = Sizes(feature_dim=DIM, token_dim=DIM, num_genes=GENES, num_neighbors=5)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few rows: a second thread costs more than it brings, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(seed: int = 0):
    torch.manual_seed(seed)
    return build_model(Model(name="bleep"), SIZES)


def _spots(count: int = SPOTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and an expression that is linear in them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, DIM, generator=generator)
    weights = torch.randn(DIM, GENES, generator=torch.Generator().manual_seed(99))
    return features, features @ weights / math.sqrt(DIM) + 2


def _predict(model, features: Tensor) -> Tensor:
    return model.eval()(ModelInputs(target_features=features)).fused


def _remember(model, features: Tensor, expression: Tensor):
    model.eval().remember(ModelInputs(target_features=features), expression)
    return model


def slow_head(head, vector: Tensor) -> Tensor:
    """The projection head of one vector, entry by entry; dropout off."""
    weights, more = head.projection.weight, head.hidden.weight
    projected = torch.stack([(weights[i] * vector).sum() + head.projection.bias[i] for i in range(WIDTH)])
    gelu = torch.stack([p * (1 + torch.erf(p / math.sqrt(2))) / 2 for p in projected])
    total = torch.stack([(more[i] * gelu).sum() + head.hidden.bias[i] for i in range(WIDTH)]) + projected
    spread = ((total - total.mean()) ** 2).mean() + head.norm.eps
    return (total - total.mean()) / spread.sqrt() * head.norm.weight + head.norm.bias


def slow_softmax(values: list[Tensor]) -> list[Tensor]:
    greatest = max(float(value.detach()) for value in values)
    powers = [(value - greatest).exp() for value in values]
    return [power / torch.stack(powers).sum() for power in powers]


def slow_loss(images: list[Tensor], genes: list[Tensor]) -> Tensor:
    """Soft-target contrastive loss by its formula, spot by spot."""
    count = range(len(images))
    similarity = [[(genes[i] * images[j]).sum() / TEMPERATURE for j in count] for i in count]
    targets = [
        slow_softmax([((images[i] * images[j]).sum() + (genes[i] * genes[j]).sum()) / 2 / TEMPERATURE for j in count])
        for i in count
    ]
    by_gene = [slow_softmax(similarity[i]) for i in count]
    by_image = [slow_softmax([similarity[i][j] for i in count]) for j in count]
    terms = []
    for i in count:
        gene_term = -torch.stack([targets[i][j] * by_gene[i][j].log() for j in count]).sum()
        image_term = -torch.stack([targets[j][i] * by_image[i][j].log() for j in count]).sum()
        terms.append((gene_term + image_term) / 2)
    return torch.stack(terms).mean()


def test_loss_and_gradients_are_those_of_the_slow_version():
    model, (features, expression) = _model().double(), _spots(5)
    features, expression = features.double(), expression.double()
    for head in (model.image_head, model.gene_head):
        head.dropout.p = 0.0
        with torch.no_grad():  # else all similarities are far apart, and the softmax says next to nothing of the rest
            head.norm.weight.mul_(0.1)
    parameters = list(model.parameters())
    prediction = model.train()(ModelInputs(target_features=features), expression)
    terms = bleep_loss(prediction, expression)
    images = [slow_head(model.image_head, vector) for vector in features]
    genes = [slow_head(model.gene_head, vector) for vector in expression]
    expected = slow_loss(images, genes)
    assert set(terms) == {"instance", "total"} and torch.equal(terms["instance"], terms["total"])
    torch.testing.assert_close(terms["total"], expected)
    for found, slow in zip(
        torch.autograd.grad(terms["total"], parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert slow.abs().max() > 0
        torch.testing.assert_close(found, slow)


@pytest.mark.parametrize("count", [60, 7])
def test_the_prediction_is_the_weighted_mean_over_the_nearest_spots(count):
    model, (features, expression) = _model(), _spots(count)
    _remember(model, features, expression)
    queries, _ = _spots(9, seed=1)
    with torch.no_grad():
        genes = [slow_head(model.gene_head, vector) for vector in expression]
        genes = [gene / gene.norm() for gene in genes]
        expected = []
        for query in queries:
            image = slow_head(model.image_head, query)
            cosines = [float((image / image.norm() * gene).sum()) for gene in genes]
            nearest = sorted(range(count), key=lambda spot: -cosines[spot])[:NUM_NEAREST]
            weights = [math.exp(cosines[spot] / TEMPERATURE) for spot in nearest]
            total = torch.stack([weight * expression[spot] for weight, spot in zip(weights, nearest)]).sum(dim=0)
            expected.append(total / sum(weights))
    torch.testing.assert_close(_predict(model, queries), torch.stack(expected))


def test_the_checkpoint_holds_the_bank(tmp_path):
    model = _remember(_model(), *_spots())
    queries, _ = _spots(9, seed=1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    for other in (_model(seed=1), _remember(_model(seed=1), *_spots(20, seed=3))):
        load_weights(other, state, tmp_path / "weights.pt")
        assert torch.equal(_predict(other, queries), _predict(model, queries))
    wider = build_model(Model(name="bleep"), Sizes(DIM, DIM, num_genes=GENES + 1, num_neighbors=5))
    with pytest.raises(ValueError, match=r"gene_head.projection.weight is \(256, 6\), the model has \(256, 7\)"):
        load_weights(wider, state, "weights.pt")


def test_other_weights_have_another_bank():
    model, spots = _model(), _spots()
    first = _remember(model, *spots).bank
    with torch.no_grad():
        model.gene_head.hidden.weight.mul_(2)
    second = _remember(model, *spots).bank
    assert not torch.equal(first, second)
    torch.testing.assert_close(second.norm(dim=1), torch.ones(SPOTS))
    assert torch.equal(model.bank_expression, spots[1])


def test_the_order_of_the_training_spots_does_not_matter():
    features, expression = _spots()
    order = torch.randperm(SPOTS, generator=torch.Generator().manual_seed(3))
    queries, _ = _spots(9, seed=1)
    found = _predict(_remember(_model(), features[order], expression[order]), queries)
    torch.testing.assert_close(found, _predict(_remember(_model(), features, expression), queries))


def test_nothing_is_looked_up_in_training_and_no_embedding_is_given_in_evaluation():
    model, (features, expression) = _remember(_model(), *_spots()), _spots(9, seed=1)
    training = model.train()(ModelInputs(target_features=features), expression)
    assert training.fused.isnan().all() and training.embeddings is not None
    with_expression = model.eval()(ModelInputs(target_features=features), expression)
    assert with_expression.embeddings is None
    assert torch.equal(with_expression.fused, _predict(model, features))


def test_a_model_without_a_bank_refuses_to_predict():
    with pytest.raises(ValueError, match="This Bleep baseline has not been fitted"):
        _predict(_model(), _spots()[0])


def test_the_bank_is_of_evaluation_mode():
    features, expression = _spots()
    with pytest.raises(AssertionError, match="evaluation mode"):
        _model().train().remember(ModelInputs(target_features=features), expression)


def test_autocast_and_half_precision_features_change_next_to_nothing():
    spots, queries = _spots(), _spots(9, seed=1)[0]
    model = _remember(_model(), *spots)
    expected = _predict(model, queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_predict(model, queries), expected)
        again = _remember(_model(), *spots)
    assert torch.equal(again.bank, model.bank)
    assert (_predict(model, queries.half()) - expected).abs().max() < 0.01


def test_the_planted_signal_is_found():
    model, (features, expression) = _model(), _spots(200)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        terms = bleep_loss(model.train()(ModelInputs(target_features=features), expression), expression)
        optimizer.zero_grad()
        terms["total"].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(terms["total"].item())
    assert losses[-1] < 0.5 * losses[0]
    queries, truth = _spots(100, seed=1)
    found = _predict(_remember(model, features, expression), queries)
    of_the_mean = (expression.mean(dim=0) - truth).square().mean()
    assert (found - truth).square().mean() < 0.6 * of_the_mean
