"""What a run leaves for its readers: summary.json, summary.md, figures and report.html.

Everything is made from the files of the run folder (`evaluation.fold_files` lists them), so it can be made again at
any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.fold_files import plain
from evaluation.tables import (
    check_summary,
    fold_rows,
    interval_rows,
    list_rows,
    price_rows,
    scale_rows,
)
from utils.files import write_text

# What `datasets.expression` makes, for summaries that do not name their unit.
UNIT = "log10(1 + counts per 10 000 of the panel)"
LEGEND = (
    "PCC(A): over all genes of the panel. PCC(H): over the highly predictive genes. "
    "MSE of mean, MAE of mean: errors of predicting the mean of the training spots."
)
SECTIONS = (
    ("Mean over patients with bootstrap 95 % interval", interval_rows),
    ("Every scale and every target", scale_rows),
    ("PCC(H) under the list of either protocol", list_rows),
    ("What choosing the epoch on the test fold would gain", price_rows),
)


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write summary.json (sorted keys: equal runs give equal bytes) and summary.md; returns both paths.

    summary: as `evaluation.protocol.summarise` makes it; optional: "unit". ValueError lists required keys it lacks.
    """
    check_summary(summary, "the summary")
    run_dir = Path(run_dir)
    content = json.dumps(plain(summary), indent=1, sort_keys=True, allow_nan=False) + "\n"
    return write_text(run_dir / "summary.json", content), write_text(run_dir / "summary.md", _markdown(summary))


def format_table(summary: Mapping[str, Any]) -> str:
    """The folds, their mean and standard deviation as text for the terminal; the first line names the protocol."""
    check_summary(summary, "the summary")
    return "\n".join(
        [
            str(summary["protocol_description"]),
            "",
            fold_rows(summary).to_text(),
            "",
            LEGEND,
            f"Unit of every error: {summary.get('unit') or UNIT}.",
            *(f"Note: {note}" for note in summary["notes"]),
        ]
    )


def _markdown(summary: Mapping[str, Any]) -> str:
    description = str(summary["protocol_description"])
    parts = [
        f"**{description[0].upper()}{description[1:]}.**",
        f"# {summary['run']}",
        f"{_counts(summary)} Unit of every target, prediction and error: {summary.get('unit') or UNIT}.",
        "## Folds",
        fold_rows(summary).to_markdown(),
        LEGEND,
    ]
    if summary["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in summary["notes"])]
    for heading, rows in SECTIONS:
        table = rows(summary)
        if table is not None:
            parts += [f"## {heading}", table.to_markdown()]
    return "\n\n".join(parts) + "\n"


def _counts(summary: Mapping[str, Any]) -> str:
    """ "4 folds, 4 patients, 8 slides, 960 spots, 60 genes." of what the summary knows."""
    names = ("folds", "patients", "slides", "spots", "genes")
    known = [(name, summary.get(f"num_{name}")) for name in names]
    return ", ".join(f"{count} {name if count != 1 else name[:-1]}" for name, count in known if count is not None) + "."
