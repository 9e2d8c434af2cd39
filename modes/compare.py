"""--mode compare: runs over the same patients beside each other, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.comparison.runs import compare_runs
from evaluation.comparison.write import comparison_text, write_comparison
from evaluation.fold_files import find_folds
from utils.checkpoint import seed_runs
from utils.cli import say
from utils.files import check_writable


def compare(runs: Sequence[str], out: str | None, intersect: bool) -> None:
    """Compare run folders (their seeds inside, if any) with the first of them and write the tables.

    Of several folders, as a pattern of the shell gives them, those that hold no finished run are left out, and said.
    out: folder of comparison.md, .csv, .html; by default `comparison/` beside the first run.
    """
    if len(runs) < 2:
        raise ValueError(f"--mode compare needs at least two run folders: --runs RUN RUN ...; found {len(runs)}.")
    left_out = {run: why for run in runs if (why := why_unfinished(Path(run), intersect))}
    finished = [run for run in runs if run not in left_out]
    listed = "".join(f"\n  {run}: {why}" for run, why in left_out.items())
    if len(finished) < 2:
        raise ValueError(f"--mode compare needs two finished runs, found {len(finished)}:{listed}")
    if left_out:
        say(f"Left out:{listed}")
    folder = Path(out) if out else Path(finished[0]).resolve().parent / "comparison"
    check_writable(folder / "comparison.html")
    table = compare_runs(finished, intersect=intersect)
    written = write_comparison(table, folder)
    say(comparison_text(table))
    say(f"Written: {', '.join(str(path) for path in written)}")


def why_unfinished(path: Path, intersect: bool) -> str:
    """Say why a folder cannot be compared yet; "" if it can.

    intersect: folds that are still missing do no harm, what is shared is compared.
    Raises FileNotFoundError if it does not exist.
    """
    for run in seed_runs(path):
        try:
            _, notes = find_folds(run)
        except ValueError as error:
            return str(error).removeprefix(f"{run} ")
        unfinished = [note for note in notes if note.startswith("Not complete")]
        if unfinished and not intersect:
            return unfinished[0]
    return ""
