"""Half precision where it costs nothing, float32 where small differences count."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def full_precision(values: Tensor) -> Tensor:
    """Widen half precision to float32; other types stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(vectors: Tensor) -> Tensor:
    """Divide by max(norm, 1e-12) over the last axis; in float32 at least, because half precision has no 1e-12."""
    return functional.normalize(full_precision(vectors), dim=-1, eps=1e-12)


def mean_tokens(tokens: Tensor) -> Tensor:
    """Mean over the tokens (B, T, P) of a scale, in float32 at least: half precision would lose the small differences."""
    return tokens.mean(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))


def project(projection: nn.Module, tokens: Tensor) -> Tensor:
    """Apply a Linear D -> P; cached half-precision tokens are widened unless autocast takes them as they are."""
    assert isinstance(projection, nn.Linear)
    if not torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.to(projection.weight.dtype)
    return projection(tokens)
