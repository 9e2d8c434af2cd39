"""Processes that train one model together: who they are, and what they exchange.

A `Team` of one does everything itself and exchanges nothing, so that whoever uses it need not ask.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.cli import WRONG_USE, be_quiet, progress
from utils.devices import device_from

Found = TypeVar("Found")
Item = TypeVar("Item")
# The others wait as long as this while the first one scores a fold and draws its figures.
LONGEST_WAIT = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class Place:
    """What torchrun tells a process of itself. rank, size: among all; local_rank, local_size: among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place_of_this_process() -> Place:
    """Read what torchrun says in the environment; the only process where it did not start this one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Place(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))


@dataclass(frozen=True)
class Team:
    """`size` processes, of which this is number `rank`; all call the same methods in the same order.

    Every method that exchanges raises ConnectionError when a process has left.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def by_first(self, work: Callable[[], Found]) -> Found:
        """Let the first process do something while the others wait; returns what it returned, on all.

        What it raises, it raises on the first; the others leave with the same exit status, without a word.
        """
        if self.size == 1:
            return work()
        self.agreed(None)  # nobody may still be reading what the first one is about to write
        outcome: list[Found] = []
        try:
            if self.is_first:
                outcome = [work()]
        except Exception:
            self.agreed(outcome)
            raise
        outcome = self.agreed(outcome)
        if not outcome:
            sys.exit(WRONG_USE)
        return outcome[0]

    def agreed(self, value: Found) -> Found:
        """Return the value that the first process has."""
        if self.size == 1:
            return value
        values = [value]
        with _exchange():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def shared(self, work: Callable[[Item], Found], items: Sequence[Item], description: str, unit: str) -> list[Found]:
        """Do the work for all items, each by one process; returns all results, in the order of the items, on all."""
        own_items = items[self.rank :: self.size]
        own = [work(item) for item in progress(own_items, description=description, unit=unit, leave=False)]
        if self.size == 1:
            return own
        parts: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(parts, own)
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def same_start(self, model: nn.Module) -> None:
        """Give all processes the weights and buffers of the first."""
        if self.size > 1:
            with torch.no_grad(), _exchange():
                for value in model.state_dict().values():
                    dist.broadcast(value, src=0)

    def sum_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Add up the gradients of all processes; a parameter that none of this one's spots met counts as zero there.

        The sum and not the mean: every process derives the loss of the whole batch by what it has computed of it.
        """
        if self.size == 1:
            return
        parameters = [value for group in optimizer.param_groups for value in group["params"] if value.requires_grad]
        for kind in dict.fromkeys((value.dtype, value.device) for value in parameters):
            of_kind = [value for value in parameters if (value.dtype, value.device) == kind]
            flat = torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in of_kind])
            with _exchange():
                dist.all_reduce(flat)
            for value, gradient in zip(of_kind, flat.split([value.numel() for value in of_kind]), strict=True):
                value.grad = gradient.view_as(value)

    def rows_of_all(self, rows: Tensor, sizes: Sequence[int], *, same_use: bool) -> Tensor:
        """Put the rows of all processes one after the other, with gradient.

        rows: (sizes[rank], ...) of this process.  returns: (sum of sizes, ...), the same on all.
        same_use: all processes compute the same of the result, so each has the whole gradient of its own rows already;
        otherwise each uses what it needs of it, and the gradients of a row are added up over the processes.
        """
        assert rows.shape[0] == sizes[self.rank], (rows.shape, sizes)
        if self.size == 1:
            return rows
        return _RowsOfAll.apply(rows, tuple(sizes), self.rank, same_use)


ALONE = Team()


@contextmanager
def opened_team(parallel: str | None, device: torch.device) -> Iterator[Team]:
    """Join the processes that torchrun started if they share each batch (nccl on GPUs, gloo elsewhere).

    parallel: "data" for that; "folds", or None for one process alone.
    Raises ValueError where torchrun did not start this process, or started several of which each would do the same;
    ConnectionError if the others cannot be reached.
    """
    place = place_of_this_process()
    if parallel is None and place.size > 1:
        raise ValueError(
            f"torchrun started {place.size} processes, which would all train the same. Add --parallel folds (each takes "
            "folds) or --parallel data (all share each batch of a fold)."
        )
    if parallel != "data":
        yield ALONE
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "--parallel data shares each batch among processes that torchrun starts. Repeat the command with torchrun "
            "--nproc_per_node N in place of python, or leave --parallel data out."
        )
    if place.rank > 0:
        be_quiet()
    with _exchange():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    yield Team(place.rank, place.size)
    dist.destroy_process_group()  # not after an error, when it would wait for whoever has left


def own_device(gpu: int | None, device: str | None) -> torch.device | None:
    """Give each process that torchrun started on a machine a GPU of its own; None where there is nothing to choose.

    gpu, device: what the user asked for. Raises ValueError for a --gpu that all of them would take.
    """
    place = place_of_this_process()
    if place.size == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        return None
    if gpu is not None:
        raise ValueError(f"--gpu {gpu}: each of the processes that torchrun starts takes its own GPU; leave --gpu out.")
    return device_from(place.local_rank % torch.cuda.device_count())


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes: tuple[int, ...], rank: int, same_use: bool) -> Tensor:
        ctx.sizes, ctx.rank, ctx.same_use = sizes, rank, same_use
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        with _exchange():
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.same_use:
            gradient = gradient.contiguous().clone()
            with _exchange():
                dist.all_reduce(gradient)
        start = sum(ctx.sizes[: ctx.rank])
        return gradient[start : start + ctx.sizes[ctx.rank]], None, None, None


@contextmanager
def _exchange() -> Iterator[None]:
    """Make one error of whatever the library raises when a process cannot be reached any more."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0][:200]
        raise ConnectionError(
            f"another process of this training has ended or cannot be reached ({first}). The message of that process says why; "
            "repeat the command with --resume."
        ) from error
