"""What a run has shown on patients it had not seen: how well each gene was predicted, and how far off predictions were.

Intervals are split conformal, over patients: half their width is the quantile of the absolute residuals of held-out patients,
each patient with the same weight however many spots it has (pooling of distributions in Dunn, Wasserman and Ramdas,
"Distribution-free prediction sets for two-layer hierarchical models", JASA 2023). A new patient is exchangeable with these
patients, its spots are not with their spots: with few patients the coverage is measured, by leaving out one after the other,
and not guaranteed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation import aggregation
from evaluation.fold_files import FoldRecord, read_run
from evaluation.predictions import MEASURED, read_prediction
from utils.files import reading
from utils.runs import write_json
from utils.text import brief

FILE = "held_out.json"
LEVEL = 0.8
_MEASURE_AGAIN = "Make it again: python main.py --mode test --model_path RUN"


@dataclass(frozen=True)
class HeldOut:
    """What is known of a run from its held-out patients. Lists follow `genes`; NaN where a value is not known.

    pcc, pcc_std: of each gene, PCC within a slide, mean over the slides of a patient, then mean and standard deviation over
    patients (divisor n - 1).  half_width: of the interval that holds `level` of the spots of held-out patients, in the unit
    of the predictions; [] where no prediction files are.  coverage: {patient: share of its spots inside the interval that
    the other patients give, mean over genes}; {} with fewer than two patients.
    """

    run: str
    patients: list[str]
    genes: list[str]
    pcc: list[float]
    pcc_std: list[float]
    level: float = LEVEL
    half_width: list[float] = field(default_factory=list)
    coverage: dict[str, float] = field(default_factory=dict)

    def values_of(self, name: str, genes: Sequence[str]) -> np.ndarray:
        """Give the list `name` for the genes asked for (G,), NaN for those that the run did not hold out."""
        known = dict(zip(self.genes, getattr(self, name)))
        return np.array([known.get(gene, math.nan) for gene in genes], dtype=np.float64)

    def describe(self) -> str | None:
        """Say how often the intervals held, in a sentence; None where that could not be measured."""
        if not self.coverage:
            return None
        values = list(self.coverage.values())
        return (
            f"Intervals of {100 * self.level:.0f} % (split conformal over patients) held {100 * np.mean(values):.1f} % of the "
            f"spots of a patient left out, mean over genes and {len(values)} patients ({100 * min(values):.1f} to "
            f"{100 * max(values):.1f} %)."
        )


def measure_held_out(run_dir: str | Path) -> HeldOut:
    """Measure what the complete folds of a run have shown; reads their tables and prediction files.

    Raises ValueError or FileNotFoundError as `fold_files.read_run` and `read_prediction`.
    """
    records, _ = read_run(run_dir)
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
            found = read_prediction(path)[:, record.genes]
            values = np.full((found.n_obs, len(genes)), np.nan, dtype=np.float32)
            values[:, place] = np.abs(np.asarray(found.layers[MEASURED]) - np.asarray(found.X))
            held.append(values)
    return {patient: np.concatenate(held) for patient, held in parts.items() if held}


def half_widths(residuals: Sequence[np.ndarray], level: float = LEVEL) -> np.ndarray:
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


def coverage_of(residuals: Mapping[str, np.ndarray], level: float = LEVEL) -> dict[str, float]:
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
    path = Path(run_dir) / FILE
    write_json(path, asdict(held_out))
    return path


def read_held_out(run_dir: str | Path) -> HeldOut | None:
    """Read held_out.json of a run folder, None where there is none; ValueError for what is no such file."""
    path = Path(run_dir) / FILE
    if not path.is_file():
        return None
    with reading(path, "what a run has shown on held-out patients", remedy=_MEASURE_AGAIN):
        return _from_dict(json.loads(path.read_text(encoding="utf-8")), path)


def _from_dict(content: object, path: Path) -> HeldOut:
    if not isinstance(content, dict) or not isinstance(content.get("genes"), list):
        raise ValueError(f"{path} lists no genes. {_MEASURE_AGAIN}")
    genes, patients = [str(gene) for gene in content["genes"]], [str(name) for name in content.get("patients", [])]
    lists = {}
    for name in ("pcc", "pcc_std", "half_width"):
        found = content.get(name)
        may_be_empty = name == "half_width" and found == []
        if not isinstance(found, list) or (len(found) != len(genes) and not may_be_empty):
            raise ValueError(f"{path}: {name} should be a list of {len(genes)} numbers. {_MEASURE_AGAIN}")
        lists[name] = [_number(value, path, name) for value in found]
    coverage, level = content.get("coverage"), _number(content.get("level"), path, "level")
    if not isinstance(coverage, dict) or not 0 < level < 1:
        raise ValueError(
            f"{path}: coverage should be a table and level a share, found {brief(level)}. {_MEASURE_AGAIN}"
        )
    return HeldOut(
        run=str(content.get("run", "")),
        patients=patients,
        genes=genes,
        pcc=lists["pcc"],
        pcc_std=lists["pcc_std"],
        level=level,
        half_width=lists["half_width"],
        coverage={str(patient): _number(value, path, "coverage") for patient, value in coverage.items()},
    )


def _number(value: object, path: Path, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: {name} should hold numbers, found {brief(value)}. {_MEASURE_AGAIN}")
    return float(value)
