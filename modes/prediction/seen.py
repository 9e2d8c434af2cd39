"""Whether a slide is one that the models were trained on: every fold records the fingerprints of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modes.prediction.ensemble import Member
from utils.checkpoint import fold_checkpoints, has_ended, load_checkpoint


def who_has_seen(members: Sequence[Member], fingerprint: str | None) -> dict[str, str]:
    """Find the members that were trained on an image, or whose epoch was chosen on it: {name: slide of the training}.

    fingerprint: see `Slide.fingerprint`; None, and folds that recorded none, contradict nothing.
    """
    several = len({member.run_folder for member in members}) > 1
    seen = {}
    for member in members:
        slide = member.fold.split.slide_of_image(fingerprint)
        if slide in member.fold.split.fitted_slides:
            seen[f"{member.run_name}/{member.name}" if several else member.name] = slide
    return seen


def note_on_seen_image(members: Sequence[Member], fingerprint: str) -> str | None:
    """Warn that members were trained on an image, and say which fold held it out; None if none was."""
    seen = who_has_seen(members, fingerprint)
    if not seen:
        return None
    return (
        f"LEAKAGE: {len(seen)} of {len(members)} models ({', '.join(seen)}) had a part of their training on this image (slide "
        f"{next(iter(seen.values()))}), so the prediction looks better than one of unseen tissue. "
        f"{_how_to_hold_out(members, fingerprint)}"
    )


def _how_to_hold_out(members: Sequence[Member], fingerprint: str) -> str:
    runs = list(dict.fromkeys(member.run_folder for member in members))
    held_out = {run: folds for run in runs if (folds := _folds_without(run, fingerprint))}
    if not held_out:
        return "No finished fold held it out."
    of_all = set.intersection(*map(set, held_out.values())) if len(held_out) == len(runs) else set()
    if of_all:
        fold = min(of_all)
        return f"fold_{fold} held it out: predict with --fold {fold}."
    return f"It was held out by {'; '.join(f'--model_path {_short(run)} --fold {min(held_out[run])}' for run in held_out)}."


def _folds_without(run: Path, fingerprint: str) -> list[int]:
    """The finished folds of a run that were tested on the image."""
    found = []
    for number, checkpoint in fold_checkpoints(run).items():
        split = load_checkpoint(checkpoint, memory_map=True).split
        if split.slide_of_image(fingerprint) in split.test_slides and has_ended(checkpoint):
            found.append(number)
    return found


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
