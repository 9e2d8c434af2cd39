"""Where a slide without counts is predicted: at given positions, or on a grid over its tissue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.images.slides import Slide
from datasets.images.spots_on_tissue import TissuePicture, check_spots_on_tissue, spacing
from datasets.images.tissue import MIN_TISSUE, TissueMask, find_tissue, tissue_grid
from datasets.tables.array_grid import grid_of_pixels
from datasets.tables.spot_table import check_inside, spot_ids

if TYPE_CHECKING:  # most predictions are of the whole slide
    from datasets.images.region import Region

THUMBNAIL_PX = 2000  # of the picture in prediction files
_LEAST_SPACING = 1 / 8  # of a patch
_LEAST_ON_TISSUE = 0.1


@dataclass(frozen=True)
class SlideSpots:
    """Where the slide is predicted. table: obs_names ids, obsm spatial, center, grid; no counts.  spot_diameter_px: at
    which spots are drawn.  note: how they came about."""

    table: AnnData
    spot_diameter_px: float
    note: str
    tissue: TissueMask | None = None  # on which the grid was laid; None where the positions were given

    def within(self, region: Region, source: Path) -> SlideSpots:
        """Keep the spots whose centre lies in a region; ValueError, with its file `source`, where none does."""
        inside = region.contains(self.centers)
        if not inside.any():
            raise ValueError(f"{source}: none of the {len(inside)} spots lies in the region. Is it of this slide?")
        note = f"{self.note} Of these, {inside.sum()} lie in the region of {source.name}."
        return replace(self, table=self.table[inside].copy(), note=note)

    @property
    def centers(self) -> np.ndarray:
        """(N, 2) int64 level-0 px (x, y)."""
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
    """Lay a square grid over the tissue that is found; without a pitch, one patch of `covered_px` beside the other.

    min_tissue: share of a patch that must be tissue.
    Raises ValueError where no tissue is found, and for a pitch in micrometres without the size of a pixel.
    """
    pitch = pitch_px or float(covered_px)
    if pitch_um is not None and mpp is None:
        raise ValueError(
            "--pitch_um needs the size of a pixel, which the slide does not tell. Give --mpp or --pitch_px."
        )
    if pitch_um and mpp and not pitch_px:
        pitch = pitch_um / mpp
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
    return SlideSpots(_table(slide, ids, grid.centers.astype(np.float64), grid.grid), pitch, note, mask)


def spots_of_file(slide: Slide, path: Path, covered_px: int, exchanged_pixels: bool = False) -> SlideSpots:
    """Take the spots at given pixels; where the file has no array positions they are found from the pixels.

    covered_px: level-0 px that a patch covers.
    exchanged_pixels: the convention of the published external sets, see `DatasetSpec`.
    Raises FileNotFoundError, or ValueError for a file that is no table of positions, for spots outside the image, on its
    glass, or far closer than a patch is wide.
    """
    from datasets.tables.positions import read_positions  # most predictions lay a grid

    positions = read_positions(path)
    if exchanged_pixels:
        positions = positions.exchanged()
    num_listed = len(positions)
    positions = positions.under_tissue()
    if len(positions) == 0:
        raise ValueError(f"{path}: none of {num_listed} spots is under tissue (in_tissue or selected is 0 everywhere).")
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
    _check_spacing(path, positions.pixels, covered_px)
    return SlideSpots(
        table, spot_diameter(positions.pixels, 100), f"{note}.{_on_tissue(slide, path, positions.pixels)}"
    )


def spot_diameter(spatial_px: np.ndarray, patch_size: int) -> float:
    """Guess the size of spots at `spatial_px` (N, 2), in full-resolution px: half the usual distance to the nearest one.

    That is right of the ST arrays' 100 um spots on a 200 um pitch.  patch_size: what a single spot gets.
    """
    if len(spatial_px) < 2:
        return float(patch_size)
    return spacing(spatial_px) / 2


def _check_spacing(path: Path, pixels: np.ndarray, covered_px: int) -> None:
    """Refuse array positions that were taken for pixels, and bins so fine that neighbors show the same patch."""
    apart = spacing(pixels)
    if len(pixels) > 1 and apart < _LEAST_SPACING * covered_px:
        raise ValueError(
            f"{path}: the spots are {apart:.3g} px apart (median), and a patch covers {covered_px} px: expected at least "
            f"{_LEAST_SPACING * covered_px:.3g}. If x and y are positions in the array, give pixel_x and pixel_y as well; of "
            "bins such as those of Visium HD give every so many."
        )


def _on_tissue(slide: Slide, path: Path, pixels: np.ndarray) -> str:
    """A sentence where the spots do not seem to follow the tissue. Raises ValueError if nearly all lie on glass."""
    picture = TissuePicture.of(slide)
    if not picture.is_tissue.any():
        return " No stained tissue is found on the slide, so whether they lie on it cannot be told."
    found = check_spots_on_tissue(picture, pixels, None)
    if found.given.on_tissue < _LEAST_ON_TISSUE:
        raise ValueError(
            f"{path} does not belong to {slide.path}: {found} Give the positions of this slide in pixels of this image "
            "(x to the right, y down; --exchanged_pixels exchanges them)."
        )
    return "" if found.fits else f" WARNING: these spots may not belong to the image: {found}"


def _table(slide: Slide, ids: Sequence[str], pixels: np.ndarray, grid: np.ndarray) -> AnnData:
    table = AnnData(obs=pd.DataFrame(index=list(ids)))
    table.obsm["spatial"], table.obsm["grid"] = pixels, grid
    table.obsm["center"] = np.floor(pixels).astype(np.int64)
    table.uns["slide"] = slide.path.stem
    return table
