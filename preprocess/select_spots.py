"""Limit a slide of a prepared data set to a region: spots outside it are marked `selected = 0` and left out everywhere.

    python preprocess/select_spots.py --type mine --slide P1_s1 --region tumour.geojson

The region is a GeoJSON of areas (QuPath's export) or a mask image. Spots that are marked already stay out. Run it before the
features are extracted.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse

import numpy as np

from datasets.images.region import read_region
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.spot_table import SELECTED, read_spots
from utils.cli import run, say
from utils.files import write_atomically


def select_spots(layout: Layout, slide: str, region: Path, *, out: Path | None = None, overwrite: bool = False) -> Path:
    """Write the spot table of a slide with `selected` by a region; returns its path.

    out: the table to write (default: that of the slide, which is only replaced with `overwrite`).
    Raises FileNotFoundError, or ValueError for a table, an image or a region that cannot be used, and where no spot is left.
    """
    source = layout.spots_path(slide)
    table = read_spots(source)
    pixels = table[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    if layout.spec.exchanged_pixels:
        pixels = pixels[:, ::-1]
    with open_slide(layout.image_path(slide)) as image:
        inside = read_region(region, image.size).contains(np.floor(pixels))
    before = table[SELECTED].to_numpy() != 0 if SELECTED in table else np.ones(len(table), dtype=bool)
    kept = inside & before
    if not kept.any():
        raise ValueError(
            f"{region}: none of the {before.sum()} spots of {source} lies in the region. Is it of this slide?"
        )
    path = out or source
    if path.exists() and not overwrite:
        raise ValueError(
            f"{path} is there (of {before.sum()} spots {kept.sum()} would stay selected). Give --out another file; to use "
            "that, put it in the place of this one, and keep this one elsewhere."
        )
    selected = table.assign(**{SELECTED: kept.astype(int)})
    write_atomically(path, lambda temporary: selected.to_csv(temporary, sep="\t", index=False))
    say(f"{path}: {kept.sum()} of {before.sum()} spots lie in the region of {region.name} and stay selected.")
    return path


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--type", help="data set: a folder below --data_dir")
    which.add_argument("--test_name", help="external set below <data_dir>/test")
    parser.add_argument("--slide", required=True, help="name of the slide")
    parser.add_argument("--region", type=Path, required=True, help="GeoJSON of areas, or a mask image of the slide")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
    parser.add_argument("--out", type=Path, help="table to write (default: the slide's own, with --overwrite)")
    parser.add_argument("--overwrite", action="store_true", help="replace the table that is there")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the command line (of this process by default) and mark the spots."""
    given = build_parser().parse_args(argv)
    spec = get_spec(given.test_name or given.type, given.data_dir)
    layout = Layout(given.data_dir, spec, test_name=given.test_name)
    select_spots(layout, given.slide, given.region, out=given.out, overwrite=given.overwrite)


if __name__ == "__main__":
    run(main)
