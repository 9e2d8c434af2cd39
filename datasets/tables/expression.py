"""From raw counts to the values that are predicted: gene panel, library size, logarithm, smoothing. Pure on arrays.

Every target, prediction and error of the project is in `utils.text.UNIT`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from utils.grid import steps_within

SCALE = 1e4
_SPOTS_AT_ONCE = 4096


def normalise(counts_panel: np.ndarray | sparse.spmatrix) -> np.ndarray:
    """Compute counts per 10 000 of the panel: 1e4 * count / sum of the row.

    counts_panel: (N, G) raw counts of the panel genes only, dense or sparse.
    returns:      (N, G) float64; a row without any count stays zero (see `empty_spots`).
    """
    counts = _dense(counts_panel)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts * SCALE, totals, out=np.zeros_like(counts), where=totals > 0)


def empty_spots(counts_panel: np.ndarray | sparse.spmatrix) -> np.ndarray:
    """Find, (N,) bool, where a spot has no count of any panel gene; such targets are all zero and worth a report."""
    return np.asarray(counts_panel.sum(axis=1)).ravel() == 0


def log10p1(values: np.ndarray) -> np.ndarray:
    """Compute log10(1 + x), elementwise; the published code and all numbers of the field use base ten here."""
    return np.log10(1.0 + np.asarray(values, dtype=np.float64))


def grid_adjacency(grid_xy: np.ndarray) -> sparse.csr_matrix:
    """Tell which spots touch which on the array, the spot itself included.

    grid_xy: (N, 2) integer grid positions, no duplicates, any order, any offset.
    returns: (N, N) float64 0/1 matrix: 1 where |dx| <= 1 and |dy| <= 1; at most nine ones in a row.
    Raises ValueError for positions that are no integers or that two spots share.
    """
    grid = np.asarray(grid_xy)
    if len(grid) == 0:
        return sparse.csr_matrix((0, 0), dtype=np.float64)
    steps = steps_within(grid, 1)
    row, column = (np.concatenate(part) for part in zip(*((step.rows, step.columns) for step in steps)))
    return sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(grid), len(grid)))


def smooth(values: np.ndarray, grid_xy: np.ndarray) -> np.ndarray:
    """Take the mean over those of the nine cells of the 3x3 neighborhood that hold a spot, one slide.

    values:  (N, G) one row per spot, any order.
    grid_xy: (N, 2) integer grid position of the same row, no duplicates.
    returns: (N, G) float64 in the order of `values`.
    """
    adjacency = grid_adjacency(grid_xy)
    neighbors = np.diff(adjacency.indptr)[:, None]  # never zero: each spot is its own neighbor
    return (adjacency @ np.asarray(values, dtype=np.float64)) / neighbors


def expression_targets(
    counts_panel: np.ndarray | sparse.spmatrix, grid_xy: np.ndarray, smoothing: bool = True
) -> np.ndarray:
    """Compute the targets of one slide, in `utils.text.UNIT`.

    counts_panel: (N, G) raw counts of the panel genes, in panel order.
    grid_xy:      (N, 2) integer grid positions.
    returns:      (N, G) float32, computed in float64.
    """
    values = log10p1(normalise(counts_panel))
    return (smooth(values, grid_xy) if smoothing else values).astype(np.float32)


def spot_totals(counts: sparse.csr_matrix) -> np.ndarray:
    """Sum the counts (N, G) of each spot: (N,), some spots at a time, since SciPy widens what it adds up."""
    parts = [counts[start : start + _SPOTS_AT_ONCE].sum(axis=1) for start in range(0, counts.shape[0], _SPOTS_AT_ONCE)]
    return np.asarray(np.concatenate(parts)).ravel()


def highest_mean_panel(slides: Iterable[AnnData], num_genes: int, measure: str = "log") -> list[str]:
    """Choose the genes with the highest mean expression over all spots of all slides (the panel of the paper).

    slides, measure: as for `genes_by_mean`; that they have as many genes is seen before (`genes_in_common`).
    returns: `num_genes` names in alphabetical order, the order of the panel.
    """
    panel = panel_of_sums((gene_sums(slide, measure) for slide in slides), num_genes)
    assert len(panel) == num_genes >= 1, "genes_in_common has told the user"
    return panel


def genes_by_mean(slides: Iterable[AnnData], measure: str = "log") -> list[str]:
    """Rank the genes present in every slide, highest mean over all spots of all slides first.

    slides:  AnnData with raw counts of all genes in X; read once, one after the other, so a generator will do.
    measure: see `gene_sums`.
    Equal means are in alphabetical order.
    """
    return _ranked(gene_sums(slide, measure) for slide in slides)


def panel_of_sums(sums: Iterable[pd.Series], num_genes: int) -> list[str]:
    """Choose the panel of `highest_mean_panel` from the `gene_sums` of the slides: fewer where these share fewer."""
    return sorted(_ranked(sums)[:num_genes])


def gene_sums(slide: AnnData, measure: str = "log") -> pd.Series:
    """Sum the expression of each gene over the spots of a slide with raw counts of all genes in X: float64, by gene.

    measure: "log" sums log(1 + counts per 10 000 of all genes of the spot), which is the rule that gives the recorded panel
             of HER2ST; "raw" the raw counts, where deeply sequenced slides weigh more.
    """
    transform = {"log": _log_expression, "raw": lambda counts: counts}[measure]
    values = transform(sparse.csr_matrix(slide.X))
    return pd.Series(np.asarray(values.sum(axis=0, dtype=np.float64)).ravel(), index=slide.var_names)


def _ranked(sums: Iterable[pd.Series]) -> list[str]:
    totals: pd.Series | None = None
    for found in sums:
        if totals is None or totals.index.equals(found.index):
            totals = found if totals is None else totals + found
        else:
            shared = totals.index[totals.index.isin(found.index)]
            totals = totals[shared] + found[shared]
    if totals is None:
        return []
    # The number of spots is the same for all genes in common, so totals rank as means do.
    totals = totals.iloc[np.argsort(totals.index.to_numpy().astype(str), kind="stable")]
    return totals.index[np.argsort(-totals.to_numpy(), kind="stable")].tolist()


def _log_expression(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """log(1 + counts per 10 000 of the spot), sparse float64; a spot without counts stays zero."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    values = counts.astype(np.float64)
    values.data *= np.repeat(SCALE / np.maximum(totals, 1), np.diff(values.indptr))
    return values.log1p()


def _dense(counts: np.ndarray | sparse.spmatrix) -> np.ndarray:
    array = counts if isinstance(counts, np.ndarray) else counts.toarray()
    return array.astype(np.float64)
