"""What is read of a folder of Space Ranger, its scale factors, and the size of a pixel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.tables.positions import Positions
from preprocess.raw.space_ranger.matrices import GeneCounts
from utils.files import reading
from utils.text import brief
from utils.untrusted.text import text_of

PITCH_UM, PITCH_SPOT_UM = 100.0, 65.0  # centre to centre of neighbors; what spot_diameter_fullres stands for
_FACTORS = ("tissue_hires_scalef", "spot_diameter_fullres", "microns_per_pixel", "bin_size_um")
_TOLERANCE = 0.1  # of the size of a pixel, between what Space Ranger states and what the positions say


@dataclass(frozen=True)
class SpaceRangerOutput:
    """positions: spots under tissue only.  scale_factors: those that scalefactors_json.json has, as `read_scale_factors`
    gives them.  hires_size: (width, height) of tissue_hires_image, None without it.  notes: what the report should say."""

    folder: Path
    positions: Positions
    positions_path: Path
    counts: GeneCounts
    scale_factors: dict[str, float]
    hires_size: tuple[int, int] | None
    notes: list[str] = field(default_factory=list)

    @property
    def grid(self) -> np.ndarray:
        """(N, 2) array positions (array_col, array_row), which Space Ranger's tables always have."""
        assert self.positions.grid is not None
        return self.positions.grid


def read_scale_factors(path: Path) -> dict[str, float]:
    """Read what is used of scalefactors_json.json. Raises ValueError naming the file if it is none."""
    with reading(path, "the scalefactors_json.json of Space Ranger"):
        return checked_factors(json.loads(text_of(path)))


def checked_factors(content: object) -> dict[str, float]:
    """Take the scale factors that are used from what somebody has stored. Raises ValueError where they are no lengths."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected names and numbers, found {brief(content)}")
    factors = {name: content[name] for name in _FACTORS if name in content}
    for name, value in factors.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 < value < 1e6:
            raise ValueError(f"{name} is {brief(value)}, expected a positive number")
    return {name: float(value) for name, value in factors.items()}


def microns_per_pixel(output: SpaceRangerOutput) -> float | None:
    """Find the size of a pixel of the full-resolution image; see `pixel_size`."""
    return pixel_size(output.scale_factors, output.grid, output.positions.pixels, output.positions_path)


def pixel_size(factors: Mapping[str, float], grid: np.ndarray, pixels: np.ndarray, source: str | Path) -> float | None:
    """Find the size of a pixel: what Space Ranger states goes first (microns_per_pixel), the array is the fallback.

    Neighbors on the array are 100 um apart, or the size of a bin of Visium HD. The array is fitted to the pixels of all
    spots, so that missing spots do not matter: hexagonal, (2, 0), (1, 1) and (1, -1) in (array_col, array_row) are steps to
    neighbors; the square one of bins has (1, 0) and (0, 1). With too few spots for a fit, from spot_diameter_fullres
    (65 um). None if nothing tells.
    Raises ValueError naming the source if Space Ranger states another size than the positions show.
    """
    fitted = _fitted_microns(grid, pixels, factors.get("bin_size_um"))
    stated = factors.get("microns_per_pixel")
    if stated is not None and fitted is not None and abs(stated / fitted - 1) > _TOLERANCE:
        raise ValueError(
            f"Scale factors and {source} do not belong together: {stated:g} um per pixel are stated, the "
            f"positions give {fitted:.4g}. Take both from the folder of one sample and one bin size."
        )
    if stated is not None or fitted is not None:
        return stated if stated is not None else fitted
    diameter = factors.get("spot_diameter_fullres")
    return PITCH_SPOT_UM / diameter if diameter and "bin_size_um" not in factors else None


def _fitted_microns(grid: np.ndarray, pixels: np.ndarray, bin_size: float | None) -> float | None:
    """Micrometres per pixel from the steps of the array; None where too few spots are there for a fit."""
    design = np.column_stack([grid.astype(np.float64), np.ones(len(grid))])
    if np.linalg.matrix_rank(design) < 3:
        return None
    steps = np.linalg.lstsq(design, pixels, rcond=None)[0][:2]
    ways = [(2.0, 0.0), (1.0, 1.0), (1.0, -1.0)] if bin_size is None else [(1.0, 0.0), (0.0, 1.0)]
    length = float(np.linalg.norm(np.array(ways) @ steps, axis=1).mean())
    return (bin_size or PITCH_UM) / length if length > 0 else None
