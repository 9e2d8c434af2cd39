"""The summary of a run, made again whenever folds of it have been scored."""

from __future__ import annotations

import json
from pathlib import Path

from evaluation.fold_files import find_folds
from evaluation.held_out import measure_held_out, write_held_out
from evaluation.report.explorer import write_explorer
from evaluation.report.write import format_table, write_report, write_summary
from evaluation.summary import summarise
from utils.checkpoint import is_complete
from utils.files import reading


def finish_run(run_dir: Path, with_report: bool = True) -> str:
    """Write held_out.json, summary.json, summary.md, report.html and explorer.html over the complete folds.

    Returns the table for the terminal.
    """
    held_out = measure_held_out(run_dir)
    write_held_out(run_dir, held_out)
    coverage = held_out.describe()
    summary = summarise(run_dir, notes=[*_run_notes(run_dir), *([coverage] if coverage else [])])
    write_summary(run_dir, summary)
    if with_report:
        write_report(run_dir)
        folds, _ = find_folds(run_dir)
        predictions = sorted((path for fold in folds for path in fold.glob("predictions/*.h5ad")), key=lambda p: p.name)
        if predictions:
            write_explorer(run_dir / "explorer.html", predictions, title=f"Genes of {summary['run']}")
    return format_table(summary)


def _run_notes(run_dir: Path) -> list[str]:
    """What the folds were told at their start about slides and folds left out, each sentence once; and scores that are
    not of a finished training."""
    notes: list[str] = []
    for path in sorted(run_dir.glob("fold_*/split.json")):
        with reading(path, "the record of how a fold was started"):
            notes += [str(note) for note in json.loads(path.read_text(encoding="utf-8")).get("run_notes", [])]
    notes = list(dict.fromkeys(notes))
    scored = [path.parent for path in sorted(run_dir.glob("fold_*/result.json"))]
    unfinished = [folder.name for folder in scored if not is_complete(folder)]
    if unfinished:
        notes.append(f"{', '.join(unfinished)}: scored before the training had ended. Go on with --resume.")
    return notes
