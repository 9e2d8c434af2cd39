"""The spots of a slide encoded and predicted on the way, and how far the prediction can be trusted.

Nothing is cached, and memory does not grow with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.batches import SlideBatch
from datasets.features.encoding import default_workers
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.images.geometry import neighbor_validity
from datasets.images.slides import Slide
from datasets.novelty import novelty
from evaluation.predictions import HeldOut, Trust, read_held_out
from modes.prediction.encode import encode_whole, plan_for, whole_slide
from modes.prediction.ensemble import (
    CHUNK_SIZE,
    Member,
    deviation,
    ensemble_folder,
    is_test_of,
    mean_prediction,
    needs_of_all,
    of_genes,
    outdated_folds,
)
from modes.prediction.slide import Scales, predict_slide
from utils.checkpoint import fold_checkpoints, has_ended, load_checkpoint
from utils.text import some

STD = "std"  # beside the scales of `predict_mean`


@dataclass(frozen=True, eq=False)
class Predicted:
    """N spots as predicted. scales: {scale: (N, G) float32}.  std (N, G): over folds and runs; None of one model.

    novelty (N,): see `datasets.novelty`; None where it is not known.
    """

    scales: Scales
    std: np.ndarray | None
    novelty: np.ndarray | None


def predict_spots(
    members: Sequence[Member],
    genes: Sequence[str],
    slide: Slide,
    centers: np.ndarray,
    grid_xy: np.ndarray,
    encoder: BatchedPatchEncoder,
    covered_px: int,
) -> Predicted:
    """Predict the spots at `centers` (N, 2) level-0 px, in their order: the mean over the folds, and over the runs.

    grid_xy (N, 2).  covered_px: level-0 px that a patch covers; it is scaled to the patch size.
    Raises ValueError where the image cannot be decoded.
    """
    member, num_workers, needs = members[0], default_workers(), needs_of_all(members)
    patch_size, num_neighbors = member.config.DATA.patch_size, member.config.DATA.num_neighbors
    source_size = None if covered_px == patch_size else covered_px
    kinds = ("target", *(k for k, is_read in (("token", needs.tokens), ("neighbor", needs.neighbors)) if is_read))
    encoded = encode_whole(slide, centers, encoder, plan_for(member, kinds, source_size), num_workers)
    is_valid = neighbor_validity(centers, slide.size, covered_px, num_neighbors)
    whole = whole_slide(encoded.features, grid_xy, is_valid, encoded.chunks, encoder.device)
    scales = predict_mean(members, genes, whole)
    return Predicted(scales, scales.pop(STD, None), unusual_spots(members, encoded.features))


def predict_mean(members: Sequence[Member], genes: Sequence[str], slide: SlideBatch) -> Scales:
    """Average the predictions of the folds for all N spots: {scale: (N, G) float32}, and their standard deviation as `STD`.

    Of each chunk these alone are held. One fold has no deviation.
    """
    chosen, runs = of_genes(members, genes), [member.run_folder for member in members]

    def summary(found: list[Scales]) -> list[Scales]:
        kept = chosen(found)
        spread = {STD: deviation(kept)} if len(kept) > 1 else {}
        return [{**mean_prediction(kept, runs), **spread}]

    (mean,) = predict_slide(
        [member.load() for member in members],
        slide,
        members[0].precision,
        chunk_size=min(CHUNK_SIZE, members[0].config.EVALUATION.chunk_size),
        keep=summary,
    )
    return mean


@dataclass(frozen=True)
class Evidence:
    """What is known before a slide is predicted. held_out: of the runs; [] where it is not known.

    notes: what is missing, and how often intervals held; one sentence each.
    """

    held_out: list[HeldOut]
    notes: list[str]

    def trust(self, genes: Sequence[str], std: np.ndarray | None, unusual: np.ndarray | None) -> Trust:
        """Collect what is known of a prediction of `genes`; of several runs the mean of what each has shown."""
        if not self.held_out:
            return Trust(std=std, novelty=unusual)

        def mean_of(name: str) -> np.ndarray:
            return np.mean([found.values_of(name, genes) for found in self.held_out], axis=0)

        has_widths = all(found.half_width for found in self.held_out)
        return Trust(
            std=std,
            novelty=unusual,
            pcc_cv=mean_of("pcc"),
            pcc_cv_std=mean_of("pcc_std"),
            half_width=mean_of("half_width") if has_widths else None,
        )


def evidence_of(members: Sequence[Member], genes: Sequence[str]) -> Evidence:
    """Read what the runs of the members have shown; of several runs what their test together has, if there was one.

    A test of other runs of the same names, or of earlier models of these, is left aside.
    Raises ValueError for a file of a test that cannot be read.
    """
    runs = list(dict.fromkeys(member.run_folder for member in members))
    folder = ensemble_folder(runs)
    is_theirs = len(runs) > 1 and is_test_of(folder, runs)
    outdated = outdated_folds(folder, runs) if is_theirs else []
    together = read_held_out(folder) if is_theirs and not outdated else None
    by_run = {run: read_held_out(run) for run in runs}
    notes = []
    if together is not None:
        known = [together]
    else:
        known = [found for found in by_run.values() if found is not None]
        if missing := [run.name for run, found in by_run.items() if found is None]:
            notes.append(_missing_note(missing))
        if len(runs) > 1 and len(known) == len(runs):
            others = (
                "" if is_theirs or not folder.exists() else f" {folder} is a test of other runs; move it away first."
            )
            others = f" In {folder} are those of other models of these runs." if outdated else others
            notes.append(
                "Scores and intervals are means of what each run has shown alone; --mode test with these runs measures them "
                f"together.{others}"
            )
    if len(known) < len(runs) and together is None:
        return Evidence([], [*notes, *_sample_notes(members)])
    unscored = [gene for gene in genes if any(gene not in found.genes for found in known)]
    if unscored:
        notes.append(f"No held-out score, no interval: {some(unscored)}, not in the panels of the cross-validation.")
    notes += [sentence for found in known if (sentence := found.describe())]
    return Evidence(known, [*notes, *_sample_notes(members)])


def unusual_spots(members: Sequence[Member], features: Tensor) -> np.ndarray | None:
    """Compute the novelty of spots (N,) from their pooled features (N, D), the mean over the members; None if one cannot."""
    samples = [member.fold.sample for member in members]
    known = [sample for sample in samples if sample is not None]
    if len(known) < len(samples):
        return None
    return np.mean([novelty(features, sample) for sample in known], axis=0)


def _missing_note(runs: Sequence[str]) -> str:
    return (
        f"How well each gene is predicted on patients not seen is not known of {some(runs)} (no held_out.json): no "
        "var['pcc_cv'], no intervals. --mode test of the cross-validation writes it."
    )


def _sample_notes(members: Sequence[Member]) -> list[str]:
    without = [str(Path(member.path.parent.name, member.path.name)) for member in members if member.fold.sample is None]
    if not without:
        return []
    return [f"No obs['novelty']: {some(without)} of an earlier version hold no sample of the training spots."]


def who_has_seen(members: Sequence[Member], fingerprint: str | None) -> dict[str, str]:
    """Find the members that were trained on an image, or whose epoch was chosen on it: {name: slide of the training}.

    fingerprint: see `Slide.fingerprint`; None, and folds that recorded none, contradict nothing.
    """
    several = len({member.run_folder for member in members}) > 1
    seen = {}
    for member in members:
        slide = member.fold.split.slide_of_image(fingerprint)
        if slide is not None and slide in member.fold.split.fitted_slides:
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
