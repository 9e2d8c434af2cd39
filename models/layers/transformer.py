"""Attention, feed-forward and the pre-norm transformer layer that every encoder is made of.

A layer is x <- x + Attention(LN x), x <- x + FeedForward(LN x) with the exact GELU. One matrix without bias gives
queries, keys and values; the output projection has a bias and is left out when there is one head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers.attention import attend, in_chunks, relative_offset_index
from models.layers.dropout import Dropout

if TYPE_CHECKING:
    from models.layers.packing import SlidePacking


class Attention(nn.Module):
    """Multi-head self-attention, optionally with a learned bias per head and per absolute offset on a square grid."""

    bias_index: Tensor

    def __init__(self, *, dim: int, heads: int, dropout: float, grid_side: int | None = None) -> None:
        """dim: width, a multiple of heads. grid_side: side of the square of tokens that gets the relative bias.
        Raises ValueError if the heads do not divide the width."""
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
        """Apply the same layer to whole slides, each spot attending to all spots of its own slide.

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
