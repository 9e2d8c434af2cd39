"""How a training step shrinks with the number of processes that share its batch, and how memory grows with the spots.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --device cuda      as many processes as there are GPUs

The same batch by one, two and four processes (`--parallel data`), at UNI size over sections of HER2ST's sizes, random features.
The threads of PyTorch are shared among the processes; with more processes than cores they wait for each other. The slow
version is the step of one process: the loss of all others is compared with it. Then, on the CPU, the memory that a training
takes of 10 000 to 160 000 spots, resident and out of core (benchmarks/out_of_core.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import os
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch._dynamo  # here and not in each process: the optimiser
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import out_of_core
from benchmarks.bench_epoch import RandomTokens, random_store
from benchmarks.common import GIGA, Goal, Report, begin, finish, flags, in_child, machine, scratch, synchronise
from benchmarks.fabricated import SECTION_SIZES
from datasets.batches import BatchMaker
from datasets.shares import SharedBatch, share_of
from models.losses import GeneDMLLoss
from modes.parallel.data import encoded_slides, whole_prediction
from modes.prediction.model import make_model
from modes.prediction.slide import model_inputs, tokens_of
from modes.training.compose import Optimization
from utils.cli import run
from utils.config import Config, with_overrides
from utils.devices import Precision, keep_freed_memory
from utils.parallel.team import Team, opened_team
from utils.runs import generator_for, seed_everything

TINY = [
    "MODEL.projection_dim=16", "MODEL.neighbor_depth=1", "MODEL.global_depth=2", "MODEL.fusion_mlp_dim=16",
    "MODEL.gene_mlp_dim=16", "MODEL.predictor_dim=16", "DATA.num_genes=8", "LOSS.k=3",
]  # fmt: skip
PARTS = ("batch", "global encoder", "rest of the model", "losses", "backward", "sum of gradients", "Adam")


@dataclass(frozen=True)
class Size:
    """Of the data and the batch that are timed."""

    lengths: tuple[int, ...]
    batch: int
    dim: int = 1024
    tokens: int = 197

    @classmethod
    def of(cls, is_quick: bool) -> Size:
        if is_quick:
            return cls((20, 18, 16, 14, 12, 10), 15, dim=32, tokens=5)
        return cls(tuple(SECTION_SIZES[name] for name in ("B1", "C1", "D1", "E1", "G1", "B2", "C2", "D2")), 64)


@dataclass
class Found:
    """What one process has found. seconds: by part, of each step. flops: of its global encoder, forward. loss: of the batch."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    flops: int = 0
    loss: float = 0.0
    parts_of_batch: tuple[int, int] = (0, 0)  # own spots, spots of the slides that it encodes

    @property
    def step(self) -> float:
        return sum(statistics.median(times) for times in self.seconds.values())


class Scene:
    """Model, data and loss of one process of a team."""

    def __init__(self, size: Size, team: Team, device: torch.device, is_quick: bool):
        self.team, self.device = team, device
        self.config = with_overrides(Config(), ["LOSS.use_kmeans=true", *(TINY if is_quick else ())])
        store = random_store(list(size.lengths), size.dim, self.config.DATA.num_neighbors**2)
        torch.manual_seed(5)
        tokens = RandomTokens(sum(size.lengths), 1, size.tokens, size.dim, device)
        self.maker = BatchMaker(store, tokens, device)
        self.rows = torch.randperm(sum(size.lengths), generator=generator_for("scale"))[: size.batch]
        self.expression = torch.rand(sum(size.lengths), self.config.DATA.num_genes, generator=generator_for("genes"))
        self.expression = self.expression.to(device)
        seed_everything(self.config.GENERAL.seed)
        self.model = make_model(
            self.config, feature_dim=size.dim, token_dim=size.dim, num_genes=self.config.DATA.num_genes
        ).to(device)
        self.precision = Precision(self.config.TRAINING.precision, device)
        self.optimizer = Optimization.of(self.model, self.config, self.precision).optimizer
        self.loss = GeneDMLLoss(self.config.LOSS)

    def share(self) -> SharedBatch:
        views = torch.zeros_like(self.rows)
        return share_of(self.maker, self.rows, views, self.expression, self.team.rank, self.team.size)

    def step(self, found: Found | None) -> float:
        """Take a step as a training does (`modes.parallel.data.shared_step`, `engine.train_one_epoch`), each part timed.

        returns: its loss.  found: where the times go; None for a step that only warms up.
        """

        @contextmanager
        def part(name: str) -> Iterator[None]:
            synchronise(self.device)
            started = time.perf_counter()
            yield
            synchronise(self.device)
            if found is not None:
                found.seconds.setdefault(name, []).append(time.perf_counter() - started)

        self.optimizer.zero_grad(set_to_none=True)
        with part("batch"):
            batch = self.share()
        with self.precision.autocast():
            with part("global encoder"):
                global_tokens = encoded_slides(self.model, batch, self.team)
            with part("rest of the model"):
                prediction = self.model(model_inputs(batch, tokens_of(batch), global_tokens), batch.expression)
            with part("losses"):
                terms = self.loss(whole_prediction(prediction, batch.sizes, self.team), batch.whole_expression)
        with part("backward"):
            terms["total"].backward()
        with part("sum of gradients"):
            self.team.sum_gradients(self.optimizer)
        with part("Adam"):
            self.optimizer.step()
        return float(terms["total"].detach())


def work(rank: int, count: int, port: int, device_name: str, is_quick: bool, steps: int) -> Found:
    """One of `count` processes that share a batch."""
    keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(device_name, rank) if device_name == "cuda" else torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    found = Found()
    with opened_team("data", device) as team:
        scene = Scene(Size.of(is_quick), team, device, is_quick)
        scene.model.eval()  # without dropout, for the comparison
        found.loss = scene.step(None)
        scene.model.train()
        for number in range(steps + 1):
            scene.step(found if number else None)
        batch = scene.share()
        found.parts_of_batch = (len(batch.rows), sum(batch.lengths))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoded_slides(scene.model, batch, team)
        found.flops = counter.get_total_flops()
    return found


def team_of(count: int, device: torch.device, is_quick: bool, steps: int) -> list[Found]:
    """Start `count` processes and wait for what they have found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "fork" if is_quick and device.type == "cpu" else "forkserver"
    with ThreadPoolExecutor(count) as pool:
        started = [
            pool.submit(in_child, work, rank, count, port, device.type, is_quick, steps, start=start)
            for rank in range(count)
        ]
        return [one.result().value for one in started]


def step_rows(found: dict[int, list[Found]]) -> list[dict[str, object]]:
    """One line for each number of processes; a part takes as long as in the first process, which waits for the others."""
    alone = found[min(found)][0]
    rows = []
    for count, processes in found.items():
        first = processes[0]
        shares = {name: statistics.median(first.seconds[name]) / first.step for name in PARTS}
        most = max(one.flops for one in processes)
        rows.append(
            {
                "processes": count,
                "step (s)": first.step,
                "times faster": alone.step / first.step,
                **{f"{name} (%)": round(100 * share) for name, share in shares.items()},
                "global encoder, most of a process (GFLOP)": most / GIGA,
                "share of one process": most / alone.flops,
            }
        )
    return rows


def encoder_goal(found: dict[int, list[Found]], is_quick: bool) -> Goal:
    """The arithmetic of the global encoder falls with the number of processes."""
    alone = found[1][0].flops
    shares = {count: max(one.flops for one in processes) / alone for count, processes in found.items()}
    return Goal(
        "global encoder, most of a process",
        "one process",
        "1/N of its arithmetic on N processes, at most a fifth more",
        ", ".join(f"{share:.2f} on {count}" for count, share in shares.items()),
        None if is_quick else all(share <= 1.2 / count for count, share in shares.items()),
    )


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    counts = [1, 2] if arguments.quick else [1, 2, 4]
    if device.type == "cuda":
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    steps = 1 if arguments.quick else arguments.steps
    found = {count: team_of(count, device, arguments.quick, steps) for count in counts}
    size, alone = Size.of(arguments.quick), found[1][0].loss
    losses = [one.loss for processes in found.values() for one in processes]
    report = Report(
        name="scale",
        title="Several processes at one batch, and many spots",
        settings={"spots": size.batch, "slides": len(size.lengths), "their spots": sum(size.lengths)},
        rows=step_rows(found),
        goals=[encoder_goal(found, arguments.quick)],
        extra={"loss_difference": max(abs(loss - alone) / abs(alone) for loss in losses)},
    )
    for count, processes in found.items():
        assert sum(one.parts_of_batch[1] for one in processes) == sum(size.lengths), "a slide is encoded by one process"
        spots = ", ".join(f"{one.parts_of_batch[0]} and {one.parts_of_batch[1]}" for one in processes)
        report.notes.append(f"{count} processes: own spots, and spots of the slides that each encodes: {spots}.")
    report.notes.append(
        f"The losses of one batch differ by at most {report.extra['loss_difference']:.0e} of their value."
    )
    assert report.extra["loss_difference"] < 1e-3, "several processes do not compute what one computes"
    if device.type == "cpu":
        with scratch() as folder:
            out_of_core.measure(report, folder, arguments.quick)
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
