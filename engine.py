"""The hand-written loop over one epoch.

Knows no model and no field of a batch: it calls `step(batch) -> terms`, which `modes/` composes from model, loss
and data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from utils.cli import progress
from utils.devices import half_precision

Step = Callable[[object], Mapping[str, Tensor]]


class Precision:
    """Mixed precision: autocast and, for fp16 alone, the gradient scaler.

    name: auto (CUDA: bf16 where the device has it, fp16 elsewhere; CPU: float32) | float32 | bf16 | fp16.
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
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def train_one_epoch(
    batches: Iterable, step: Step, optimizer: torch.optim.Optimizer, precision: Precision, description: str
) -> dict[str, float]:
    """One pass over the batches; returns the average of every term over the spots.

    The sums stay on the device until the end of the epoch, so that the loop never waits for it.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in progress(batches, description=description, unit="batch", leave=False):
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            terms = step(batch)
        precision.backward(terms["total"], optimizer)
        count += len(batch)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() * len(batch)
    averages = {name: float(value) / count for name, value in sums.items()}
    broken = [name for name, value in averages.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{description}: the loss is no longer finite ({', '.join(broken)}); --resume would come to it again. Start "
            "another run (--run_name NAME) with a smaller TRAINING.learning_rate or --set TRAINING.precision=float32."
        )
    return averages


def evaluate(slides: Iterable, predict: Callable[[object], object], description: str) -> list:
    """`predict(slide)` for every slide in order, without gradients."""
    with torch.inference_mode():
        return [predict(slide) for slide in progress(slides, description=description, unit="slide", leave=False)]
