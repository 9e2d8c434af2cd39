"""What was measured and predicted of one slide, and every metric of it in one long table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from evaluation.metrics import METRIC_NAMES, per_gene_metrics, spot_windows

SCALES = ("fused", "target", "neighbor", "global")
TRAINING_MEAN = "training_mean"  # stands in the column "scale" of the tables of a fold


@dataclass(frozen=True, eq=False)
class SlideResult:
    """One slide after evaluation. All (N, G) in log10(1 + counts per 10 000 of the panel), G = len(genes).

    grid_xy: (N, 2) integer grid positions, or None where the spots have no grid (SSIM is then undefined).
    measured: the smoothed target; measured_unsmoothed: the same before smoothing, if it is to be scored too.
    predictions: "fused" and optionally "target", "neighbor", "global".
    Raises ValueError that names the slide and every array that does not fit or holds a number that is not finite: no slide
    may drop out of a mean by a NaN.
    """

    slide: str
    patient: str
    spot_ids: Sequence[str]
    grid_xy: np.ndarray | None
    genes: list[str]
    measured: np.ndarray
    measured_unsmoothed: np.ndarray | None
    predictions: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        shape = (len(self.spot_ids), len(self.genes))
        problems = []
        if "fused" not in self.predictions or set(self.predictions) - set(SCALES):
            problems.append(f"predictions are {sorted(self.predictions)}; expected 'fused' and any of {SCALES[1:]}")
        if self.grid_xy is not None and np.shape(self.grid_xy) != (shape[0], 2):
            problems.append(f"grid_xy has shape {np.shape(self.grid_xy)}; expected {(shape[0], 2)}")
        arrays = {"measured": self.measured, "measured_unsmoothed": self.measured_unsmoothed, **self.predictions}
        for name, values in arrays.items():
            if values is not None and np.shape(values) != shape:
                problems.append(f"{name} has shape {np.shape(values)}; expected (spots, genes) = {shape}")
            elif values is not None and (count := np.count_nonzero(~np.isfinite(values))):
                problems.append(f"{count} numbers of {name} are not finite, first of spot {self._first_broken(values)}")
        if len(set(self.genes)) != len(self.genes):
            problems.append("a gene is listed twice; expected distinct genes")
        if problems:
            raise ValueError(f"slide {self.slide}: " + "; ".join(problems) + ".")

    def _first_broken(self, values: np.ndarray) -> str:
        spot, gene = np.argwhere(~np.isfinite(values))[0]
        return f"{self.spot_ids[spot]}, gene {self.genes[gene]}"

    @property
    def truths(self) -> dict[str, np.ndarray]:
        """The values that the predictions are compared with: "smoothed" and, if there, "unsmoothed"."""
        truths = {"smoothed": self.measured, "unsmoothed": self.measured_unsmoothed}
        return {name: values for name, values in truths.items() if values is not None}


def score_slide(result: SlideResult) -> pd.DataFrame:
    """Score every scale against every truth by every metric: columns slide, patient, scale, truth, gene, METRIC_NAMES."""
    return _score(result, result.predictions, result.truths)


def _score(
    result: SlideResult, predictions: Mapping[str, np.ndarray], truths: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    windows = None if result.grid_xy is None else spot_windows(result.grid_xy)
    tables = [
        long_table(result, scale, truth, per_gene_metrics(measured, predicted, windows))
        for truth, measured in truths.items()
        for scale, predicted in predictions.items()
    ]
    return pd.concat(tables, ignore_index=True)


def long_table(result: SlideResult, scale: str, truth: str, values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Put per-gene values (metric -> (G,)) of one slide, scale and truth into rows of the long table."""
    keys = {"slide": result.slide, "patient": result.patient, "scale": scale, "truth": truth}
    # A metric that was not asked for is a column of NaN: every long table has the same columns.
    columns = {name: values.get(name, np.nan) for name in METRIC_NAMES}
    return pd.DataFrame({**keys, "gene": result.genes, **columns})


def score_training_mean(result: SlideResult, means: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """Score the constant prediction of the training mean, as `score_slide` does.

    means: truth -> (G,) mean over the training spots; a truth whose mean is None is left out.
    Raises ValueError for a mean of another shape.
    """
    tables = []
    for truth, measured in result.truths.items():
        if means[truth] is None:
            continue
        mean = np.asarray(means[truth])
        if mean.shape != (len(result.genes),):
            raise ValueError(f"the training mean ({truth}) has shape {mean.shape}; expected ({len(result.genes)},).")
        predicted = np.broadcast_to(mean, measured.shape)
        tables.append(_score(result, {TRAINING_MEAN: predicted}, {truth: measured}))
    return pd.concat(tables, ignore_index=True)
