"""Scores of an external test set: every fold of a run, and the mean of their predictions.

The headline is declared beforehand: it is the mean of the folds' predictions, not the best fold. PCC(H) is over a list
that the training run fixed; no number here is chosen on the external slides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import aggregation
from evaluation.comparison.verdict import against_mean, on_single_spots, support
from evaluation.fold_files import write_table
from evaluation.report.tables import Table, label, number
from evaluation.slide_result import SlideResult
from evaluation.slide_scores import notes_on_undefined, score_slide, score_training_mean
from utils.files import write_text
from utils.runs import plain
from utils.text import capitalised

SCORES = ("pcc_all", "pcc_h", "pcc_highly_variable", "mse", "mae")
EXPLANATION = (
    "Scored are only the panel genes that the external set has measured and that every fold predicts; the measured targets "
    "are counts per 10 000 of these genes, the predictions were learned per 10 000 of the whole panel. That moves MSE and "
    "MAE, and PCC hardly."
)


@dataclass(eq=False)
class Predictor:
    """One fold, or the mean of all, with its scores as they come in slide by slide.

    training_mean: (2, G) mean target over its training spots, smoothed and unsmoothed.  gene_lists: "h" (PCC(H)) and
    others, fixed in training; all of genes that are scored.
    """

    name: str
    training_mean: np.ndarray
    gene_lists: dict[str, list[str]]
    tables: list[pd.DataFrame] = field(default_factory=list)

    def add(self, result: SlideResult) -> None:
        """Score one slide; only the scores are kept."""
        means = dict(zip(("smoothed", "unsmoothed"), self.training_mean))
        self.tables += [score_slide(result), score_training_mean(result, means)]


def combined_list(lists: Sequence[Sequence[str]], genes: Sequence[str]) -> list[str]:
    """Make one list out of those of the folds: the genes that most folds list; among equals the better mean place.

    genes: those that are scored. The list is as long as those of the folds are on average, restricted to `genes`.
    """
    restricted = [[gene for gene in names if gene in set(genes)] for names in lists if names]
    if not restricted:
        return []
    times = Counter(gene for names in restricted for gene in names)
    places = {gene: np.mean([names.index(gene) for names in restricted if gene in names]) for gene in times}
    size = round(np.mean([len(names) for names in restricted]))
    return sorted(times, key=lambda gene: (-times[gene], places[gene], gene))[:size]


def score_predictors(predictors: Sequence[Predictor]) -> dict[str, pd.DataFrame]:
    """Put the scores of all predictors into three tables, each with the column "predictor" first.

    per_gene: scale, truth, gene, metrics (mean over the slides of a patient, then over patients).
    per_slide: slide, patient, scale, truth, means over genes.  overall: scale, truth, means.
    """
    found: dict[str, list[pd.DataFrame]] = {"per_gene": [], "per_slide": [], "overall": []}
    for predictor in predictors:
        scores = pd.concat(predictor.tables, ignore_index=True)
        slides = aggregation.slide_table(scores, predictor.gene_lists)
        patients = aggregation.patient_table(scores, predictor.gene_lists)
        tables = {
            "per_gene": aggregation.gene_table(scores, "clean"),
            "per_slide": slides,
            "overall": aggregation.fold_table(slides, patients, "clean"),
        }
        for name, table in tables.items():
            table.insert(0, "predictor", predictor.name)
            found[name].append(table)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


def external_summary(predictors: Sequence[Predictor], about: Mapping[str, Any]) -> tuple[dict[str, Any], dict]:
    """Make the summary (plain values; undefined is None), and give it with the tables of `score_predictors`.

    The verdict is on the last predictor, in sentences.
    about: what the scores are of: run, test_name, protocol, slides {slide: spots}, genes, missing_genes, notes, unit, ...;
    kept as it is. Added: headline (of the mean of the folds' predictions, or of the only fold), predictors (rows of the
    fused prediction against the smoothed target), scales (rows of everything), gene_lists.
    """
    tables = score_predictors(predictors)
    overall = tables["overall"]
    fused, of_mean = aggregation.select(overall), aggregation.select(overall, "training_mean")
    rows = []
    for row, mean in zip(fused.to_dict("records"), of_mean.to_dict("records"), strict=True):
        assert row["predictor"] == mean["predictor"]
        scores = {name: row[name] for name in aggregation.value_columns(overall) if name != "predictor"}
        errors = {f"training_mean_{name}": mean[name] for name in ("mse", "mae")}
        undefined = int(row["undefined_pearson"])
        rows.append({"predictor": row["predictor"], **scores, **errors, "undefined_pearson": undefined})
    headline = {name: value for name, value in rows[-1].items() if name != "undefined_pearson"}
    notes = [*about.get("notes", []), EXPLANATION]
    notes += notes_on_undefined(aggregation.select(pd.concat(predictors[-1].tables)), about.get("slides", {}))
    lists = {predictor.name: predictor.gene_lists for predictor in predictors}
    summary = {
        **about,
        "verdict": _verdict(predictors[-1]),
        "num_genes": len(about["genes"]),
        "headline": headline,
        "predictors": rows,
        "scales": overall.to_dict("records"),
        "gene_lists": lists,
        "notes": notes,
    }
    return plain(summary), tables


def _verdict(predictor: Predictor) -> list[str]:
    table = aggregation.patient_table(pd.concat(predictor.tables, ignore_index=True), predictor.gene_lists)
    means = aggregation.select(table, "training_mean").set_index("patient")["mse"]
    fused = aggregation.select(table).to_dict("records")
    rows = plain([{**row, "training_mean_mse": means[row["patient"]]} for row in fused])
    (single,) = plain([aggregation.select(table, truth="unsmoothed")["pcc_all"].mean()])
    return [f"{capitalised(against_mean(rows))}.", on_single_spots(single), support(rows, None)]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Show one row a predictor; the last one is the headline."""
    names = [*SCORES, "training_mean_mse", "training_mean_mae"]
    rows = [(str(row["predictor"]), *(number(row.get(name)) for name in names)) for row in summary["predictors"]]
    return Table(("prediction", *(label(name) for name in names)), tuple(rows), footer=1 if len(rows) > 1 else 0)


def list_note(found: Sequence[str], listed: int, origin: str) -> str:
    """Say which genes PCC(H) is over. found: those scored; listed: how many the training listed; origin: of whom."""
    if not found:
        return f"PCC(H) is undefined: {origin}."
    return f"PCC(H) is over {len(found)} genes of {origin}; {listed} were listed there."


def write_external(folder: Path, summary: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
    """Write per_gene.csv, per_slide.csv, summary.md and, last, summary.json into `folder`."""
    for name in ("per_gene", "per_slide"):
        write_table(tables[name], folder / f"{name}.csv")
    write_text(folder / "summary.md", _markdown(summary))
    write_text(folder / "summary.json", json.dumps(plain(summary), indent=1, sort_keys=True, allow_nan=False) + "\n")


def _markdown(summary: Mapping[str, Any]) -> str:
    slides = ", ".join(f"{name} ({spots} spots)" for name, spots in summary["slides"].items())
    missing = summary["missing_genes"]
    parts = [
        f"# {summary['run']} on {summary['test_name']}",
        "\n".join(f"- {sentence}" for sentence in summary["verdict"]),
        f"{slides}; {summary['num_genes']} genes. Unit of every error: {summary['unit']}.",
        summary_table(summary).to_markdown(),
        "## Notes",
        "\n".join(f"- {note}" for note in summary["notes"]),
    ]
    if missing:
        parts += ["## Genes that are predicted but not measured", ", ".join(missing)]
    return "\n\n".join(parts) + "\n"
