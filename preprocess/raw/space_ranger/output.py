"""What is read of a folder of Space Ranger, its scale factors, and the size of a pixel."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.tables.positions import Positions
from preprocess.raw.space_ranger.matrices import GeneCounts
from utils.files import reading
from utils.text import brief
from utils.untrusted.text import text_of

PITCH_UM, PITCH_SPOT_UM = 100.0, 65.0  # centre to centre of neighbors; what spot_diameter_fullres stands for
SMALLER = ("hires", "lowres")  # images that Space Ranger makes of the full-resolution one, the larger first
_FACTORS = (*(f"tissue_{name}_scalef" for name in SMALLER), "spot_diameter_fullres", "microns_per_pixel", "bin_size_um")
_TOLERANCE = 0.1  # of the size of a pixel as stated and as fitted, and of steps that should be equally long
_HEXAGONAL = np.array([(2.0, 0.0), (1.0, 1.0), (1.0, -1.0)])  # steps to neighbors in (array_col, array_row)
_BIN_NAME = re.compile(r"(?<![A-Za-z0-9])s_(?!000)(\d{3})um_\d{5}_\d{5}(?!\d)")


@dataclass(frozen=True)
class SpaceRangerOutput:
    """positions: spots under tissue only.  scale_factors: those that scalefactors_json.json has, as `read_scale_factors`
    gives them.  smaller: (width, height) of those of `SMALLER` that are there.  notes: what the report should say."""

    folder: Path
    positions: Positions
    positions_path: Path
    counts: GeneCounts
    scale_factors: dict[str, float]
    smaller: dict[str, tuple[int, int]]
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
    used: dict[str, float] = {}
    for name, value in factors.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 < value < 1e6:
            if name == "tissue_lowres_scalef" and "tissue_hires_scalef" in factors:
                continue  # nothing asks for it
            raise ValueError(f"{name} is {brief(value)}, expected a positive number")
        used[name] = float(value)
    return used


def bin_size_of(names: Sequence[str]) -> float | None:
    """Find the size of bins of Visium HD (um) in their names, "s_008um_00012_00345-1"; None if they do not all say one."""
    found = {match and match[1] for match in map(_BIN_NAME.search, names)}
    size = found.pop() if len(found) == 1 else None
    return None if size is None else float(size)


def with_bin_size(factors: Mapping[str, float], names: Sequence[str], source: str | Path) -> dict[str, float]:
    """Add the size of a bin to scale factors that lack it, where the names of all spots say it.

    Raises ValueError naming the source if scale factors and names say two sizes.
    """
    size = bin_size_of(names)
    if size is None:
        return dict(factors)
    stated = factors.get("bin_size_um", size)
    if abs(stated - size) >= 1:
        raise ValueError(
            f"Scale factors and {source} do not belong together: bin_size_um is {stated:g}, but bins are called "
            f"{brief(names[0])}. Take both from the folder of one sample and one bin size."
        )
    return {**factors, "bin_size_um": stated}


def not_added_up(factors: Mapping[str, float]) -> list[str]:
    """Warn of bins of Visium HD that are taken as they are, where they are much finer than a spot."""
    size = factors.get("bin_size_um", PITCH_SPOT_UM)
    return [] if size > PITCH_SPOT_UM / 2 else [
        f"WARNING: bins of {size:g} um are not added up: each counts as a spot, and neighbors show nearly the same patch. Add "
        "them up: preprocess/prepare_visium.py --bin_um, from an outs/ with binned_outputs/square_*um (.parquet)."
    ]  # fmt: skip


@dataclass(frozen=True)
class Pitch:
    """From neighbor to neighbor on the array: microns by its kind, px by a fit."""

    microns: float
    px: float


def fitted_pitch(factors: Mapping[str, float], grid: np.ndarray, pixels: np.ndarray) -> Pitch | None:
    """Find how far apart neighbors are: the size of a bin, or the 100 um of Visium, whose array is hexagonal.

    The array is fitted to the pixels of all spots, so that missing spots do not matter. Only steps that are equally long
    make it the one or the other; the axes of a turned section may be exchanged.
    returns: None with too few spots, and for any other array (of another technology: of whatever pitch).
    """
    steps = _steps(grid, pixels)
    if steps is None:
        return None
    size = factors.get("bin_size_um")
    ways = [steps] if size is not None else [_HEXAGONAL @ steps, _HEXAGONAL @ steps[::-1]]
    for lengths in (np.linalg.norm(way, axis=1) for way in ways):
        if 0 < lengths.max() <= lengths.min() * (1 + _TOLERANCE):
            return Pitch(PITCH_UM if size is None else size, float(lengths.mean()))
    return None


def microns_per_pixel(output: SpaceRangerOutput) -> float | None:
    """Find the size of a pixel of the full-resolution image; see `pixel_size`."""
    return pixel_size(output.scale_factors, output.grid, output.positions.pixels, output.positions_path)


def pixel_size(factors: Mapping[str, float], grid: np.ndarray, pixels: np.ndarray, source: str | Path) -> float | None:
    """Find the size of a pixel: what Space Ranger states goes first (microns_per_pixel), then `fitted_pitch`.

    With too few spots for a fit, from spot_diameter_fullres (65 um). None if nothing tells.
    Raises ValueError naming the source if Space Ranger states another size than the positions show.
    """
    pitch = fitted_pitch(factors, grid, pixels)
    fitted = None if pitch is None else pitch.microns / pitch.px
    stated = factors.get("microns_per_pixel")
    if stated is not None and fitted is not None and abs(stated / fitted - 1) > _TOLERANCE:
        raise ValueError(
            f"Scale factors and {source} do not belong together: {stated:g} um per pixel are stated, the "
            f"positions give {fitted:.4g}. Take both from the folder of one sample and one bin size."
        )
    if stated is not None or fitted is not None:
        return stated if stated is not None else fitted
    diameter = factors.get("spot_diameter_fullres")
    if diameter is None or "bin_size_um" in factors or _steps(grid, pixels) is not None:
        return None
    return PITCH_SPOT_UM / diameter


def _steps(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """(2, 2) pixels (x, y) of one step along each axis of the array; None where too few spots are there for a fit."""
    design = np.column_stack([grid.astype(np.float64), np.ones(len(grid))])
    if np.linalg.matrix_rank(design) < 3:
        return None
    return np.linalg.lstsq(design, pixels, rcond=None)[0][:2]
