"""Before a run goes on: its data must be those that its folds were started with, or two studies would mix in one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from datasets.folds import Fold
from modes.training.run_data import Study, possible_folds, slides_of
from modes.training.split import Split
from utils.checkpoint import load_checkpoint
from utils.files import load_names
from utils.text import some

PARTS = ("train", "validation", "test")


def check_started_folds(run_dir: Path, study: Study) -> None:
    """Every fold of the run, complete or not, against the slides, features and tokens there are now. Writes nothing.

    Raises ValueError that names each change, the folds it concerns, and what to do.
    """
    folds = {fold.index: fold for fold in possible_folds(study.layout)[0]}
    panel = load_names(study.layout.panel_path) if study.config.EVALUATION.protocol == "paper" else None
    changes: dict[str, list[str]] = {}
    for folder in sorted(run_dir.glob("fold_*")):
        if (started := _started(folder)) is None:
            continue
        fold = folds.get(started["fold"]["fold"])
        found = _changed_data(started, study, fold)
        if panel is not None:
            found += _changed_list("genes of the panel", started["genes"], panel)
        for change in found:
            changes.setdefault(change, []).append(folder.name)
    if changes:
        _refuse(run_dir, [f"{change} ({', '.join(names)})" for change, names in changes.items()])


def check_continues(folder: Path, split: Split) -> None:
    """The split of a fold that was begun against the one there is now: every patient, slide and gene, and the targets.

    Raises ValueError as `check_started_folds`; writes nothing.
    """
    if (started := _started(folder)) is None:
        return
    now = split.to_dict(started["fold"]["protocol"])
    changes = []
    for part in PARTS:
        for what in ("patients", "slides"):
            changes += _changed_list(f"{part} {what}", started["fold"][f"{part}_{what}"], now[f"{part}_{what}"])
    changes += _changed_list("genes of the panel", started["genes"], split.genes)
    mean = started["training_mean"]
    if not changes and mean is not None and not torch.allclose(mean, split.training_mean, rtol=1e-4, atol=1e-6):
        changes.append("counts: the expression of the training slides has another mean")
    if changes:
        _refuse(folder, changes)


def _started(folder: Path) -> dict | None:
    """What a fold was started with: of its checkpoint, or where there is none yet of split.json; None before that."""
    if not (folder / "split.json").is_file():
        return None
    fold = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    features = fold.get("features", {})
    genes = folder / "genes.txt"
    started = {
        "fold": fold,
        "encoder": {"name": features["encoder"], "sha256": features["encoder_sha256"]} if features else {},
        "tokens": fold.get("tokens", {}),
        "genes": genes.read_text(encoding="utf-8").splitlines() if genes.is_file() else None,
        "training_mean": None,
    }
    written = [folder / name for name in ("last.pt", "best.pt") if (folder / name).is_file()]
    if written:
        content = load_checkpoint(written[0], memory_map=True)
        encoder = {key: content["encoder"][key] for key in ("name", "sha256")}
        started |= {"fold": content["fold"], "encoder": encoder, "genes": content["genes"]}
        started["tokens"] = {"token_pool": content["encoder"].get("token_pool", 1), **started["tokens"]}
        started["training_mean"] = content["training_mean"].clone()
    return started


def _changed_data(started: Mapping, study: Study, fold: Fold | None) -> list[str]:
    """Patients and slides that were trained on (validation included) and tested, the encoder, the tokens."""
    then = started["fold"]
    if fold is None:
        return [f"test patients: no slide of {', '.join(then['test_patients'])} is there"]
    changes = []
    for name, parts, now in (
        ("training", ("train", "validation"), fold.train_patients),
        ("test", ("test",), fold.test_patients),
    ):
        for what, found in (("patients", now), ("slides", slides_of(study.layout, now))):
            before = [entry for part in parts for entry in then[f"{part}_{what}"]]
            changes += _changed_list(f"{name} {what}", sorted(before), sorted(found))
    encoder = {"name": study.store.encoder.name, "sha256": study.store.encoder.sha256}
    changes += _changed_values("encoder", started["encoder"], encoder)
    tokens = {"token_pool": study.token_pool, **study.token_source}
    return changes + _changed_values("tokens", started["tokens"], tokens)


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
