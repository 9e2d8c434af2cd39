"""Baselines behind the interface of the loop: what they learn, what they may not see, how they are saved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import NearestNeighbors

from models.baselines.fitted import NUM_COMPONENTS
from models.baselines.fitted_model import neighbor_mean
from models.contract import ModelInputs, Needs, Sizes
from models.losses import fused_loss
from models.table import MODELS, build_model, find_model
from utils.config import Loss, Model

DIM, GENES, SPOTS = 20, 6, 120
PATIENTS = ["A"] * 30 + ["B"] * 50 + ["C"] * 40
CLOSED_FORM = ("mean", "ridge", "ridge_neighbor", "knn")
SIZES = Sizes(feature_dim=DIM, token_dim=DIM, num_genes=GENES, num_neighbors=5)
SMALL = Model(
    projection_dim=16,
    neighbor_depth=1,
    neighbor_heads=2,
    neighbor_mlp_ratio=1.0,
    global_depth=2,
    global_heads=2,
    global_mlp_ratio=1.0,
    fusion_mlp_dim=16,
    predictor_dim=24,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few rows: a second thread costs more than it brings, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _build(name: str, **changes):
    torch.manual_seed(0)
    return build_model(dataclasses.replace(SMALL, name=name, **changes), SIZES)


def _planted(seed: int = 0, noise: float = 0.3) -> dict[str, torch.Tensor]:
    """Spots whose expression is linear in the target feature and in the mean of the valid neighbors."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(2, 0.5, DIM)
    target = torch.randn(SPOTS, DIM, generator=generator) * spread + 1
    neighbors = torch.randn(SPOTS, 25, DIM, generator=generator) * spread * 3
    is_valid = torch.rand(SPOTS, 25, generator=generator) > 0.3
    is_valid[:, 12] = True
    weights = torch.Generator().manual_seed(99)
    own, around = (torch.randn(DIM, GENES, generator=weights) * 0.4 for _ in range(2))
    context = (neighbors * is_valid[..., None]).sum(dim=1) / is_valid.sum(dim=1, keepdim=True)
    error = torch.randn(SPOTS, GENES, generator=generator) * noise
    return {
        "target_features": target,
        "neighbor_features": neighbors,
        "neighbor_is_valid": is_valid,
        "expression": target @ own + context @ around + error + 3,
    }


def _inputs(data: dict[str, torch.Tensor], rows=slice(None)) -> ModelInputs:
    return ModelInputs(**{name: values[rows] for name, values in data.items() if name != "expression"})


def _fit(model, data, patients=PATIENTS, slides=None):
    return model.fit(_inputs(data), data["expression"], patients=patients, slides=slides)


def _error(model, data) -> float:
    return (model(_inputs(data)).fused - data["expression"]).square().mean().item()


def _fitted(name: str, data=None, patients=PATIENTS):
    model = _build(name)
    report = _fit(model, data or _planted(), patients)
    return model, report


def test_mean_predicts_the_training_mean_for_every_spot():
    data = _planted()
    model, report = _fitted("mean", data)
    found = model(_inputs(_planted(1), slice(0, 7))).fused
    torch.testing.assert_close(found, data["expression"].mean(dim=0).expand(7, -1))
    assert report["num_training_spots"] == SPOTS


def test_ridge_is_scikit_learns_at_the_alpha_it_reports():
    data, new = _planted(), _planted(1)
    model, report = _fitted("ridge", data)
    train, test = data["target_features"].double().numpy(), new["target_features"].double().numpy()
    pca = PCA(report["num_components"], svd_solver="full").fit(train)
    expected = SklearnRidge(alpha=report["alpha"]).fit(pca.transform(train), data["expression"].double().numpy())
    np.testing.assert_allclose(model(_inputs(new)).fused, expected.predict(pca.transform(test)), rtol=1e-4, atol=1e-5)
    assert model.alpha.item() == report["alpha"]
    assert report["num_components"] == min(NUM_COMPONENTS, DIM)


def test_ridge_takes_the_alpha_of_the_least_error_over_left_out_patients():
    data = _planted()
    _, report = _fitted("ridge", data)
    features, expression = data["target_features"].double().numpy(), data["expression"].double().numpy()
    patients, errors = np.array(PATIENTS), []
    for alpha in report["grid"]:
        per_patient = []
        for patient in "ABC":
            train, test = patients != patient, patients == patient
            pca = PCA(svd_solver="full").fit(features[train])
            fitted = SklearnRidge(alpha=alpha).fit(pca.transform(features[train]), expression[train])
            per_patient.append(((fitted.predict(pca.transform(features[test])) - expression[test]) ** 2).mean())
        errors.append(np.mean(per_patient))
    assert report["alpha"] == report["grid"][int(np.argmin(errors))]
    np.testing.assert_allclose(report["inner_mse"], errors, rtol=1e-6)
    assert report["held_out"] == "patient" and report["num_inner_folds"] == 3
    assert min(errors) < errors[0] and min(errors) < errors[-1], "the planted case must have an inner optimum"


def test_knn_is_scikit_learns_at_the_k_it_reports():
    data, new = _planted(), _planted(1)
    model, report = _fitted("knn", data)
    pca = PCA(report["num_components"], svd_solver="full").fit(data["target_features"].double())
    search = NearestNeighbors(n_neighbors=report["num_nearest"], metric="cosine")
    search.fit(pca.transform(data["target_features"].double()))
    distance, nearest = search.kneighbors(pca.transform(new["target_features"].double()))
    weights = np.exp((1 - distance) / model.temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("bk,bkg->bg", weights, data["expression"].numpy()[nearest])
    np.testing.assert_allclose(model(_inputs(new)).fused, expected, rtol=1e-3, atol=1e-4)
    assert report["num_nearest"] == report["grid"][int(np.argmin(report["inner_mse"]))]


def test_knn_never_asks_for_more_spots_than_an_inner_fold_holds():
    data = {name: values[:9] for name, values in _planted().items()}
    _, report = _fitted("knn", data, ["A"] * 6 + ["B"] * 3)
    assert report["grid"] == [1, 2]


def test_a_planted_signal_is_found_and_the_neighbors_help():
    data, new = _planted(), _planted(1)
    errors = {name: _error(_fitted(name, data)[0], new) for name in CLOSED_FORM}
    assert errors["knn"] < errors["mean"]
    assert errors["ridge"] < 0.6 * errors["mean"]
    assert errors["ridge_neighbor"] < 0.3 * errors["ridge"]


def test_noise_alone_is_not_taken_for_signal():
    data = _planted()
    generator = torch.Generator().manual_seed(5)
    data["expression"] = torch.randn(SPOTS, GENES, generator=generator) + 3
    new = _planted(1) | {"expression": torch.randn(SPOTS, GENES, generator=generator) + 3}
    ridge, report = _fitted("ridge", data)
    assert _error(ridge, new) < 1.05 * _error(_fitted("mean", data)[0], new)
    assert report["alpha"] > np.median(report["grid"])


@pytest.mark.parametrize("name", ["ridge", "knn"])
def test_inner_folds_never_mix_a_patient(name):
    """Each patient's spots come twice: if copies fell on both sides of a split, memorising would look perfect."""
    data = _planted()
    generator = torch.Generator().manual_seed(5)
    half = {key: values[: SPOTS // 2] for key, values in data.items()}
    half["expression"] = torch.randn(SPOTS // 2, GENES, generator=generator)
    doubled = {key: torch.cat([values, values]) for key, values in half.items()}
    patients = [str(row % 4) for row in range(SPOTS // 2)] * 2
    _, report = _fitted(name, doubled, patients)
    variance = half["expression"].var().item()
    assert min(report["inner_mse"]) > 0.8 * variance
    _, leaking = _fitted(name, doubled, list(range(SPOTS // 2)) + list(range(1000, 1000 + SPOTS // 2)))
    assert min(leaking["inner_mse"]) < min(report["inner_mse"]) - 0.05 * variance


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_the_order_of_the_spots_does_not_matter(name):
    data, new = _planted(), _planted(1)
    order = torch.randperm(SPOTS, generator=torch.Generator().manual_seed(3))
    shuffled = {key: values[order] for key, values in data.items()}
    model, report = _fitted(name, data)
    other, other_report = _fitted(name, shuffled, [PATIENTS[row] for row in order])
    torch.testing.assert_close(other(_inputs(new)).fused, model(_inputs(new)).fused, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(_inputs(new, order)).fused, model(_inputs(new)).fused[order])
    for key in ("alpha", "num_nearest"):
        assert other_report.get(key) == pytest.approx(report.get(key))


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_a_checkpoint_loads_strictly_into_an_unfitted_model(name, tmp_path):
    model, report = _fitted(name)
    torch.save({"model": model.state_dict(), "report": report}, tmp_path / "best.pt")
    loaded = torch.load(tmp_path / "best.pt", weights_only=True)
    fresh = _build(name)
    fresh.load_state_dict(loaded["model"], strict=True)
    new = _inputs(_planted(1))
    assert torch.equal(fresh(new).fused, model(new).fused)
    assert loaded["report"] == report
    refit = _fitted(name, {key: values[10:90] for key, values in _planted(2).items()}, PATIENTS[10:90])[0]
    refit.load_state_dict(loaded["model"])
    assert torch.equal(refit(new).fused, model(new).fused)


def test_a_checkpoint_of_other_sizes_or_keys_is_refused():
    state = _fitted("knn")[0].state_dict()
    other = build_model(dataclasses.replace(SMALL, name="knn"), dataclasses.replace(SIZES, feature_dim=DIM + 1))
    with pytest.raises(RuntimeError, match="size mismatch for feature_mean"):
        other.load_state_dict(state)
    del state["bank"]
    with pytest.raises(RuntimeError, match=r"Missing key.*bank"):
        _build("knn").load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        _build("ridge").load_state_dict(_fitted("knn")[0].state_dict())


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_prediction_in_pieces_is_that_of_the_whole(name):
    model, _ = _fitted(name)
    new = _planted(1)
    pieces = [model(_inputs(new, slice(start, start + 17))).fused for start in range(0, SPOTS, 17)]
    torch.testing.assert_close(torch.cat(pieces), model(_inputs(new)).fused)


@pytest.mark.parametrize("name", ["ridge_neighbor", "knn"])
def test_half_precision_features_and_autocast_change_next_to_nothing(name):
    data, new = _planted(), _planted(1)
    model, _ = _fitted(name, data)
    expected = model(_inputs(new)).fused
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(_inputs(new)).fused, expected)
    half = {key: values.half() if values.is_floating_point() else values for key, values in new.items()}
    found = model(_inputs(half)).fused
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.std()


def test_arrays_are_as_good_as_tensors():
    data = _planted()
    model, _ = _fitted("ridge_neighbor", data)
    arrays = {key: values.numpy() for key, values in data.items()}
    other, _ = _fitted("ridge_neighbor", arrays, np.array(PATIENTS))
    assert torch.equal(other.weight, model.weight)
    numbered, _ = _fitted("ridge_neighbor", data, torch.tensor([ord(patient) for patient in PATIENTS]))
    assert torch.equal(numbered.weight, model.weight)


def test_neighbor_mean_leaves_out_invalid_tiles_whatever_they_hold(monkeypatch):
    data = _planted()
    features, is_valid = data["neighbor_features"].clone(), data["neighbor_is_valid"].clone()
    is_valid[4] = False
    features[~is_valid] = float("nan")
    expected = torch.stack(
        [part[kept].mean(dim=0) if kept.any() else torch.zeros(DIM) for part, kept in zip(features, is_valid)]
    )
    torch.testing.assert_close(neighbor_mean(features, is_valid), expected)
    monkeypatch.setattr("models.baselines.fitted_model.MEMORY_BUDGET", 7 * 25 * DIM)
    torch.testing.assert_close(neighbor_mean(features, is_valid), expected)
    assert neighbor_mean(features[:0], is_valid[:0]).shape == (0, DIM)


def test_one_training_patient_is_said_aloud():
    _, report = _fitted("ridge", patients=["A"] * SPOTS)
    assert any("Only one training patient (A)" in note for note in report["notes"])
    model = _build("ridge")
    report = _fit(model, _planted(), ["A"] * SPOTS, ["A1"] * 70 + ["A2"] * 50)
    assert report["held_out"] == "slide" and report["num_inner_folds"] == 2


def test_equal_features_give_the_training_mean():
    data = _planted() | {"target_features": torch.ones(SPOTS, DIM)}
    for name in ("ridge", "knn"):
        model, report = _fitted(name, data)
        assert report["num_components"] == 0
        assert model(_inputs(_planted(1))).fused.isfinite().all()
    found = _fitted("ridge", data)[0](_inputs(_planted(1))).fused
    torch.testing.assert_close(found, data["expression"].mean(dim=0).expand_as(found))


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_parts_of_the_spots_are_fitted_as_all_of_them(name):
    data, whole, parted = _planted(), _build(name), _build(name)
    _fit(whole, data)
    parts = (_inputs(data, rows) for rows in (slice(0, 50), slice(50, 51), slice(51, None)))
    parted.fit(parts, data["expression"], patients=PATIENTS)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, parted.state_dict()[key]), key


def test_bad_training_data_are_named_all_at_once():
    data = _planted()
    data["expression"][3, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"1 rows of expression.*not finite.*120 features, 120 expression, 119 patients"
    ):
        _fit(_build("ridge"), data, PATIENTS[1:])
    with pytest.raises(ValueError, match=r"shape \(120, 20\), expected \(spots, 21\)"):
        wider = dataclasses.replace(SIZES, feature_dim=DIM + 1)
        _fit(build_model(dataclasses.replace(SMALL, name="ridge"), wider), _planted())
    with pytest.raises(ValueError, match=r"needs neighbor_features.*use ridge"):
        alone = ModelInputs(target_features=data["target_features"])
        _build("ridge_neighbor").fit(alone, data["expression"], patients=PATIENTS)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_an_unfitted_model_refuses_to_predict(name):
    with pytest.raises(ValueError, match=r"has not been fitted. Call fit\(\)"):
        _build(name)(_inputs(_planted()))


def test_flags_tell_the_loop_what_a_model_reads():
    expected = {
        "mean": (False, False, False, True),
        "ridge": (False, False, False, True),
        "ridge_neighbor": (False, True, False, True),
        "knn": (False, False, False, True),
        "linear_probe": (False, False, False, False),
        "mlp": (False, False, False, False),
        "bleep": (False, False, False, False),
        "triplex": (True, True, True, False),
        "gene_dml": (True, True, True, False),
    }
    for name, row in MODELS.items():
        model = _build(name)
        flags = (model.needs.tokens, model.needs.neighbors, model.needs.slides, row.loss is None)
        assert flags == expected[name], name
        assert (row.loss is None) == (not list(model.parameters()))
        assert row.loss is None or callable(row.loss(Loss()))
        assert row.needs(dataclasses.replace(SMALL, name=name)) == model.needs
    alone = _build("triplex", use_neighbor=False, use_global=False)
    assert alone.needs == Needs(tokens=True)


@pytest.mark.parametrize("name", ["linear_probe", "mlp"])
def test_trained_probes_learn_the_planted_signal(name):
    data = _planted(noise=0.0)
    model, loss = _build(name, predictor_dropout=0.0), MODELS[name].loss(Loss())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        terms = loss(model(ModelInputs(target_features=data["target_features"].half())), data["expression"])
        assert set(terms) == {"prediction", "total"}
        optimiser.zero_grad()
        terms["total"].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimiser.step()
    assert terms["total"] < 0.6 * data["expression"].var(dim=0).mean()


def test_prediction_loss_is_the_mean_square():
    model, _ = _fitted("mean")
    data = _planted(1)
    prediction = model(_inputs(data))
    terms = fused_loss(prediction, data["expression"])
    expected = ((prediction.fused - data["expression"]) ** 2).sum() / (SPOTS * GENES)
    torch.testing.assert_close(terms["prediction"], expected)
    assert torch.equal(terms["total"], terms["prediction"])


def test_pooled_width_may_differ_from_the_width_of_tokens():
    for name in ("mean", "ridge", "ridge_neighbor", "knn"):
        model = build_model(dataclasses.replace(SMALL, name=name), dataclasses.replace(SIZES, token_dim=7))
        _fit(model, _planted())
        assert model(_inputs(_planted(1))).fused.shape == (SPOTS, GENES)


def test_wrong_names_and_contradictions_are_refused():
    with pytest.raises(
        ValueError, match=r"Unknown model 'triplx'. Did you mean 'triplex'\? Known: gene_dml, mean, ridge"
    ):
        find_model("triplx")
    with pytest.raises(ValueError, match=r"Unknown model 'forest'\. Known: gene_dml.*MODEL.name"):
        _build("forest")
    with pytest.raises(ValueError, match="use --model ridge"):
        _build("ridge_neighbor", use_neighbor=False)
