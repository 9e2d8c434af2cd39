"""Several runs tested together: the mean of their predictions for each fold, scored and written like a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from datasets.digests import COUNTS, SPOTS
from datasets.targets import store_targets
from evaluation.predictions import HELD_OUT_FILE
from modes.prediction.ensemble import (
    Member,
    ensemble_folder,
    is_test_of,
    load_members,
    mean_prediction,
    models_of,
    outdated_folds,
    provenance_of,
    write_tested_runs,
)
from modes.prediction.slide import Scales
from modes.prediction.summary import finish_run
from modes.training.run_data import RunData
from modes.training.score import check_same_patch_encoder, predict_record, score_slides
from utils.cli import say
from utils.files import check_writable
from utils.runs import write_json
from utils.text import some
from utils.trained_fold import SplitRecord, changed_parts

OpenTested = Callable[[Member], RunData]


def test_together(
    checkpoints: Sequence[Path],
    notes: Sequence[str],
    overrides: Sequence[str],
    device: torch.device,
    open_tested: OpenTested,
    with_report: bool,
    genes: Sequence[str] = (),
) -> Path:
    """Test the mean of several runs on the folds that they share; returns the folder, `ensemble_...` beside the first run.

    checkpoints: of all runs, finished.  open_tested: reads the test slides of a fold, or says why they cannot be used.
    Raises ValueError for runs of other folds, test patients, test data, panels or features, and for files of one run.
    """
    members = load_members(checkpoints, overrides, device)
    by_fold = check_same_folds(members)
    runs = list(dict.fromkeys(member.run_folder for member in members))
    folder = ensemble_folder(runs)
    _check_is_of(folder, runs)
    _check_others(folder, runs, [of_fold[0].name for of_fold in by_fold.values()])
    check_writable(folder / "fold_0" / "predictions" / "slide.h5ad")
    (folder / HELD_OUT_FILE).unlink(missing_ok=True)  # of an earlier test
    note = f"Mean of the predictions of {len(runs)} runs: {', '.join(run.name for run in runs)}."
    for of_fold in by_fold.values():
        _test_fold(of_fold, folder / of_fold[0].name, [note, *notes], open_tested)
    write_tested_runs(folder, runs)
    say(finish_run(folder, with_report, genes))
    say(f"Written to {folder}")
    return folder


def check_same_folds(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Sort the members of several runs by fold: {fold: one member of each run}.

    Raises ValueError unless there are several runs and all have the same folds, with the same test slides, counts and spots of
    these, protocol and panel.
    """
    by_run: dict[Path, dict[int, Member]] = {}
    for member in members:
        by_run.setdefault(member.run_folder, {})[member.fold.split.fold] = member
    if len(by_run) == 1:
        (run,) = by_run
        raise ValueError(
            f"All that --model_path gives is of one run, {run}; a mean is tested of several runs. Give the run folder itself, "
            "or one fold of it with --fold."
        )
    (first_run, first), *others = by_run.items()
    problems = []
    for run, folds in others:
        if set(folds) != set(first):
            problems.append(f"{run} has folds {_listed(folds)}, {first_run} has {_listed(first)}")
            continue
        for index, member in folds.items():
            then, now = _what_is_tested(first[index]), _what_is_tested(member)
            changed = [name for name in then if then[name] != now[name]]
            problems += [f"fold {index} of {run} has another {', another '.join(changed)}"] if changed else []
            if other := _slides_of_other_data(first[index], member):
                problems.append(
                    f"fold {index} of {run} was given other counts or spots of the test slides {some(other)}"
                )
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"These runs cannot be tested together with {first_run}:\n  {listed}\nTheir mean has a held-out score only where "
            "all were tested on the same spots of the same patients. Give such runs, or --fold N of one that they share."
        )
    return {index: [folds[index] for folds in by_run.values()] for index in sorted(first)}


def _what_is_tested(member: Member) -> dict[str, object]:
    split = member.fold.split
    return {
        "set of test patients": sorted(split.test_patients),
        "set of test slides": sorted(split.test_slides),
        "protocol": split.protocol,
        "panel": member.genes,
    }


def _slides_of_other_data(first: Member, other: Member) -> list[str]:
    """Test slides whose counts or spots both members know, and not as the same."""
    changed = changed_parts(first.fold.split.digests, other.fold.split.digests, (COUNTS, SPOTS))
    return [slide for slide in other.fold.split.test_slides if slide in changed]


def _listed(folds: Mapping[int, Member]) -> str:
    return ", ".join(map(str, sorted(folds)))


def _check_is_of(folder: Path, runs: Sequence[Path]) -> None:
    """Refuse a folder that holds the results of other runs of the same names."""
    if folder.exists() and not is_test_of(folder, runs):
        raise ValueError(
            f"{folder} holds something else than a test of these runs. Move it away, or give the runs other names."
        )


def _check_others(folder: Path, runs: Sequence[Path], tested: Sequence[str]) -> None:
    """Refuse a folder with folds that are not tested now and were tested with other models than the runs hold now."""
    if others := [name for name in outdated_folds(folder, runs) if name not in tested]:
        raise ValueError(
            f"{folder} holds {', '.join(others)}, tested with other models than the runs hold now: a summary would mix both. "
            "Test all folds again, without --fold; a fold that a run no longer has: move it away."
        )


def _test_fold(members: Sequence[Member], folder: Path, notes: Sequence[str], open_tested: OpenTested) -> None:
    """Predict the test slides by one run after the other, score the mean and write it."""
    found: dict[str, list[Scales]] = {}
    tested: dict[str, tuple[list[str], str]] = {}  # the spots of a slide and the digest of its counts
    for member in members:
        run_data = open_tested(member)
        check_same_patch_encoder(member.fold, run_data, member.path)
        model = member.load()
        for record in run_data.store.named(member.fold.split.test_slides):
            data = (list(record.table.obs_names), run_data.digests[record.name][COUNTS])
            if tested.setdefault(record.name, data) != data:  # of runs that recorded no digests
                raise ValueError(
                    f"{member.path} is tested on other spots or counts of slide {record.name} ({len(data[0])} spots) than "
                    f"{members[0].path} ({len(tested[record.name][0])} spots), so their predictions have no mean. Give one "
                    "data folder for both with --data_dir, or test each run by itself."
                )
            found.setdefault(record.name, []).append(predict_record(run_data, model, record))
        member.release()
    runs = [member.run_folder for member in members]
    mean = {slide: mean_prediction(each, runs) for slide, each in found.items()}
    fold = members[0].fold
    split = replace(fold.split, selection=_selection_of(members))
    together = replace(
        fold,
        epoch=0,
        split=split,
        training_mean=torch.from_numpy(np.mean([member.fold.training_mean.numpy() for member in members], axis=0)),
    )
    targets = store_targets(run_data.store, split.test_slides, fold.genes, absent_is_zero=split.protocol == "clean")
    models = models_of([member.path for member in members])
    write_json(folder / "split.json", {**_described(split), "run_notes": list(notes), "models": models})
    score_slides(run_data, together, lambda record: mean[record.name], folder, targets, provenance_of(members, notes))


def _selection_of(members: Sequence[Member]) -> str:
    each = {member.fold.split.selection for member in members}
    return each.pop() if len(each) == 1 else "mixed"


def _described(split: SplitRecord) -> dict[str, object]:
    return {name: value for name, value in asdict(split).items() if value != {}}
