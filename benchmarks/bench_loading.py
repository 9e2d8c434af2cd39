"""What it costs that every number of the caches is verified: features of HER2ST's size and width, read by us and by h5py.

    python benchmarks/bench_loading.py

Both fill one array with the features of all sections; ours compares every spot's checksum on the way. The files lie in
the system's cache, where the checksums weigh most: a disk hides them. Counts and spot tables, which a training loads
as well, are read once beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import h5py
import numpy as np

from benchmarks.common import MEGA, Goal, Report, begin, finish, flags, machine, scratch, seconds_in_turn
from benchmarks.fabricated import (
    ENCODER,
    NUM_GENES,
    SECTION_SIZES,
    Sizes,
    fabricated_layout,
    write_features,
    write_section,
)
from datasets.features.cache import opened, write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.reader import FeatureReader
from utils.cli import run

LIMIT = 1.10  # of the time without checksums
IDENTITY = CacheIdentity(
    kind="neighbor",
    encoder=ENCODER,
    encoder_sha256="fabricated",
    image_size=(9000, 9000),
    image_fingerprint="fabricated",
    patch_size=224,
    microns_per_pixel=None,
    num_neighbors=5,
    views=1,
    dtype="float32",
)


def write_sections(folder: Path, sizes: Sequence[int], dim: int, dtype: str) -> list[Path]:
    """Neighbor features of each section, random numbers; returns the files."""
    random, paths = np.random.default_rng(0), []
    for index, spots in enumerate(sizes):
        paths.append(folder / dtype / f"S{index}.h5")
        values = random.standard_normal((spots, 25, dim), dtype=np.float32).astype(dtype)
        ids = [f"{spot}x0" for spot in range(spots)]
        write_cache(paths[-1], replace(IDENTITY, dtype=dtype), ids, np.zeros((spots, 2), np.int64), [values])
    return paths


def read_bare(paths: Sequence[Path], out: np.ndarray) -> np.ndarray:
    """Read through h5py, nothing looked at."""
    start = 0
    for path in paths:
        with h5py.File(path) as file:
            features = file["features"]
            features.read_direct(out, dest_sel=np.s_[start : start + len(features)])
            start += len(features)
    return out


def read_verified(paths: Sequence[Path], out: np.ndarray) -> np.ndarray:
    """Read as a training does: structure, identity, and a checksum for every spot."""
    start = 0
    for path in paths:
        with opened(path) as cache:
            count = len(cache.numbers)
            cache.read(out=out[start : start + count])
            start += count
    return out


def fresh(read: Callable, paths: Sequence[Path], shape: tuple[int, ...], dtype: str) -> Callable[[], np.ndarray]:
    """The reading into memory that was not touched before, as when a training starts."""
    return lambda: read(paths, np.empty(shape, dtype))


def seconds_of_tables(folder: Path, sections: dict[str, int], num_genes: int) -> float:
    """Time to read counts and spot tables of all sections."""
    layout = fabricated_layout(folder, Sizes(), 224)
    for slide, spots in sections.items():
        write_section(layout, slide, spots, num_genes)
        write_features(layout, slide, ["target", "neighbor"], Sizes(dim=2))  # a slide is read only with them
    started = time.perf_counter()
    FeatureReader(layout, ENCODER).read_tables(list(sections))
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    names = list(SECTION_SIZES)[: 2 if arguments.quick else None]
    sections = {name: SECTION_SIZES[name] for name in names}
    dim, num_genes, rounds = (32, 50, 1) if arguments.quick else (1024, NUM_GENES, arguments.rounds)
    shape, rows, are_equal = (sum(sections.values()), 25, dim), [], True
    with scratch() as folder:
        tables = seconds_of_tables(folder / "tables", sections, num_genes)
        for dtype in ("float32", "float16"):
            paths = write_sections(folder, list(sections.values()), dim, dtype)
            reads = [fresh(read, paths, shape, dtype) for read in (read_bare, read_verified)]
            are_equal &= np.array_equal(reads[0](), reads[1]())
            bare, verified = seconds_in_turn(reads, device, rounds=rounds)
            size = np.prod(shape) * np.dtype(dtype).itemsize / MEGA
            loading = (tables + verified) / (tables + bare)
            row = {"features": dtype, "MB": size, "tables [s]": tables, "h5py [s]": bare, "verified [s]": verified}
            rows.append(row | {"features, ratio": verified / bare, "loading, ratio": loading})
    worst = max(row["loading, ratio"] for row in rows)
    report = Report(
        name="loading",
        title="Loading a data set with every checksum compared",
        settings={"spots": shape[0], "genes": num_genes, "neighbors": 25, "width": dim},
        rows=rows,
        goals=[
            Goal(
                what="loading with checksums",
                published="no checksums",
                goal=f"at most {LIMIT} of the time without",
                measured=f"{worst:.3f}",
                is_met=None if arguments.quick else worst <= LIMIT,
            )
        ],
        notes=["Features: medians, the two take turns. Each reading fills memory of its own."],
        extra={"are_equal": bool(are_equal)},
    )
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
