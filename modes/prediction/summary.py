"""The summary of a run, made again whenever folds of it have been scored."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.comparison.verdict import STRONGER, Circumstances, judge, ridge_beside
from evaluation.fold_files import (
    FoldRecord,
    check_together,
    prediction_files,
    read_fold,
    read_histories,
    read_run,
    scored_folds,
)
from evaluation.held_out import measure_held_out, write_held_out
from evaluation.predictions import read_compared, read_prediction
from evaluation.report.explorer import write_explorer
from evaluation.report.fold_figures import read_clusters
from evaluation.report.write import format_table, write_report, write_summary
from evaluation.summary import summarise
from utils.checkpoint import config_of_run, fold_checkpoints, is_complete, load_checkpoint
from utils.cli import progress
from utils.config import load_config
from utils.files import reading

# What the features of a run and its folds depend on, and where its runs lie; the model's own settings mean nothing to ridge.
_SHARED = ("DATA", "EVALUATION.protocol", "GENERAL.log_path")


def finish_run(run_dir: Path, with_report: bool = True, genes: Sequence[str] = ()) -> str:
    """Write held_out.json, summary.json, summary.md, report.html and explorer.html over the complete folds.

    genes: drawn on every slide in report.html, beside the best and the worst. Returns the table for the terminal.
    """
    records, found_notes = read_run(run_dir)
    held_out = measure_held_out(run_dir, records)
    write_held_out(run_dir, held_out)
    coverage = held_out.describe()
    notes = [*_run_notes(run_dir), *([coverage] if coverage else [])]
    summary = summarise(run_dir, notes, (records, found_notes))
    summary = {"verdict": judge(summary, _circumstances(run_dir)), **summary}
    write_summary(run_dir, summary)
    if with_report:
        write_report(run_dir, genes=genes, records=records)
        predictions = sorted((path for r in records for path in prediction_files(r.path)), key=lambda p: p.name)
        if predictions:
            write_explorer(run_dir / "explorer.html", predictions, title=f"Genes of {summary['run']}")
    return format_table(summary)


def check_scored_folds(run_dir: Path, in_full: bool = False) -> None:
    """Read what `finish_run` will read of the folds that are complete, before others are trained; nothing is written.

    in_full: also of predictions what its figures alone need, which takes four times as long.
    Raises ValueError that names every damaged file and what makes it again, and as `read_run`.
    """
    records: list[FoldRecord] = []
    problems: list[str] = []
    for folder in progress(
        list(scored_folds(run_dir).values()), description="complete folds", unit="fold", leave=False
    ):
        try:
            if not _is_complete(folder):
                continue  # trained, and then scored, again
            records.append(read_fold(folder))
            if (folder / "clusters.csv").is_file():
                read_clusters(folder / "clusters.csv")
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        for path in prediction_files(folder):
            try:
                read_compared(path, records[-1].genes)
                if in_full:
                    read_prediction(path)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    check_together([record.path for record in records])


def _is_complete(folder: Path) -> bool:
    try:
        return is_complete(folder)
    except ValueError as error:
        raise ValueError(
            f"{error} Restore it; or move it elsewhere: the fold keeps its scores, and nothing predicts with it any more."
        ) from error


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


def _circumstances(run_dir: Path) -> Circumstances:
    """What the judgement of a run needs beside its scores; imported runs and means of runs have no configuration."""
    histories, config = read_histories(run_dir), config_of_run(run_dir)
    model = config.MODEL.name if config else ""
    ridge = ridge_beside(run_dir, model)
    if config is None:
        return Circumstances(histories=histories, ridge=ridge)
    return Circumstances(
        model=model,
        epochs=config.EVALUATION.fixed_epochs or config.TRAINING.epochs,
        learning_rate=config.TRAINING.learning_rate,
        histories=histories,
        ridge=ridge,
        to_make_one="" if ridge else _ridge_command(run_dir, config.to_dict()),
    )


def _ridge_command(run_dir: Path, own: Mapping[str, Mapping[str, Any]]) -> str:
    """The command that trains ridge beside a run, on the same folds and features; "" where the run's own is not known."""
    checkpoint = next(iter(fold_checkpoints(run_dir).values()), None)
    try:
        name = load_checkpoint(checkpoint, memory_map=True).config_name if checkpoint else ""
        given = load_config(name).to_dict()
    except (ValueError, OSError):
        return ""
    keys = [(section, key) for section, values in own.items() for key in values]
    shared = [(s, key) for s, key in keys if s in _SHARED or f"{s}.{key}" in _SHARED]
    changed = [f"{s}.{key}={_as_flag(own[s][key])}" for s, key in shared if own[s][key] != given[s][key]]
    words = [
        "python",
        "main.py",
        "--config_name",
        name,
        "--mode",
        "train",
        "--model",
        STRONGER,
        "--run_name",
        STRONGER,
    ]
    return shlex.join([*words, *(word for setting in changed for word in ("--set", setting))])


def _as_flag(value: object) -> str:
    """A value as --set reads it."""
    return value if isinstance(value, str) else json.dumps(value)
