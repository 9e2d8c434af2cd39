"""Attention, feed-forward and the pre-norm transformer layer that every encoder is made of.

A layer is x <- x + Attention(LN x), x <- x + FeedForward(LN x) with the exact GELU. One matrix without bias gives
queries, keys and values; the output projection has a bias and is left out when there is one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.dropout import Dropout

if TYPE_CHECKING:
    from models.packing import SlidePacking

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
    cells = torch.arange(side * side)
    row, column = cells // side, cells % side
    row_offset = (row[:, None] - row[None, :]).abs()
    column_offset = (column[:, None] - column[None, :]).abs()
    return side * row_offset + column_offset


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


class Attention(nn.Module):
    """Multi-head self-attention, optionally with a learned bias per head and per absolute offset on a square grid."""

    def __init__(self, *, dim: int, heads: int, dropout: float, grid_side: int | None = None) -> None:
        """dim: width, a multiple of heads. grid_side: side of the square of tokens that gets the relative bias."""
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"A width of {dim} cannot be shared among {heads} attention heads. Choose a number of heads that "
                f"divides {dim} (MODEL.neighbor_heads, MODEL.global_heads, MODEL.fusion_heads)."
            )
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Sequential(nn.Linear(dim, dim), Dropout(dropout)) if heads > 1 else nn.Identity()
        self.bias_table = None
        if grid_side is not None:
            self.bias_table = nn.Parameter(torch.zeros(heads, grid_side * grid_side))
            self.register_buffer("bias_index", relative_offset_index(grid_side), persistent=False)

    def forward(self, tokens: Tensor, *, key_is_valid: Tensor | None = None) -> Tensor:
        """tokens: (B, T, D); key_is_valid: (B, T) bool or None. Returns (B, T, D), also for the hidden tokens."""
        batch, count, dim = tokens.shape
        qkv = self.to_qkv(tokens).view(batch, count, 3, self.heads, dim // self.heads)
        # Not by indexing: its gradients would be three tensors of zeros, filled and added, instead of one copy.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(dim=2))
        bias = None if self.bias_table is None else self.bias_table[:, self.bias_index]
        attended = attend(query, key, value, bias=bias, key_is_valid=key_is_valid)
        return self.project(attended.transpose(1, 2).reshape(batch, count, dim))

    def query_key_value(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Parts start..stop of (query, key, value) of packed rows (R, D), as (R, stop - start, H, d)."""
        dim = rows.shape[-1]
        weight = self.to_qkv.weight[start * dim : stop * dim]
        return functional.linear(rows, weight).view(-1, stop - start, self.heads, dim // self.heads)


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear, with dropout after each; no residual and no normalisation inside."""

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.contract = nn.Linear(hidden_dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (..., D). Returns (..., D)."""
        hidden = self.dropout(functional.gelu(self.expand(tokens)))
        return self.dropout(self.contract(hidden))


class TransformerLayer(nn.Module):
    """One pre-norm layer, for a batch of token lists or for the packed rows of several slides."""

    def __init__(self, *, dim: int, heads: int, hidden_dim: int, dropout: float, grid_side: int | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim=dim, heads=heads, dropout=dropout, grid_side=grid_side)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim=dim, hidden_dim=hidden_dim, dropout=dropout)

    def forward(self, tokens: Tensor, *, key_is_valid: Tensor | None = None) -> Tensor:
        """tokens: (B, T, D); key_is_valid: (B, T) bool or None. Returns (B, T, D)."""
        tokens = tokens + self.attention(self.attention_norm(tokens), key_is_valid=key_is_valid)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))

    def forward_packed(self, rows: Tensor, packing: SlidePacking) -> Tensor:
        """The same layer over whole slides, each spot attending to all spots of its own slide.

        rows:    (R, D), the slides of `packing` one after the other.
        returns: (R, D), or (B, D) in the order of `packing.rows` when the packing asks for certain rows only: keys
                 and values still come from every spot, queries and everything after them only from those rows.
        """
        attention = self.attention
        if packing.rows is None:
            qkv = in_chunks(lambda part: attention.query_key_value(self.attention_norm(part), 0, 3), rows)
            query, key, value = qkv.unbind(dim=1)
        else:
            key_value = in_chunks(lambda part: attention.query_key_value(self.attention_norm(part), 1, 3), rows)
            key, value = key_value.unbind(dim=1)
            rows = rows.index_select(0, packing.rows)
            query = in_chunks(lambda part: attention.query_key_value(self.attention_norm(part), 0, 1)[:, 0], rows)
        attended = packing.attend(query, key, value).flatten(start_dim=1)
        return in_chunks(self._after_attention, rows, attended)

    def _after_attention(self, rows: Tensor, attended: Tensor) -> Tensor:
        rows = rows + self.attention.project(attended)
        return rows + self.feed_forward(self.feed_forward_norm(rows))
