"""How unlike the training spots a spot looks to the patch encoder: where its distance to them lies among their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.trained_fold import TrainingSample

SAMPLE_SIZE = 1000  # spots: 2 MB at the width of UNI
_NEAREST = 5
_CHUNK = 4096


def sample_training_spots(
    features: Tensor,
    patients: Sequence[str],
    slides: Sequence[str],
    generator: torch.Generator,
    of_training: Tensor | None = None,
) -> TrainingSample:
    """Draw spots that stand for the training, as many of each patient as it has, up to its share of `SAMPLE_SIZE`.

    features (R, D), of which the rows `of_training` (N,) are the training spots (None: all); patients, slides: N names.
    A sampled spot's own distance is that to the spots of other patients, which is what a new patient's will be; with one
    patient to those of other slides, with one slide to all others.
    """
    names = np.asarray(patients)
    groups = sorted(set(patients))
    chosen = []
    for patient in groups:
        rows = torch.from_numpy(np.flatnonzero(names == patient))
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        chosen.append(shuffled[: max(1, SAMPLE_SIZE // len(groups))])
    rows = torch.cat(chosen).sort().values
    kept = features[rows if of_training is None else of_training[rows]].to(torch.float16)
    labels = names[rows.numpy()] if len(groups) > 1 else np.asarray(slides)[rows.numpy()]
    if len(set(labels.tolist())) == 1:
        labels = np.arange(len(rows))
    same = torch.from_numpy(labels[:, None] == labels[None])
    return TrainingSample(kept, _to_nearest(kept.float(), kept, same).sort().values)


def novelty(features: Tensor, sample: TrainingSample) -> np.ndarray:
    """Tell, (N,) float32 in 0..1, which share of the training spots lies closer to the (other) training spots than a spot does.

    features (N, D) of the spots of a slide, in float32.  0: as usual as can be; 1: farther off than every training spot.
    """
    parts = [_to_nearest(part, sample.features) for part in features.float().cpu().split(_CHUNK)]
    closer = torch.searchsorted(sample.distances, torch.cat(parts))
    return (closer / max(1, len(sample.distances))).float().numpy()


def _to_nearest(features: Tensor, others: Tensor, is_left_out: Tensor | None = None) -> Tensor:
    """(N,) mean distance to the nearest few of `others` (n, D); is_left_out (N, n): pairs that do not count."""
    distances = torch.cdist(features, others.float())
    if is_left_out is not None:
        distances[is_left_out] = torch.inf
    nearest = distances.topk(min(_NEAREST, len(others)), largest=False).values
    known = torch.isfinite(nearest)
    return torch.where(known, nearest, 0).sum(dim=1) / known.sum(dim=1).clamp(min=1)
