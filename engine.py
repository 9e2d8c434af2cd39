"""The hand-written loop: one epoch, and epochs until the score no longer grows.

Knows no model and no field of a batch: it calls `step(batch) -> terms`, which `modes/` composes from model, loss
and data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

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


@dataclass
class Progress:
    """Where a training stands; all of it goes into the checkpoint, so that it can go on from there."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best_score: float = -math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    def is_finished(self, epochs: int, patience: int | None) -> bool:
        """All epochs are done, or `patience` epochs have passed without a better score."""
        return self.epoch >= epochs or (patience is not None and self.epoch - self.best_epoch >= patience)


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


def fit(
    state: Progress,
    *,
    epochs: int,
    patience: int | None,
    run_epoch: Callable[[int], dict[str, float]],
    score_name: str | None,
    save: Callable[[Progress, bool], None],
) -> Progress:
    """Train until `epochs` are done or `patience` epochs brought no better score.

    run_epoch: trains epoch number n (from 1) and returns its record, validation included.
    score_name: entry of the record that chooses the best epoch, the larger the better; None: the last one is the best.
    save: called after every epoch with the state and whether this epoch is the best so far.
    """
    while not state.is_finished(epochs, patience if score_name else None):
        epoch = state.epoch + 1
        record = {"epoch": epoch, **run_epoch(epoch)}
        score = record[score_name] if score_name else float(epoch)
        is_better = epoch == 1 or score > state.best_score
        if is_better:
            state.best_epoch, state.best_score = epoch, score if math.isfinite(score) else -math.inf
        state.epoch = epoch
        state.history.append(record)
        save(state, is_better)
    return state
