"""The frozen encoder through torch.compile where that works, aloud without it where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.cli import say

_CHAIN_AT_MOST = 10  # causes of an error that are looked at


@dataclass(frozen=True)
class Encoded:
    """tokens (B, T, D) and pooled features (B, D') of B images."""

    tokens: Tensor
    pooled: Tensor


class CompiledEncoder:
    """Call it like the encoder. It compiles in its first call, for one shape: `batch_size` images.

    Shorter batches are filled up with black images whose results are cut off: images do not see each other in a frozen
    encoder, so that changes no result. If compiling fails (no compiler, an unsupported device), that is said once and
    the encoder runs as it is. A device that is out of memory is no failure of the compiler: that error is raised.
    """

    def __init__(self, backbone: Callable[[Tensor], object], batch_size: int):
        self._backbone, self._batch_size, self._is_proven = backbone, batch_size, False
        self._forward = torch.compile(backbone, dynamic=False)

    @property
    def is_compiled(self) -> bool:
        """False once compiling has failed."""
        return self._forward is not self._backbone

    def __call__(self, images: Tensor) -> Encoded:
        """images: uint8 (B, 3, P, P), B up to the batch size."""
        assert len(images) <= self._batch_size, (len(images), self._batch_size)
        if not self._is_proven:
            self._prove(images)
        encoded = self._forward(self._whole(images) if self.is_compiled else images)
        return Encoded(encoded.tokens[: len(images)], encoded.pooled[: len(images)])

    def _prove(self, images: Tensor) -> None:
        """Compile, or find that it cannot be done."""
        try:
            self._forward(self._whole(images))
        except RuntimeError as error:  # all errors of the compiler are; one of the encoder comes again in the next call
            if _is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
            say(f"--compile: torch.compile failed ({reason}); the encoder runs without it.")
            self._forward = self._backbone
        self._is_proven = True

    def _whole(self, images: Tensor) -> Tensor:
        """(batch_size, 3, P, P), always with the same strides: another layout would be compiled again."""
        channels, height, width = images.shape[1:]
        whole = images.new_zeros((self._batch_size, height, width, channels)).permute(0, 3, 1, 2)
        whole[: len(images)] = images
        return whole


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where the compiler has wrapped it."""
    for _ in range(_CHAIN_AT_MOST):
        if error is None or isinstance(error, torch.OutOfMemoryError):
            break
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return isinstance(error, torch.OutOfMemoryError)
