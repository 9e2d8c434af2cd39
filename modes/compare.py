"""--mode compare: runs over the same patients beside each other, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evaluation.comparison.runs import compare_runs
from evaluation.comparison.write import write_comparison
from utils.cli import say
from utils.files import check_writable


def compare(runs: Sequence[str], out: str | None, intersect: bool) -> None:
    """Compare run folders (their seeds inside, if any) with the first of them and write the tables.

    out: folder of comparison.md, .csv, .html; by default `comparison/` beside the first run.
    """
    if len(runs) < 2:
        raise ValueError(f"--mode compare needs at least two run folders: --runs RUN RUN ...; found {len(runs)}.")
    folder = Path(out) if out else Path(runs[0]).resolve().parent / "comparison"
    check_writable(folder / "comparison.html")
    table = compare_runs(runs, intersect=intersect)
    written = write_comparison(table, folder)
    columns = ["method", "mean", "low", "high", "difference", "wilcoxon_p", "genes_improved"]
    with pd.option_context("display.width", 160, "display.float_format", "{:.4f}".format):
        for metric, rows in table.groupby("metric", sort=False):
            say(f"\n{metric}\n{rows[columns].to_string(index=False)}")
    for note in table.attrs["notes"]:
        say(f"Note: {note}")
    say(f"Written: {', '.join(str(path) for path in written)}")
