"""The model on all patients: for use, once a cross-validation has said how good its method is and how long it should train."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from evaluation.fold_files import FoldRecord, read_run
from evaluation.held_out import measure_held_out
from evaluation.predictions import HeldOut, read_held_out
from modes.training.compose import is_closed_form
from modes.training.run_data import RunData
from utils.cli import say
from utils.config import MAY_CHANGE, Config, differences, read_config, with_overrides
from utils.files import require_file
from utils.text import some

# What the cross-validation may have had otherwise without being another method.
_NO_MATTER = MAY_CHANGE | {"GENERAL.exp_id", "EVALUATION.fixed_epochs"}
_SAID = ("GENERAL.seed", "TRAINING.epochs", "TRAINING.patience")


@dataclass(frozen=True)
class CrossValidation:
    """The run whose epochs and scores a final model takes over."""

    path: Path
    folds: list[FoldRecord]
    held_out: HeldOut


def open_cross_validation(run_dir: str | Path, config: Config) -> CrossValidation:
    """Read the run that the final model follows, and hold its configuration against that of the model.

    Raises FileNotFoundError, or ValueError for a run that cannot be read or is of another configuration.
    """
    path = Path(run_dir)
    saved = require_file(
        path / "config.yaml", "--epochs_from should be the folder of a cross-validation (--mode train)."
    )
    found = differences(read_config(saved), config)
    key_of = {line: line.split(":")[0] for line in found}
    refused = [line for line in found if key_of[line] not in _NO_MATTER and key_of[line] not in _SAID]
    if refused:
        listed = "\n  ".join(refused)
        raise ValueError(
            f"--epochs_from {path} is a run of another configuration:\n  {listed}\n"
            "Its epochs and scores say nothing about this one. Give the flags of that run, or another run."
        )
    for line in found:
        if key_of[line] in _SAID:
            say(f"Note: {line} (--epochs_from {path}).")
    folds, notes = read_run(path)
    for note in notes:
        say(f"{path}: {note}")
    return CrossValidation(path, folds, read_held_out(path) or measure_held_out(path, folds))


def with_chosen_epochs(config: Config, source: CrossValidation | None) -> Config:
    """Fix the number of epochs: EVALUATION.fixed_epochs, or the median of those that the cross-validation chose.

    Raises ValueError where neither is there. A model that is fitted in closed form has no epochs and needs none.
    """
    if is_closed_form(config) or config.EVALUATION.fixed_epochs is not None:
        return config
    chosen = [int(fold.result["epoch"]) for fold in source.folds if fold.result.get("epoch")] if source else []
    if not chosen:
        raise ValueError(
            "--all_patients: no patient is left to choose the epoch on. Give the cross-validation that has chosen them, "
            "--epochs_from RUN, or a number, --fixed_epochs N."
        )
    epochs = round(statistics.median(chosen))
    say(
        f"Epochs: {epochs}, the median of those chosen in the folds of the cross-validation ({some(sorted(chosen), 30)})."
    )
    return with_overrides(config, [f"EVALUATION.fixed_epochs={epochs}"])


def check_same_data(source: CrossValidation, run_data: RunData) -> None:
    """Hold patch encoder and patients of the cross-validation against those of the final model.

    Raises ValueError for features of another patch encoder; other patients are said.
    """
    encoder = run_data.store.encoder
    for fold in source.folds:
        then = dict(fold.split.get("features") or {})
        sha256 = then.get("encoder_sha256", "unknown")
        is_other = sha256 != encoder.sha256 and "unknown" not in (sha256, encoder.sha256)
        if then.get("encoder", encoder.name) != encoder.name or is_other:
            raise ValueError(
                f"--epochs_from {source.path}: its folds were trained on features of {then.get('encoder')} (weights "
                f"{sha256[:12]}...), those at hand are of {encoder.name} ({encoder.sha256[:12]}...). Train the "
                "cross-validation on these features first."
            )
    here = set(run_data.store.patients.values())
    without_score = sorted(here - set(source.held_out.patients))
    gone = sorted(set(source.held_out.patients) - here)
    if without_score:
        say(f"Note: {source.path} held out none of {some(without_score)}; they are trained on all the same.")
    if gone:
        say(f"Note: {some(gone)}, held out in {source.path}, are not in {run_data.layout.root} and not trained on.")
