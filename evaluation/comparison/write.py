"""The comparison of runs for readers: comparison.md, .csv and .html from the table of `runs.compare_methods`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.intervals import LEAST_PATIENTS
from evaluation.report import html
from evaluation.report.style import INK, MUTED, PALETTE, new_figure, plain_axes, save_figure, title
from evaluation.report.tables import NOT_DEFINED, Table, label, number
from utils.files import write_atomically, write_text

_COLUMNS = (
    "metric", "method", "num_seeds", "num_patients", "mean", "low", "high", "by_patient", "seed_std", "difference",
    "difference_low", "difference_high", "wilcoxon_p", "wilcoxon_note", "genes_improved", "gene_difference_median",
)  # fmt: skip


def write_comparison(table: pd.DataFrame, out_dir: str | Path) -> tuple[Path, Path, Path]:
    """Write comparison.md, comparison.csv, comparison.html (and comparison.png, .svg); returns the first three.

    table: of `evaluation.comparison.runs.compare_methods`, one row per metric and method, the first method first; its
    `attrs["notes"]` are printed before the numbers. ValueError when columns are missing or there is no row.
    """
    if missing := [name for name in _COLUMNS if name not in table.columns]:
        raise ValueError(
            f"the table of a comparison lacks the columns {', '.join(missing)}; make it by compare_methods."
        )
    if table.empty:
        raise ValueError("the table of a comparison has no row; expected at least one metric of one method.")
    out_dir = Path(out_dir)
    notes = _notes(table)
    first = str(table["method"].iloc[0])
    tables = {metric: _metric_table(rows, first) for metric, rows in _defined(table)}
    remarks = _remarks(table)
    markdown = [
        f"# Comparison with {first}",
        _explanation(first),
        "\n".join(f"- {note}" for note in notes),
    ]
    for metric, cells in tables.items():
        markdown += [f"## {_heading(metric)}", cells.to_markdown()]
    if remarks:
        markdown += ["## Remarks on the tests", "\n".join(f"- {remark}" for remark in remarks)]
    save_figure(comparison_intervals(table), out_dir / "comparison")
    return (
        write_text(out_dir / "comparison.md", "\n\n".join(part for part in markdown if part) + "\n"),
        write_atomically(out_dir / "comparison.csv", lambda temporary: table.to_csv(temporary, index=False)),
        write_text(out_dir / "comparison.html", _page(first, notes, remarks, tables, out_dir / "comparison.png")),
    )


def comparison_text(table: pd.DataFrame) -> str:
    """Show the tables of comparison.md, with their words, on a terminal.

    table: as in `write_comparison`.
    """
    first = str(table["method"].iloc[0])
    parts = []
    for metric, rows in _defined(table):
        parts += ["", _heading(metric), _metric_table(rows, first).to_text()]
    said = [*_notes(table), *_remarks(table)]
    return "\n".join([*parts, "", _explanation(first), *(f"Note: {text}" for text in said)])


def comparison_intervals(table: pd.DataFrame) -> Figure:
    """Draw one panel a metric, one row a method: mean over patients and interval; a line: the first method."""
    groups = _defined(table)
    methods = list(dict.fromkeys(table["method"].astype(str)))
    figure = new_figure(1.4 + 2.3 * len(groups), 1.0 + 0.3 * len(methods))
    for axes, (metric, rows) in zip(figure.subplots(1, len(groups), squeeze=False, sharey=True)[0], groups):
        plain_axes(axes, grid="x")
        title(axes, _heading(metric))
        axes.axvline(rows["mean"].iloc[0], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
        for method, mean, low, high in rows[["method", "mean", "low", "high"]].itertuples(index=False):
            row = methods.index(str(method))
            color = INK if row == 0 else PALETTE[0]
            if np.isfinite([low, high]).all():
                axes.plot((low, high), (row, row), color=color, linewidth=2.0, solid_capstyle="butt")
            axes.scatter([mean], [row], s=34, color=color, edgecolors="white", linewidths=0.8, zorder=3)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        axes.set(yticks=range(len(methods)), ylim=(len(methods) - 0.4, -0.6))
        axes.set_yticklabels(methods)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def _defined(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each score that at least one method has."""
    return [(str(metric), rows) for metric, rows in table.groupby("metric", sort=False) if rows["mean"].notna().any()]


def _notes(table: pd.DataFrame) -> list[str]:
    """What is to be known beforehand: the notes of the comparison, and which scores are undefined for all methods."""
    defined = {metric for metric, _ in _defined(table)}
    undefined = [label(metric) for metric in dict.fromkeys(table["metric"].astype(str)) if metric not in defined]
    left_out = [f"Undefined for every method, and left out: {', '.join(undefined)}."] if undefined else []
    return [*map(str, table.attrs.get("notes", [])), *left_out]


def _explanation(first: str) -> str:
    return (
        "Targets are smoothed (means over 3 x 3 spots). Mean over patients with bootstrap 95 % interval (with fewer than "
        "four patients their values, no interval and no test); std over seeds; the mean of the row minus that of "
        f"{first}, paired over patients, with its interval; two-sided Wilcoxon signed-rank test over patients; share of "
        f"the genes that the row predicts better than {first}, and the median over the genes of row minus {first}."
    )


def _heading(metric: str) -> str:
    return f"{label(metric)}, lower is better" if metric in ("mse", "mse_centered", "mae") else label(metric)


def _metric_table(rows: pd.DataFrame, first: str) -> Table:
    patients = patients_shown(rows)
    columns = (
        "method", "mean", *patients, "95 %", "std (seeds)", "patients", f"row minus {first}", "95 %", "p",
        f"genes better than {first}", f"median gene, row minus {first}",
    )  # fmt: skip
    cells = []
    for row in rows.to_dict("records"):
        better = row["genes_improved"]
        cells.append(
            (
                str(row["method"]),
                number(row["mean"]),
                *(number(row["by_patient"].get(patient, np.nan)) for patient in patients),
                _span(row["low"], row["high"]),
                f"{number(row['seed_std'])} ({row['num_seeds']})",
                str(row["num_patients"]),
                _signed(row["difference"]),
                _span(row["difference_low"], row["difference_high"]),
                number(row["wilcoxon_p"], 3),
                f"{100 * better:.0f} %" if np.isfinite(better) else NOT_DEFINED,
                _signed(row["gene_difference_median"]),
            )
        )
    return Table(columns, tuple(cells))


def patients_shown(rows: pd.DataFrame) -> list[str]:
    """Name the patients whose values stand in a table: all of them where they are too few for an interval."""
    patients = sorted({patient for values in rows["by_patient"] for patient in values})
    return patients if len(patients) < LEAST_PATIENTS else []


def _span(low: float, high: float) -> str:
    return f"{low:.4f} to {high:.4f}" if np.isfinite([low, high]).all() else NOT_DEFINED


def _signed(value: float) -> str:
    return f"{value:+.4f}" if np.isfinite(value) else NOT_DEFINED


def _remarks(table: pd.DataFrame) -> list[str]:
    """What the tests have to say, each remark once, with the methods and metrics it is about."""
    remarks: dict[str, list[str]] = {}
    for metric, method, remark in table[["metric", "method", "wilcoxon_note"]].itertuples(index=False):
        if isinstance(remark, str) and remark:
            remarks.setdefault(remark, []).append(f"{method}, {label(str(metric))}")
    compared = int((table["method"] != table["method"].iloc[0]).sum())
    return [
        f"All tests: {remark}." if len(about) == compared else f"{'; '.join(about)}: {remark}."
        for remark, about in remarks.items()
    ]


def _page(first: str, notes: list[str], remarks: list[str], tables: dict[str, Table], picture: Path) -> str:
    sections = [
        html.Section(
            "reading",
            "How to read it",
            html.note_list([*notes, *remarks]) + html.paragraph(_explanation(first)),
        ),
        html.Section(
            "means",
            "Means over patients",
            html.picture(
                picture,
                alt="Mean over patients and its interval for every method and metric",
                caption=f"Mean over patients and its bootstrap 95 % interval; dashed: the mean of {first}.",
            ),
        ),
        *(
            html.Section(
                f"metric-{index}", _heading(metric), html.scrollable(cells.to_html(f"Differences: row minus {first}"))
            )
            for index, (metric, cells) in enumerate(tables.items())
        ),
    ]
    names = list(dict.fromkeys(row[0] for cells in tables.values() for row in cells.rows))
    lead = f"{len(names)} methods on the same folds, slides and genes; differences are row minus {first}."
    return html.page(f"Comparison with {first}", lead, sections, "The same numbers are in comparison.csv.")
