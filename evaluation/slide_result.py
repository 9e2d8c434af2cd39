"""What is known of one slide when it is scored: measured and predicted expression, and what the predictions are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCALES = ("fused", "target", "neighbor", "global")
MEAN = "mean of folds"  # what predictions averaged over the folds of a run are called
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
