"""Every metric against scipy or scikit-learn, against a naive loop, and at the edges of what is defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import sklearn.metrics

from evaluation import metrics


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    measured = generator.gamma(2.0, size=(40, 7))
    predicted = 0.5 * measured + generator.normal(size=(40, 7)) + 0.3
    # Ties, as zeros in counts make them.
    measured[:, 1] = np.round(measured[:, 1])
    predicted[:, 1] = np.round(predicted[:, 1])
    return measured, predicted


LIBRARY = {
    "pearson": lambda y, p: scipy.stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: scipy.stats.spearmanr(y, p).statistic,
    "mse": sklearn.metrics.mean_squared_error,
    "mae": sklearn.metrics.mean_absolute_error,
    "r2": sklearn.metrics.r2_score,
    "explained_variance": sklearn.metrics.explained_variance_score,
}


@pytest.mark.parametrize("name", LIBRARY)
def test_equals_library(name, arrays):
    measured, predicted = arrays
    expected = [LIBRARY[name](measured[:, g], predicted[:, g]) for g in range(measured.shape[1])]
    np.testing.assert_allclose(metrics.METRICS[name](measured, predicted), expected, rtol=1e-12)


def _mean(values):
    return sum(values) / len(values)


def _variance(values):
    mean = _mean(values)
    return _mean([(value - mean) ** 2 for value in values])


def _naive_pearson(y, p):
    my, mp = _mean(y), _mean(p)
    covariance = _mean([(a - my) * (b - mp) for a, b in zip(y, p)])
    return covariance / math.sqrt(_variance(y) * _variance(p))


def _naive_ranks(values):
    """Number of smaller values plus the middle of the equal ones."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def _naive_ccc(y, p):
    my, mp = _mean(y), _mean(p)
    covariance = _mean([(a - my) * (b - mp) for a, b in zip(y, p)])
    return 2 * covariance / (_variance(y) + _variance(p) + (my - mp) ** 2)


NAIVE = {
    "pearson": _naive_pearson,
    "spearman": lambda y, p: _naive_pearson(_naive_ranks(y), _naive_ranks(p)),
    "mse": lambda y, p: _mean([(a - b) ** 2 for a, b in zip(y, p)]),
    "mse_centered": lambda y, p: _variance([a - b for a, b in zip(y, p)]),
    "mae": lambda y, p: _mean([abs(a - b) for a, b in zip(y, p)]),
    "ccc": _naive_ccc,
    "r2": lambda y, p: 1 - _mean([(a - b) ** 2 for a, b in zip(y, p)]) / _variance(y),
    "explained_variance": lambda y, p: 1 - _variance([a - b for a, b in zip(y, p)]) / _variance(y),
    "rvd": lambda y, p: (_variance(p) - _variance(y)) ** 2 / _variance(y) ** 2,
}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_equals_naive(name, arrays):
    measured, predicted = arrays
    expected = [NAIVE[name](measured[:, g].tolist(), predicted[:, g].tolist()) for g in range(measured.shape[1])]
    np.testing.assert_allclose(metrics.METRICS[name](measured, predicted), expected, rtol=1e-10)


def test_by_hand():
    measured, predicted = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[2.0], [2.0], [4.0], [4.0]])
    # means 2.5, 3; variances 1.25, 1; covariance (1.5 + .5 + .5 + 1.5)/4 = 1
    assert metrics.pearson(measured, predicted)[0] == pytest.approx(1 / math.sqrt(1.25))
    # ranks 1 2 3 4 and 1.5 1.5 3.5 3.5: the same geometry
    assert metrics.spearman(measured, predicted)[0] == pytest.approx(1 / math.sqrt(1.25))
    assert metrics.mse(measured, predicted)[0] == 0.5
    assert metrics.mse_centered(measured, predicted)[0] == 0.25  # errors 1, 0, 1, 0
    assert metrics.mae(measured, predicted)[0] == 0.5
    assert metrics.ccc(measured, predicted)[0] == pytest.approx(2 / (1.25 + 1 + 0.25))
    assert metrics.r2(measured, predicted)[0] == pytest.approx(1 - 0.5 / 1.25)
    assert metrics.explained_variance(measured, predicted)[0] == pytest.approx(1 - 0.25 / 1.25)
    assert metrics.rvd(measured, predicted)[0] == pytest.approx(0.0625 / 1.5625)


def test_float32_is_calculated_in_float64(arrays):
    # An offset of 1e4 leaves float32 moments with no correct digit.
    measured, predicted = (values.astype(np.float32) + np.float32(1e4) for values in arrays)
    exact = [scipy.stats.pearsonr(measured[:, g].astype(float), predicted[:, g].astype(float))[0] for g in range(7)]
    result = metrics.pearson(measured, predicted)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, exact, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_genes(arrays, dtype):
    measured, predicted = (values.astype(dtype) for values in arrays)
    measured[:, 0] = 0.1
    predicted[:, 2] = 0.1
    # One rounding unit of noise is still a constant.
    measured[::2, 3] = 0.7
    measured[1::2, 3] = np.nextafter(dtype(0.7), dtype(1))
    for name in ("pearson", "spearman"):
        assert np.isnan(metrics.METRICS[name](measured, predicted)).tolist() == [1, 0, 1, 1, 0, 0, 0]
    for name in ("ccc", "r2", "explained_variance", "rvd"):
        assert np.isnan(metrics.METRICS[name](measured, predicted)).tolist() == [1, 0, 0, 1, 0, 0, 0]
    for name in ("mse", "mae"):
        assert np.isfinite(metrics.METRICS[name](measured, predicted)).all()
    # What a constant prediction of a varying gene scores.
    assert metrics.ccc(measured, predicted)[2] == pytest.approx(0, abs=1e-7)
    assert metrics.rvd(measured, predicted)[2] == pytest.approx(1)
    assert metrics.r2(measured, predicted)[2] < 0


def test_tiny_variance_is_not_constant():
    generator = np.random.default_rng(1)
    measured, predicted = generator.normal(size=(2, 30, 1)) * 1e-100
    expected = scipy.stats.pearsonr(measured[:, 0] * 1e100, predicted[:, 0] * 1e100).statistic
    assert metrics.pearson(measured, predicted)[0] == pytest.approx(expected)


def test_single_spot():
    measured, predicted = np.array([[1.0, 2.0]]), np.array([[1.5, 2.0]])
    scores = metrics.per_gene_metrics(measured, predicted, metrics.spot_windows(np.array([[3, 4]])))
    assert scores["mse"].tolist() == [0.25, 0.0]
    assert scores["mae"].tolist() == [0.5, 0.0]
    for name in set(metrics.METRIC_NAMES) - {"mse", "mae"}:
        assert np.isnan(scores[name]).all(), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_undo_their_gene_only(arrays, bad, side):
    grid = np.stack(np.unravel_index(np.arange(40), (8, 5)), axis=1)
    windows = metrics.spot_windows(grid)
    clean = metrics.per_gene_metrics(*arrays, windows)
    arrays[side][5, 4] = bad
    scores = metrics.per_gene_metrics(*arrays, windows)
    others = [0, 1, 2, 3, 5, 6]
    for name in metrics.METRIC_NAMES:
        assert np.isnan(scores[name][4]), name
        np.testing.assert_array_equal(scores[name][others], clean[name][others])
    assert np.isfinite(arrays[1 - side]).all()  # the input is not written to


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"measured has shape \(3, 2\) and predicted \(2, 2\)"):
        metrics.mse(np.zeros((3, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least one spot"):
        metrics.pearson(np.zeros((0, 2)), np.zeros((0, 2)))


def test_mean_defined():
    assert metrics.mean_defined(np.array([1.0, np.nan, 3.0])) == 2.0
    assert math.isnan(metrics.mean_defined(np.array([np.nan, np.nan])))


# --- SSIM ---


def _naive_ssim(measured, predicted, grid_xy, window):
    """One gene: a dense map with NaN where there is no spot, and a loop over the window of every spot."""
    radius = 5 if window == "gaussian" else 3
    x, y = (grid_xy - grid_xy.min(axis=0) + radius).T
    maps = np.full((2, x.max() + radius + 1, y.max() + radius + 1), np.nan)
    maps[0, x, y], maps[1, x, y] = measured, predicted
    c1, c2 = (0.01 * np.ptp(measured)) ** 2, (0.03 * np.ptp(measured)) ** 2
    total = 0.0
    for i, j in zip(x, y):
        weight, left, right = [], [], []
        for di in range(-radius, radius + 1):
            for dj in range(-radius, radius + 1):
                if np.isnan(maps[0, i + di, j + dj]):
                    continue
                weight.append(math.exp(-(di * di + dj * dj) / 4.5) if window == "gaussian" else 1.0)
                left.append(maps[0, i + di, j + dj])
                right.append(maps[1, i + di, j + dj])
        weight, left, right = np.array(weight) / sum(weight), np.array(left), np.array(right)
        ml, mr = weight @ left, weight @ right
        vl, vr, c = weight @ (left - ml) ** 2, weight @ (right - mr) ** 2, weight @ ((left - ml) * (right - mr))
        total += (2 * ml * mr + c1) * (2 * c + c2) / ((ml**2 + mr**2 + c1) * (vl + vr + c2))
    return total / len(x)


@pytest.fixture
def tissue():
    """A ragged piece of a grid, in any order, away from the origin."""
    generator = np.random.default_rng(3)
    cells = np.stack(np.unravel_index(np.arange(14 * 9), (14, 9)), axis=1)
    grid = generator.permutation(cells)[:80] + np.array([-4, 17])
    measured = generator.gamma(2.0, size=(80, 3))
    return measured, 0.6 * measured + 0.4 * generator.gamma(2.0, size=(80, 3)), grid


@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_ssim_equals_naive_map_with_missing_cells(tissue, window):
    measured, predicted, grid = tissue
    expected = [_naive_ssim(measured[:, g], predicted[:, g], grid, window) for g in range(3)]
    np.testing.assert_allclose(metrics.ssim(measured, predicted, grid, window=window), expected, rtol=1e-9)


def test_ssim_of_equal_maps_is_one_and_shifts_and_order_do_not_matter(tissue):
    measured, predicted, grid = tissue
    np.testing.assert_allclose(metrics.ssim(measured, measured, grid), 1.0)
    reference = metrics.ssim(measured, predicted, grid)
    assert np.all(reference < 0.95)
    order = np.random.default_rng(5).permutation(len(grid))
    shifted = metrics.ssim(measured[order], predicted[order], grid[order] + np.array([1000, -7]))
    np.testing.assert_allclose(shifted, reference, rtol=1e-12)


def test_window_is_the_usual_one_away_from_the_border():
    image = np.random.default_rng(4).random((31, 29))
    x, y = (part.ravel() for part in np.indices(image.shape))
    grid = np.stack([x, y], axis=1)
    usual = {
        "gaussian": scipy.ndimage.gaussian_filter(image, sigma=1.5, truncate=3.5),  # 11 x 11, as Wang et al.
        "uniform": scipy.ndimage.uniform_filter(image, size=7),
    }
    for window, filtered in usual.items():
        ours = (metrics.spot_windows(grid, window=window) @ image.ravel()).reshape(image.shape)
        np.testing.assert_allclose(ours[5:-5, 5:-5], filtered[5:-5, 5:-5], rtol=1e-12)


def test_ssim_does_not_see_the_hole_between_spots():
    """A checkerboard of spots (hexagonal array) with equal maps everywhere: no zero is filled in between."""
    x, y = (part.ravel() for part in np.indices((12, 12)))
    keep = (x + y) % 2 == 0
    grid = np.stack([x, y], axis=1)[keep]
    smooth = np.sin(grid[:, :1] / 3.0) + 2
    offset = metrics.ssim(smooth, smooth + 1e-9, grid)
    assert offset[0] == pytest.approx(1.0, abs=1e-6)
    windows = metrics.spot_windows(grid)
    np.testing.assert_allclose(windows.sum(axis=1), 1.0)
    # A spot in the middle sees the 61 cells of its colour among 121.
    middle = np.flatnonzero((grid == [6, 6]).all(axis=1))[0]
    assert windows[[middle]].nnz == 61


def test_ssim_refuses_grids_that_are_none():
    with pytest.raises(ValueError, match=r"two spots share the grid position \(x, y\) = \(1, 2\)"):
        metrics.spot_windows(np.array([[1, 2], [0, 0], [1, 2]]))
    with pytest.raises(ValueError, match=r"must be .N, 2. integers, found float64"):
        metrics.spot_windows(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="'box' is unknown"):
        metrics.spot_windows(np.array([[0, 0]]), window="box")
    with pytest.raises(ValueError, match="the grid has 2 spots, the expression 3"):
        metrics.ssim(np.zeros((3, 1)), np.zeros((3, 1)), np.array([[0, 0], [0, 1]]))


def test_without_a_grid_only_ssim_is_undefined(arrays):
    scores = metrics.per_gene_metrics(*arrays, None)
    assert tuple(scores) == metrics.METRIC_NAMES
    assert np.isnan(scores["ssim"]).all()
    assert all(np.isfinite(scores[name]).all() for name in metrics.METRICS)
