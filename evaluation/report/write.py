"""Files of a run for its readers: summary.json, summary.md, figures and report.html.

Everything is made from the files of the run folder (`evaluation.fold_files` lists them), so it can be made again at
any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation import aggregation
from evaluation.fold_files import FoldRecord, read_run
from evaluation.report import figures, html
from evaluation.report.fold_figures import Picture, figures_of, pcc_by_scale
from evaluation.report.style import save_figure
from evaluation.report.tables import (
    Table,
    check_summary,
    fold_rows,
    interval_rows,
    list_rows,
    price_rows,
    protocol_rows,
    scale_rows,
)
from evaluation.summary import choice_of_epoch
from utils.files import reading, require_file, write_text
from utils.runs import plain
from utils.text import UNIT, capitalised, check_genes

LEGEND = (
    "PCC(A): over all genes of the panel. PCC(H): over the highly predictive genes; PCC(HVG): over the "
    "most variable ones. "
    "MSE of mean, MAE of mean: errors of predicting the mean of the training spots."
)
SECTIONS = (
    ("Mean over patients with bootstrap 95 % interval", interval_rows),
    ("Every scale and every target", scale_rows),
    ("The same predictions averaged as in either protocol", protocol_rows),
    ("PCC(H) under the list of either protocol", list_rows),
    ("What choosing the epoch on the test fold would gain", price_rows),
)
TARGETS = (
    "smoothed: each target is the mean over the spot and its neighbors (3 x 3 on the array), as in the paper; these are "
    "learned and stand in every other table. unsmoothed: the counts of the single spot alone."
)
SINGLE_SCALES = (
    "target, neighbor and global are heads of one model that was trained with all scales together, so these rows do not tell "
    "what a scale adds. Ablations do: trainings with MODEL.use_neighbor=false or MODEL.use_global=false "
    "(docs/evaluation.md, Ablations)."
)
METRICS = (
    "R2: 1 - squared error / variance of the measured gene within the slide. 0 is what the gene's own mean on that slide "
    "would score, which nobody knows beforehand; a wrong level of the whole slide alone makes it negative, so read it "
    "beside the explained variance, which leaves that out. RVD, relative variance distance: (predicted - measured "
    "variance)^2 / measured variance^2 of a gene. 0: predictions vary as much as measurements, 1: they do not vary at all, "
    "above 1: they vary more than twice as much. CCC: PCC lowered by a wrong level or spread; SSIM: likeness of the two "
    "maps, 1 for equal ones."
)


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write summary.json (sorted keys: equal runs give equal bytes) and summary.md; returns both paths.

    summary: as `evaluation.summary.summarise` makes it. Raises ValueError that lists required keys it lacks.
    """
    check_summary(summary, "the summary")
    run_dir = Path(run_dir)
    content = json.dumps(plain(summary), indent=1, sort_keys=True, allow_nan=False) + "\n"
    return write_text(run_dir / "summary.json", content), write_text(run_dir / "summary.md", _markdown(summary))


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary.json. Raises FileNotFoundError or ValueError, which name what is missing in it."""
    path = require_file(path, "Make it first: python main.py --mode test --model_path RUN writes the summary.")
    with reading(path, "the summary of a run", remedy="Make the summary again: --mode test --model_path RUN"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        check_summary(summary, str(path))
        (
            _protocol_part(summary),
            _scores_part(summary),
        )  # what lies deeper: shown once here, where an error names the file
        return summary


def format_table(summary: Mapping[str, Any]) -> str:
    """Show the verdict, the protocol, the folds, their mean and standard deviation on a terminal.

    Raises ValueError that lists what the summary lacks.
    """
    check_summary(summary, "the summary")
    verdict = verdict_of(summary)
    return "\n".join(
        [
            *verdict,
            *([""] if verdict else []),
            str(summary["protocol_description"]),
            "",
            fold_rows(summary).to_text(),
            "",
            LEGEND,
            f"Unit of every error: {UNIT}.",
            *(f"Note: {note}" for note in summary["notes"]),
        ]
    )


def verdict_of(summary: Mapping[str, Any]) -> list[str]:
    """Give the sentences that stand first; a summary of an earlier version has none."""
    return [str(sentence) for sentence in summary.get("verdict", [])]


def _markdown(summary: Mapping[str, Any]) -> str:
    description, verdict = str(summary["protocol_description"]), verdict_of(summary)
    parts = [
        *([f"**{verdict[0]}**", "\n".join(f"- {sentence}" for sentence in verdict[1:])] if verdict else []),
        f"**{capitalised(description)}.**",
        f"# {summary['run']}",
        f"{_counts(summary)} Unit of every target, prediction and error: {UNIT}.",
        "## Folds",
        fold_rows(summary).to_markdown(),
        LEGEND,
    ]
    if summary["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in summary["notes"])]
    for heading, table, explanations in _tables(summary):
        parts += [f"## {heading}", table.to_markdown(), *explanations]
    return "\n\n".join(parts) + "\n"


def _tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, Table, list[str]]]:
    """The tables that a summary has beside that of its folds: heading, cells, and the paragraphs below."""
    for heading, rows in SECTIONS:
        table = rows(summary)
        if table is not None:
            yield heading, table, _explanations(summary) if rows is scale_rows else []


def _explanations(summary: Mapping[str, Any]) -> list[str]:
    scales = {row["scale"] for row in summary["scales"]}
    return [TARGETS, *([SINGLE_SCALES] if scales & {"target", "neighbor", "global"} else []), METRICS]


def _counts(summary: Mapping[str, Any]) -> str:
    """ "4 folds, 4 patients, 8 slides, 960 spots, 60 genes." of what the summary knows."""
    names = ("folds", "patients", "slides", "spots", "genes")
    known = [(name, summary.get(f"num_{name}")) for name in names]
    return ", ".join(f"{count} {name if count != 1 else name[:-1]}" for name, count in known if count is not None) + "."


def write_report(
    run_dir: str | Path,
    *,
    genes: Sequence[str] = (),
    count: int = 2,
    records: Sequence[FoldRecord] | None = None,
) -> Path:
    """Write report.html from the files of a run (summary.json first of all); returns its path.

    records: of the folds, where they are read already.
    genes, count: as in `fold_figures.write_figures`, a gene in the folds whose panel has it; figures that are on disk and up
    to date are taken as they are.
    Raises FileNotFoundError or ValueError when the run has no summary or no complete fold, ValueError for a gene of no panel.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir / "summary.json")
    records = records or read_run(run_dir)[0]
    check_genes(genes, {gene for record in records for gene in record.genes}, "the run predicts")
    description, verdict = str(summary["protocol_description"]), verdict_of(summary)
    sections = [
        *([html.Section("verdict", "In words", html.note_list(verdict))] if verdict else []),
        html.Section("protocol", "Protocol and caveats", _protocol_part(summary)),
        html.Section("scores", "Scores", _scores_part(summary)),
        *_run_parts(run_dir, records, summary),
        *(html.Section(f"fold-{r.index}", f"Fold {r.name}", _fold_part(r, genes, count)) for r in records),
        html.Section("settings", "Configuration and versions", _settings_part(run_dir)),
    ]
    page = html.page(
        title=f"Gene-DML: {summary['run']}",
        lead=f"{capitalised(description)}.",
        sections=sections,
        footer="Made from the files of the run folder; the figures are there as PNG and SVG, every gene in explorer.html.",
    )
    return write_text(run_dir / "report.html", page)


def _protocol_part(summary: Mapping[str, Any]) -> str:
    return html.note_list(summary["notes"]) + html.paragraph(
        f"{_counts(summary)} Unit of every target, prediction and error: {UNIT}."
    )


def _scores_part(summary: Mapping[str, Any]) -> str:
    parts = [html.scrollable(fold_rows(summary).to_html("Folds")), html.paragraph(LEGEND)]
    for heading, table, explanations in _tables(summary):
        parts += [html.scrollable(table.to_html(heading)), *map(html.paragraph, explanations)]
    return "\n".join(parts)


def _run_parts(run_dir: Path, records: Sequence[FoldRecord], summary: Mapping[str, Any]) -> list[html.Section]:
    """Patients and genes of the whole run, with figures of their own in `figures/` of the run."""
    folder = run_dir / "figures"
    scores = pd.concat([record.per_gene_slide for record in records], ignore_index=True)
    slides = aggregation.select(scores).groupby(["patient", "slide"], sort=False)["pearson"].mean()
    by_patient = {name: group.tolist() for name, group in slides.groupby(level="patient", sort=False)}
    interval = (summary.get("intervals") or {}).get("pcc_all", {})
    low, high, mean = (float("nan") if interval.get(key) is None else interval[key] for key in ("low", "high", "mean"))
    figure = figures.patient_dots(by_patient, mean=mean, interval=(low, high) if low == low else None)
    save_figure(figure, folder / "patients")
    table = aggregation.gene_table(scores, records[0].protocol)
    save_figure(figures.pcc_distribution(pcc_by_scale(table)), folder / "pcc_distribution")
    fused = aggregation.select(table)
    spread = aggregation.select(scores).groupby("gene")["pearson"].std().reindex(fused["gene"])
    bars = figures.gene_bars(list(fused["gene"]), fused["pearson"].to_numpy(), spread=spread.to_numpy())
    save_figure(bars, folder / "gene_bars")
    with_interval = " with its bootstrap interval" if low == low else ""
    patients = html.picture(
        folder / "patients.png",
        alt="PCC(A) of every slide and patient",
        caption="PCC(A) of the fused prediction. Small dots: slides; large dots: means of a patient; "
        f"diamond: mean over patients{with_interval}.",
    )
    genes = html.picture(
        folder / "pcc_distribution.png",
        alt="PCC of every gene by scale",
        caption="PCC of every gene that a fold predicts, by scale. Bar: the middle half of the genes; line and number: median.",
    ) + html.picture(
        folder / "gene_bars.png",
        alt="The genes of highest and lowest PCC",
        caption="Genes of highest and lowest PCC of the fused prediction; lines: standard deviation over slides.",
    )
    return [html.Section("patients", "Patients", patients), html.Section("genes", "Genes", genes)]


def _fold_part(record: FoldRecord, genes: Sequence[str], count: int) -> str:
    """Training, clusters and genes on the tissue of one fold."""
    pictures = figures_of(record.path, genes=[gene for gene in genes if gene in record.genes], count=count)
    split = record.split
    held_out = f" ({', '.join(split['validation_patients'])})" if split.get("validation_patients") else ""
    told = html.paragraph(
        f"Tested on {', '.join(split['test_patients'])} ({record.result['num_slides']} slides, "
        f"{record.result['num_spots']} spots); trained on {', '.join(split.get('train_patients', [])) or 'unknown'}; "
        f"{choice_of_epoch([record])}{held_out}."
    )
    charts = chart_parts(record.path, pictures, {"curves": "Training", "clusters": "Clusters of a batch"})
    return "\n".join([told, *charts, gene_part(record.path, pictures, "this fold")])


def chart_parts(folder: Path, pictures: Sequence[Picture], headings: Mapping[str, str]) -> list[str]:
    """Show the pictures of some kinds, each under the heading of its kind; headings: {kind: heading}, in order."""
    return [
        f"<h3>{heading}</h3>{_embedded(folder, shown)}"
        for kind, heading in headings.items()
        for shown in pictures
        if shown.kind == kind
    ]


def gene_part(folder: Path, pictures: Sequence[Picture], what: str) -> str:
    """Show the maps of chosen, best and worst genes with their scatter plots, or say that there are none. what: "this fold"."""
    parts = []
    for group, heading in (("chosen", "Chosen genes"), ("best", "Best genes"), ("worst", "Worst genes")):
        maps, points = ([p for p in pictures if (p.group, p.kind) == (group, kind)] for kind in ("map", "scatter"))
        if maps:
            row = "".join(_embedded(folder, shown) for shown in points)
            parts.append(f"<h3>{heading}</h3>" + "".join(_embedded(folder, shown) for shown in maps))
            parts.append(f'<div class="row">{row}</div>')
    return "\n".join(parts) or html.paragraph(
        f"No maps: {what} holds no prediction files, or no gene with a defined PCC."
    )


def _embedded(folder: Path, shown: Picture) -> str:
    """Embed a picture of `figures/` in the folder."""
    path = folder / "figures" / f"{shown.name}.png"
    return html.picture(path, alt=shown.alt, caption=shown.caption, photograph=shown.kind == "map")


def _settings_part(run_dir: Path) -> str:
    parts = []
    for name, heading in (("config.yaml", "Configuration"), ("versions.json", "Versions")):
        path = run_dir / name
        with reading(path, "text"):
            text = (
                path.read_text(encoding="utf-8", errors="replace")
                if path.is_file()
                else f"{name} is not in the run folder."
            )
        parts.append(f"<h3>{heading}</h3>{html.preformatted(text)}")
    return "\n".join(parts)
