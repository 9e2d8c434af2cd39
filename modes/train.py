"""--mode train: cross-validation over patients, one fold after the other, resumable at any moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from datasets.folds import Fold
from evaluation.report.write import format_table, write_report, write_summary
from evaluation.summary import summarise
from modes.prediction.checkpoint import score_checkpoint
from modes.training.compose import is_closed_form, open_layout
from modes.training.fold import FoldRun, fit_closed_form, new_model, start_folder
from modes.training.resume import check_continues, check_started_folds
from modes.training.run_data import RunData, find_folds, open_run_data
from modes.training.split import prepare_split
from utils.checkpoint import is_complete
from utils.cli import say
from utils.config import Config, with_overrides
from utils.devices import keep_freed_memory
from utils.files import reading
from utils.runs import check_run, open_run


@dataclass(frozen=True)
class TrainOptions:
    """What a training is asked for beside its configuration. config_name: of the folder of its runs."""

    config_name: str
    run_name: str
    device: torch.device
    folds: Sequence[int] | None
    resume: bool
    checkpoint_seconds: float
    with_report: bool = True  # figures and report.html; the tables are written in any case
    config_file: str | None = None  # the configuration as it was given, for the commands in messages; else config_name


def train(config: Config, options: TrainOptions) -> Path:
    """Train and test the folds, write the summary; returns the run folder."""
    if options.device.type == "cpu":
        keep_freed_memory()
    layout = open_layout(config)
    run_dir = Path(config.GENERAL.log_path) / options.config_name / options.run_name
    check_run(run_dir, config, options.resume)
    folds, notices = find_folds(config, layout, options.folds)
    patients = sorted(
        {p for fold in folds for p in (*fold.test_patients, *fold.train_patients, *fold.validation_patients)}
    )
    slides = [slide for slide in layout.slides_on_disk() if layout.spec.patient_of(slide) in patients]
    run_data = open_run_data(config, options.config_file or options.config_name, layout, slides, options.device, folds)
    check_started_folds(run_dir, run_data)
    open_run(run_dir, config, options.resume)
    say(f"Run folder: {run_dir}")
    for fold in folds:
        folder = run_dir / f"fold_{fold.index}"
        if is_complete(folder):
            say(f"Fold {fold.index} ({fold.name}): complete, nothing to do.")
            continue
        train_fold(run_data, fold, folder, options.checkpoint_seconds, notices)
    say(finish_run(run_dir, options.with_report))
    return run_dir


def train_seeds(config: Config, options: TrainOptions, seeds: Sequence[int]) -> None:
    """The same run once per seed, in `<run>/seed_<s>`; `--mode compare` takes the run folder and averages over seeds."""
    for seed in seeds:
        say(f"Seed {seed}")
        train(
            with_overrides(config, [f"GENERAL.seed={seed}"]),
            replace(options, run_name=f"{options.run_name}/seed_{seed}"),
        )


def train_fold(run_data: RunData, fold: Fold, folder: Path, checkpoint_seconds: float, notices: Sequence[str]) -> None:
    """Train one fold, or go on with it, then test the chosen weights."""
    split = prepare_split(run_data, fold)
    check_continues(folder, split)
    start_folder(folder, run_data, split, notices)
    run = FoldRun(run_data, split, folder, new_model(run_data, split), checkpoint_seconds)
    if is_closed_form(run_data.config):
        fit_closed_form(run)
    else:
        run.train()
    score_checkpoint(run_data, folder / "best.pt", folder)


def finish_run(run_dir: Path, with_report: bool = True) -> str:
    """Write summary.json, summary.md and report.html over the complete folds; returns the table for the terminal."""
    summary = summarise(run_dir, notes=_run_notes(run_dir))
    write_summary(run_dir, summary)
    if with_report:
        write_report(run_dir)
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
