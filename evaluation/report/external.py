"""report.html and the figures of an external test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.external import Predictor, summary_table
from evaluation.fold_files import FoldRecord
from evaluation.report import html
from evaluation.report.fold_figures import draw_figures
from evaluation.report.write import chart_parts, gene_part
from utils.files import write_text

_CHARTS = {"patients": "Patients", "distribution": "Genes", "bars": "Genes of highest and lowest PCC"}


def write_external_report(
    folder: Path, summary: Mapping[str, Any], predictor: Predictor, genes: Sequence[str] = (), count: int = 2
) -> Path:
    """Write `figures/` and report.html into the folder of an external test; returns the page.

    summary: of `evaluation.external.external_summary`.  predictor: whose predictions lie in the folder.
    genes: drawn on every slide; count: that many of the best and of the worst genes are drawn too.
    """
    record = FoldRecord(
        path=folder,
        index=0,
        name=str(summary["test_name"]),
        protocol="clean",
        split={},
        genes=list(summary["genes"]),
        result={"pcc_all": summary["headline"]["pcc_all"]},
        per_gene_slide=pd.concat(predictor.tables, ignore_index=True),
        epochs=pd.DataFrame(),
    )
    pictures = draw_figures(record, record.name, genes, count)
    slides = ", ".join(f"{name} ({spots} spots)" for name, spots in summary["slides"].items())
    told = html.paragraph(f"{slides}; {summary['num_genes']} genes. Unit of every error: {summary['unit']}.")
    table = html.scrollable(summary_table(summary).to_html("Every fold, and the mean of their predictions"))
    sections = [
        html.Section("verdict", "In words", html.note_list(summary["verdict"])),
        html.Section("caveats", "Caveats", html.note_list(summary["notes"])),
        html.Section("scores", "Scores", told + table),
        html.Section("charts", "Patients and genes", "".join(chart_parts(folder, pictures, _CHARTS))),
        html.Section("maps", "Genes on the tissue", gene_part(folder, pictures, "this test")),
    ]
    page = html.page(
        title=f"Gene-DML: {summary['run']} on {summary['test_name']}",
        lead="Slides of another origin; what is scored is the mean of the folds' predictions, declared beforehand.",
        sections=sections,
        footer="The same numbers are in summary.json; the figures are there as PNG and SVG, every gene in explorer.html.",
    )
    return write_text(folder / "report.html", page)
