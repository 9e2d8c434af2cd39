"""Dropout whose masks are cheap on a CPU.

PyTorch draws one random number of 24 or more bits per element, one after the other, which took a fifth of a training
step on two cores. Sixteen bits decide whether an element stays just as well: one draw of 64 bits serves four elements.
On a GPU drawing is free and PyTorch's own kernel is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 2**16  # of the 16 bits that decide about an element
WORD = torch.iinfo(torch.int64)
HALF_WORD = torch.iinfo(torch.int16)


class Dropout(nn.Dropout):
    """`nn.Dropout` with another source of random numbers on the CPU.

    The probability is rounded to a multiple of 1/65536, and the scale is that of the rounded one, so that the expected
    value is the input's. Random numbers come from PyTorch's default generator: a seed or a restored state repeats them.
    """

    def forward(self, values: Tensor) -> Tensor:
        """values: any shape. Returns the same shape, scaled by 1 / (1 - p) where kept and zero elsewhere."""
        if not (self.training and values.device.type == "cpu" and 0 < self.p < 1):
            return super().forward(values)
        return values * kept(values, self.p)


def kept(values: Tensor, probability: float) -> Tensor:
    """What to multiply with: 1 / (1 - p) with probability 1 - p, otherwise 0; shape and type of `values`."""
    dropped_levels = min(round(probability * LEVELS), LEVELS - 1)
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(WORD.min, None)  # None: up to the greatest
    is_kept = words.view(torch.int16)[:count] >= HALF_WORD.min + dropped_levels
    return is_kept.to(values.dtype).mul_(LEVELS / (LEVELS - dropped_levels)).view(values.shape)
