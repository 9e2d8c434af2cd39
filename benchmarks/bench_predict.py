"""Predicting a slide: what sharing tiles between spots saves, and the memory that a slide of 40 000 px takes.

    python benchmarks/bench_predict.py
    python benchmarks/bench_predict.py --sides 1300,2000 --whole 0     smaller slides, and none of 40 000 px

The whole of `--mode predict` at the sizes of the demo (one fold, random weights), on simulated slides. On the default grid
the tiles around a spot are patches of other spots, and each is encoded once. With a pitch one pixel off no two spots share
a tile: the cost of encoding every tile of every spot anew. The predictions are compared with those of every spot encoded
alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import math
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import anndata
import numpy as np
import tifffile
import torch
from PIL import Image

from benchmarks.common import GIGA, Goal, Report, begin, finish, flags, machine, scratch, watched
from datasets.features.patch_encoder import BatchedPatchEncoder
from models.patch_encoders.build import build_patch_encoder
from modes.predict import PredictOptions, predict
from modes.prediction import encode
from modes.prediction.model import make_model
from utils.checkpoint import save_checkpoint
from utils.cli import run
from utils.config import load_config, with_overrides
from utils.trained_fold import PatchEncoderRecord, Progress, SplitRecord, TrainedFold, TrainingSample

TILE = 256  # px, of the TIFF
TEXTURES = 64
SIDES, QUICK_SIDES, TISSUE = (2600, 4100), (340,), 0.6  # px; share of the slide
WHOLE, QUICK_WHOLE, WHOLE_TISSUE = 40_000, 768, 0.1  # a section of HER2ST covers 9 to 21 % of its slide
SAMPLE = 1000  # training spots that the novelty is measured against
MOST_GB, MOST_OF_THE_TIME = 4, 0.2


@dataclass(frozen=True)
class Found:
    """Of one prediction: spots, images that passed the encoder, wall and processor seconds."""

    spots: int
    images: int
    seconds: float
    processor: float


@cache
def stained_tiles() -> list[bytes]:
    """Tiles of tissue, compressed."""
    coarse = np.array([190, 120, 170]) + np.random.default_rng(0).integers(
        -45, 46, (TEXTURES, TILE // 12, TILE // 12, 3)
    )
    textures = [Image.fromarray(one.astype(np.uint8)).resize((TILE, TILE), Image.Resampling.BILINEAR) for one in coarse]
    return [zlib.compress(texture.tobytes(), 1) for texture in textures]


def write_slide(path: Path, side: int, tissue: float) -> None:
    """A disc of tissue on glass, a share `tissue` of the slide, as a tiled TIFF with a pyramid; tiles repeat."""
    stained, glass = stained_tiles(), zlib.compress(np.full((TILE, TILE, 3), 244, dtype=np.uint8).tobytes(), 1)

    def tiles(length: int) -> Iterator[bytes]:
        for row in range(-(-length // TILE)):
            for column in range(-(-length // TILE)):
                apart = math.hypot((column + 0.5) * TILE - length / 2, (row + 0.5) * TILE - length / 2)
                is_stained = math.pi * apart**2 < tissue * length**2
                yield stained[(31 * row + column) % TEXTURES] if is_stained else glass

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        length = side
        while length == side or length > 2048:
            tiff.write(
                tiles(length), shape=(length, length, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="rgb",
                compression="adobe_deflate", subfiletype=int(length < side), metadata=None,
            )  # fmt: skip
            length //= 4


def write_run(folder: Path, config_name: str, overrides: list[str]) -> Path:
    """A checkpoint of one fold with random weights; returns it."""
    config = with_overrides(load_config(config_name), overrides)
    patch_encoder = build_patch_encoder(config.DATA.encoder)
    dim, token_dim, num_genes = patch_encoder.pooled_dim, patch_encoder.dim, config.DATA.num_genes
    torch.manual_seed(0)
    model = make_model(config, feature_dim=dim, token_dim=token_dim, num_genes=num_genes)
    split = SplitRecord(0, "A", "clean", ["A"], ["B"], [], ["A1"], ["B1"], [], "fixed")
    fold = TrainedFold(
        weights=model.state_dict(),
        epoch=1,
        progress=Progress(1, 1),
        config=config,
        config_name=config_name,
        genes=[f"GENE{number}" for number in range(num_genes)],
        encoder=PatchEncoderRecord(patch_encoder.name, patch_encoder.weights_sha256, dim, token_dim),
        split=split,
        training_mean=torch.zeros(2, num_genes),
        gene_lists={},
        field_of_view_um=None,
        finished=True,
        sample=TrainingSample(torch.randn(SAMPLE, dim).half(), torch.rand(SAMPLE).sort().values),
    )
    path = folder / "run" / "fold_0" / "best.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, fold)
    return path


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the images that pass the patch encoder meanwhile."""
    counts, genuine = [0], BatchedPatchEncoder.encode

    def counting(self: BatchedPatchEncoder, images: torch.Tensor, with_tokens: int):
        counts[0] += len(images)
        return genuine(self, images, with_tokens)

    BatchedPatchEncoder.encode = counting
    try:
        yield counts
    finally:
        BatchedPatchEncoder.encode = genuine


def predicted(checkpoint: Path, slide: Path, pitch_px: int | None, device: str) -> Found:
    """Predict a slide as the command does; pitch_px: None for the default grid."""
    out = slide.with_suffix(".h5ad")
    started, started_processor = time.perf_counter(), time.process_time()
    with counted() as images:
        predict(
            checkpoint, PredictOptions(slide, out, pitch_px=pitch_px, overwrite=True), None, [], torch.device(device)
        )
    seconds, processor = time.perf_counter() - started, time.process_time() - started_processor
    spots = anndata.read_h5ad(out, backed="r").n_obs
    return Found(spots, images[0], seconds, processor)


def difference_to_the_slow_way(checkpoint: Path, slide: Path, device: str) -> float:
    """The greatest difference between the predictions and those of every spot encoded alone, over all scales."""
    numbers = []
    genuine = encode.encode_slide

    def alone(slide, centers, encoder, plan, *, num_workers):
        for row, center in enumerate(centers):
            for part in genuine(slide, center[None], encoder, plan, num_workers=num_workers):
                yield encode.replace(part, rows=slice(row, row + 1))

    for encode_slide in (genuine, alone):
        encode.encode_slide = encode_slide
        try:
            predicted(checkpoint, slide, None, device)
        finally:
            encode.encode_slide = genuine
        found = anndata.read_h5ad(slide.with_suffix(".h5ad"))
        numbers.append(np.stack([found.X, *(found.layers[scale] for scale in ("target", "neighbor", "global"))]))
    return float(np.abs(numbers[0] - numbers[1]).max())


def grid_rows(checkpoint: Path, slide: Path, side: int, patch_size: int, device: str) -> list[dict[str, object]]:
    """The default grid and the one a pixel off, on one slide."""
    write_slide(slide, side, TISSUE)
    off = predicted(checkpoint, slide, patch_size + 1, device)
    shared = predicted(checkpoint, slide, None, device)
    return [
        {
            "slide (px)": f"{side} x {side}",
            "pitch (px)": pitch,
            "spots": found.spots,
            "images encoded": found.images,
            "a spot": found.images / found.spots,
            "s": found.seconds,
            "processor s": found.processor,
            "share of the time": found.seconds / off.seconds,
            "of the processor time": found.processor / off.processor,
        }
        for pitch, found in ((patch_size + 1, off), (patch_size, shared))
    ]


def goals(rows: list[dict], whole: list[dict], is_quick: bool) -> list[Goal]:
    shares = [row["of the processor time"] for row in rows[1::2]]
    found = [
        Goal("predict on the default grid", "every tile anew", f"{MOST_OF_THE_TIME} of the time with a pitch one pixel off",
             ", ".join(f"{share:.2f}" for share in shares) + " of the processor time",
             None if is_quick else max(shares) <= MOST_OF_THE_TIME),
    ]  # fmt: skip
    for row in whole:
        peak = row["peak memory (GB)"]
        reached = f"{peak:.2f} GB, {row['spots']} spots"
        is_met = None if is_quick else peak < MOST_GB
        found.append(Goal(f"predict a slide of {row['slide (px)']} px", "-", f"under {MOST_GB} GB", reached, is_met))
    return found


def whole_row(checkpoint: Path, slide: Path, side: int, device: str, apart: bool) -> dict[str, object]:
    """A large slide on the default grid, in a process of its own whose memory is watched."""
    write_slide(slide, side, WHOLE_TISSUE)
    found = watched(predicted, checkpoint, slide, None, device, apart=apart)
    return {
        "slide (px)": f"{side} x {side}",
        "tissue": f"{100 * WHOLE_TISSUE:.0f} %",
        "spots": found.value.spots,
        "images encoded": found.value.images,
        "peak memory (GB)": found.peak_bytes / GIGA,
        "over the start (GB)": found.taken_bytes / GIGA,
        "s": found.value.seconds,
        "processor s": found.value.processor,
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--config", default="demo/dml", help="of the fold (default: demo/dml)")
    parser.add_argument(
        "--sides", type=_numbers, default=SIDES, help="px of the slides that are timed, comma separated"
    )
    parser.add_argument("--whole", type=int, default=WHOLE, help="px of the slide whose memory is measured, 0 for none")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on, is_quick = machine(device), arguments.quick
    tiny = ["DATA.num_neighbors=3", "MODEL.neighbor_depth=1", "DATA.num_genes=4"] if is_quick else []
    with scratch() as folder:
        checkpoint = write_run(folder, arguments.config, tiny)
        patch_size = load_config(arguments.config).DATA.patch_size
        write_slide(folder / "small.tif", QUICK_SIDES[0], TISSUE)
        difference = difference_to_the_slow_way(checkpoint, folder / "small.tif", device.type)  # also warms up
        rows: list[dict[str, object]] = []
        for side in QUICK_SIDES if is_quick else arguments.sides:
            rows += grid_rows(checkpoint, folder / "grid.tif", side, patch_size, device.type)
        side = QUICK_WHOLE if is_quick else arguments.whole
        whole = [whole_row(checkpoint, folder / "whole.tif", side, device.type, not is_quick)] if side else []
    report = Report(
        name="predict",
        title="Predicting a slide",
        settings={"configuration": arguments.config, "folds": 1, "patch (px)": patch_size},
        rows=rows,
        tables={"A whole slide, default grid": whole} if whole else {},
        goals=goals(rows, whole, is_quick),
        notes=[
            "All of the command but the imports: tissue, encoder, model, files, pages.",
            f"Against every spot encoded alone, predictions differ by at most {difference:.1e}.",
        ],
        extra={"difference": difference},
    )
    assert difference < 1e-5, "shared tiles give other predictions than tiles of one spot"
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
