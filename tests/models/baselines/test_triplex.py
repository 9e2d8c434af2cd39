"""The TRIPLEX-style baseline: scales, fusion, distillation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.baselines.triplex import CrossAttention, triplex_loss
from models.contract import ModelInputs, Prediction, Sizes
from models.table import MODELS, build_model
from utils.config import Loss, Model

TOKEN_DIM, POOLED_DIM, GENES = 12, 8, 5
CONFIG = Model(
    name="triplex",
    projection_dim=16,
    neighbor_depth=1,
    neighbor_heads=2,
    neighbor_mlp_ratio=1.0,
    neighbor_dropout=0.0,
    global_depth=2,
    global_heads=2,
    global_mlp_ratio=1.0,
    global_dropout=0.0,
    fusion_mlp_dim=24,
    fusion_dropout=0.0,
)
LENGTHS = [7, 5]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few rows: a second thread costs more than it brings, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(**changes):
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIG, **changes)
    return build_model(config, Sizes(feature_dim=POOLED_DIM, token_dim=TOKEN_DIM, num_genes=GENES, num_neighbors=5))


def _batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    is_valid = torch.rand(count, 25, generator=generator) > 0.3
    is_valid[:, 12] = True
    return {
        "target_tokens": torch.randn(count, 4, TOKEN_DIM, generator=generator),
        "target_features": torch.randn(count, POOLED_DIM, generator=generator),
        "neighbor_features": torch.randn(count, 25, POOLED_DIM, generator=generator),
        "neighbor_is_valid": is_valid,
        "expression": torch.randn(count, GENES, generator=generator) + 2,
    }


def _grid() -> torch.Tensor:
    return torch.tensor([(spot % 3, spot // 3) for length in LENGTHS for spot in range(length)])


def _predict(model, batch) -> Prediction:
    return model(_inputs(batch, model.encode_slides(batch["target_features"], _grid(), LENGTHS)), batch["expression"])


def _inputs(batch, global_tokens) -> ModelInputs:
    given = {name: values for name, values in batch.items() if name != "expression"}
    return ModelInputs(**given, global_tokens=global_tokens)


def test_every_scale_and_the_fusion_predict():
    prediction = _predict(_model(), _batch())
    assert set(prediction.scales) == {"target", "neighbor", "global"}
    for values in (prediction.fused, *prediction.scales.values()):
        assert values.shape == (sum(LENGTHS), GENES) and values.dtype == torch.float32
    assert prediction.embeddings is None


def test_the_expression_does_not_reach_the_prediction():
    model, batch = _model().eval(), _batch()
    expected = _predict(model, batch).fused
    assert torch.equal(_predict(model, batch | {"expression": batch["expression"] * 9}).fused, expected)


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({"use_neighbor": False}, {"target", "global"}),
        ({"use_global": False}, {"target", "neighbor"}),
        ({"use_neighbor": False, "use_global": False}, {"target"}),
    ],
)
def test_a_scale_that_is_off_is_neither_read_nor_predicted(changes, scales):
    model, batch = _model(**changes), _batch()
    tokens = model.encode_slides(batch["target_features"], _grid(), LENGTHS) if "global" in scales else None
    prediction = model(_inputs(batch, tokens), batch["expression"])
    assert set(prediction.scales) == scales
    inputs = {"target_tokens": batch["target_tokens"]}
    if "neighbor" in scales:
        inputs |= {name: batch[name] for name in ("neighbor_features", "neighbor_is_valid")}
    assert torch.equal(model(ModelInputs(**inputs, global_tokens=tokens)).fused, prediction.fused)
    terms = triplex_loss(prediction, batch["expression"])
    terms["total"].backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []


def test_the_loss_is_that_of_the_hand():
    generator = torch.Generator().manual_seed(2)
    fused, target, neighbor, global_, truth = (torch.randn(3, 2, generator=generator) for _ in range(5))
    terms = triplex_loss(Prediction(fused, {"target": target, "neighbor": neighbor, "global": global_}), truth)

    def mse(a, b):
        return sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist())) / 6

    expected = mse(fused, truth)
    for name, values in (("target", target), ("neighbor", neighbor), ("global", global_)):
        assert terms[name].item() == pytest.approx(mse(values, truth))
        assert terms[f"{name}_distillation"].item() == pytest.approx(mse(values, fused))
        expected += 0.7 * mse(values, truth) + 0.3 * mse(values, fused)
    assert terms["prediction"].item() == pytest.approx(mse(fused, truth))
    assert terms["total"].item() == pytest.approx(expected)
    assert MODELS["triplex"].loss(Loss()) is triplex_loss


def test_the_teacher_gets_no_gradient_from_its_pupils():
    fused, target = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    truth = torch.randn(3, 2)
    triplex_loss(Prediction(fused, {"target": target}), truth)["total"].backward()
    torch.testing.assert_close(fused.grad, 2 * (fused.detach() - truth) / 6)
    pupil = 0.7 * 2 * (target.detach() - truth) / 6 + 0.3 * 2 * (target.detach() - fused.detach()) / 6
    torch.testing.assert_close(target.grad, pupil)


def test_invalid_neighbors_change_no_prediction():
    model, batch = _model().eval(), _batch()
    disturbed = batch["neighbor_features"].clone()
    disturbed[~batch["neighbor_is_valid"]] += 50
    found, expected = _predict(model, batch | {"neighbor_features": disturbed}), _predict(model, batch)
    torch.testing.assert_close(found.fused, expected.fused)
    torch.testing.assert_close(found.scales["neighbor"], expected.scales["neighbor"])


def test_spots_may_come_in_any_order():
    model, batch = _model().eval(), _batch()
    order = torch.cat([torch.randperm(7, generator=torch.Generator().manual_seed(4)), 7 + torch.randperm(5)])
    shuffled = {name: values[order] for name, values in batch.items()}
    tokens = model.encode_slides(shuffled["target_features"], _grid()[order], LENGTHS)
    found, expected = model(_inputs(shuffled, tokens)), _predict(model, batch)
    torch.testing.assert_close(found.fused, expected.fused[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_cross_attention_is_the_written_formula(heads):
    torch.manual_seed(0)
    layer = CrossAttention(dim=8, heads=heads, dropout=0.0)
    query, tokens = torch.randn(3, 8), torch.randn(3, 5, 8)
    is_valid = torch.tensor([[1, 1, 0, 1, 0]] * 3).bool()
    found = layer(query, tokens, is_valid)
    width = 8 // heads
    for spot in range(3):
        asked = layer.to_query(layer.query_norm(query[spot]))
        keys, values = layer.to_key_value(layer.token_norm(tokens[spot][is_valid[spot]])).chunk(2, dim=-1)
        parts = []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            weights = torch.softmax(keys[:, columns] @ asked[columns] / width**0.5, dim=0)
            parts.append(weights @ values[:, columns])
        torch.testing.assert_close(found[spot], layer.project(torch.cat(parts)))


def test_the_encoders_are_those_of_gene_dml():
    sizes = Sizes(feature_dim=8, token_dim=8, num_genes=GENES, num_neighbors=3)
    reference = build_model(dataclasses.replace(CONFIG, name="gene_dml", neighbor_mlp_ratio=1.4), sizes)
    model = build_model(dataclasses.replace(CONFIG, neighbor_mlp_ratio=1.4), sizes)
    for name in ("neighbor_encoder", "global_encoder"):
        getattr(model, name).load_state_dict(getattr(reference, name).state_dict(), strict=True)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"MODEL.fusion_heads"):
        CrossAttention(dim=8, heads=3, dropout=0.0)


def test_a_tiny_model_overfits_one_batch_with_finite_gradients():
    model, batch = _model(), _batch()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        terms = triplex_loss(_predict(model, batch), batch["expression"])
        optimiser.zero_grad()
        terms["total"].backward()
        if step in (0, 59):
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimiser.step()
        losses.append(terms["prediction"].item())
    assert losses[-1] < 0.02 * losses[0]


def test_half_precision_inputs_and_autocast_stay_finite():
    model, batch = _model().eval(), _batch()
    half = {name: values.half() if values.is_floating_point() else values for name, values in batch.items()}
    expected = _predict(model, batch).fused
    assert (_predict(model, half).fused - expected).abs().max() < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _predict(model, half).fused
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.2
