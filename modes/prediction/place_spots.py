"""Where a slide without counts is predicted: at given positions, or on a grid over its tissue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.images.slides import Slide
from datasets.images.tissue import MIN_TISSUE, find_tissue, tissue_grid
from datasets.tables.array_grid import grid_of_pixels
from datasets.tables.positions import read_positions
from datasets.tables.slide_table import check_inside, spot_ids
from modes.prediction.checkpoint import spot_diameter


@dataclass(frozen=True)
class SlideSpots:
    """Where the slide is predicted. table: obs_names ids, obsm spatial, center, grid; no counts.  spot_diameter_px: at
    which spots are drawn.  note: how they came about."""

    table: AnnData
    spot_diameter_px: float
    note: str

    @property
    def centers(self) -> np.ndarray:
        return self.table.obsm["center"]


def spots_on_tissue(
    slide: Slide,
    *,
    pitch_px: float | None,
    pitch_um: float | None,
    mpp: float | None,
    covered_px: int,
    min_tissue: float | None,
) -> SlideSpots:
    """A square grid on the tissue that is found; without a pitch, one patch of `covered_px` beside the other."""
    if pitch_um is not None and mpp is None:
        raise ValueError(
            "--pitch_um needs the size of a pixel, which the slide does not tell. Give --mpp or --pitch_px."
        )
    pitch = pitch_px or (pitch_um / mpp if pitch_um else float(covered_px))
    mask = find_tissue(slide)
    share = MIN_TISSUE if min_tissue is None else min_tissue
    grid = tissue_grid(mask, slide.size, pitch, covered_px, share)
    note = (
        f"Grid on the tissue, which is {100 * mask.share:.1f} % of the slide: {len(grid.grid)} spots, {pitch:.4g} px apart"
        + (f" ({pitch * mpp:.4g} um)" if mpp else "")
        + ("" if pitch_px or pitch_um else "; that is one patch beside the other (--pitch_px, --pitch_um)")
        + "."
    )
    ids = spot_ids(*grid.grid.T)
    return SlideSpots(_table(slide, ids, grid.centers.astype(np.float64), grid.grid), pitch, note)


def spots_of_file(slide: Slide, path: Path, exchanged_pixels: bool = False) -> SlideSpots:
    """Spots at given pixels; where the file has no array positions they are found from the pixels.

    exchanged_pixels: the convention of the published external sets, see `DatasetSpec`.
    """
    positions = read_positions(path)
    if exchanged_pixels:
        positions = positions.exchanged()
    num_listed = len(positions)
    positions = positions.under_tissue()
    if len(positions) == 0:
        raise ValueError(f"{path}: none of {num_listed} spots is under tissue (in_tissue is 0 everywhere).")
    note = f"{len(positions)} spots of {path.name} ({positions.kind})"
    if len(positions) < num_listed:
        note += f", {num_listed - len(positions)} beside the tissue left out"
    grid = positions.grid
    if grid is None:
        found = grid_of_pixels(positions.pixels)
        grid = found.grid
        note += f"; {found.kind} array, {found.pitch_px:.4g} px apart" if len(grid) > 1 else ""
        note += f", {found.moved} spots moved to a free cell" if found.moved else ""
    table = _table(slide, positions.ids, positions.pixels, grid)
    check_inside(table, slide.size, slide.path)
    return SlideSpots(table, spot_diameter(positions.pixels, 100), f"{note}.")


def _table(slide: Slide, ids: Sequence[str], pixels: np.ndarray, grid: np.ndarray) -> AnnData:
    table = AnnData(obs=pd.DataFrame(index=list(ids)))
    table.obsm["spatial"], table.obsm["grid"] = pixels, grid
    table.obsm["center"] = np.floor(pixels).astype(np.int64)
    table.uns["slide"] = slide.path.stem
    return table
