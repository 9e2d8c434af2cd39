"""Data of the size of HER2ST without HER2ST: section sizes, counts, spot tables, feature files of any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from datasets.features.cache import write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.reader import FeatureReader
from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec
from datasets.spots import SpotStore
from utils.files import write_text

# Spots with counts of each section of the public download (13 620 in all).
SECTION_SIZES = {
    "A1": 346, "A2": 325, "A3": 359, "A4": 343, "A5": 332, "A6": 360, "B1": 295, "B2": 270, "B3": 298, "B4": 283,
    "B5": 289, "B6": 277, "C1": 176, "C2": 187, "C3": 180, "C4": 184, "C5": 181, "C6": 178, "D1": 306, "D2": 303,
    "D3": 301, "D4": 302, "D5": 306, "D6": 315, "E1": 587, "E2": 572, "E3": 570, "F1": 691, "F2": 695, "F3": 712,
    "G1": 441, "G2": 467, "G3": 463, "H1": 613, "H2": 603, "H3": 510,
}  # fmt: skip
NUM_GENES = 15_000  # that a section has counts of, about
PITCH = 190  # px between two spots of the array
ENCODER = "uni"


@dataclass(frozen=True)
class Sizes:
    """Of the features: width D, tokens T of a patch, views in the token cache, tiles a side."""

    dim: int = 1024
    tokens: int = 197
    views: int = 1
    neighbors: int = 5


def round_section(num_spots: int) -> np.ndarray:
    """(N, 2) grid positions (x, y): a round tissue of N spots on a square array, sorted by (y, x)."""
    side = int(np.ceil(2 * np.sqrt(num_spots / np.pi))) + 2
    y, x = np.divmod(np.arange(side * side), side)
    distance = (x - side / 2) ** 2 + (y - side / 2) ** 2
    inside = np.sort(np.argsort(distance, kind="stable")[:num_spots])
    return np.stack([x[inside], y[inside]], axis=1)


def write_section(layout: Layout, slide: str, num_spots: int, num_genes: int) -> None:
    """Counts (parquet, sparse like a real section: 14 % of the entries) and the spot table of one section."""
    random = np.random.default_rng(sum(map(ord, slide)))
    grid = round_section(num_spots)
    # Mean counts of genes fall off like those of a section: few genes carry most of the counts.
    means = 12.0 / (1 + np.arange(num_genes)) ** 0.7
    counts = random.poisson(means * random.gamma(2.0, 0.5, (num_spots, 1)))
    ids = [f"{x}x{y}" for x, y in grid]
    frame = pd.DataFrame(counts, index=ids, columns=[f"GENE{i}" for i in range(num_genes)])
    path = layout.new_counts_path(slide)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path)
    pixels = grid * PITCH + 600
    spots = pd.DataFrame({"x": grid[:, 0], "y": grid[:, 1], "pixel_x": pixels[:, 0], "pixel_y": pixels[:, 1]})
    write_text(layout.spots_path(slide), spots.to_csv(sep="\t", index=False))


def write_features(layout: Layout, slide: str, kinds: Sequence[str], sizes: Sizes) -> None:
    """Feature files of one section in our format, random numbers: their values cost what any values cost."""
    table = pd.read_csv(layout.spots_path(slide), sep="\t")
    ids = [f"{x}x{y}" for x, y in zip(table["x"], table["y"])]
    centers = table[["pixel_x", "pixel_y"]].to_numpy()
    image_size = tuple(int(length) for length in centers.max(axis=0) + 600)
    generator = torch.Generator().manual_seed(sum(map(ord, slide)))
    shapes = {
        "target": (sizes.dim,),
        "neighbor": (sizes.neighbors**2, sizes.dim),
        "token": (sizes.views, sizes.tokens, sizes.dim),
        "patch": (layout.patch_size, layout.patch_size, 3),
    }
    for kind in kinds:
        identity = CacheIdentity(
            kind=kind,
            encoder=ENCODER if kind != "patch" else "none",
            encoder_sha256="fabricated" if kind != "patch" else "none",
            image_size=image_size,
            image_fingerprint=f"fabricated {slide}",
            patch_size=layout.patch_size,
            microns_per_pixel=None,
            num_neighbors=sizes.neighbors,
            views=sizes.views if kind == "token" else 1,
            dtype={"token": "float16", "patch": "uint8"}.get(kind, "float32"),
        )
        blocks = (_block(kind, shapes[kind], min(32, len(ids) - i), generator) for i in range(0, len(ids), 32))
        write_cache(layout.cache_path(kind, slide), identity, ids, centers, blocks)


def _block(kind: str, shape: tuple[int, ...], count: int, generator: torch.Generator) -> np.ndarray:
    if kind == "patch":
        return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8).numpy()
    values = torch.randn((count, *shape), generator=generator)
    return (values.half() if kind == "token" else values).numpy()


def fabricated_layout(folder: Path, sizes: Sizes, patch_size: int) -> Layout:
    """Where the fabricated sections lie below `folder`."""
    spec = DatasetSpec(name="fabricated", patient_pattern=SPECS["her2st"].patient_pattern)
    return Layout(folder, spec, patch_size=patch_size, num_neighbors=sizes.neighbors)


def fabricate(
    folder: Path,
    slides: dict[str, int],
    sizes: Sizes,
    kinds: Sequence[str],
    *,
    num_genes: int = 50,
    patch_size: int = 224,
) -> Layout:
    """A data folder with the sections `slides` {name: spots}, counts of few genes and feature files."""
    layout = fabricated_layout(folder, sizes, patch_size)
    for slide, num_spots in slides.items():
        write_section(layout, slide, num_spots, num_genes)
        write_features(layout, slide, kinds, sizes)
    return layout


def open_store(layout: Layout, slides: Sequence[str]) -> SpotStore:
    """The fabricated sections through the loader of the project."""
    reader = FeatureReader(layout, ENCODER)
    return reader.read_features(reader.read_tables(slides))


def chosen_sections(count: int) -> dict[str, int]:
    """`count` of the 36 sections, spread evenly over the patients."""
    names = list(SECTION_SIZES)
    picked = [names[i * len(names) // count] for i in range(count)]
    return {name: SECTION_SIZES[name] for name in picked}


def random_validity(count: int, tiles: int, generator: torch.Generator) -> Tensor:
    """(B, tiles) bool: about one tile in twenty leaves the image, never the middle one."""
    is_valid = torch.rand(count, tiles, generator=generator) > 0.05
    is_valid[:, tiles // 2] = True
    return is_valid
