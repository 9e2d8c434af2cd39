"""Per-gene metrics of one slide: measured and predicted (N spots, G genes) in, one float64 value per gene out.

Every function takes `measured` and `predicted` in this order, both (N, G) in the unit of the targets
(log10(1 + counts per 10 000 of the panel)), calculates in float64 over the N spots and returns (G,).

What is undefined is NaN, and never a silent zero:

* a gene with a value that is not finite, on either side: NaN in every metric;
* `pearson`, `spearman`: NaN where either side is constant over the spots (a single spot is constant);
* `r2`, `explained_variance`, `rvd`, `ccc`, `ssim`: NaN where the *measured* gene is constant, because there is no
  variance to explain. A constant *prediction* of a varying gene is defined: CCC 0, RVD 1, R2 at most 0;
* `mse`, `mae`: defined for every finite gene, also for a single spot, of which `mse_centered` knows nothing;
* no spots at all, or two shapes that differ, is a ValueError.

"Constant" means: the range is at most four rounding units of the number type times the greatest magnitude, so that a
constant that went through float32 arithmetic is still recognised. Means over genes skip NaN (`mean_defined`), and
whoever reports such a mean reports the number of undefined genes beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse
import scipy.stats

from utils.grid import steps_within


def pearson(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation coefficient (PCC): covariance over the product of the standard deviations."""
    measured, predicted, constant = _checked(measured, predicted)
    return np.where(constant.any(axis=0), np.nan, _correlation(measured, predicted))


def spearman(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute Spearman's correlation: Pearson's of the ranks; tied values share the average of their ranks."""
    measured, predicted, constant = _checked(measured, predicted)
    ranks = [scipy.stats.rankdata(values, axis=0) for values in (measured, predicted)]
    return np.where(constant.any(axis=0), np.nan, _correlation(*ranks))


def mse(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute the mean squared error."""
    measured, predicted, _ = _checked(measured, predicted)
    return np.mean((predicted - measured) ** 2, axis=0)


def mse_centered(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute the mean squared error that is left when each gene's mean error over the slide is taken away.

    The rest of the MSE is a constant per gene and slide: the level of a gene differs between patients, and so do depth and
    capture of their measurements, which no image shows. NaN for a single spot.
    """
    measured, predicted, _ = _checked(measured, predicted)
    return (predicted - measured).var(axis=0) if len(measured) > 1 else np.full(measured.shape[1], np.nan)


def mae(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute the mean absolute error."""
    measured, predicted, _ = _checked(measured, predicted)
    return np.mean(np.abs(predicted - measured), axis=0)


def ccc(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute Lin's concordance correlation coefficient, with the variances of divisor N as in Lin (Biometrics 1989).

    2 cov / (var_measured + var_predicted + (mean_measured - mean_predicted)^2)
    """
    measured, predicted, constant = _checked(measured, predicted)
    mean_measured, mean_predicted = measured.mean(axis=0), predicted.mean(axis=0)
    covariance = np.mean((measured - mean_measured) * (predicted - mean_predicted), axis=0)
    total = measured.var(axis=0) + predicted.var(axis=0) + (mean_measured - mean_predicted) ** 2
    return _divide(2 * covariance, total, undefined=constant[0])


def r2(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute the coefficient of determination: 1 - residual sum of squares / total sum of squares of the measured gene."""
    measured, predicted, constant = _checked(measured, predicted)
    residual = np.mean((measured - predicted) ** 2, axis=0)
    return 1 - _divide(residual, measured.var(axis=0), undefined=constant[0])


def explained_variance(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute 1 - variance of the residual / variance of the measured gene: R2 without the punishment of an offset."""
    measured, predicted, constant = _checked(measured, predicted)
    return 1 - _divide((measured - predicted).var(axis=0), measured.var(axis=0), undefined=constant[0])


def rvd(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute the relative variance distance of each gene: (var_predicted - var_measured)^2 / var_measured^2.

    Its mean over genes is the RVD of Stem (Zhu et al., "Diffusion Generative Modeling for Spatially Resolved Gene
    Expression Inference from Histology Images", ICLR 2025). 0: the prediction varies as much as the measurement;
    1: the prediction has collapsed to a constant, which a correlation does not show.
    """
    measured, predicted, constant = _checked(measured, predicted)
    variance = measured.var(axis=0)
    return _divide((predicted.var(axis=0) - variance) ** 2, variance**2, undefined=constant[0])


def ssim(
    measured: np.ndarray,
    predicted: np.ndarray,
    grid_xy: np.ndarray | None,
    *,
    window: str = "gaussian",
    windows: scipy.sparse.csr_array | None = None,
) -> np.ndarray:
    """Compute the structural similarity of the gene maps on the spot grid (Wang et al., IEEE TIP 2004).

    grid_xy: (N, 2) integer grid positions, no duplicates. window: see `spot_windows`, whose result can be passed as
    `windows` when several maps of one slide are compared.

    Each spot is the centre of one window. Cells of the grid without a spot (outside the tissue, or between the
    columns of a hexagonal array) do not exist for it: the weights of the window are renormalised over the cells that
    hold a spot, so nothing is filled in and no border is cut. Local means, variances and the covariance use these
    weights (no N - 1 correction); SSIM is averaged over the spots. On a full grid, spots further from the border
    than the radius have the value of the usual image SSIM.
    The dynamic range L of each gene is the range of its measured values on the slide; C1 = (0.01 L)^2,
    C2 = (0.03 L)^2. NaN where the measured gene is constant.
    Raises ValueError without grid or windows, and for those of another number of spots.
    """
    measured, predicted, constant = _checked(measured, predicted)
    if windows is None:
        if grid_xy is None:
            raise ValueError("SSIM needs the grid positions of the spots, or the windows made of them; found neither.")
        windows = spot_windows(grid_xy, window=window)
    if windows.shape[0] != len(measured):
        raise ValueError(f"the grid has {windows.shape[0]} spots, the expression {len(measured)}; expected as many.")
    parts = [measured, predicted, measured**2, predicted**2, measured * predicted]
    with np.errstate(invalid="ignore"):
        mean_m, mean_p, square_m, square_p, product = np.split(windows @ np.hstack(parts), 5, axis=1)
    # Rounding can push the variance of a locally constant map a hair below zero.
    variance_m, variance_p = np.maximum(square_m - mean_m**2, 0), np.maximum(square_p - mean_p**2, 0)
    covariance = product - mean_m * mean_p
    dynamic_range = np.ptp(measured, axis=0)
    c1, c2 = (0.01 * dynamic_range) ** 2, (0.03 * dynamic_range) ** 2
    numerator = (2 * mean_m * mean_p + c1) * (2 * covariance + c2)
    denominator = (mean_m**2 + mean_p**2 + c1) * (variance_m + variance_p + c2)
    return _divide(numerator, denominator, undefined=np.broadcast_to(constant[0], numerator.shape)).mean(axis=0)


def spot_windows(grid_xy: np.ndarray, *, window: str = "gaussian") -> scipy.sparse.csr_array:
    """Make the window weights between the spots of a slide: (N, N) sparse, row i the window around spot i, sum 1.

    grid_xy: (N, 2) integer grid positions, no duplicates.
    window: "gaussian", sigma 1.5 cells within 11 x 11 cells, or "uniform", 7 x 7 cells.
    Raises ValueError for another window, positions that are not integers or two spots in one cell.
    """
    if window not in ("gaussian", "uniform"):
        raise ValueError(f"SSIM window {window!r} is unknown; expected 'gaussian' or 'uniform'.")
    steps = steps_within(grid_xy, radius=5 if window == "gaussian" else 3)
    rows, columns = (np.concatenate(part) for part in zip(*((step.rows, step.columns) for step in steps)))
    weights = np.ones(len(rows))
    if window == "gaussian":
        of_step = [np.exp(-(step.x**2 + step.y**2) / (2 * 1.5**2)) for step in steps]
        weights = np.repeat(of_step, [len(step.rows) for step in steps])
    weights /= np.bincount(rows, weights=weights, minlength=len(grid_xy))[rows]
    return scipy.sparse.csr_array((weights, (rows, columns)), shape=(len(grid_xy), len(grid_xy)))


# In the order of the tables; SSIM needs the grid and is added by `per_gene_metrics`.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
    "mse_centered": mse_centered,
    "mae": mae,
    "ccc": ccc,
    "r2": r2,
    "explained_variance": explained_variance,
    "rvd": rvd,
}
METRIC_NAMES = (*METRICS, "ssim")


def per_gene_metrics(
    measured: np.ndarray, predicted: np.ndarray, windows: scipy.sparse.csr_array | None
) -> dict[str, np.ndarray]:
    """Compute every metric of METRIC_NAMES -> (G,).

    windows: `spot_windows` of the slide; None (no spot grid): SSIM is NaN.
    """
    scores = {name: metric(measured, predicted) for name, metric in METRICS.items()}
    if windows is None:
        scores["ssim"] = np.full(np.shape(measured)[1], np.nan)
    else:
        scores["ssim"] = ssim(measured, predicted, None, windows=windows)
    return scores


def mean_defined(values: np.ndarray) -> float:
    """Average the values that are not NaN; NaN when none is left."""
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _checked(measured: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both as float64 with NaN for genes that are not finite, and (2, G): is measured / predicted constant."""
    measured, predicted = np.asarray(measured), np.asarray(predicted)
    if measured.shape != predicted.shape or measured.ndim != 2 or len(measured) == 0:
        raise ValueError(
            f"measured has shape {measured.shape} and predicted {predicted.shape}; "
            "expected the same (spots, genes) with at least one spot."
        )
    not_finite = ~(np.isfinite(measured).all(axis=0) & np.isfinite(predicted).all(axis=0))
    constant = np.stack([_is_constant(measured), _is_constant(predicted)])
    measured, predicted = measured.astype(np.float64), predicted.astype(np.float64)  # copies: written to below
    measured[:, not_finite] = predicted[:, not_finite] = np.nan
    return measured, predicted, constant


def _is_constant(values: np.ndarray) -> np.ndarray:
    precision = np.finfo(np.float64).eps
    if np.issubdtype(values.dtype, np.floating):
        precision = min(np.finfo(values.dtype).eps, np.finfo(np.float32).eps)
    low, high = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return high - low <= 4 * precision * np.maximum(np.abs(low), np.abs(high))


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    # Scaling to unit length first keeps tiny variances from underflowing in the product.
    lengths = [np.linalg.norm(values, axis=0) for values in (first, second)]
    undefined = (lengths[0] == 0) | (lengths[1] == 0)
    first, second = first / np.where(undefined, 1, lengths[0]), second / np.where(undefined, 1, lengths[1])
    return np.where(undefined, np.nan, np.clip(np.sum(first * second, axis=0), -1, 1))


def _divide(numerator: np.ndarray, denominator: np.ndarray, *, undefined: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=~undefined & (denominator != 0))
