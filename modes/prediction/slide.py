"""A slide through one or several models: the one way to predict in validation, test, external test and prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from datasets.batches import SlideBatch, SpotBatch
from datasets.spots import SlideRecord
from evaluation.slide_result import SlideResult
from models.contract import ExpressionModel, ModelInputs
from utils.devices import Precision

Encode = Callable[[SpotBatch], Tensor | None]  # batch -> its target tokens (B, T, D), None where the model reads none
Scales = dict[str, np.ndarray]  # {scale: (n, G) float32} of n spots, the fused prediction first


def tokens_of(batch: SpotBatch) -> Tensor | None:
    """Give the target tokens that a batch comes with."""
    return batch.target_tokens


@torch.inference_mode()
def predict_slide(
    models: Sequence[ExpressionModel],
    slide: SlideBatch,
    precision: Precision,
    *,
    chunk_size: int,
    encode: Encode = tokens_of,
    keep: Callable[[list[Scales]], list[Scales]] = list,
) -> list[Scales]:
    """Predict the N spots of a slide, in their order: {scale: (N, G) float32} of each model.

    The global encoders see the whole slide; everything else passes in chunks of at most `chunk_size` spots, each made once
    for all models. Held are one chunk, one global token a spot and model, and what is kept of the predictions.
    keep: what of the predictions of a chunk (b, G), one of each model, for instance some genes or the mean; default all.
    Raises ValueError for a prediction that is not finite.
    """
    global_tokens = [_global_tokens(model.eval(), slide, precision) for model in models]
    parts: list[list[Scales]] = []
    start = 0
    for batch in slide.chunks(chunk_size):
        assert int(batch.rows[-1] - batch.rows[0]) + 1 == len(batch), "spots of a chunk are consecutive"
        chunk = slice(start, start + len(batch))
        with precision.autocast():
            tokens = encode(batch)
            found = [
                model(model_inputs(batch, tokens, None if whole is None else whole[chunk])).by_scale()
                for model, whole in zip(models, global_tokens)
            ]
        arrays = [{scale: values.float().cpu().numpy() for scale, values in one.items()} for one in found]
        _check_finite(arrays, chunk)
        parts.append(keep(arrays))
        start = chunk.stop
    return [_joined(list(of_one)) for of_one in zip(*parts)]


def _check_finite(predictions: list[Scales], rows: slice) -> None:
    """Raise ValueError for numbers that are not finite; weights and features are, when they come here."""
    count = sum(int(np.count_nonzero(~np.isfinite(values))) for one in predictions for values in one.values())
    if count:
        raise ValueError(
            f"{count} numbers predicted for the spots {rows.start} to {rows.stop - 1} of a slide are not finite. Try --set "
            "TRAINING.precision=float32; where the training diverged, start another with a smaller TRAINING.learning_rate."
        )


def _global_tokens(model: ExpressionModel, slide: SlideBatch, precision: Precision) -> Tensor | None:
    if not model.needs.slides:
        return None
    with precision.autocast():
        return model.encode_slides(slide.slide_features, slide.grid_xy, [len(slide)], None)


def _joined(parts: list[Scales]) -> Scales:
    """One array a scale; of the parts only those of one scale are held beside it."""
    return {scale: np.concatenate([part.pop(scale) for part in parts]) for scale in list(parts[0])}


def model_inputs(batch: SpotBatch, target_tokens: Tensor | None, global_tokens: Tensor | None) -> ModelInputs:
    """Put together what a model is called with; target_tokens (B, T, D) and global_tokens (B, F) if it needs them.

    Without target tokens (DATA.tokens=pooled) the pooled feature of a patch is its one token.
    """
    return ModelInputs(
        target_features=batch.target_features,
        target_tokens=batch.target_features[:, None] if target_tokens is None else target_tokens,
        neighbor_features=batch.neighbor_features,
        neighbor_is_valid=batch.neighbor_is_valid,
        global_tokens=global_tokens,
    )


def slide_result(
    record: SlideRecord,
    genes: list[str],
    predictions: Scales,
    measured: np.ndarray,
    measured_unsmoothed: np.ndarray | None = None,
) -> SlideResult:
    """Put the predictions of a slide beside what was measured, (N, G) each (`datasets.targets`)."""
    return SlideResult(
        slide=record.name,
        patient=record.patient,
        spot_ids=list(record.table.obs_names),
        grid_xy=record.table.obsm["grid"],
        genes=genes,
        measured=measured,
        measured_unsmoothed=measured_unsmoothed,
        predictions=predictions,
    )
