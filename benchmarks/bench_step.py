"""One training step at UNI size (1024 wide, 197 tokens): its parts, with the token cache and with the encoder included.

    python benchmarks/bench_step.py                      CPU: 32 spots of 5 slides, as the published code was measured
    python benchmarks/bench_step.py --device cuda        512 spots of 30 slides, bf16; FLOP/s against the ceiling
    python benchmarks/bench_step.py --device cuda --profile

The slow version is the step with the frozen ViT-L in it, which is what the published code runs: 47 s for 32 spots (38.0 of
them the ViT-L), 9.3 s without it. The ViT-L has random weights here and is measured on a few spots and scaled: its
time is proportional to the number of spots. That both steps have the same gradients is checked in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.common import (
    GIGA,
    TERA,
    Goal,
    Report,
    begin,
    finish,
    flags,
    machine,
    matmul_ceiling,
    seconds_in_turn,
    seconds_of,
)
from benchmarks.fabricated import SECTION_SIZES, random_validity, round_section
from benchmarks.flops import forward_flops, step_flops
from datasets.batches import SpotBatch
from datasets.images.geometry import dihedral_views
from models.layers.attention import attend_plainly
from models.losses import GeneDMLLoss
from models.patch_encoders.build import PatchEncoder, build_patch_encoder
from modes.prediction.model import make_model
from modes.train import make_step
from modes.training.compose import Optimization, make_encode
from utils.cli import run
from utils.config import Config, with_overrides
from utils.devices import Precision, keep_freed_memory
from utils.runs import seed_everything

PUBLISHED_S = {"neighbor encoder": 1.0, "global encoder": 2.6, "projection and fusion": 0.7}  # forward, 32 spots
TINY = (
    *("MODEL.projection_dim=32", "MODEL.neighbor_depth=1", "MODEL.neighbor_mlp_ratio=1", "MODEL.global_depth=2"),
    *("MODEL.global_mlp_ratio=1", "MODEL.fusion_mlp_dim=32", "MODEL.gene_mlp_dim=32", "MODEL.predictor_dim=32"),
    *("DATA.num_neighbors=3", "DATA.num_genes=20", "DATA.encoder=efficientnet-lite0", "DATA.patch_size=64", "LOSS.k=4"),
)


@dataclass(frozen=True)
class Scene:
    """A model and everything a step needs, on one device."""

    config: Config
    model: nn.Module
    encoder: PatchEncoder
    device: torch.device
    precision: Precision

    @property
    def num_tokens(self) -> int:
        return self.encoder.num_tokens(self.config.DATA.patch_size)

    def batch(self, size: int, lengths: list[int], **changes: object) -> SpotBatch:
        """`size` random spots of slides of `lengths` spots with random features and tokens."""
        generator = torch.Generator().manual_seed(7)
        tiles, dim = self.config.DATA.num_neighbors**2, self.encoder.pooled_dim

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device)

        whole = {
            "rows": torch.arange(size),
            "target_tokens": random(size, self.num_tokens, self.encoder.dim).half(),  # as the cache stores them
            "patches": None,
            "target_features": random(size, dim),
            "neighbor_features": random(size, tiles, dim),
            "neighbor_is_valid": random_validity(size, tiles, generator).to(self.device),
            "expression": random(size, self.config.DATA.num_genes),
            "slide_features": random(sum(lengths), dim),
            "grid_xy": torch.cat([torch.from_numpy(round_section(length)) for length in lengths]),
            "lengths": lengths,
            "slide_rows": torch.randint(sum(lengths), (size,), generator=generator),
        }
        return SpotBatch(**whole | changes)


def make_scene(arguments: argparse.Namespace, device: torch.device) -> Scene:
    config = with_overrides(Config(), ["LOSS.use_kmeans=true", *(TINY if arguments.quick else ())])
    encoder = build_patch_encoder(config.DATA.encoder, random_weights=True).to(device)
    seed_everything(config.GENERAL.seed)
    model = make_model(
        config, feature_dim=encoder.pooled_dim, token_dim=encoder.dim, num_genes=config.DATA.num_genes
    ).to(device)
    return Scene(config, model, encoder, device, Precision(config.TRAINING.precision, device))


# --- times --------------------------------------------------------------------------------------------------------------


def whole_step(scene: Scene, batch: SpotBatch) -> Callable[[], None]:
    """A whole step: forward, losses, backward, Adam."""
    step = make_step(scene.model, scene.config, make_encode(scene.encoder))
    optimizer = Optimization.of(scene.model, scene.config, scene.precision).optimizer
    scaler = scene.precision.scaler

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        with scene.precision.autocast():
            terms = step(batch)
        scaler.scale(terms["total"]).backward()
        scaler.step(optimizer)
        scaler.update()

    return once


def time_parts(scene: Scene, batch: SpotBatch, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds (forward, forward and backward) of each part alone, and of Adam (the first number)."""
    model = scene.model
    context = torch.cat([batch.neighbor_features, batch.target_features[:, None]], dim=1)
    tokens = batch.target_tokens.to(context.dtype)
    parts = {
        "neighbor encoder": lambda: model.neighbor_encoder(batch.neighbor_features, batch.neighbor_is_valid),
        "global encoder": lambda: model.encode_slides(
            batch.slide_features, batch.grid_xy, batch.lengths, batch.slide_rows
        ),
        "projection and fusion": lambda: model.fusion(
            torch.cat([model.projection(tokens), (model.context_projection or model.projection)(context)], 1)
        ),
        "losses": losses_of(scene, len(batch)),
    }
    found = {}
    for name, part in parts.items():

        def forward(part=part) -> Tensor:
            with scene.precision.autocast():
                return part()

        def both(forward=forward) -> None:
            forward().float().sum().backward()

        found[name] = (
            seconds_of(forward, scene.device, repeats=repeats),
            seconds_of(both, scene.device, repeats=repeats),
        )
    optimizer = Optimization.of(model, scene.config, scene.precision).optimizer
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found["Adam"] = (seconds_of(optimizer.step, scene.device, repeats=repeats),) * 2
    return found


def losses_of(scene: Scene, size: int):
    """The alignment losses, k-means included, on vectors of the batch's size."""
    from models.contract import SCALES, Embeddings, Prediction
    from models.layers.precision import unit

    width, genes = scene.config.MODEL.projection_dim, scene.config.DATA.num_genes
    vectors = [torch.randn(size, width, device=scene.device, requires_grad=True) for _ in range(7)]
    predicted = torch.randn(size, genes, device=scene.device, requires_grad=True)
    loss, expression = GeneDMLLoss(scene.config.LOSS), torch.randn(size, genes, device=scene.device)

    def compute() -> Tensor:
        *scales, fused, gene, fused_cluster, gene_cluster = [unit(v) for v in vectors]
        embeddings = Embeddings(dict(zip(SCALES, scales, strict=True)), gene, fused, fused_cluster, gene_cluster)
        prediction = Prediction(predicted, dict.fromkeys(SCALES, predicted), embeddings)
        return loss(prediction, expression)["total"]

    return compute


def frozen_encoder(scene: Scene, spots: int) -> Callable[[], Tensor]:
    """The frozen encoder on some spots, as training without a token cache runs it."""
    size = scene.config.DATA.patch_size
    patches = torch.randint(256, (spots, 3, size, size), dtype=torch.uint8, device=scene.device)

    def forward() -> Tensor:
        with scene.precision.autocast():
            return scene.encoder(patches).tokens

    return forward


# --- gradients ----------------------------------------------------------------------------------------------------------


def gradient_differences(scene: Scene, spots: int, lengths: list[int]) -> dict[str, float]:
    """How far the gradients with cached tokens are from those with the encoder in the step, by type of the cache.

    The cache's tokens are encoded spot by spot, as another program with another batch would. Relative to the greatest
    gradient of each parameter; the largest over all parameters. All in float32: with 16 bits the encoder itself rounds
    another way for one patch than for several. "float16" leaves the group term out: where rounding
    moves a spot to another cluster its gradient jumps, which "float16, group term" shows when it happens.
    """
    scene = replace(scene, precision=Precision("float32", scene.device))
    size = scene.config.DATA.patch_size
    generator = torch.Generator().manual_seed(3)
    # A colour for each patch: patches of noise alone are all alike, and rounding would decide their clusters.
    colour = torch.randint(180, (spots, 3, 1, 1), generator=generator)
    patches = (colour + torch.randint(76, (spots, 3, size, size), generator=generator)).to(torch.uint8)
    views = torch.randint(8, (spots,), generator=generator)
    turned = dihedral_views(patches, views).to(scene.device)
    with scene.precision.autocast():
        tokens = torch.cat([scene.encoder(patch[None]).tokens.float() for patch in turned])
    rounded, found = tokens.half().float(), {}
    for name, cached, group_weight in (
        ("float32", tokens, scene.config.LOSS.group_weight),
        ("float16", rounded, 0.0),
        ("float16, group term", rounded, scene.config.LOSS.group_weight),
    ):
        online = gradients(scene, scene.batch(spots, lengths, target_tokens=None, patches=turned), group_weight)
        with_cache = gradients(scene, scene.batch(spots, lengths, target_tokens=cached), group_weight)
        found[name] = max(
            float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(online, with_cache)
        )
    return found


def gradients(scene: Scene, batch: SpotBatch, group_weight: float) -> list[Tensor]:
    """Of every parameter, with the same dropout in every call."""
    loss = replace(scene.config.LOSS, k=min(scene.config.LOSS.k, len(batch) // 2), group_weight=group_weight)
    config = replace(scene.config, LOSS=loss)
    step = make_step(scene.model, config, make_encode(scene.encoder))
    seed_everything(11)
    scene.model.zero_grad(set_to_none=True)
    with scene.precision.autocast():
        step(batch)["total"].backward()
    return [parameter.grad.clone() for parameter in scene.model.parameters() if parameter.grad is not None]


# --- the report ---------------------------------------------------------------------------------------------------------


def part_rows(scene: Scene, parts: dict, batch: SpotBatch, step_s: float, encoder_s: float) -> list[dict[str, object]]:
    """The table of a step's parts; the share is of the step with the token cache."""
    work = flops_of(scene, len(batch), batch.lengths)
    work["projection and fusion"] = work["projection"] + work["fusion"]
    is_published = len(batch) == 32 and len(batch.lengths) == 5
    rows = []
    for name, (forward, both) in parts.items():
        rows.append(
            {
                "part": name,
                "published forward (ms)": 1e3 * PUBLISHED_S[name] if is_published and name in PUBLISHED_S else None,
                "forward (ms)": 1e3 * forward if name != "Adam" else None,
                "with backward (ms)": 1e3 * both,
                "share of the step": f"{100 * both / step_s:.0f} %",
                "GFLOP/s": 3 * work[name] / both / GIGA if name in work else None,
            }
        )
    total = step_flops_of(scene, len(batch), batch.lengths)
    empty = dict.fromkeys(rows[0])
    rows.append(empty | {"part": "step, token cache", "with backward (ms)": 1e3 * step_s, "share of the step": "100 %",
                         "published forward (ms)": None, "GFLOP/s": total / step_s / GIGA})  # fmt: skip
    rows.append(empty | {"part": "frozen encoder", "forward (ms)": 1e3 * encoder_s,
                         "published forward (ms)": 38e3 if is_published else None})  # fmt: skip
    rows.append(empty | {"part": "step, encoder included", "with backward (ms)": 1e3 * (step_s + encoder_s)})
    return rows


def flops_of(scene: Scene, size: int, lengths: list[int]) -> dict[str, float]:
    data = scene.config.DATA
    return forward_flops(
        scene.config.MODEL,
        dim=scene.encoder.pooled_dim,
        tokens=scene.num_tokens,
        tiles=data.num_neighbors**2,
        genes=data.num_genes,
        batch=size,
        lengths=lengths,
    )


def step_flops_of(scene: Scene, size: int, lengths: list[int]) -> float:
    width = scene.config.MODEL.projection_dim
    parts = flops_of(scene, size, lengths)
    return step_flops(parts, dim=scene.encoder.dim, width=width, tokens=scene.num_tokens, batch=size)


def slides_table(scene: Scene, parts: dict, size: int, counts: list[int], repeats: int) -> list[dict[str, object]]:
    """What `--slides_per_batch` saves: the global encoder grows with the slides of a batch, nothing else does.

    The other parts are those measured at `size` spots, in proportion to 512.
    """
    others = sum(parts[name][1] for name in parts if name not in ("global encoder", "Adam")) * 512 / size
    others += parts["Adam"][0]
    rows = []
    for count in counts:
        batch = scene.batch(size, section_lengths(scene, count))
        seconds = time_parts_of_global(scene, batch, repeats)
        rows.append(
            {
                "slides a batch": count,
                "their spots": sum(batch.lengths),
                "global encoder, with backward (s)": seconds,
                "step of 512 spots (s, from the parts)": others + seconds,
                "share of the global encoder": f"{100 * seconds / (others + seconds):.0f} %",
            }
        )
    return rows


def time_parts_of_global(scene: Scene, batch: SpotBatch, repeats: int) -> float:
    def both() -> None:
        with scene.precision.autocast():
            found = scene.model.encode_slides(batch.slide_features, batch.grid_xy, batch.lengths, batch.slide_rows)
        found.float().sum().backward()

    return seconds_of(both, scene.device, repeats=repeats, warm_up=1 if scene.device.type == "cuda" else 0)


def wide_head_table(scene: Scene, size: int, repeats: int) -> list[dict[str, object]]:
    """The fusion's attention (one head, as wide as the model) by PyTorch's kernel and by two plain matrix products.

    Flash attention takes heads up to 256 wide; `models/layers/attention.py` prefers the plain way beyond that,
    which keeps (B, T, T) scores. This table tells whether it is right on the device at hand.
    """
    count = scene.num_tokens + scene.config.DATA.num_neighbors**2 + 1
    width = scene.config.MODEL.projection_dim // scene.config.MODEL.fusion_heads
    shape = (size, scene.config.MODEL.fusion_heads, count, width)
    parts = [torch.randn(shape, device=scene.device, dtype=scene.precision.dtype, requires_grad=True) for _ in range(3)]

    rows = []
    kernel = nn.functional.scaled_dot_product_attention
    for name, attention in (("kernel of PyTorch", kernel), ("two matrix products", attend_plainly)):
        seconds = seconds_of(
            lambda attention=attention: attention(*parts).sum().backward(), scene.device, repeats=repeats
        )
        rows.append({"attention": name, "head width": width, "tokens": count, "with backward (ms)": 1e3 * seconds})
    return rows


def section_lengths(scene: Scene, count: int) -> list[int]:
    """Spots of `count` sections; small ones for a trial with the tiny model.

    Five are those whose arithmetic is that of the published measurement (its global encoder: 2.6 s at about 56 GFLOP/s).
    """
    if scene.encoder.name != "uni":
        return [20 + i for i in range(count)]
    if count == 5:
        return [SECTION_SIZES[name] for name in ("B1", "B4", "C2", "C3", "C4")]
    names = list(SECTION_SIZES)
    return [SECTION_SIZES[names[i * len(names) // count]] for i in range(count)]


def profile(scene: Scene, batch: SpotBatch, path: Path) -> None:
    """The table of PyTorch's profiler for one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    once = whole_step(scene, batch)
    once()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (scene.device.type == "cuda")
    with profiler(activities=activities) as found:
        once()
    order = "cuda_time_total" if scene.device.type == "cuda" else "cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=order, row_limit=30))


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--batch_size", type=int, help="spots of a step (default: 32, on CUDA 512)")
    parser.add_argument("--slides", type=int, help="slides they lie on (default: 5, on CUDA 30)")
    parser.add_argument("--encoder_spots", type=int, help="spots that the encoder is timed on (default: 8; CUDA: 256)")
    parser.add_argument("--profile", action="store_true", help="write the profiler's table of a step")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    on_cuda = device.type == "cuda"
    size = arguments.batch_size or (10 if arguments.quick else 512 if on_cuda else 32)
    count = arguments.slides or (2 if arguments.quick else 30 if on_cuda else 5)
    repeats = 10 if on_cuda else 1 if arguments.quick else 3
    if not on_cuda:
        keep_freed_memory()  # as a training does
    scene = make_scene(arguments, device)
    batch = scene.batch(size, section_lengths(scene, count))
    ceiling = matmul_ceiling(device, scene.precision.dtype, 256 if arguments.quick else None)
    scene.model.train()
    encoder_spots = arguments.encoder_spots or (4 if arguments.quick else 256 if on_cuda else 8)
    compared = [whole_step(scene, batch), frozen_encoder(scene, encoder_spots)]
    calls = 10 if on_cuda else 1
    step_s, encoder_s = seconds_in_turn(compared, device, rounds=1 if arguments.quick else 10, calls=calls)
    encoder_s *= size / encoder_spots
    parts = time_parts(scene, batch, repeats)
    scene.model.eval()
    without_dropout = seconds_of(whole_step(scene, batch), device, repeats=repeats, calls=calls)
    scene.model.train()
    differences = gradient_differences(scene, 8, section_lengths(scene, 1))
    rate = step_flops_of(scene, size, batch.lengths) / step_s
    report = Report(
        name="step",
        title="Training step",
        settings={
            "spots": size,
            "slides": count,
            "their spots": sum(batch.lengths),
            "precision": scene.precision.name,
            "encoder": f"{scene.encoder.name}, random weights, timed on {encoder_spots} spots",
            "matrix products (TFLOP/s)": round(ceiling / TERA, 3),
        },
        rows=part_rows(scene, parts, batch, step_s, encoder_s),
        notes=[
            f"The step reaches {100 * rate / ceiling:.0f} % of the rate of a large matrix product.",
            f"Without dropout the step takes {1e3 * without_dropout:.0f} ms.",
            "Gradients with cached tokens against the encoder in the step, greatest relative difference: "
            + ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
            + ". (float16 alone: without the group term, whose gradient jumps where rounding moves a spot to another cluster.)",
        ],
        extra={"gradient_differences": differences, "ceiling_flops": ceiling, "step_flops_per_second": rate},
    )
    if not arguments.quick:
        counts = [1, 5, 10, 30]
        report.tables["Slides of a batch"] = slides_table(scene, parts, size, counts, 1 if not on_cuda else 5)
    if on_cuda or arguments.quick:
        report.tables["Attention of the fusion"] = wide_head_table(scene, size, repeats)
    report.goals = goals(scene, step_s, encoder_s, rate / ceiling, differences, arguments.quick)
    path = finish(report, arguments, device, started_on)
    if arguments.profile:
        profile(scene, batch, path.with_name(f"{path.stem}_profile.txt"))
    return path


def goals(
    scene: Scene, step_s: float, encoder_s: float, share: float, differences: dict[str, float], is_quick: bool
) -> list[Goal]:
    times = (step_s + encoder_s) / step_s
    measured = (
        f"{step_s:.2f} s instead of {step_s + encoder_s:.1f} s, {times:.1f} times; gradients differ by "
        f"{differences['float32']:.0e} (float32 cache)"
    )
    is_met = times >= 5 and differences["float32"] < 1e-3
    found = [
        Goal("step with the token cache", "encoder included", "5 times faster, gradient-equal", measured,
             None if is_quick else is_met),
    ]  # fmt: skip
    if scene.device.type == "cuda":
        found.append(
            Goal(
                "step at batch 512",
                "-",
                "35 % of the ceiling",
                f"{100 * share:.0f} %",
                None if is_quick else share >= 0.35,
            )
        )
    return found


if __name__ == "__main__":
    run(main)
