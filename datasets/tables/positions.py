"""Spot positions from elsewhere: Space Ranger's tables of every generation, spot tables of the documented layout, and
plain lists of pixels. What a file is, is told by its header and shape.

Space Ranger names rows before columns (`pxl_row_in_fullres` is y, `pxl_col_in_fullres` is x); here everything is (x, y).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from datasets.tables.spot_table import GREATEST_COORDINATE, SELECTED, spot_ids
from utils.files import reading, require_file
from utils.text import checked_names, some
from utils.untrusted.text import cells_of, text_of

SPACE_RANGER_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_SPACE_RANGER, _SPOT_TABLE, _PIXELS = "Space Ranger positions", "spot table", "pixel positions"
_COLUMNS = {  # of each kind: x, y in full-resolution px, and the integer grid (x, y)
    _SPACE_RANGER: (("pxl_col_in_fullres", "pxl_row_in_fullres"), ("array_col", "array_row")),
    _SPOT_TABLE: (("pixel_x", "pixel_y"), ("x", "y")),
    _PIXELS: (("x", "y"), None),
}
_OTHER_PIXELS = (("pxl_col_in_fullres", "pxl_row_in_fullres"), ("imagecol", "imagerow"))  # Space Ranger, Seurat
_ID_COLUMNS = ("barcode", "spot_id", "id", "spot")
EXPECTED = (
    "Expected comma or tab separated: Space Ranger's tissue_positions.csv or tissue_positions_list.csv; a spot table with "
    "x, y, pixel_x, pixel_y; or columns x, y (full-resolution pixels) with an optional column 'barcode'. "
    "Or the same columns as .parquet."
)


@dataclass(frozen=True)
class Positions:
    """Spots of one slide, in the order of the file.

    ids: barcodes, or whatever the file calls them.  pixels (N, 2): (x, y) in full-resolution px.
    grid (N, 2): integer (column, row) of the array, None if the file has none.  in_tissue (N,) bool: what Space Ranger
    says, or the column `selected` of a spot table; all true for other files.  kind: what the file was taken for.
    """

    ids: list[str]
    pixels: np.ndarray
    grid: np.ndarray | None
    in_tissue: np.ndarray
    kind: str

    def __len__(self) -> int:
        return len(self.ids)

    def exchanged(self) -> Positions:
        """With x and y exchanged, of the pixels and of the grid: for tables of the published external sets."""
        grid = None if self.grid is None else self.grid[:, ::-1]
        return Positions(self.ids, self.pixels[:, ::-1], grid, self.in_tissue, self.kind)

    def under_tissue(self) -> Positions:
        """Only the spots that lie under tissue."""
        keep = self.in_tissue
        ids = [name for name, kept in zip(self.ids, keep) if kept]
        return Positions(ids, self.pixels[keep], None if self.grid is None else self.grid[keep], keep[keep], self.kind)


def read_positions(path: str | Path) -> Positions:
    """Read any accepted file of positions.

    Raises FileNotFoundError, or one ValueError naming the file and everything that is wrong with it: no known columns,
    values that are no numbers, ids or grid positions that occur twice.
    """
    path = require_file(path, EXPECTED)
    table = _read_table(path)
    kind = _kind_of(table, path)
    pixel_columns, grid_columns = _COLUMNS[kind]
    numbers, problems = _numbers(table, [*pixel_columns, *(grid_columns or ())])
    if len(table) == 0:
        problems.append("no spots in it")
    in_tissue = np.ones(len(table), dtype=bool)
    column = "in_tissue" if kind == _SPACE_RANGER else SELECTED
    if column in table:
        flag = pd.to_numeric(table[column], errors="coerce")
        if not flag.isin([0, 1]).all():
            problems.append(f"{column} should be 0 or 1, found {some(sorted(set(table[column].astype(str))))}")
        in_tissue = flag.to_numpy() == 1
    ids: list[str] = []
    grid = None
    if not problems:
        grid = None if grid_columns is None else np.rint(numbers[list(grid_columns)].to_numpy()).astype(np.int64)
        ids = _ids(table, numbers, path)
        problems += _repeated("spots", ids)
        problems += [] if grid is None else _repeated("grid positions", [f"({x}, {y})" for x, y in grid.tolist()])
    if problems:
        raise ValueError(f"{path} (read as {kind}): {'; '.join(problems)}. {EXPECTED}")
    return Positions(ids, numbers[list(pixel_columns)].to_numpy(dtype=np.float64), grid, in_tissue, kind)


def _read_table(path: Path) -> pd.DataFrame:
    """The table with lower-case column names; those of Space Ranger or x, y are supplied where there is no header."""
    if path.suffix == ".parquet":
        with reading(path, "a table of spot positions", remedy=EXPECTED):
            table = pa.parquet.ParquetFile(path, page_checksum_verification=True).read().to_pandas()
        return table.rename(columns=lambda name: str(name).strip().lower())
    with reading(path, "a table of spot positions", remedy=EXPECTED):
        text = text_of(path)
        first = text.partition("\n")[0].rstrip("\r")
        separator = "\t" if "\t" in first else ","
        names = _names_without_header([cell.strip().strip('"') for cell in first.split(separator)])
        table = cells_of(text, separator, has_header=names is None)
    if names is not None:
        table.columns = pd.Index(names)
    table.columns = [str(name).strip().lower() for name in table.columns]
    return table


def _names_without_header(cells: list[str]) -> list[str] | None:
    """Column names of a file whose first line is already a spot; None if that line is a header."""
    if len(cells) == len(SPACE_RANGER_COLUMNS) and all(_is_number(cell) for cell in cells[1:]):
        return list(SPACE_RANGER_COLUMNS)
    if len(cells) == 2 and all(_is_number(cell) for cell in cells):
        return ["x", "y"]
    if len(cells) == 3 and not _is_number(cells[0]) and all(_is_number(cell) for cell in cells[1:]):
        return ["barcode", "x", "y"]
    return None


def _kind_of(table: pd.DataFrame, path: Path) -> str:
    found = set(table.columns)
    if set(SPACE_RANGER_COLUMNS) <= found:
        return _SPACE_RANGER
    if {"x", "y", "pixel_x", "pixel_y"} <= found:
        return _SPOT_TABLE
    better = next((pair for pair in _OTHER_PIXELS if set(pair) <= found), None)
    if {"x", "y"} <= found and better is not None:
        raise ValueError(
            f"{path} has x and y, which would be taken for pixels, but also {' and '.join(better)}. If these are the pixels, "
            "call them x and y, and leave the other two out."
        )
    if {"x", "y"} <= found:
        return _PIXELS
    missing = [name for name in SPACE_RANGER_COLUMNS if name not in found]
    near = f" (for Space Ranger {', '.join(missing)} are missing)" if len(missing) < len(SPACE_RANGER_COLUMNS) else ""
    raise ValueError(f"{path} has the columns {some(list(table.columns), 10)}{near}. {EXPECTED}")


def _numbers(table: pd.DataFrame, columns: list[str]) -> tuple[pd.DataFrame, list[str]]:
    numbers = table[columns].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    problems = []
    for name in columns:
        values = numbers[name].to_numpy()
        wrong = np.flatnonzero(~(np.abs(values) <= GREATEST_COORDINATE))
        if len(wrong):
            what = "missing or no number" if np.isnan(values[wrong]).any() else f"beyond {GREATEST_COORDINATE:,}"
            problems.append(f"{name} is {what} in {some([f'spot {row + 1}' for row in wrong])}")
    return numbers, problems


def _ids(table: pd.DataFrame, numbers: pd.DataFrame, path: Path) -> list[str]:
    """The file's own ids where it has a column of them, else "XxY" of the grid or, without a grid, of the pixels."""
    named = next((name for name in _ID_COLUMNS if name in table.columns), None)
    if named is not None:
        if table[named].isna().any():
            raise ValueError(f"{path}: the {named} is missing in some rows. {EXPECTED}")
        return checked_names(table[named].tolist(), "spots", str(path))
    return spot_ids(numbers["x"].to_numpy(), numbers["y"].to_numpy())


def _repeated(what: str, names: list[str]) -> list[str]:
    index = pd.Index(names)
    twice = index[index.duplicated()].unique().tolist()
    return [f"{what} listed twice: {some(twice)}"] if twice else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
