"""A slide encoded and predicted on the way: nothing is cached, and memory does not grow with the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datasets.batches import SlideBatch
from datasets.features.encoding import default_workers
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.images.geometry import neighbor_validity
from datasets.images.slides import Slide
from modes.prediction.encode import Chunk, bare_chunks, encoded_chunks, plan_for, pooled_features, whole_slide
from modes.prediction.ensemble import CHUNK_SIZE, Member, deviation, mean_prediction, needs_of_all, of_genes
from modes.prediction.slide import Scales, predict_slide
from modes.prediction.trust import unusual_spots

STD = "std"  # beside the scales of `predict_mean`


@dataclass(frozen=True, eq=False)
class Predicted:
    """N spots as predicted. scales: {scale: (N, G) float32}.  std (N, G): over folds and runs; None of one model.

    novelty (N,): see `datasets.features.novelty`; None where it is not known.
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
    kinds = tuple(k for k, is_read in (("token", needs.tokens), ("neighbor", needs.neighbors)) if is_read)
    target_plan = plan_for(member, ("target",), source_size)
    features = pooled_features(slide, centers, encoder, target_plan, num_workers)

    def chunks(size: int) -> Iterator[Chunk]:
        if not kinds:
            return bare_chunks(len(centers), size)
        return encoded_chunks(slide, centers, encoder, plan_for(member, kinds, source_size), num_workers, size)

    is_valid = neighbor_validity(centers, slide.size, covered_px, num_neighbors)
    scales = predict_mean(members, genes, whole_slide(features, grid_xy, is_valid, chunks, encoder.device))
    return Predicted(scales, scales.pop(STD, None), unusual_spots(members, features))


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
