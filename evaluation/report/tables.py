"""Tables of a summary: the same cells as terminal text, Markdown and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.slide_result import SCALES, TRAINING_MEAN

NOT_DEFINED = "\N{EN DASH}"
SCORES = ("pcc_all", "pcc_h", "mse", "mae", "training_mean_mse", "training_mean_mae")
LABELS = {
    "pcc_all": "PCC(A)",
    "pcc_h": "PCC(H)",
    "mse": "MSE",
    "mse_centered": "MSE without offset",
    "mae": "MAE",
    "training_mean_mse": "MSE of mean",
    "training_mean_mae": "MAE of mean",
    "pcc_highly_variable": "PCC(HVG)",
    "spearman": "Spearman",
    "ccc": "CCC",
    "r2": "R2",
    "explained_variance": "explained variance",
    "rvd": "RVD",
    "ssim": "SSIM",
    "training_mean": "training mean",
}
# The order in which scores and predictions are listed; sorted JSON has lost its own.
_ORDER = ("pcc_all", "pcc_h", "mse", "mse_centered", "mae", "spearman", "ccc", "r2", "explained_variance", "rvd", "ssim",
          "pcc_highly_variable")  # fmt: skip
_PREDICTIONS = (*SCALES, TRAINING_MEAN)
_REQUIRED = ("protocol", "protocol_description", "run", "num_folds", "headline", "folds", "notes")
_REQUIRED_OF_FOLD = ("fold", "name", "test_patients", "num_slides", "num_spots", "epoch", *SCORES)


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `left` columns are aligned to the left, numbers to the right; the last `footer` rows
    sum up the others."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    footer: int = 0

    def to_text(self) -> str:
        """Pad the columns with spaces, for a terminal."""
        widths = [max(len(row[index]) for row in (self.columns, *self.rows)) for index in range(len(self.columns))]
        rule = "  ".join("-" * width for width in widths)
        lines = [self._padded(self.columns, widths), rule]
        for number, row in enumerate(self.rows):
            if self.footer and number == len(self.rows) - self.footer:
                lines.append(rule)
            lines.append(self._padded(row, widths))
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Make a pipe table, padded so that it also reads well as text."""
        escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in (self.columns, *self.rows)]
        widths = [max(3, *(len(row[index]) for row in escaped)) for index in range(len(self.columns))]
        rule = ["-" * width if index < self.left else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
        lines = [self._padded(row, widths, " | ") for row in escaped]
        lines.insert(1, " | ".join(rule))
        return "\n".join(f"| {line} |" for line in lines)

    def to_html(self, caption: str) -> str:
        """Make a <table> with a caption; class "sum" marks the rows that sum up."""
        head = "".join(f'<th scope="col"{self._class(i)}>{html.escape(c)}</th>' for i, c in enumerate(self.columns))
        lines = [f"<table><caption>{html.escape(caption)}</caption>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
        for number, row in enumerate(self.rows):
            mark = ' class="sum"' if number >= len(self.rows) - self.footer else ""
            cells = "".join(f"<td{self._class(i)}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
            lines.append(f"<tr{mark}>{cells}</tr>")
        return "\n".join([*lines, "</tbody></table>"])

    def _class(self, index: int) -> str:
        return ' class="text"' if index < self.left else ""

    def _padded(self, cells: Sequence[str], widths: Sequence[int], separator: str = "  ") -> str:
        padded = [
            cell.ljust(width) if index < self.left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths))
        ]
        return separator.join(padded).rstrip() if separator.isspace() else separator.join(padded)


def number(value: Any, digits: int = 4) -> str:
    """Show a score as text; a dash where it is undefined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_DEFINED
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def label(name: str) -> str:
    """Name a score or scale as a reader knows it."""
    return LABELS.get(name, name.replace("_", " "))


def check_summary(summary: Mapping[str, Any], source: str) -> None:
    """Raise ValueError that lists everything a summary lacks. source: where it came from, for the message."""
    missing = [name for name in _REQUIRED if name not in summary]
    for row in summary.get("folds", []):
        missing += [f"folds[{row.get('fold', '?')}].{name}" for name in _REQUIRED_OF_FOLD if name not in row]
    missing += [f"headline.{name}" for name in SCORES if "headline" in summary and name not in summary["headline"]]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)}. A summary is made by evaluation.summary.summarise(run_dir); "
            "one written by another version of the program must be made again: python main.py --mode test "
            "--model_path RUN"
        )


def fold_rows(summary: Mapping[str, Any]) -> Table:
    """Show one row a fold, then the mean and the standard deviation over folds."""
    rows = [
        (
            f"{row['fold']} ({row['name']})" if str(row["name"]) != str(row["fold"]) else str(row["fold"]),
            _shortened(row["test_patients"]),
            str(row["num_slides"]),
            str(row["num_spots"]),
            number(row["epoch"]),
            *(number(row[name]) for name in SCORES),
        )
        for row in summary["folds"]
    ]
    headline = summary["headline"]
    # Which mean it is depends on the protocol, and the table says so.
    over = {"paper": "mean over folds", "clean": "mean over patients"}.get(summary["protocol"], "mean")
    for name, key in ((over, "mean"), ("std over folds", "std")):
        rows.append((name, "", "", "", "", *(number(headline[score][key]) for score in SCORES)))
    columns = ("fold", "test patients", "slides", "spots", "epoch", *(label(name) for name in SCORES))
    return Table(columns, tuple(rows), left=2, footer=2)


def interval_rows(summary: Mapping[str, Any]) -> Table | None:
    """Show the mean over patients with its 95 % interval; None when no score has one, as with few patients."""
    intervals = summary.get("intervals") or {}
    if all(interval["low"] is None for interval in intervals.values()):
        return None
    rows = [
        (label(name), *(number(intervals[name][key]) for key in ("mean", "low", "high", "num_patients")))
        for name in _ORDER
        if name in intervals
    ]
    return Table(("score", "mean over patients", "95 % from", "to", "patients"), tuple(rows))


def scale_rows(summary: Mapping[str, Any]) -> Table | None:
    """Show every defined score of the fused prediction, of each scale and of the training mean, against each truth."""
    scales = summary.get("scales") or []
    if not scales:
        return None
    names = [name for name in _ORDER if any(row.get(name) is not None for row in scales)]
    ordered = sorted(scales, key=lambda row: (row["truth"], _PREDICTIONS.index(row["scale"])))
    rows = [(row["truth"], label(row["scale"]), *(number(row.get(name), 3) for name in names)) for row in ordered]
    return Table(("target", "prediction", *(label(name) for name in names)), tuple(rows), left=2)


def list_rows(summary: Mapping[str, Any]) -> Table | None:
    """Show PCC(H) under the list of either protocol."""
    both = summary.get("pcc_h") or {}
    kinds = {"paper": "paper: ranked on test predictions", "clean": "clean: fixed from training data"}
    rows = [
        (text, _pcc_h(summary, name, both[name]["mean"]), *(number(both[name][key]) for key in ("std", "size")))
        for name, text in kinds.items()
        if name in both
    ]
    return Table(("list", "PCC(H)", "std over folds", "genes"), tuple(rows)) if rows else None


def protocol_rows(summary: Mapping[str, Any]) -> Table | None:
    """Show the same predictions in the order of averages of either protocol."""
    both = summary.get("both_protocols") or {}
    kinds = {"paper": "paper: slides of a fold, folds", "clean": "clean: slides of a patient, patients"}
    rows = []
    for name, text in kinds.items():
        if name in both:
            pcc_all, pcc_h, mse, mae = (both[name][key]["mean"] for key in ("pcc_all", "pcc_h", "mse", "mae"))
            rows.append((text, number(pcc_all), _pcc_h(summary, name, pcc_h), number(mse), number(mae)))
    return Table(("averaged and listed as", "PCC(A)", "PCC(H)", "MSE", "MAE"), tuple(rows)) if rows else None


def _pcc_h(summary: Mapping[str, Any], protocol: str, value: float | None) -> str:
    """PCC(H) over the list of a protocol, marked where a clean run shows what the paper's list would make of it."""
    is_biased = summary["protocol"] == "clean" and protocol == "paper" and value is not None
    return f"{number(value)} (chosen on the test, do not report)" if is_biased else number(value)


def price_rows(summary: Mapping[str, Any]) -> Table | None:
    """Show what choosing the epoch on the test fold would have gained in PCC(A)."""
    price = summary.get("selection_price")
    if not price:
        return None
    names = ("fold", "chosen_epoch", "chosen", "best_epoch", "best", "price")
    rows = [tuple(number(row[name]) for name in names) for row in price["folds"]]
    rows.append(("mean", "", "", "", "", number(price["mean"])))
    columns = ("fold", "chosen epoch", "test PCC(A) there", "best epoch", "test PCC(A) there", "price")
    return Table(columns, tuple(rows), footer=1)


def _shortened(names: Sequence[str], limit: int = 40) -> str:
    """The names, or as many as fit and how many more."""
    names = [str(name) for name in names]
    for shown in range(len(names), 0, -1):
        rest = f" and {len(names) - shown} more" if shown < len(names) else ""
        text = ", ".join(names[:shown]) + rest
        if len(text) <= limit or shown == 1:
            return text
    return ""
