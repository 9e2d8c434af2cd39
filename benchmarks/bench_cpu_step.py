"""What two measures for the CPU bring to a training step at UNI size: cheap dropout masks, and freed memory that is kept.

    python benchmarks/bench_cpu_step.py

The same step with both, and with either left out, in processes of their own (the allocator cannot be set back), in turn.
Besides the time on the clock the processor time (user and system) is given, which other work on the machine changes
little.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import statistics
import time

import timm  # noqa: F401, here and not in each process: the encoder
import torch
import torch._dynamo  # here and not in each process: the optimiser
from torch import nn

from benchmarks.bench_step import make_scene, section_lengths, whole_step
from benchmarks.common import Report, begin, finish, flags, machine, watched
from models.layers.dropout import Dropout
from modes.train import make_step
from modes.training.compose import make_encode
from utils.cli import run
from utils.devices import keep_freed_memory

VARIANTS = {"as in a training": (True, True), "PyTorch's dropout": (False, True), "memory given back": (True, False)}


def step_times(
    is_quick: bool, own_dropout: bool, keeps_memory: bool, steps: int
) -> tuple[list[tuple[float, float]], float]:
    """(seconds, processor seconds) of each step after a first one that warms up; and the first loss without dropout."""
    if keeps_memory:
        keep_freed_memory()
    scene = make_scene(argparse.Namespace(quick=is_quick), torch.device("cpu"))
    if not own_dropout:
        for module in scene.model.modules():
            if isinstance(module, Dropout):
                module.__class__ = nn.Dropout
    size, count = (10, 2) if is_quick else (32, 5)
    batch = scene.batch(size, section_lengths(scene, count))
    scene.model.eval()
    with torch.no_grad():
        loss = float(make_step(scene.model, scene.config, make_encode(scene.encoder))(batch)["total"])
    scene.model.train()
    step = whole_step(scene, batch)
    step()
    times = []
    for _ in range(steps):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return times, loss


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each variant, in turn")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    losses = set()
    for _ in range(rounds):
        for name, switches in VARIANTS.items():
            times, loss = watched(step_times, arguments.quick, *switches, steps, apart=not arguments.quick).value
            found[name] += times
            losses.add(loss)
    wall = {name: statistics.median(seconds for seconds, _ in times) for name, times in found.items()}
    processor = {name: statistics.median(seconds for _, seconds in times) for name, times in found.items()}
    best = "as in a training"
    report = Report(
        name="cpu_step",
        title="What the CPU's dropout and allocator bring to a training step",
        settings={"spots": 10 if arguments.quick else 32, "processes": rounds, "steps of each": steps},
        rows=[
            {
                "step": name,
                "seconds": wall[name],
                "times slower": wall[name] / wall[best],
                "processor seconds": processor[name],
                "times more": processor[name] / processor[best],
            }
            for name in VARIANTS
        ],
        notes=["Medians over all timed steps."],
        extra={"losses": sorted(losses)},
    )
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
