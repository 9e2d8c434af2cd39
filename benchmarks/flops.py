"""Arithmetic of the model in floating point operations, counted from its sizes (a product and a sum are two)."""

from __future__ import annotations

from collections.abc import Sequence

from utils.config import Model


def layer_flops(
    rows: float, context_sum: float, dim: int, hidden: int, heads: int, *, keys_of: float | None = None
) -> float:
    """One transformer layer forward.

    rows: tokens that get a result.  context_sum: over these tokens, the number of tokens each one attends to.
    keys_of: tokens that give keys and values, where they are more than `rows`.
    """
    keys = rows if keys_of is None else keys_of
    projections = 2 * dim * dim * (rows + 2 * keys + (rows if heads > 1 else 0))
    return projections + 4 * dim * context_sum + 4 * dim * hidden * rows


def forward_flops(
    model: Model, *, dim: int, tokens: int, tiles: int, genes: int, batch: int, lengths: Sequence[int]
) -> dict[str, float]:
    """FLOP of each part of a forward pass of Gene-DML over `batch` spots of slides of `lengths` spots."""
    width, fused = model.projection_dim, tokens + tiles + 1
    hidden = round(model.neighbor_mlp_ratio * dim)
    neighbor = model.neighbor_depth * layer_flops(batch * tiles, batch * tiles**2, dim, hidden, model.neighbor_heads)
    fusion = layer_flops(batch * fused, batch * fused**2, width, model.fusion_mlp_dim, model.fusion_heads)
    fusion += 4 * width * model.fusion_mlp_dim * batch * fused
    predictor = 2 * (width * model.predictor_dim + model.predictor_dim * width + width * genes)
    heads = 3 * 2 * (width * width + width * genes)
    gene = 2 * (genes * width + width * width + 2 * width * model.gene_mlp_dim + 2 * width * width)
    return {
        "neighbor encoder": neighbor,
        "global encoder": global_flops(model, dim, batch, lengths),
        "projection": 2 * dim * width * batch * fused,
        "fusion": fusion,
        "heads and gene encoder": batch * (predictor + heads + gene),
        "losses": 2 * batch * batch * width * 9,  # three products for each of three scales
    }


def global_flops(model: Model, dim: int, batch: int, lengths: Sequence[int]) -> float:
    """The global encoder: whole slides, but in the last layer only the batch's own rows ask."""
    rows, squares = sum(lengths), sum(length**2 for length in lengths)
    hidden = round(model.global_mlp_ratio * dim)
    whole = (model.global_depth - 1) * layer_flops(rows, squares, dim, hidden, model.global_heads)
    last = layer_flops(batch, batch * squares / rows, dim, hidden, model.global_heads, keys_of=rows)
    return whole + last + 2 * 9 * dim * rows


def step_flops(parts: dict[str, float], *, dim: int, width: int, tokens: int, batch: int) -> float:
    """Forward and backward: three times forward, but cached tokens need no gradient themselves."""
    return 3 * sum(parts.values()) - 2 * dim * width * batch * tokens
