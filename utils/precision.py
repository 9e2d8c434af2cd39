"""The precision of the numbers a model computes with, and which 16-bit type a device has matrix units for."""

from __future__ import annotations

import contextlib

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


class Precision:
    """Mixed precision: autocast and, for fp16 alone, the gradient scaler.

    name: auto (CUDA: bf16 where the device has it, fp16 elsewhere; CPU: float32) | float32 | bf16 | fp16.
    Raises ValueError for fp16 on the CPU.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = half_precision(device) if device.type == "cuda" else "float32"
        if name == "fp16" and device.type != "cuda":
            raise ValueError("TRAINING.precision=fp16 needs a CUDA device; on the CPU use float32 or bf16.")
        self.name, self.device = name, device
        self.dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Open the context in which the model runs in this precision."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
