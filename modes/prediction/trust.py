"""How far a prediction can be trusted: what its runs have shown on held-out patients, and how unusual its spots are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.features.novelty import novelty
from evaluation.held_out import HeldOut, read_held_out
from evaluation.predictions import Trust
from modes.prediction.ensemble import Member, ensemble_folder
from utils.text import some


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

    Raises ValueError for a held_out.json that cannot be read.
    """
    runs = list(dict.fromkeys(member.run_folder for member in members))
    together = read_held_out(ensemble_folder(runs)) if len(runs) > 1 else None
    by_run = {run: read_held_out(run) for run in runs}
    notes = []
    if together is not None:
        known = [together]
    else:
        known = [found for found in by_run.values() if found is not None]
        if missing := [run.name for run, found in by_run.items() if found is None]:
            notes.append(_missing_note(missing))
        if len(runs) > 1 and len(known) == len(runs):
            notes.append(
                "Scores and intervals are means of what each run has shown alone; --mode test with these runs measures them "
                "together."
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
