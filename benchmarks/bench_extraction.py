"""Feature extraction: patches per second against the bare encoder, and memory against the number of spots.

    python benchmarks/bench_extraction.py
    python benchmarks/bench_extraction.py --device cuda          UNI's ViT-L (random weights), bf16

The slow version is what the published code does: all crops of a slide are prepared and kept, tile by tile, then encoded.
It stands for 37-40 MB per spot of neighbor extraction and, with a tiny ViT of 20 ms a patch, 0.86 s per spot.
Memory is measured with an encoder that costs nothing, so that 4 000 spots take seconds: what the pipeline holds does
not depend on it. The weights and activations of a real encoder come on top, once (ViT-L: 1.2 GB in float32).
Files go to /dev/shm where there is room (10 GB for CUDA), so that no disk is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import (
    GIGA,
    MEGA,
    TERA,
    Goal,
    Report,
    available_memory,
    begin,
    finish,
    flags,
    machine,
    matmul_ceiling,
    scratch,
    seconds_of,
    watched,
)
from datasets.features.cache import read_features
from datasets.features.encoding import default_workers
from datasets.features.identity import CacheIdentity
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.features.places import find_cache
from datasets.images.plain_reader import open_picture
from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.spec import DatasetSpec
from models.patch_encoders.build import PatchEncoder, build_patch_encoder, folded_encoder, patch_encoder_spec
from models.patch_encoders.spec import create_encoder, encode
from preprocess.extraction.extract import extract_slides
from preprocess.extraction.plan import ExtractionSettings, SlideWork
from utils.cli import run

TILES = 5  # a side
ROUNDS = 3  # of each throughput measurement; the one with the median share is shown
SLIDE = "S1"
SEVERAL = (("token",), ("target", "neighbor", "token"))
SLIDES, FULL_SIZE = 4, (9300, 9900)  # with images as those of HER2ST
SHARED_MEMORY = Path("/dev/shm")
ROOM = {"cuda": 10 * GIGA, "cpu": 4 * GIGA}  # free there: twice what the files of the largest measurement take
VIT_L_GFLOP = 119.3  # per patch of 224 px: 24 layers, 197 tokens, width 1024
COMBINATIONS = (("target",), ("token",), ("neighbor",), ("target", "neighbor", "token"))


def write_image(path: Path, width: int, height: int) -> None:
    """A JPEG that compresses like tissue: blurred noise."""
    coarse = np.random.default_rng(0).integers(90, 230, (height // 12 + 1, width // 12 + 1, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(path, quality=85)


def centers_in(width: int, height: int, count: int, margin: int) -> np.ndarray:
    """(N, 2) centres on a grid; all tiles of all spots lie inside the image."""
    side = int(np.ceil(np.sqrt(count)))
    y, x = np.divmod(np.arange(count), side)
    steps = np.stack([x, y], axis=1) / max(1, side - 1)
    return (margin + steps * (np.array([width, height]) - 2 * margin)).astype(np.int64)


@contextmanager
def scratch_in_memory(device: torch.device) -> Iterator[tuple[Path, str]]:
    """A folder for files, removed afterwards, and where it is: in memory if there is room, else on the disk."""
    is_there = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    if is_there and min(shutil.disk_usage(SHARED_MEMORY).free, available_memory()) > ROOM.get(device.type, ROOM["cpu"]):
        with TemporaryDirectory(dir=SHARED_MEMORY) as folder:
            yield Path(folder), "memory"
    else:
        with scratch() as folder:
            yield folder, "disk"


def extraction_of(
    folder: Path, image_path: Path, count: int, kinds: tuple[str, ...], patch_size: int, views: int, slide: str = SLIDE
) -> tuple[Layout, SlideWork, ExtractionSettings]:
    """The work of one slide, as `preprocess/extract_features_uni.py` plans it."""
    layout = Layout(folder, DatasetSpec(name="bench"), patch_size=patch_size, num_neighbors=TILES)
    place = layout.images_dir / f"{slide}.jpg"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(image_path)
    with open_slide(place) as image:
        size = image.size
    centers = centers_in(*size, count, patch_size * TILES // 2 + 1)
    identities = {
        kind: CacheIdentity(
            kind=kind,
            encoder="bench",
            encoder_sha256="bench",
            image_size=size,
            image_fingerprint="bench",
            patch_size=patch_size,
            microns_per_pixel=None,
            num_neighbors=TILES,
            views=views if kind == "token" else 1,
            dtype="float16" if kind == "token" else "float32",
        )
        for kind in kinds
    }
    spots, every = [f"{i}x0" for i in range(count)], slice(0, count)
    paths = {kind: find_cache(layout, kind, slide) for kind in kinds}
    work = SlideWork(slide, spots, centers, np.ones(count), paths, identities, [every], every)
    return layout, work, ExtractionSettings(kinds=kinds, num_workers=default_workers(), command="bench", views=views)


# --- throughput ---------------------------------------------------------------------------------------------------------


def throughput(
    folder: Path,
    image_path: Path,
    encoder: BatchedPatchEncoder,
    images: int,
    kinds: tuple[str, ...],
    patch_size: int,
    slides: int = 1,
) -> tuple[float, int]:
    """Patches per second of the whole extraction of about `images` patches, and how many spots there were.

    slides: among how many they are spread; every one of them is decoded. The folder is removed afterwards.
    """
    views = 8
    per_spot = ("neighbor" in kinds) * (TILES**2 - 1) + (views if "token" in kinds else 1)
    count = max(2, images // per_spot // slides)
    prepared = [
        extraction_of(folder, image_path, count, kinds, patch_size, views, f"S{number}") for number in range(slides)
    ]
    layout, _, settings = prepared[0]
    started = time.perf_counter()
    extract_slides(layout, [work for _, work, _ in prepared], encoder, settings)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return slides * count * per_spot / seconds, slides * count


def bare_throughput(encoder: BatchedPatchEncoder, patch_size: int, repeats: int) -> float:
    """Patches per second of the encoder on patches that lie on its device, at its own batch size."""
    shape = (encoder.batch_size, patch_size, patch_size, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=encoder.device)
    return len(images) / seconds_of(lambda: encoder.encode(images, 0), encoder.device, repeats=repeats)


# --- memory -------------------------------------------------------------------------------------------------------------


class FreeEncoder:
    """Features of a patch without an encoder: some of its pixels, mixed to a given width."""

    def __init__(self, dim: int):
        self.mix = torch.randn(3 * 16, dim, generator=torch.Generator().manual_seed(0)) / 1000

    def __call__(self, images: Tensor) -> SimpleNamespace:
        step = images.shape[-1] // 4
        pooled = images[:, :, ::step, ::step][:, :, :4, :4].flatten(1).float() @ self.mix
        return SimpleNamespace(tokens=pooled[:, None], pooled=pooled)


def extract_all(folder: Path, image_path: Path, count: int, dim: int, patch_size: int) -> None:
    """Neighbor extraction of `count` spots with the free encoder, through the project's pipeline."""
    layout, work, settings = extraction_of(folder, image_path, count, ("neighbor",), patch_size, 1)
    extract_slides(layout, [work], BatchedPatchEncoder(FreeEncoder(dim), torch.device("cpu"), batch_size=32), settings)


def naive_extraction(image_path: Path, centers: np.ndarray, patch_encoder, patch_size: int) -> np.ndarray:
    """(N, 25, D): crops of all spots first, tile by tile as pictures to tensors, all kept; then spot by spot encoded."""
    image = open_picture(image_path)
    image.load()
    half, prepared = patch_size * TILES // 2, []
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for x, y in centers.tolist():
        region = image.crop((x - half, y - half, x + half, y + half))
        tiles = []
        for row in range(TILES):
            for column in range(TILES):
                corner = (column * patch_size, row * patch_size)
                tile = region.crop((*corner, corner[0] + patch_size, corner[1] + patch_size))
                pixels = torch.from_numpy(np.asarray(tile).copy()).permute(2, 0, 1)
                tiles.append((pixels / 255 - mean) / std)
        prepared.append((region, tiles, torch.stack(tiles)))
    features = []
    for _, _, stacked in prepared:
        with torch.no_grad():
            features.append(patch_encoder(((stacked * std + mean) * 255).round().to(torch.uint8)).pooled)
    return torch.stack(features).numpy()


def naive_with_free_encoder(image_path: Path, count: int, dim: int, patch_size: int) -> np.ndarray:
    with open_slide(image_path) as image:
        centers = centers_in(*image.size, count, patch_size * TILES // 2 + 1)
    return naive_extraction(image_path, centers, FreeEncoder(dim), patch_size)


def same_features(folder: Path, image_path: Path, found: np.ndarray, patch_size: int) -> bool:
    """Whether the project's neighbor features of the same spots are those of the slow version."""
    extract_all(folder / "same", image_path, len(found), found.shape[-1], patch_size)
    layout = extraction_of(folder / "same", image_path, 2, ("neighbor",), patch_size, 1)[0]
    return bool(np.allclose(read_features(layout.cache_path("neighbor", SLIDE)), found, rtol=1e-4, atol=1e-4))


# --- the report ---------------------------------------------------------------------------------------------------------


def patch_encoder_for(
    arguments: argparse.Namespace, patch_encoder: PatchEncoder, device: torch.device
) -> BatchedPatchEncoder:
    return BatchedPatchEncoder(
        patch_encoder.to(device),
        device,
        prefix_tokens=patch_encoder.spec.prefix_tokens,
        batch_size=arguments.batch_size or (8 if arguments.quick else 256 if device.type == "cuda" else 32),
    )


def patches_of(arguments: argparse.Namespace, kinds: tuple[str, ...], device: torch.device) -> int:
    """How many patches a measurement takes: some seconds each, and no more tokens than fit into memory."""
    if arguments.images or arguments.quick:
        return arguments.images or 20
    if device.type != "cuda":
        return 500
    return 8_000 if "token" in kinds else 40_000


def median_round(
    arguments: argparse.Namespace,
    folder: Path,
    image_path: Path,
    encoder: BatchedPatchEncoder,
    kinds: tuple[str, ...],
    slides: int = 1,
) -> dict[str, object]:
    """Row (kinds, spots, patches/s, share of the bare encoder) of the round with the median share."""
    patch_size = 64 if arguments.quick else 224
    images = patches_of(arguments, kinds, encoder.device)
    rounds, repeats = [], 1 if arguments.quick else 3
    # Bare before and after, and several rounds: on a machine that others use too, the two differ.
    for _ in range(1 if arguments.quick else ROUNDS):
        before = bare_throughput(encoder, patch_size, repeats)
        found, count = throughput(folder / "round", image_path, encoder, images, kinds, patch_size, slides)
        rounds.append((found, (before + bare_throughput(encoder, patch_size, repeats)) / 2))
    found, bare = sorted(rounds, key=lambda pair: pair[0] / pair[1])[len(rounds) // 2]
    return {
        "extraction of": ", ".join(kinds),
        "spots": count,
        "patches/s": found,
        "bare encoder (patches/s)": bare,
        "share": f"{100 * found / bare:.0f} %",
    }


def throughput_table(
    arguments: argparse.Namespace, folder: Path, encoder: BatchedPatchEncoder
) -> list[dict[str, object]]:
    """A row per combination of kinds, of one slide whose image is small: nothing to decode."""
    image_path, side = folder / "small.jpg", 500 if arguments.quick else 2400
    write_image(image_path, side, side)
    return [median_round(arguments, folder, image_path, encoder, kinds) for kinds in COMBINATIONS]


def slides_table(arguments: argparse.Namespace, folder: Path, encoder: BatchedPatchEncoder) -> list[dict[str, object]]:
    """The same of several slides of full size, which are decoded during the run. On a CPU decoding is no matter."""
    if encoder.device.type != "cuda" and not arguments.quick:
        return []
    size = (400, 440) if arguments.quick else FULL_SIZE
    write_image(image_path := folder / "large.jpg", *size)
    return [
        {"slides": SLIDES, "their size (px)": "{} x {}".format(*size)}
        | median_round(arguments, folder, image_path, encoder, kinds, SLIDES)
        for kinds in SEVERAL
    ]


def folding_table(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """The bare convolutional encoder, its batch normalisations as they are and folded, in turn."""
    spec, patch_size = patch_encoder_spec("efficientnet-lite0"), 64 if arguments.quick else 224
    usual = create_encoder(spec)
    given = PatchEncoder(spec, usual, weights_sha256="", weights_path=None).to(device)
    encoders = {
        version: BatchedPatchEncoder(
            lambda images, of=of: encode(spec, of, given.normalise(images)),
            device,
            batch_size=8 if arguments.quick else 32,
            precision="float32",
        )
        for version, of in (("as they are", usual), ("folded", folded_encoder(spec, usual)))
    }
    rounds = [
        {version: bare_throughput(encoder, patch_size, 1) for version, encoder in encoders.items()}
        for _ in range(1 if arguments.quick else 3 * ROUNDS)
    ]
    ratios = [found["folded"] / found["as they are"] for found in rounds]
    return [
        {
            "batch normalisations of efficientnet-lite0": version,
            "patches/s": statistics.median(found[version] for found in rounds),
            "times": statistics.median(ratios) if version == "folded" else 1.0,
        }
        for version in encoders
    ]


def memory_table(arguments: argparse.Namespace, folder: Path) -> tuple[list[dict[str, object]], bool]:
    """Rows (version, spots, peak memory) and whether both versions give the same features."""
    patch_size, dim, apart = (64, 16, False) if arguments.quick else (224, 1024, True)
    size = (400, 440) if arguments.quick else FULL_SIZE
    image_path = folder / "large.jpg"
    write_image(image_path, *size)
    few, many = (3, 6) if arguments.quick else (10, 40)
    rows, taken = [], {}
    for count in (few, many):
        found = watched(naive_with_free_encoder, image_path, count, dim, patch_size, apart=apart)
        taken[count] = found.taken_bytes
        rows.append(memory_row("naive: crops kept", count, found))
    rows[-1]["a further spot (MB)"] = (taken[many] - taken[few]) / (many - few) / MEGA
    is_same = same_features(folder, image_path, found.value, patch_size)
    counts = (10, 20) if arguments.quick else (500, 4000)
    for count in counts:
        found = watched(extract_all, folder / f"n{count}", image_path, count, dim, patch_size, apart=apart)
        taken[count] = found.taken_bytes
        rows.append(memory_row("here", count, found))
    rows[-1]["a further spot (MB)"] = (taken[counts[1]] - taken[counts[0]]) / (counts[1] - counts[0]) / MEGA
    return rows, is_same


def memory_row(version: str, count: int, found) -> dict[str, object]:
    return {
        "version": version,
        "spots": count,
        "peak memory (GB)": found.peak_bytes / GIGA,
        "over the start (GB)": found.taken_bytes / GIGA,
        "a further spot (MB)": None,
        "s": found.seconds,
    }


def goals(rows: list[dict], memory: list[dict], on_cuda: bool, share: float | None, is_told: bool) -> list[Goal]:
    here = memory[-1]
    least = min(row["patches/s"] / row["bare encoder (patches/s)"] for row in rows)
    found = [
        Goal("neighbor extraction, 4 000 spots", "37-40 MB per spot", "constant, under 2 GB",
             f"{here['peak memory (GB)']:.2f} GB, {here['a further spot (MB)']:.3f} MB per further spot",
             here["peak memory (GB)"] < 2 and here["a further spot (MB)"] < 0.1 if is_told else None),
        Goal("throughput of the extraction", "-", "85 % of the bare encoder", f"{100 * least:.0f} %",
             least >= 0.85 if is_told else None),
    ]  # fmt: skip
    if on_cuda and share is not None:
        found.append(Goal("extraction of UNI tokens", "-", "60 % of the ceiling", f"{100 * share:.0f} %", share >= 0.6))
    return found


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument(
        "--encoder", help="any timm model as timm:NAME, or an encoder of the table (default: a tiny ViT)"
    )
    parser.add_argument(
        "--batch_size", type=int, help="patches that pass the encoder at a time (default: 32, CUDA: 256)"
    )
    parser.add_argument("--images", type=int, help="patches of a measurement (default: 500, CUDA: 8 000 or 40 000)")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    on_cuda = device.type == "cuda"
    name = arguments.encoder or (
        "efficientnet-lite0" if arguments.quick else "uni" if on_cuda else "timm:vit_tiny_patch16_224"
    )
    patch_encoder = build_patch_encoder(name, random_weights=True)
    share = ceiling = None
    encoder = patch_encoder_for(arguments, patch_encoder, device)
    with scratch_in_memory(device) as (folder, where):
        rows = throughput_table(arguments, folder, encoder)
        tables = {"Several slides, decoded during the run": slides_table(arguments, folder, encoder)}
        memory, is_same = memory_table(arguments, folder)
        tables["Memory of neighbor extraction"] = memory
    if not on_cuda:
        tables["Folded into the convolutions"] = folding_table(arguments, device)
    if on_cuda and name == "uni":
        ceiling = matmul_ceiling(device, torch.bfloat16)
        share = rows[1]["patches/s"] * VIT_L_GFLOP * GIGA / ceiling
    report = Report(
        name="extraction",
        title="Feature extraction",
        settings={
            "encoder": f"{name}, random weights",
            "batch": encoder.batch_size,
            "precision": encoder.precision,
            "files in": where,
            "bare encoder (patches/s)": round(max(row["bare encoder (patches/s)"] for row in rows), 1),
        },
        rows=rows,
        tables={title: table for title, table in tables.items() if table},
        goals=goals(rows, memory, on_cuda, share, not arguments.quick),
        notes=[
            "Throughput is that of the whole extraction of a slide: decode, crop, encode, write; the share is of the bare "
            "encoder on patches that lie in its memory.",
            "The slow version's features and ours agree.",
        ],
        extra={"same_features": is_same, "ceiling_flops": ceiling, "share_of_ceiling": share},
    )
    if share is not None:
        report.notes.append(
            f"ViT-L: {rows[1]['patches/s'] * VIT_L_GFLOP * GIGA / TERA:.0f} of {ceiling / TERA:.0f} TFLOP/s."
        )
    assert is_same, "the fast extraction gives other features than the slow one"
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
