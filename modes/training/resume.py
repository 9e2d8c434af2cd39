"""Before a run goes on: its data must be those that its folds were started with, or two studies would mix in one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.digests import changed_slides
from evaluation.fold_files import read_genes
from modes.training.plan import plan_all_patients, plan_folds
from modes.training.run_data import RunData, fixed_panel
from modes.training.split import Split
from utils.checkpoint import check_fold_folders, fold_checkpoints, load_checkpoint
from utils.cli import say
from utils.files import reading
from utils.text import some
from utils.trained_fold import ALL_PATIENTS_FOLDER, SplitRecord

_WRITTEN_AGAIN = "Restore it; or move it elsewhere: a fold that is trained on writes it again."


@dataclass(frozen=True)
class Started:
    """What a fold was started with, as far as it is known."""

    split: SplitRecord
    encoder: Mapping[str, str]  # name and sha256
    tokens: Mapping[str, Any]
    genes: list[str] | None
    training_mean: Tensor | None


def check_started_folds(run_dir: Path, run_data: RunData) -> None:
    """Compare every fold of the run, complete or not, with the slides, features and tokens there are now. Writes nothing.

    Raises ValueError that names each change, the folds it concerns, and what to do, and as `check_fold_folders`.
    """
    finals = [path for path in [run_dir / ALL_PATIENTS_FOLDER / "best.pt"] if path.is_file()]
    best = [*fold_checkpoints(run_dir).values(), *finals]
    # The same settings, and of a damaged best.pt the training says more.
    check_fold_folders([last if (last := path.with_name("last.pt")).is_file() else path for path in best])
    planned = [plan_all_patients(run_data.config, run_data.store.patients)]
    if any(run_dir.glob("fold_*")):
        planned += plan_folds(run_data.config, run_data.layout.spec, run_data.store.patients)[0]
    folds = {split.fold: split for split in planned}
    panel = fixed_panel(run_data.config, run_data.layout)
    changes: dict[str, list[str]] = {}
    without_digests = []
    for folder in sorted([*run_dir.glob("fold_*"), run_dir / ALL_PATIENTS_FOLDER]):
        if (started := _started(folder)) is None:
            continue
        if not started.split.digests:
            without_digests.append(folder.name)
        found = _changed_data(started, run_data, folds.get(started.split.fold))
        if panel is not None:
            found += _changed_list("genes of the panel", started.genes, panel)
        for change in found:
            changes.setdefault(change, []).append(folder.name)
    if changes:
        _refuse(run_dir, [f"{change} ({', '.join(names)})" for change, names in changes.items()])
    if without_digests:
        say(
            f"{', '.join(without_digests)}: started by a version that recorded no digests of the data; whether the counts and "
            "features of the slides are still the same is checked only as far as that version could."
        )


def check_continues(folder: Path, split: Split) -> None:
    """Compare the split of a fold that was begun with the one there is now: every patient, slide and gene, the targets.

    Raises ValueError as `check_started_folds`; writes nothing.
    """
    if (started := _started(folder)) is None:
        return
    before, now = asdict(started.split), asdict(split.record)
    changes = []
    for part in ("train", "validation", "test"):
        for what in ("patients", "slides"):
            name = f"{part}_{what}"
            changes += _changed_list(f"{part} {what}", sorted(before[name]), sorted(now[name]))
    changes += _changed_list("genes of the panel", started.genes, split.genes)
    mean = started.training_mean
    if not changes and mean is not None and not torch.allclose(mean, split.training_mean, rtol=1e-4, atol=1e-6):
        changes.append("counts: the expression of the training slides has another mean")
    if changes:
        _refuse(folder, changes)


def _started(folder: Path) -> Started | None:
    """What a fold was started with: of its checkpoint, or where there is none yet of split.json; None before that."""
    path, content, tokens = folder / "split.json", None, {}
    if path.is_file():
        with reading(path, "the record of how a fold was started", _WRITTEN_AGAIN):
            content = json.loads(path.read_text(encoding="utf-8"))
            tokens = dict(content.get("tokens", {}))
    for written in (folder / "last.pt", folder / "best.pt"):
        if written.is_file():
            trained = load_checkpoint(written, memory_map=True).without_weights()
            return Started(
                split=trained.split,
                encoder={"name": trained.encoder.name, "sha256": trained.encoder.sha256},
                tokens={"token_pool": trained.encoder.token_pool, **tokens},
                genes=trained.genes,
                training_mean=trained.training_mean,
            )
    if content is None:
        return None
    genes = folder / "genes.txt"
    try:
        split = SplitRecord.from_dict(content, str(path))
    except ValueError as error:
        raise ValueError(f"{error} {_WRITTEN_AGAIN}") from error
    return Started(
        split=split,
        encoder={"name": split.features["encoder"], "sha256": split.features["encoder_sha256"]}
        if split.features
        else {},
        tokens=tokens,
        genes=read_genes(genes) if genes.is_file() else None,
        training_mean=None,
    )


def _changed_data(started: Started, run_data: RunData, now: SplitRecord | None) -> list[str]:
    """Patients and slides that were trained on (validation included) and tested, the encoder, the tokens."""
    then = started.split
    if now is None:
        return [f"test patients: no slide of {', '.join(then.test_patients)} is there"]
    changes = []
    for name, before, found in (
        ("training patients", then.fitted_patients, now.fitted_patients),
        ("training slides", then.fitted_slides, now.fitted_slides),
        ("test patients", then.test_patients, now.test_patients),
        ("test slides", then.test_slides, now.test_slides),
    ):
        changes += _changed_list(name, sorted(before), sorted(found))
    changes += changed_slides(then.digests, run_data.digests)
    encoder = {"name": run_data.store.encoder.name, "sha256": run_data.store.encoder.sha256}
    changes += _changed_values("encoder", started.encoder, encoder)
    tokens = {"token_pool": run_data.token_pool, **run_data.token_source}
    return changes + _changed_values("tokens", started.tokens, tokens)


def _changed_list(name: str, before: Sequence[str] | None, now: Sequence[str]) -> list[str]:
    """One sentence, or none where nothing has changed."""
    if before is None or list(before) == list(now):
        return []
    gone, new = [x for x in before if x not in now], [x for x in now if x not in before]
    parts = ([f"no longer {some(gone, 6)}"] if gone else []) + ([f"now also {some(new, 6)}"] if new else [])
    return [f"{name}: {', '.join(parts) or 'in another order'}"]


def _changed_values(name: str, before: Mapping, now: Mapping) -> list[str]:
    """A sentence for each value that both know and that is another now."""
    return [
        f"{name}: {key} {now[key]} instead of {value}"
        for key, value in before.items()
        if key in now and now[key] != value
    ]


def _refuse(place: Path, changes: Sequence[str]) -> None:
    listed = "\n  ".join(changes)
    raise ValueError(
        f"--resume: the data have changed since {place} was started:\n  {listed}\n"
        "Restore them as they were, or start another run with --run_name NAME."
    )
