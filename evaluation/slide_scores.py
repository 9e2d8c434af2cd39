"""Every metric of one slide in one long table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from evaluation.metrics import METRIC_NAMES, per_gene_metrics, spot_windows
from evaluation.slide_result import TRAINING_MEAN, SlideResult
from utils.text import some


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


def notes_on_undefined(rows: pd.DataFrame, num_spots: Mapping[str, int]) -> list[str]:
    """Say of how many (slide, gene) pairs PCC is undefined, and why.

    rows: of `score_slide`, of one scale and truth.  num_spots: of each slide.
    """
    single, notes = [slide for slide, count in num_spots.items() if count == 1], []
    undefined = rows["pearson"].isna() & ~rows["slide"].isin(single)
    if undefined.any():
        notes.append(
            f"PCC undefined for {undefined.sum()} of {len(rows)} (slide, gene) pairs, where the measured or the predicted "
            "gene is constant within the slide; means skip them."
        )
    if single:
        notes.append(f"PCC undefined for every gene of slides that have 1 spot: {some(single)}; means skip them.")
    return notes
