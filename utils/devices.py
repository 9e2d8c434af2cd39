"""What a device can do, asked in one place: which 16-bit type its matrix units have."""

from __future__ import annotations

import torch

_BF16_CAPABILITY = (8, 0)  # Ampere


def half_precision(device: torch.device) -> str:
    """Name of the 16-bit type for mixed precision on a CUDA device: bf16 where its matrix units have it, fp16 elsewhere.

    `torch.cuda.is_bf16_supported` is no answer: it also says yes for older cards, which emulate bf16 without their
    matrix units, and it asks the current device instead of this one.
    """
    assert device.type == "cuda", device
    if torch.version.hip is not None:
        return "bf16"
    return "bf16" if torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY else "fp16"
