"""The mathematics of the closed-form baselines against scikit-learn and against slow, obvious loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from models.baselines import closed_form


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few rows: a second thread costs more than it brings, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _spots(count: int = 90, dim: int = 12, genes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.3, dim, dtype=torch.float64)
    features = torch.randn(count, dim, generator=generator, dtype=torch.float64) * spread + 2
    weight = torch.randn(dim, genes, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, genes, generator=generator, dtype=torch.float64)
    return features, features @ weight * 0.3 + noise + 1


def _sklearn_ridge(train_x, train_y, test_x, *, components: int, alpha: float) -> np.ndarray:
    pca = PCA(components, svd_solver="full").fit(train_x)
    model = Ridge(alpha=alpha, solver="svd").fit(pca.transform(train_x), train_y)
    return model.predict(pca.transform(test_x))


def test_inner_folds_hold_out_whole_patients_and_cover_every_spot_once():
    patients = ["B", "A", "C", "A", "B", "B", "C"]
    folds = closed_form.inner_folds(patients)
    assert folds.unit == "patient" and folds.note is None
    assert [rows.tolist() for rows in folds.held_out] == [[1, 3], [0, 4, 5], [2, 6]]
    for rows in folds.held_out:
        kept = closed_form.complement(rows, len(patients))
        assert {patients[row] for row in rows}.isdisjoint({patients[row] for row in kept})
        assert sorted([*rows.tolist(), *kept.tolist()]) == list(range(len(patients)))


def test_one_patient_is_split_by_slide_and_it_is_said():
    folds = closed_form.inner_folds(["P2"] * 5, ["s1", "s2", "s1", "s3", "s2"])
    assert folds.unit == "slide"
    assert "Only one training patient (P2)" in folds.note and "3 slides" in folds.note
    assert [rows.tolist() for rows in folds.held_out] == [[0, 2], [1, 4], [3]]


def test_one_slide_is_split_in_contiguous_blocks_and_it_is_said():
    folds = closed_form.inner_folds(["P2"] * 12)
    assert folds.unit == "block" and "contiguous blocks" in folds.note
    assert torch.cat(folds.held_out).tolist() == list(range(12))
    assert all((rows.diff() == 1).all() for rows in folds.held_out)
    assert [rows.tolist() for rows in closed_form.inner_folds(["P2"] * 2).held_out] == [[0], [1]]


def test_one_spot_cannot_be_tuned():
    with pytest.raises(ValueError, match=r"at least 2 training spots, found 1.*--model mean"):
        closed_form.inner_folds(["A"])


def test_moments_without_a_part_are_the_moments_of_the_rest():
    features, expression = _spots()
    total = closed_form.moments(features, expression)
    part = closed_form.moments(features[20:50], expression[20:50])
    rest_rows = closed_form.complement(torch.arange(20, 50), len(features))
    rest = closed_form.moments(features[rest_rows], expression[rest_rows])
    found = total.without(part)
    assert found.count == rest.count
    for name in ("features", "expression", "squares", "products"):
        torch.testing.assert_close(getattr(found, name), getattr(rest, name))


def test_components_are_those_of_scikit_learn():
    features, expression = _spots()
    components = closed_form.principal_components(closed_form.moments(features, expression), 6)
    expected = PCA(6, svd_solver="full").fit(features.numpy())
    np.testing.assert_allclose(components.squares, expected.singular_values_**2, rtol=1e-9)
    cosine = (components.directions.T.numpy() * expected.components_).sum(axis=1)
    np.testing.assert_allclose(np.abs(cosine), 1, rtol=1e-9)
    np.testing.assert_allclose(components.mean, expected.mean_)


@pytest.mark.parametrize(("count", "dim", "rank", "expected"), [(40, 12, 12, 12), (7, 12, 12, 6), (40, 12, 3, 3)])
def test_components_are_fewer_when_rows_or_directions_are_fewer(count, dim, rank, expected):
    features, expression = _spots(count, dim)
    centred = features - features.mean(dim=0)
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    features = left[:, :rank] * values[:rank] @ right[:rank] + 5
    components = closed_form.principal_components(closed_form.moments(features, expression), 256)
    assert len(components.squares) == components.directions.shape[1] == expected


def test_equal_spots_have_no_component():
    features, expression = torch.full((6, 4), 3.0, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    components = closed_form.principal_components(closed_form.moments(features, expression), 256)
    assert components.directions.shape == (4, 0)


@pytest.mark.parametrize("alpha", [1e-3, 10.0, 1e4])
def test_ridge_is_scikit_learns_at_the_same_penalty(alpha):
    features, expression = _spots()
    train, test = slice(0, 60), slice(60, None)
    sums = closed_form.moments(features[train], expression[train])
    components = closed_form.principal_components(sums, 7)
    coefficients = closed_form.ridge_coefficients(sums, components, alpha)
    found = expression[train].mean(dim=0) + components.scores(features[test]) @ coefficients
    expected = _sklearn_ridge(features[train], expression[train], features[test], components=7, alpha=alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_inner_errors_of_ridge_are_those_of_a_naive_loop():
    features, expression = _spots()
    patients = np.array(["A"] * 20 + ["B"] * 45 + ["C"] * 25)
    alphas = [0.1, 5.0, 300.0]
    found = closed_form.ridge_inner_errors(
        features,
        expression,
        closed_form.inner_folds(patients.tolist()),
        closed_form.moments(features, expression),
        6,
        alphas,
    )
    for row, patient in enumerate("ABC"):
        train, test = patients != patient, patients == patient
        for column, alpha in enumerate(alphas):
            predicted = _sklearn_ridge(features[train], expression[train], features[test], components=6, alpha=alpha)
            error = ((predicted - expression[test].numpy()) ** 2).mean()
            assert found[row, column].item() == pytest.approx(error, rel=1e-8)


def test_the_grid_follows_the_scale_of_the_features():
    features, expression = _spots()
    small = closed_form.principal_components(closed_form.moments(features, expression), 6)
    large = closed_form.principal_components(closed_form.moments(features * 10, expression), 6)
    assert closed_form.alpha_grid(large, [1.0]) == pytest.approx([100 * closed_form.alpha_grid(small, [1.0])[0]])


@pytest.mark.parametrize("budget", [1, 400, 2**24])
def test_retrieval_is_that_of_scikit_learn_for_every_chunk_size(budget):
    features, expression = _spots()
    bank, queries = closed_form.unit(features[:60]), closed_form.unit(features[60:])
    found = closed_form.retrieve(queries, bank, expression[:60], [1, 4, 60], 0.2, budget)
    for count, prediction in zip([1, 4, 60], found):
        search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(bank)
        distance, nearest = search.kneighbors(queries)
        weights = np.exp((1 - distance) / 0.2)
        expected = np.einsum("bk,bkg->bg", weights, expression.numpy()[nearest]) / weights.sum(axis=1)[:, None]
        np.testing.assert_allclose(prediction, expected, rtol=1e-7)


def test_retrieval_of_no_spots_is_empty():
    features, expression = _spots()
    (found,) = closed_form.retrieve(closed_form.unit(features[:0]), features, expression, [3], 0.1, 100)
    assert found.shape == (0, 5)


def test_retrieval_survives_a_very_low_temperature():
    features, expression = _spots()
    bank = closed_form.unit(features).float()
    (found,) = closed_form.retrieve(bank[:9], bank, expression.float(), [20], 1e-4, 2**20)
    torch.testing.assert_close(found, expression[:9].float(), rtol=1e-3, atol=1e-3)


def test_inner_errors_of_retrieval_are_those_of_a_naive_loop():
    features, expression = _spots()
    patients = np.array(["A"] * 30 + ["B"] * 35 + ["C"] * 25)
    total = closed_form.moments(features, expression)
    found = closed_form.retrieval_inner_errors(
        features, expression, closed_form.inner_folds(patients.tolist()), total, 4, [1, 10], 0.1, 500
    )
    for row, patient in enumerate("ABC"):
        train, test = patients != patient, patients == patient
        pca = PCA(4, svd_solver="full").fit(features[train])
        for column, count in enumerate([1, 10]):
            search = NearestNeighbors(n_neighbors=count, metric="cosine").fit(pca.transform(features[train]))
            distance, nearest = search.kneighbors(pca.transform(features[test]))
            weights = np.exp((1 - distance) / 0.1)
            weights /= weights.sum(axis=1, keepdims=True)
            predicted = np.einsum("bk,bkg->bg", weights, expression[train].numpy()[nearest])
            error = ((predicted - expression[test].numpy()) ** 2).mean()
            assert found[row, column].item() == pytest.approx(error, rel=1e-5)
