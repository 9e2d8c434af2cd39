"""Scaled dot-product attention as the models use it: which kernel, in which chunks, and the index of relative offsets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ROWS = 4096


# The fast CUDA kernels take heads up to 256 wide. For a wider one PyTorch falls back to a kernel of older devices, and two
# matrix products are faster as long as there are few scores (the fusion: one head of 512, 223 tokens).
FAST_HEAD_WIDTH, FEW_TOKENS = 256, 1024


def in_chunks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Apply a function of rows piece by piece, so that its intermediate results stay small.

    function: maps tensors (n, ...) to one tensor (n, ...), each row by itself.
    rows:     tensors with the same number of rows.
    returns:  what `function(*rows)` returns. With gradients the pieces would all be kept anyway, so it is called once.
    """
    count = rows[0].shape[0]
    if torch.is_grad_enabled() or count <= CHUNK_ROWS:
        return function(*rows)
    first = function(*(tensor[:CHUNK_ROWS] for tensor in rows))
    result = first.new_empty((count, *first.shape[1:]))
    result[:CHUNK_ROWS] = first
    for start in range(CHUNK_ROWS, count, CHUNK_ROWS):
        result[start : start + CHUNK_ROWS] = function(*(tensor[start : start + CHUNK_ROWS] for tensor in rows))
    return result


def relative_offset_index(side: int) -> Tensor:
    """Index (side^2, side^2) of the absolute offset (|drow|, |dcol|) between the cells of a square, row-major."""
    row, column = np.divmod(np.arange(side * side), side)
    row_offset, column_offset = (np.abs(place[:, None] - place[None, :]) for place in (row, column))
    return torch.from_numpy(side * row_offset + column_offset)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by two matrix products, which keeps the scores (B, H, Q, T) for the backward pass."""
    # Scaled before the product, so that half precision does not overflow.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def _is_plain_faster(query: Tensor, key: Tensor) -> bool:
    return query.is_cuda and query.shape[-1] > FAST_HEAD_WIDTH and max(query.shape[-2], key.shape[-2]) <= FEW_TOKENS


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, key_is_valid: Tensor | None = None
) -> Tensor:
    """Attention of heads over keys, softmax(q k^T / sqrt(d) + bias) v.

    query:        (B, H, Q, d); key and value (B, H, T, d).
    bias:         (H, Q, T) added to the scores, or None.
    key_is_valid: (B, T) bool, False hides the key from every query, or None. Where *no* key of a row is valid the
                  result is the plain average of all values: hidden scores are all the same number, so the softmax is
                  uniform (section 1 of the golden README).
    returns:      (B, H, Q, d).
    """
    if key_is_valid is None:
        if bias is None and _is_plain_faster(query, key):
            return attend_plainly(query, key, value)
        mask = None if bias is None else bias[None].to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    has_key = key_is_valid.any(dim=-1)[:, None, None, None]
    visible = key_is_valid[:, None, None, :]
    # A zero query gives equal scores to all keys: the uniform average without a row of -inf, which would be NaN.
    query = torch.where(has_key, query, torch.zeros_like(query))
    if bias is None:
        mask = visible | ~has_key
    else:
        hidden = torch.full_like(bias, float("-inf"))
        mask = torch.where(has_key, torch.where(visible, bias, hidden), torch.zeros_like(bias)).to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
