"""A frozen encoder on a device: batches, precision, pooling of tokens. The encoder itself comes as a callable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from utils.devices import half_precision

BATCH_SIZE = {"cuda": 256}  # images that pass the encoder at a time
CPU_BATCH_SIZE = 32  # also of any other device
PRECISIONS = ("auto", "float32", "bf16", "fp16")


class Encoded(Protocol):
    """What a patch encoder gives for B images: tokens (B, T, D) and one pooled feature (B, D')."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def pooled(self) -> Tensor: ...


class BatchedPatchEncoder:
    """A frozen encoder on a device.

    patch_encoder: uint8 images (B, 3, P, P) on the device -> what they are encoded to.
    prefix_tokens: how many of the T tokens come before the grid of patch tokens (class and register tokens).
    batch_size: images that pass the encoder at a time (default: by the device).
    precision: of its arithmetic; "auto" is float32 on the CPU and bf16 (or fp16 where there is no bf16) on CUDA.
    """

    def __init__(
        self,
        patch_encoder: Callable[[Tensor], Encoded],
        device: torch.device,
        *,
        prefix_tokens: int = 0,
        batch_size: int | None = None,
        precision: str = "auto",
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"The precision should be one of {', '.join(PRECISIONS)}, found {precision!r}.")
        if batch_size is None:
            batch_size = BATCH_SIZE.get(device.type, CPU_BATCH_SIZE)
        if batch_size < 1:
            raise ValueError(f"The batch size should be at least 1, found {batch_size}.")
        if precision == "auto":
            precision = half_precision(device) if device.type == "cuda" else "float32"
        self.device, self.prefix_tokens, self.batch_size, self.precision = device, prefix_tokens, batch_size, precision
        self._patch_encoder = patch_encoder

    @torch.inference_mode()
    def encode(self, images: Tensor, with_tokens: int) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, P, P, 3) on the device -> pooled features (B, D') in float32, and the tokens of the first
        `with_tokens` images (None if 0)."""
        reduced = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        pooled, tokens = [], []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size].permute(0, 3, 1, 2)
            with torch.autocast(self.device.type, dtype=reduced, enabled=reduced is not None):
                encoded = self._patch_encoder(batch)
            pooled.append(encoded.pooled.float())
            if start < with_tokens:
                tokens.append(encoded.tokens[: with_tokens - start])
        return torch.cat(pooled), torch.cat(tokens) if tokens else None


def pool_tokens(tokens: Tensor, prefix_tokens: int, factor: int) -> Tensor:
    """Mean over blocks of factor x factor patch tokens of the square grid: (B, T, D) -> (B, prefix + (T - prefix)/f^2, D).

    Class and register tokens are kept as they are. Raises ValueError if the grid cannot be divided.
    """
    if factor == 1:
        return tokens
    side = pooled_grid_side(tokens.shape[1], prefix_tokens, factor) * factor
    grid = tokens[:, prefix_tokens:].reshape(len(tokens), side // factor, factor, side // factor, factor, -1)
    return torch.cat([tokens[:, :prefix_tokens], grid.mean(dim=(2, 4)).flatten(1, 2)], dim=1)


def pooled_grid_side(num_tokens: int, prefix_tokens: int, factor: int) -> int:
    """Side of the grid of patch tokens after pooling by `factor`; ValueError if that does not divide it."""
    side = math.isqrt(num_tokens - prefix_tokens)
    assert side * side == num_tokens - prefix_tokens, f"{num_tokens} tokens, {prefix_tokens} before the grid"
    if factor < 1 or side % factor:
        divisors = [divisor for divisor in range(1, side + 1) if side % divisor == 0]
        raise ValueError(
            f"--token_pool {factor} does not divide the {side} x {side} grid of patch tokens; possible: "
            f"{', '.join(map(str, divisors))}."
        )
    return side // factor
