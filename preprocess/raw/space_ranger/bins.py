"""Visium HD: bins of 2, 8 or 16 um, whose counts are added up to squares as large as a spot.

A square is kept if at least half of its bins are under tissue; its centre is the mean of those of its bins. The finest
bins that make such squares are read, because they know best where the tissue ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from datasets.tables.positions import SPACE_RANGER_COLUMNS, Positions
from preprocess.raw.files import plain_image_size, without_twins
from preprocess.raw.space_ranger.matrices import read_pooled
from preprocess.raw.space_ranger.output import SMALLER, SpaceRangerOutput, bin_size_of, read_scale_factors
from preprocess.raw.space_ranger.samples import sample_of
from utils.files import reading, require_file
from utils.text import some
from utils.untrusted.text import unpacked_bytes

BIN_UM = 56.0  # about as wide as a spot of Visium (55 um)
_MOST_BINS = 1 << 28  # of an array; a slide has 11 000 000 of 2 um
_LEAST_TISSUE = 0.5  # of the bins of a square
_NUMBERS = SPACE_RANGER_COLUMNS[1:]
_TABLE = "tissue_positions.parquet"
_BIN_FOLDER = re.compile(r"(^|_)square_\d+um")


@dataclass(frozen=True)
class BinFolder:
    """One bin size of a slide, binned_outputs/square_008um for example. size: um.  factors: its scale factors."""

    folder: Path
    positions: Path
    size: float
    factors: dict[str, float]


@dataclass(frozen=True)
class Squares:
    """place (rows, columns) int32 of the array of bins: the square of each bin under tissue, -1 for none.

    grid (S, 2): column and row of each square.  pixels (S, 2): its centre, full-resolution px (x, y).  left_out: how many
    squares have too little tissue.
    """

    place: np.ndarray
    grid: np.ndarray
    pixels: np.ndarray
    left_out: int


def find_bins(files: Sequence[Path]) -> list[BinFolder]:
    """Find the bin sizes among the files of a source: tables of positions whose scale factors know the size of a bin.

    Names may have a beginning, as in a GEO download (<sample>_<name>.gz); files of one beginning belong together.
    Raises ValueError naming scale factors that are damaged, or positions of bins without them.
    """
    found = []
    tables = [path for path in files if re.fullmatch(rf"(.*_)?{re.escape(_TABLE)}(\.gz)?", path.name)]
    for positions in without_twins(tables):
        is_inner = re.fullmatch(r"(.*_)?spatial", positions.parent.name) is not None
        folder = positions.parent.parent if is_inner else positions.parent
        path = _of_same_name(positions, positions.parent, "scalefactors_json.json")
        factors = read_scale_factors(path) if path.is_file() else {}
        if "bin_size_um" in factors:
            found.append(BinFolder(folder, positions, factors["bin_size_um"], factors))
        elif _BIN_FOLDER.search(f"{folder.name}_{positions.name}") or bin_size_of(_first_names(positions)) is not None:
            raise ValueError(
                f"{positions if positions.parent == folder else folder} is of Visium HD, but no {path} says how large a bin is "
                "(bin_size_um). Take the file of Space Ranger again."
            )
    return found


def _of_same_name(positions: Path, folder: Path, name: str) -> Path:
    """The file of Space Ranger's `name` with the beginning that the name of the positions has, compressed or not."""
    path = folder / f"{positions.name.removesuffix('.gz').removesuffix(_TABLE)}{name}"
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def choose_bins(found: Sequence[BinFolder], bin_um: float) -> BinFolder:
    """Choose the finest bins that squares of `bin_um` can be made of.

    Raises ValueError if they are of several samples, or no size divides `bin_um`.
    """
    homes = {(bins.folder.parent, sample_of(bins.positions)) for bins in found}
    sizes = sorted(found, key=lambda bins: bins.size)
    if len(homes) > 1 or len({bins.size for bins in found}) < len(found):
        raise ValueError(
            f"Bins of {len(found)} folders where those of one slide were expected: {some([b.positions for b in found])}. Give "
            "the folder of one slide (its outs/)."
        )
    for bins in sizes:
        if bin_um >= bins.size and abs(bin_um / bins.size - round(bin_um / bins.size)) < 1e-6:
            return bins
    finest = sizes[0].size
    raise ValueError(
        f"Squares of {bin_um:g} um cannot be made of bins of {some([f'{bins.size:g}' for bins in sizes])} um, as "
        f"the scale factors beside {sizes[0].positions} have it. Give --bin_um as a multiple of one of them, for "
        f"example {max(1, round(bin_um / finest)) * finest:g}."
    )


def read_bins(bins: BinFolder, bin_um: float) -> SpaceRangerOutput:
    """Read one bin size and add its bins up to squares of `bin_um`.

    returns: squares in the place of spots; their scale factors say `bin_um` as the size of a bin.
    Raises FileNotFoundError / ValueError naming the file that is missing, damaged or without tissue.
    """
    matrix = require_file(
        _of_same_name(bins.positions, bins.folder, "filtered_feature_bc_matrix.h5"),
        "It holds the counts of the bins, and its name begins as that of their positions; take it from Space Ranger's outs/.",
    )
    side = round(bin_um / bins.size)
    with reading(bins.positions, "the positions of bins (.parquet)"):
        squares = _squares(_read_table(bins.positions), side)
    names = [f"s_{bin_um:03.0f}um_{row:05d}_{column:05d}" for column, row in squares.grid.tolist()]
    images = {
        name: _of_same_name(bins.positions, bins.positions.parent, f"tissue_{name}_image.png") for name in SMALLER
    }
    return SpaceRangerOutput(
        folder=bins.folder,
        positions=Positions(
            names, squares.pixels, squares.grid, np.ones(len(names), dtype=bool), "Space Ranger positions"
        ),
        positions_path=bins.positions,
        counts=read_pooled(matrix, squares.place, names),
        scale_factors={**bins.factors, "bin_size_um": bin_um},
        smaller={name: plain_image_size(path) for name, path in images.items() if path.is_file()},
        notes=[
            f"squares of {bin_um:g} um of {side} x {side} bins of {bins.size:g} um ({bins.folder.name}); left out, as less "
            f"than half of their bins are under tissue: {squares.left_out}"
        ],
    )


def _read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns of numbers; that the names of the bins agree with them is looked up in the first rows."""
    file = _opened(path)
    missing = [name for name in SPACE_RANGER_COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"columns {', '.join(missing)} are missing; found {some(file.schema_arrow.names, 8)}")
    first = next(file.iter_batches(1000, columns=list(SPACE_RANGER_COLUMNS)), None)
    for row in [] if first is None else first.to_pylist():
        if f"_{row['array_row']:05d}_{row['array_col']:05d}" not in str(row["barcode"]):
            raise ValueError(f"bin {row['barcode']} stands in row {row['array_row']}, column {row['array_col']}")
    table = file.read(columns=list(_NUMBERS))
    return {name: table.column(name).to_numpy() for name in _NUMBERS}


def _first_names(path: Path) -> list[str]:
    with reading(path, "a table of spot positions"):
        file = _opened(path)
        if "barcode" not in file.schema_arrow.names:
            return []
        first = next(file.iter_batches(1, columns=["barcode"]), None)
        return [] if first is None else [str(name) for name in first.column(0).to_pylist()]


def _opened(path: Path) -> pa.parquet.ParquetFile:
    source = pa.BufferReader(unpacked_bytes(path)) if path.suffix == ".gz" else path
    return pa.parquet.ParquetFile(source, page_checksum_verification=True)


def _squares(table: dict[str, np.ndarray], side: int) -> Squares:
    """Squares of `side` x `side` bins. Raises ValueError, without the file, where the table is none of bins."""
    in_tissue, row, column, pixel_row, pixel_column = (table[name] for name in _NUMBERS)
    for name, values in table.items():
        if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
            raise ValueError(f"{name} is missing or no number in some rows")
    row, column = row.astype(np.int64), column.astype(np.int64)
    if not len(row) or min(row.min(), column.min()) < 0 or (row.max() + 1) * (column.max() + 1) > _MOST_BINS:
        raise ValueError(f"expected some bins of an array of at most {_MOST_BINS:,}, found {len(row):,} rows")
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    flat = row * shape[1] + column
    if len(np.unique(flat)) < len(flat):
        raise ValueError("positions of the array are listed twice")
    width = -(-shape[1] // side)
    square = (row // side) * width + column // side
    is_tissue = in_tissue == 1
    listed, tissue = np.bincount(square), np.bincount(square[is_tissue], minlength=int(square.max()) + 1)
    kept = np.flatnonzero(tissue >= _LEAST_TISSUE * side * side)
    if not len(kept):
        raise ValueError(
            f"no square of {side} x {side} bins is under tissue ({int(is_tissue.sum()):,} of {len(row):,} bins are)"
        )
    number = np.full(len(listed), -1, dtype=np.int32)
    number[kept] = np.arange(len(kept), dtype=np.int32)
    place = np.full(shape, -1, dtype=np.int32)
    place.ravel()[flat[is_tissue]] = number[square[is_tissue]]
    sums = [np.bincount(square, weights=values) for values in (pixel_column, pixel_row)]
    return Squares(
        place=place,
        grid=np.stack([kept % width, kept // width], axis=1),
        pixels=np.stack([total[kept] / listed[kept] for total in sums], axis=1),
        left_out=int((tissue > 0).sum()) - len(kept),
    )
