"""The hand-written loop over one epoch.

Knows no model and no field of a batch: it calls `step(batch) -> terms`, which `modes/` composes from model, loss
and data.
"""

from __future__ import annotations

import utils  # noqa: F401  first: whoever runs this file need not wait for PyTorch to be told what the programs are

# isort: split
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TypeVar

import torch
from torch import Tensor

from utils.cli import progress
from utils.devices import Precision
from utils.parallel.team import ALONE, Team

Batch = TypeVar("Batch", bound=Sized)


def train_one_epoch(
    batches: Iterable[Batch],
    step: Callable[[Batch], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    description: str,
    team: Team = ALONE,
) -> dict[str, float]:
    """Pass once over the batches; returns the average of every term over the spots.

    The sums stay on the device until the end of the epoch, so that the loop never waits for it.
    team: the processes that share the batches; terms and length of a batch are those of all of it.
    Raises ValueError when a term is no longer finite.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in progress(batches, description=description, unit="batch", leave=False):
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            terms = step(batch)
        precision.scaler.scale(terms["total"]).backward()
        team.sum_gradients(optimizer)
        precision.scaler.step(optimizer)
        precision.scaler.update()
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
