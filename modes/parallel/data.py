"""The training step of several processes on one batch: it computes what one process would compute of the whole batch.

Each process runs the model on its own spots, and the global encoder on its share of the slides. The rows of the slides, and
what the model gives for the spots, are exchanged. Then every process has the whole batch before it and computes the whole
loss, k-means included: that costs little beside the model. Its gradient flows back into what this process has computed, and
the sum over the processes is the gradient of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from datasets.batches import SpotBatch
from datasets.shares import SharedBatch
from models.contract import Embeddings, ExpressionModel, LossFunction, Prediction
from modes.prediction.slide import Encode, model_inputs
from utils.parallel.team import Team


def shared_step(
    model: ExpressionModel, loss: LossFunction, encode: Encode, team: Team
) -> Callable[[SpotBatch], dict[str, Tensor]]:
    """Make the training step of a team: its share of a batch -> named loss terms of the whole batch."""

    def step(batch: SpotBatch) -> dict[str, Tensor]:
        assert isinstance(batch, SharedBatch) and batch.whole_expression is not None
        global_tokens = encoded_slides(model, batch, team) if model.needs.slides else None
        prediction = model(model_inputs(batch, encode(batch), global_tokens), batch.expression)
        return loss(whole_prediction(prediction, batch.sizes, team), batch.whole_expression)

    return step


def encoded_slides(model: ExpressionModel, batch: SharedBatch, team: Team) -> Tensor:
    """Encode this process's slides, and take its own spots' global tokens (b, F) from whoever encoded theirs."""
    weights = next(model.parameters())
    dtype = torch.promote_types(weights.dtype, torch.float32)
    if batch.slide_features is None:
        width = batch.target_features.shape[1]
        encoded = torch.zeros((0, width), dtype=dtype, device=weights.device, requires_grad=True)
    else:
        assert batch.grid_xy is not None
        encoded = model.encode_slides(batch.slide_features, batch.grid_xy, list(batch.lengths), batch.slide_rows)
    assert batch.places is not None
    tokens = team.rows_of_all(encoded.to(dtype), batch.encoded, same_use=False)
    return tokens.index_select(0, batch.places.to(tokens.device))


def whole_prediction(prediction: Prediction, sizes: Sequence[int], team: Team) -> Prediction:
    """Put the predictions and embeddings (b, ...) of all processes together, (B, ...), with gradient, in one exchange."""
    parts = _tensors_of(prediction)
    dtype = max((part.dtype for part in parts), key=lambda kind: torch.finfo(kind).bits)
    joined = torch.cat([part.to(dtype) for part in parts], dim=1)
    whole = team.rows_of_all(joined, sizes, same_use=True).split([part.shape[1] for part in parts], dim=1)
    return _with_tensors(prediction, [values.to(part.dtype) for values, part in zip(whole, parts, strict=True)])


def _tensors_of(prediction: Prediction) -> list[Tensor]:
    """All tensors (b, ...) of a prediction, in the order of `_with_tensors`."""
    found = [prediction.fused, *prediction.scales.values()]
    if (vectors := prediction.embeddings) is not None:
        found += [*vectors.scales.values(), vectors.gene]
        found += [value for value in (vectors.fused, vectors.fused_cluster, vectors.gene_cluster) if value is not None]
    return found


def _with_tensors(prediction: Prediction, tensors: list[Tensor]) -> Prediction:
    left = iter(tensors)

    def like(value: Tensor | None) -> Tensor | None:
        return None if value is None else next(left)

    fused, scales = next(left), {name: next(left) for name in prediction.scales}
    if (vectors := prediction.embeddings) is None:
        return replace(prediction, fused=fused, scales=scales)
    embeddings = Embeddings(
        scales={name: next(left) for name in vectors.scales},
        gene=next(left),
        fused=like(vectors.fused),
        fused_cluster=like(vectors.fused_cluster),
        gene_cluster=like(vectors.gene_cluster),
    )
    return replace(prediction, fused=fused, scales=scales, embeddings=embeddings)
