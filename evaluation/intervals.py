"""What few patients can tell: bootstrap intervals, a paired test and the effect per gene. Patients are the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

# Up to this many pairs all 2^n sign patterns are enumerated, which stays exact with ties.
_ENUMERATED_PAIRS = 16


def bootstrap_interval(
    values: Sequence[float] | Mapping[str, float],
    statistic: Callable[..., np.ndarray] = np.mean,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a statistic of the patients' values.

    values: one number per patient (a mapping patient -> number, or the numbers). statistic: called as
    statistic(samples, axis=1) on (resamples, n). With fewer than two patients nothing is known: (NaN, NaN).
    With a handful of patients the interval is known to be too narrow; it is a floor of the uncertainty.
    Raises ValueError for a value that is not finite (leave undefined patients out, and say so).
    """
    values = np.asarray(list(values.values()) if isinstance(values, Mapping) else values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.sum(~np.isfinite(values))} of {len(values)} patients have no finite value.")
    if len(values) < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(statistic(values[picks], axis=1), [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """p: two-sided; smallest_p: the least p that this many pairs can give; note: what a reader must know."""

    p: float
    statistic: float
    num_pairs: int
    smallest_p: float
    note: str


def paired_wilcoxon(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Wilcoxon's signed-rank test of the differences second - first over patients, two-sided.

    Differences of exactly zero are left out (Wilcoxon's own treatment), ties share the average rank. Up to 16 pairs
    the distribution is enumerated over all signs (exact, also with ties); above, scipy decides. statistic: the
    smaller of the two rank sums. With n pairs p cannot be below 2 / 2^n: 0.125 for n = 4; n = 6 is the least that can
    go under 0.05.
    Raises ValueError for different lengths; pairs with NaN are left out and counted in the note.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a paired test needs as many values on both sides, found {first.shape} and {second.shape}.")
    defined = ~(np.isnan(first) | np.isnan(second))
    differences = (second - first)[defined]
    notes = [f"{(~defined).sum()} undefined pairs left out"] if not defined.all() else []
    if zeros := int(np.sum(differences == 0)):
        notes.append(f"{zeros} pairs without a difference left out")
    differences = differences[differences != 0]
    num_pairs = len(differences)
    smallest = 2.0 ** (1 - num_pairs) if num_pairs else 1.0
    if smallest >= 0.05:
        notes.append(f"{num_pairs} pairs cannot give p < 0.05 (the least is {smallest:.4g})")
    if not defined.any():
        return PairedTest(math.nan, math.nan, 0, smallest, "; ".join(notes))
    if num_pairs == 0:
        return PairedTest(1.0, 0.0, 0, smallest, "; ".join(notes))
    ranks = scipy.stats.rankdata(np.abs(differences))
    positive = float(ranks[differences > 0].sum())
    statistic = min(positive, float(ranks.sum()) - positive)
    p = _enumerated_p(ranks, statistic) if num_pairs <= _ENUMERATED_PAIRS else scipy.stats.wilcoxon(differences).pvalue
    return PairedTest(float(p), statistic, num_pairs, smallest, "; ".join(notes))


def _enumerated_p(ranks: np.ndarray, statistic: float) -> float:
    signs = (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks))) & 1
    sums = signs @ ranks
    # Ranks are multiples of one half and exact in floating point: no tolerance is needed.
    return float(np.mean(np.minimum(sums, ranks.sum() - sums) <= statistic))


@dataclass(frozen=True)
class GeneEffect:
    """differences: gene -> mean over patients of second - first; share_improved: of the genes with a difference."""

    differences: pd.Series
    share_improved: float
    median: float


def gene_effect(first: pd.Series, second: pd.Series, *, greater_is_better: bool = True) -> GeneEffect:
    """Paired effect per gene: both indexed by (patient, gene); only pairs defined on both sides count.

    The difference of a gene is the mean over patients of (second - first). A gene without any difference is neither
    improved nor worsened but stays in the denominator.
    """
    paired = pd.concat({"first": first, "second": second}, axis=1, join="inner").dropna()
    differences = (paired["second"] - paired["first"]).groupby(level="gene", sort=False).mean()
    if differences.empty:
        return GeneEffect(differences, math.nan, math.nan)
    improved = differences > 0 if greater_is_better else differences < 0
    return GeneEffect(differences, float(improved.mean()), float(differences.median()))
