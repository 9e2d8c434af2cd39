"""What a run has shown on patients it had not seen: how well each gene was predicted, and how far off predictions were.

Intervals are split conformal, over patients: half their width is the quantile of the absolute residuals of held-out patients,
each patient with the same weight however many spots it has (pooling of distributions in Dunn, Wasserman and Ramdas,
"Distribution-free prediction sets for two-layer hierarchical models", JASA 2023). A new patient is exchangeable with these
patients, its spots are not with their spots: with few patients the coverage is measured, by leaving out one after the other,
and not guaranteed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation import aggregation
from evaluation.fold_files import FoldRecord
from evaluation.predictions import HELD_OUT_FILE, INTERVAL_LEVEL, HeldOut, read_compared
from utils.runs import write_json


def measure_held_out(run_dir: str | Path, records: Sequence[FoldRecord]) -> HeldOut:
    """Measure what the complete folds of a run have shown; reads their prediction files.

    records: as `fold_files.read_run` gives them.
    Raises ValueError as `read_compared`.
    """
    genes = list(dict.fromkeys(gene for record in records for gene in record.genes))
    pcc = gene_scores(records)
    residuals = residuals_of(records, genes)
    return HeldOut(
        run=Path(run_dir).resolve().name,
        patients=list(pcc.columns),
        genes=genes,
        pcc=pcc.mean(axis=1).reindex(genes).tolist(),
        pcc_std=pcc.std(axis=1, ddof=1).reindex(genes).tolist(),
        half_width=half_widths(list(residuals.values())).tolist() if residuals else [],
        coverage=coverage_of(residuals),
    )


def gene_scores(records: Sequence[FoldRecord]) -> pd.DataFrame:
    """Table PCC by gene (rows) and held-out patient (columns), mean over the slides of the patient; NaN where undefined."""
    tables = [aggregation.select(aggregation.patient_gene_table(record.per_gene_slide)) for record in records]
    return pd.concat(tables).pivot_table(index="gene", columns="patient", values="pearson", dropna=False)


def residuals_of(records: Sequence[FoldRecord], genes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read |measured - predicted| of the held-out spots: {patient: (N, G) float32}, NaN for a gene its fold does not have.

    A patient with a slide whose prediction file is missing is left out.
    """
    parts: dict[str, list[np.ndarray] | None] = {}
    for record in records:
        place = pd.Index(genes).get_indexer(record.genes)
        slides = aggregation.select(record.per_gene_slide)[["slide", "patient"]].drop_duplicates()
        for slide, patient in slides.itertuples(index=False):
            path, held = record.path / "predictions" / f"{slide}.h5ad", parts.setdefault(patient, [])
            if not path.is_file() or held is None:
                parts[patient] = None
                continue
            predicted, measured = read_compared(path, record.genes)
            values = np.full((len(predicted), len(genes)), np.nan, dtype=np.float32)
            values[:, place] = np.abs(measured - predicted)
            held.append(values)
    return {patient: np.concatenate(held) for patient, held in parts.items() if held}


def half_widths(residuals: Sequence[np.ndarray], level: float = INTERVAL_LEVEL) -> np.ndarray:
    """Find, (G,), the `level` quantile of the residuals of several patients, each of the same weight.

    residuals: of each patient (N, G), NaN where it has no value of a gene.  NaN for a gene of which no patient has one.
    """
    values = np.concatenate(residuals)
    weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in residuals])
    order = np.argsort(values, axis=0)  # NaN comes last
    values = np.take_along_axis(values, order, axis=0)
    cumulated = np.cumsum(np.where(np.isnan(values), 0, weights[order]), axis=0)
    first = (cumulated >= level * cumulated[-1] - 1e-9).argmax(axis=0)
    return np.take_along_axis(values, first[None], axis=0)[0].astype(np.float64)


def coverage_of(residuals: Mapping[str, np.ndarray], level: float = INTERVAL_LEVEL) -> dict[str, float]:
    """Measure, for each patient, how many of its residuals lie within what the other patients give, mean over genes."""
    if len(residuals) < 2:
        return {}
    coverage = {}
    for patient, own in residuals.items():
        limit = half_widths([values for other, values in residuals.items() if other != patient], level)
        known = ~np.isnan(limit) & ~np.isnan(own).all(axis=0)
        coverage[patient] = float((own[:, known] <= limit[known]).mean()) if known.any() else math.nan
    return coverage


def write_held_out(run_dir: str | Path, held_out: HeldOut) -> Path:
    """Write held_out.json into a run folder; returns its path."""
    path = Path(run_dir) / HELD_OUT_FILE
    write_json(path, asdict(held_out))
    return path
