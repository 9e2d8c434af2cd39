"""Read Space Ranger's `outs/` of every generation: positions, counts with ids and symbols, scale factors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.tables.positions import Positions, read_positions
from preprocess.raw.files import files_below, find_optional, plain_image_size
from preprocess.raw.matrices import GeneCounts, read_matrix
from utils.files import reading
from utils.text import brief
from utils.untrusted.text import text_of

CONTENTS = (
    "Space Ranger's outs/: spatial/tissue_positions.csv (or tissue_positions_list.csv before 2.0) and "
    "filtered_feature_bc_matrix.h5 or the folder filtered_feature_bc_matrix/"
)
PITCH_UM, PITCH_SPOT_UM = 100.0, 65.0  # centre to centre of neighbors; what spot_diameter_fullres stands for
_FACTORS = ("tissue_hires_scalef", "spot_diameter_fullres", "microns_per_pixel", "bin_size_um")
_TOLERANCE = 0.1  # of the size of a pixel, between what Space Ranger states and what the positions say
_POSITIONS = r"tissue_positions\.csv(\.gz)?|tissue_positions_list\.(csv|txt)(\.gz)?"
# What of a folder's or file's name is Space Ranger's; the rest is the name of the sample.
_OF_SPACE_RANGER = re.compile(
    r"(^|_)(outs|spatial|(filtered|raw)_(feature|gene)_bc_matri(x|ces)(_h5|_mex)?(\.h5)?(\.gz)?|matrix\.mtx(\.gz)?"
    rf"|{_POSITIONS}|scalefactors_json\.json(\.gz)?|tissue_hires_image\.\w+(\.gz)?)$"
)


@dataclass(frozen=True)
class SpaceRangerOutput:
    """positions: spots under tissue only.  scale_factors: those of `_FACTORS` that scalefactors_json.json has.
    hires_size: (width, height) of tissue_hires_image, None without it."""

    folder: Path
    positions: Positions
    positions_path: Path
    counts: GeneCounts
    scale_factors: dict[str, float]
    hires_size: tuple[int, int] | None

    @property
    def grid(self) -> np.ndarray:
        """(N, 2) array positions (array_col, array_row), which Space Ranger's tables always have."""
        assert self.positions.grid is not None
        return self.positions.grid


def read_outs(source: Path) -> SpaceRangerOutput:
    """Read a folder `outs/`, or one that holds it, also with the file names of a GEO download (<sample>_<name>.gz).

    Raises FileNotFoundError / ValueError naming what is missing, unreadable, of several samples or inconsistent.
    """
    files = files_below(source)
    positions_path = _positions_file(files, source)
    positions = read_positions(positions_path)
    if positions.grid is None:
        raise ValueError(f"{positions_path} has no array positions ({positions.kind}). Expected {CONTENTS}.")
    under_tissue = positions.under_tissue()
    if len(under_tissue) == 0:
        raise ValueError(
            f"{positions_path}: none of {len(positions)} spots is under tissue (in_tissue is 0 everywhere)."
        )
    factors = find_optional(files, r"(.*_)?scalefactors_json\.json(\.gz)?", f"Scale factors in {source}")
    hires = find_optional(files, r"(.*_)?tissue_hires_image\.(png|jpe?g|tiff?)(\.gz)?", f"Smaller image in {source}")
    counts = read_matrix(files, source, CONTENTS)
    _check_one_sample([path for path in (positions_path, counts.path, factors, hires) if path is not None], source)
    return SpaceRangerOutput(
        folder=source,
        positions=under_tissue,
        positions_path=positions_path,
        counts=counts,
        scale_factors={} if factors is None else _scale_factors(factors),
        hires_size=None if hires is None else plain_image_size(hires),
    )


def _positions_file(files: Sequence[Path], source: Path) -> Path:
    """The table with a header where a sample has both."""
    newer = {path: path.with_name(re.sub(r"_list\.(csv|txt)(\.gz)?$", ".csv", path.name)) for path in files}
    tables = [
        path for path in files if newer[path] == path or not {newer[path], Path(f"{newer[path]}.gz")} & set(files)
    ]
    found = find_optional(tables, rf"(.*_)?({_POSITIONS})", f"Spot positions in {source}")
    if found is not None:
        return found
    if any(path.name.endswith("tissue_positions.parquet") for path in files):
        raise ValueError(
            f"{source} is Visium HD (tissue_positions.parquet). Export the positions of one bin size as "
            "tissue_positions.csv, beside its scalefactors_json.json and filtered_feature_bc_matrix.h5, and prepare that "
            "folder (binned_outputs/square_008um, for example)."
        )
    raise FileNotFoundError(
        f"{source} holds no tissue_positions.csv and no tissue_positions_list.csv. Expected {CONTENTS}."
    )


def _check_one_sample(paths: Sequence[Path], source: Path) -> None:
    """Files of two samples are not paired: barcodes are the same on every slide, so nothing else would tell.

    The name of a sample is what folders and files are called beyond Space Ranger's own names; it may be left out of some.
    """
    names = {path: [_OF_SPACE_RANGER.sub("", part) for part in path.relative_to(source).parts] for path in paths}
    samples = {path: tuple(name for name in parts if name) for path, parts in names.items()}
    longest = max(samples.values(), key=len)
    for path, sample in samples.items():
        if sample != longest[: len(sample)]:
            other = next(path for path, name in samples.items() if name == longest)
            raise ValueError(
                f"{path} and {other} seem to be of two samples. Give as --source the folder of one sample; of a download "
                "whose names differ, bring the files of one sample into one folder."
            )


def _scale_factors(path: Path) -> dict[str, float]:
    what = "the scalefactors_json.json of Space Ranger"
    with reading(path, what):
        content = json.loads(text_of(path))
        if not isinstance(content, dict):
            raise ValueError(f"expected names and numbers, found {brief(content)}")
        factors = {name: content[name] for name in _FACTORS if name in content}
        for name, value in factors.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 < value < 1e6:
                raise ValueError(f"{name} is {brief(value)}, expected a positive number")
    return {name: float(value) for name, value in factors.items()}


def check_full_resolution(output: SpaceRangerOutput, image: Path, size: tuple[int, int]) -> None:
    """Raise ValueError if `image` of `size` (width, height) cannot be the one that the positions refer to.

    tissue_hires_scalef is the size of the smaller image over that of the full-resolution one: this tells a smaller, an
    enlarged or a turned image even where all positions lie inside it.
    """
    scale = output.scale_factors.get("tissue_hires_scalef")
    if not scale or output.hires_size is None:
        return
    expected = tuple(length / scale for length in output.hires_size)
    if _is_near(size, expected, scale):
        return
    found = f"{image} has {size[0]} x {size[1]} pixels"
    wanted = f"about {expected[0]:.0f} x {expected[1]:.0f} (tissue_hires_image {output.hires_size} / {scale:g})"
    if size == output.hires_size:
        cause = "It is the smaller tissue_hires_image itself"
    elif _is_near(size[::-1], expected, scale):
        cause = "Its sides are exchanged: it was turned after Space Ranger ran"
    else:
        ratio = (size[0] / expected[0] + size[1] / expected[1]) / 2
        cause = f"It is scaled by about {ratio:.3g}, or the image of another slide"
    raise ValueError(
        f"{found}, the positions refer to {wanted}. {cause}. Give the image that was the input of Space Ranger (--image)."
    )


def _is_near(size: Sequence[int], expected: Sequence[float], scale: float) -> bool:
    """Within the rounding of the smaller image, and one percent for viewers that pad to whole tiles."""
    return all(abs(found - wanted) <= 2 / scale + 0.01 * wanted for found, wanted in zip(size, expected))


def microns_per_pixel(output: SpaceRangerOutput) -> float | None:
    """Find the size of a pixel, from the distance of neighbors on the array: 100 um, or the size of a bin of Visium HD.

    The array is fitted to the pixels of all spots, so that missing spots do not matter: hexagonal, (2, 0), (1, 1) and
    (1, -1) in (array_col, array_row) are steps to neighbors; the square one of bins has (1, 0) and (0, 1). What Space
    Ranger states goes before. With too few spots for a fit, from spot_diameter_fullres (65 um). None if nothing tells.
    Raises ValueError if Space Ranger states another size than the positions show.
    """
    factors = output.scale_factors
    fitted = _fitted_microns(output.grid, output.positions.pixels, factors.get("bin_size_um"))
    stated = factors.get("microns_per_pixel")
    if stated is not None and fitted is not None and abs(stated / fitted - 1) > _TOLERANCE:
        raise ValueError(
            f"Scale factors and {output.positions_path} do not belong together: {stated:g} um per pixel are stated, the "
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
