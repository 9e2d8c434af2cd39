"""Evaluation and prediction of one slide at UNI size: time and peak memory against the number of spots.

    python benchmarks/bench_evaluation.py              300 and 1 000 spots whole, 4 000 in part; minutes
    python benchmarks/bench_evaluation.py --full       also 16 000 and 40 000 in part; about half an hour on two cores

Every size runs in a process of its own. "In part": the global encoder over the whole slide and the first chunks of
everything else, which decides the peak; the time of the whole is then projected from the seconds of a chunk.
The slow version keeps attention matrices of spots by spots and passes all spots through the model at once, as the
published code does. It stands for 2.7 MB a spot in the fusion, 1.1 MB in the neighbor encoder, and 2.0 GB in the global
encoder at 4 000 spots, growing with the square.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import GIGA, MEGA, ChildResult, Goal, Report, begin, finish, flags, machine, synchronise, watched
from benchmarks.fabricated import random_validity, round_section
from datasets.batches import SlideBatch, SpotBatch
from models.gene_dml import GeneDML
from models.layers.precision import mean_tokens
from modes.prediction.model import make_model
from modes.prediction.slide import predict_slide
from utils.cli import run
from utils.config import Config, with_overrides
from utils.devices import Precision
from utils.runs import seed_everything

POOL = 48  # different spots that the features of a slide are made of


@dataclass(frozen=True)
class Setting:
    """Sizes of the features and the model, and the device; small enough to be sent to another process."""

    dim: int
    tokens: int
    overrides: tuple[str, ...]
    device: str

    @property
    def config(self) -> Config:
        return with_overrides(Config(), list(self.overrides))

    def model(self) -> GeneDML:
        config = self.config
        seed_everything(config.GENERAL.seed)
        model = make_model(config, feature_dim=self.dim, token_dim=self.dim, num_genes=config.DATA.num_genes)
        return model.to(self.device).eval()


class FabricatedSlide:
    """A round slide of N spots; tokens and neighbor features come chunk by chunk, as from their files."""

    def __init__(self, setting: Setting, count: int):
        generator = torch.Generator().manual_seed(5)
        tiles = setting.config.DATA.num_neighbors**2
        self.count, self.device = count, torch.device(setting.device)
        self.features = torch.randn(count, setting.dim, generator=generator)
        self.grid_xy = torch.from_numpy(round_section(count))
        self._tokens = torch.randn(POOL, setting.tokens, setting.dim, generator=generator).half()
        self._neighbors = torch.randn(POOL, tiles, setting.dim, generator=generator)
        self._is_valid = random_validity(POOL, tiles, generator)

    def batch(self, rows: Tensor) -> SpotBatch:
        places = rows % POOL
        return SpotBatch(
            rows=rows,
            target_tokens=self._tokens[places].to(self.device),
            patches=None,
            target_features=self.features[rows].to(self.device),
            neighbor_features=self._neighbors[places].to(self.device),
            neighbor_is_valid=self._is_valid[places].to(self.device),
            expression=None,
        )

    def whole(self, most_chunks: int | None, clock: list[float]) -> SlideBatch:
        """For `predict_slide`; it ends after `most_chunks` chunks, and notes when each of them was asked for."""

        def chunks(size: int) -> Iterator[SpotBatch]:
            for number, rows in enumerate(torch.arange(self.count).split(size)):
                if most_chunks is not None and number >= most_chunks:
                    break
                synchronise(self.device)
                clock.append(time.perf_counter())
                yield self.batch(rows)
            synchronise(self.device)
            clock.append(time.perf_counter())

        return SlideBatch(self.features.to(self.device), self.grid_xy, chunks)


def fast(setting: Setting, count: int, most_chunks: int | None) -> dict[str, object]:
    """The project's evaluation of a slide: predictions, seconds of the global encoder and of all chunks together."""
    model, config = setting.model(), setting.config
    slide, clock = FabricatedSlide(setting, count), []
    precision, size = Precision(config.TRAINING.precision, slide.device), config.EVALUATION.chunk_size
    started = time.perf_counter()
    found = predict_slide([model], slide.whole(most_chunks, clock), precision, chunk_size=size)[0]["fused"]
    per_spot = (clock[-1] - clock[0]) / len(found)
    return {
        "fused": found,
        "is_whole": len(found) == count,
        "seconds": clock[0] - started + per_spot * count,
        "global_seconds": clock[0] - started,
        "gpu_peak": torch.cuda.max_memory_allocated() if slide.device.type == "cuda" else None,
    }


# --- the slow version ---------------------------------------------------------------------------------------------------


def naive_layer(layer: nn.Module, tokens: Tensor, is_valid: Tensor | None = None) -> Tensor:
    """(B, T, D) through one pre-norm layer, scores and probabilities of all tokens by all tokens in memory."""
    attention, (batch, count, dim) = layer.attention, tokens.shape
    qkv = attention.to_qkv(layer.attention_norm(tokens)).view(batch, count, 3, attention.heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) / (dim // attention.heads) ** 0.5
    if attention.bias_table is not None:
        scores = scores + attention.bias_table[:, attention.bias_index]
    if is_valid is not None:
        scores = scores.masked_fill(~is_valid[:, None, None], float("-inf"))
    probabilities = scores.softmax(dim=-1)
    attended = (probabilities @ value).transpose(1, 2).reshape(batch, count, dim)
    tokens = tokens + attention.project(attended)
    return tokens + layer.feed_forward(layer.feed_forward_norm(tokens))


def naive_global(encoder: nn.Module, features: Tensor, grid_xy: Tensor) -> Tensor:
    """(N, D): every layer over the whole slide, the convolution on the dense grid."""
    tokens = naive_layer(encoder.layers[0], features[None])[0]
    x, y = (grid_xy - grid_xy.amin(dim=0)).T
    dense = tokens.new_zeros(tokens.shape[1], int(x.max()) + 1, int(y.max()) + 1)
    dense[:, x, y] = tokens.T
    convolution = encoder.position
    mixed = functional.conv2d(dense[None], convolution.weight, convolution.bias, padding=1, groups=tokens.shape[1])
    tokens = (tokens + mixed[0][:, x, y].T)[None]
    for layer in encoder.layers[1:]:
        tokens = naive_layer(layer, tokens)
    return encoder.norm(tokens[0])


def naive(setting: Setting, count: int) -> dict[str, object]:
    """All spots of a slide at once."""
    model, slide = setting.model(), FabricatedSlide(setting, count)
    started = time.perf_counter()
    with torch.no_grad():
        batch = slide.batch(torch.arange(count))
        global_tokens = naive_global(model.global_encoder, batch.target_features, slide.grid_xy.to(slide.device))
        neighbors = batch.neighbor_features
        for layer in model.neighbor_encoder.layers:
            neighbors = naive_layer(layer, neighbors, batch.neighbor_is_valid)
        neighbors = model.neighbor_encoder.norm(neighbors)
        tokens = torch.cat([batch.target_tokens.float(), neighbors, global_tokens[:, None]], dim=1)
        fused = model.fusion.feed_forward(naive_layer(model.fusion.layer, model.projection(tokens)))
        predicted = model.fused_predictor(mean_tokens(fused))
    return {"fused": predicted.cpu().numpy(), "is_whole": True, "seconds": time.perf_counter() - started}


# --- the report ---------------------------------------------------------------------------------------------------------


def row_of(version: str, count: int, found: ChildResult) -> dict[str, object]:
    value = found.value
    return {
        "version": version,
        "spots": count,
        "peak memory (GB)": found.peak_bytes / GIGA,
        "over the start (GB)": found.taken_bytes / GIGA,
        "GPU peak (GB)": value["gpu_peak"] / GIGA if value.get("gpu_peak") else None,
        "global encoder (s)": value.get("global_seconds"),
        "whole slide (s)": value["seconds"],
        "time is": "measured" if value["is_whole"] else "projected",
    }


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--full", action="store_true", help="16 000 and 40 000 spots as well (evaluation_full.json)")
    parser.add_argument("--chunks", type=int, default=1, help="chunks that are run 'in part' (default: 1; 0: all)")
    parser.add_argument("--sizes", help="sizes of slides instead, comma separated; those over 1000 in part")
    parser.add_argument("--chunk_size", type=int, help="spots of a chunk (default: EVALUATION.chunk_size)")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    setting, apart = setting_of(arguments, str(device)), not arguments.quick
    slow_sizes = [20, 40] if arguments.quick else [100, 300]
    slow = {count: watched(naive, setting, count, apart=apart) for count in slow_sizes}
    fast_found = {}
    for count in sizes_of(arguments):
        in_part = arguments.chunks if count > 1000 and arguments.chunks else None
        fast_found[count] = watched(fast, setting, count, in_part, apart=apart)
    shared = slow_sizes[-1]
    assert shared in fast_found, f"the sizes should hold {shared}, where both versions are compared"
    difference = float(np.abs(slow[shared].value["fused"] - fast_found[shared].value["fused"]).max())
    per_spot = (slow[slow_sizes[1]].taken_bytes - slow[slow_sizes[0]].taken_bytes) / (slow_sizes[1] - slow_sizes[0])
    report = Report(
        name="evaluation",
        title="Evaluation of one slide",
        settings={
            "width": setting.dim,
            "tokens": setting.tokens,
            "genes": setting.config.DATA.num_genes,
            "spots of a chunk": setting.config.EVALUATION.chunk_size,
            "chunks run in part": arguments.chunks,
        },
        rows=[
            *(row_of("naive: all at once", count, found) for count, found in slow.items()),
            *(row_of("here", count, found) for count, found in fast_found.items()),
        ],
        notes=[
            f"Greatest difference of the predictions of {shared} spots: {difference:.1e}.",
            f"The slow version takes {per_spot / MEGA:.1f} MB for a further spot, {40_000 * per_spot / GIGA:.0f} GB for "
            "40 000; attention over the slide comes on top and grows with the square.",
        ],
        extra={"difference": difference, "naive_bytes_per_spot": per_spot},
    )
    report.goals = [goal(fast_found, arguments.quick)]
    assert difference < 1e-3, "the fast evaluation predicts something else than the slow one"
    if arguments.full:
        report.script, report.name = report.name, "evaluation_full"
    path = finish(report, arguments, device, started_on)
    return path


def sizes_of(arguments) -> list[int]:
    if arguments.sizes:
        return [int(size) for size in arguments.sizes.split(",")]
    if arguments.quick:
        return [20, 40, 80]
    return [300, 1000, 4000, 16_000, 40_000] if arguments.full else [300, 1000, 4000]


def setting_of(arguments, device: str) -> Setting:
    chunk = [f"EVALUATION.chunk_size={arguments.chunk_size}"] if arguments.chunk_size else []
    if not arguments.quick:
        return Setting(1024, 197, tuple(chunk), device)
    from benchmarks.bench_step import TINY

    return Setting(32, 5, (*TINY, "EVALUATION.chunk_size=16", *chunk), device)


def goal(found: dict[int, ChildResult], is_quick: bool) -> Goal:
    """The whole memory: of the host, or of the device where the greatest part of it lies there."""
    greatest = max(found)
    peak = max(found[greatest].peak_bytes, found[greatest].value.get("gpu_peak") or 0) / GIGA
    return Goal(
        "evaluation of a slide of 40 000 spots",
        "grows with N^2",
        "under 6 GB",
        f"{peak:.2f} GB at {greatest} spots",
        None if is_quick or greatest < 40_000 else peak < 6,
    )


if __name__ == "__main__":
    run(main)
