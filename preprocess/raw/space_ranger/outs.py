"""Read Space Ranger's `outs/` of every generation: positions, counts with ids and symbols, scale factors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.tables.positions import Positions, read_positions
from preprocess.raw.files import files_below, find_optional, image_size, plain_image_size
from preprocess.raw.space_ranger.bins import BIN_UM, choose_bins, find_bins, read_bins
from preprocess.raw.space_ranger.matrices import GeneCounts, read_matrix
from preprocess.raw.space_ranger.output import (
    SMALLER,
    SpaceRangerOutput,
    not_added_up,
    read_scale_factors,
    with_bin_size,
)
from preprocess.raw.space_ranger.samples import POSITIONS, check_one_sample
from utils.text import some

CONTENTS = (
    "Space Ranger's outs/: spatial/tissue_positions.csv (.parquet; or tissue_positions_list.csv before 2.0) and "
    "filtered_feature_bc_matrix.h5 or the folder filtered_feature_bc_matrix/; of Visium HD binned_outputs/"
)
_TABLE = re.compile(rf"(.*_)?({POSITIONS})")


def read_outs(source: Path, bin_um: float | None = None) -> SpaceRangerOutput:
    """Read a folder `outs/`, or one that holds it, also with the file names of a GEO download (<sample>_<name>.gz).

    bin_um: side of the squares that bins of Visium HD are pooled to, None for `BIN_UM`; an error for other folders.
    Raises FileNotFoundError / ValueError naming what is missing, unreadable, of several samples or inconsistent.
    """
    files = files_below(source)
    if found := find_bins(files):
        bins = choose_bins(found, bin_um or BIN_UM)
        check_one_sample([bins.positions, *[path for path in files if _TABLE.fullmatch(path.name)]], source)
        return read_bins(bins, bin_um or BIN_UM)
    if bin_um is not None:
        raise ValueError(f"--bin_um {bin_um:g} is for Visium HD, and {source} holds no bins. Leave it out.")
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
    names = {name: rf"(.*_)?tissue_{name}_image\.(png|jpe?g|tiff?)(\.gz)?" for name in SMALLER}
    images = {name: find_optional(files, pattern, f"Smaller image in {source}") for name, pattern in names.items()}
    counts = read_matrix(files, source, CONTENTS)
    paths = (positions_path, counts.path, factors, *images.values())
    check_one_sample([path for path in paths if path is not None], source)
    _check_barcodes(counts, positions, positions_path)
    stated = {} if factors is None else read_scale_factors(factors)
    stated = with_bin_size(stated, under_tissue.ids, positions_path)
    return SpaceRangerOutput(
        folder=source,
        positions=under_tissue,
        positions_path=positions_path,
        counts=counts,
        scale_factors=stated,
        smaller={name: plain_image_size(path) for name, path in images.items() if path is not None},
        notes=not_added_up(stated),
    )


def _check_barcodes(counts: GeneCounts, positions: Positions, positions_path: Path) -> None:
    """Raise ValueError for counts of several samples, or of another one: the arrays of all slides have the same barcodes.

    Of one run the filtered counts are of the very spots under tissue, and the raw ones of all spots.
    """
    wells = sorted({barcode.rpartition("-")[2] for barcode in counts.barcodes if re.fullmatch(r"\w+-\d+", barcode)})
    if len(wells) > 1:
        raise ValueError(
            f"{counts.path} holds the counts of {len(wells)} samples (barcodes end in -{', -'.join(wells[:3])}), as "
            "spaceranger aggr writes them. Give each sample's own outs/."
        )
    counted, under_tissue = set(counts.barcodes), set(positions.under_tissue().ids)
    beside, without = (counted & set(positions.ids)) - under_tissue, under_tissue - counted
    if beside and without:
        raise ValueError(
            f"{counts.path} has counts of {len(beside)} spots that are not under tissue by {positions_path}, and none of "
            f"{len(without)} that are ({some(sorted(without), 3)}): they are of different slides, or of different runs of "
            "Space Ranger. Take both from one outs/."
        )


def _positions_file(files: Sequence[Path], source: Path) -> Path:
    """The table with a header where a sample has both."""
    newer = {path: path.with_name(re.sub(r"(_list\.(csv|txt)(\.gz)?|\.parquet)$", ".csv", path.name)) for path in files}
    tables = [
        path for path in files if newer[path] == path or not {newer[path], Path(f"{newer[path]}.gz")} & set(files)
    ]
    found = find_optional(tables, _TABLE.pattern, f"Spot positions in {source}")
    if found is not None:
        return found
    raise FileNotFoundError(
        f"{source} holds no tissue_positions.csv and no tissue_positions_list.csv. Expected {CONTENTS}."
    )


def check_full_resolution(
    factors: Mapping[str, float], smaller: Mapping[str, tuple[int, int]], source: Path, image: Path
) -> list[str]:
    """Raise ValueError if `image` cannot be the one that the positions of a source refer to.

    Scale factors are the size of a smaller image over that of the full-resolution one: this tells a smaller, an enlarged or a
    turned image even where all positions lie inside it.  smaller: (width, height) of those of `SMALLER` that are there.
    returns: a warning where nothing tells.
    """
    name = next((name for name in SMALLER if name in smaller and f"tissue_{name}_scalef" in factors), None)
    if name is None:
        return [
            f"WARNING: whether {image.name} is the full-resolution image was not checked by its size: {source} holds no "
            "smaller image (tissue_hires_image or tissue_lowres_image) with its scale factor."
        ]
    size, scale = image_size(image), factors[f"tissue_{name}_scalef"]
    expected = tuple(length / scale for length in smaller[name])
    if _is_near(size, expected, scale):
        return []
    found = f"{image} has {size[0]} x {size[1]} pixels"
    wanted = f"about {expected[0]:.0f} x {expected[1]:.0f} (tissue_{name}_image {smaller[name]} / {scale:g})"
    if size == smaller[name]:
        cause = f"It is the smaller tissue_{name}_image itself"
    elif _is_near(size[::-1], expected, scale):
        cause = "Its sides are exchanged: it was turned after Space Ranger ran"
    else:
        ratio = (size[0] / expected[0] + size[1] / expected[1]) / 2
        cause = f"It is scaled by about {ratio:.3g}, or the image of another slide"
    raise ValueError(
        f"{found}, the positions of {source} refer to {wanted}. {cause}. Give the image that was the input of Space Ranger "
        "(--image)."
    )


def _is_near(size: Sequence[int], expected: Sequence[float], scale: float) -> bool:
    """Within the rounding of the smaller image, and one percent for viewers that pad to whole tiles."""
    return all(abs(found - wanted) <= 2 / scale + 0.01 * wanted for found, wanted in zip(size, expected))
