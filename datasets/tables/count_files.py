"""Tables of counts in parquet and in text, taken apart but not yet checked; to be called inside `reading`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from scipy import sparse

from datasets.tables.sparse import stacked
from utils.untrusted.text import first_lines, text_bytes

_ROWS = 2048
_CELLS = 1 << 25  # of a full table: 128 MB
_HEXADECIMAL = re.compile(rb"[\t,] *[-+]?0[xX][^\t,\n]*")  # Arrow takes it for a number


def read_parquet(path: Path, genes: Sequence[str] | None) -> tuple[pa.Table | sparse.csr_matrix, list[str], list[str]]:
    """Read the columns of counts (only those of `genes`), the spots and the genes.

    What is written in several groups of rows is too large for a full table, and becomes sparse group by group.
    """
    # Many short columns: no read-ahead.
    file = pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
    index = _index_columns(file.schema_arrow)
    if not index:
        raise ValueError(f"{path} has no column of spot ids; write it with the ids as the index of the table.")
    columns = [name for name in file.schema_arrow.names if name not in index]
    if genes is not None:
        wanted = set(genes)
        columns = [name for name in columns if name in wanted]
    kinds = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    if file.num_row_groups > 1 and columns and all(is_number(kinds[name]) for name in columns):
        spots, parts = [], []
        for group in range(file.num_row_groups):
            spots += file.read_row_group(group, columns=index[:1]).column(0).to_pylist()
            parts.append(_sparse_group(file, group, columns))
        return stacked(parts), spots, columns
    table = file.read(columns=index[:1] + columns)
    return table.select(columns), table.column(index[0]).to_pylist(), columns


def _sparse_group(file: pa.parquet.ParquetFile, group: int, columns: list[str]) -> sparse.csr_matrix:
    """One group of rows, some columns at a time, so that little of it is ever full; Arrow gives its reserve back."""
    step = max(1, _CELLS // max(1, file.metadata.row_group(group).num_rows))
    parts = [
        sparse_of(file.read_row_group(group, columns=columns[start : start + step]))
        for start in range(0, len(columns), step)
    ]
    pa.default_memory_pool().release_unused()
    return sparse.hstack(parts, format="csr")


def is_number(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def sparse_of(table: pa.Table) -> sparse.csr_matrix:
    """Make a table of numbers (N, G) sparse: int32 where all of them fit, else float64, an empty cell NaN.

    Some rows at a time, so that the full table is there only once.
    """
    dtype = _dtype_of(table)
    parts = []
    for start in range(0, table.num_rows, _ROWS):
        piece = table.slice(start, _ROWS)
        dense = np.empty((piece.num_rows, piece.num_columns), dtype=dtype)
        for position, column in enumerate(piece.itercolumns()):
            dense[:, position] = column.to_numpy()
        parts.append(sparse.csr_matrix(dense))
    empty = sparse.csr_matrix((0, table.num_columns), dtype=dtype)
    return stacked(parts) if parts else empty


def _dtype_of(table: pa.Table) -> type:
    """int32 where every number of every column fits; float64 for those that have to be looked at first."""
    fits = all(
        pa.types.is_integer(field.type) and field.type.bit_width <= 32 and field.type != pa.uint32()
        for field in table.schema
    )
    return np.int32 if fits and not any(column.null_count for column in table.itercolumns()) else np.float64


def parquet_genes(path: Path) -> list[str]:
    """Read the names of the genes from the schema."""
    schema = pa.parquet.read_schema(path)
    index = _index_columns(schema)
    return [name for name in schema.names if name not in index]


def _index_columns(schema: pa.Schema) -> list[str]:
    """Columns that hold the spot ids: the index of pandas, or, without one, the first column of text."""
    listed = (schema.pandas_metadata or {}).get("index_columns", [])
    index = [name for name in listed if isinstance(name, str) and name in schema.names]
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    return index or texts[:1]


def read_text(path: Path) -> tuple[np.ndarray | pa.Table, list[str], list[str]]:
    """Read tab or comma separated text; the header may leave out the name of the first column, as R writes it."""
    header, _, body = text_bytes(path).replace(b"\r\n", b"\n").partition(b"\n")
    names, separator = _columns(path, header, body.partition(b"\n")[0]), _separator(path)
    values, spots = _integers(body, separator, len(names) - 1)
    if values is not None:
        return values, spots, names[1:]
    if found := _HEXADECIMAL.search(body):
        raise ValueError(f"{path} holds {found[0][1:].decode().strip()!r} where a count was expected.")
    table = pa.csv.read_csv(
        pa.BufferReader(body),
        read_options=pa.csv.ReadOptions(column_names=[str(i) for i in range(len(names))], block_size=max(len(body), 1)),
        parse_options=pa.csv.ParseOptions(delimiter=separator),
        convert_options=pa.csv.ConvertOptions(column_types={"0": pa.string()}, true_values=[], false_values=[]),
    )
    return table.select(range(1, len(names))), table.column(0).to_pylist(), names[1:]


def text_genes(path: Path) -> list[str]:
    """Read the names of the genes from the first line."""
    header, first_row = first_lines(path, 2)
    return _columns(path, header, first_row)[1:]


def _separator(path: Path) -> str:
    return "," if ".csv" in path.suffixes else "\t"


def _columns(path: Path, header: bytes, first_row: bytes) -> list[str]:
    """Names of all columns, that of the ids included, checked against the first row."""
    separator = _separator(path)
    names = [name.strip('"') for name in header.decode().rstrip("\r\n").split(separator)]
    if not first_row.strip():
        raise ValueError(f"{path} holds no spots: it ends after its first line.")
    width = first_row.decode().count(separator) + 1
    if width == len(names) + 1 and not first_row.rstrip(b"\r\n").endswith(separator.encode()):
        names = ["", *names]
    if width != len(names) or width < 2:
        raise ValueError(
            f"{path}: the header names {len(names)} columns, the first row has {width}, separated by {separator!r}. "
            "Expected a row of genes, then one row a spot: its id and the counts."
        )
    return names


def _integers(body: bytes, separator: str, width: int) -> tuple[np.ndarray | None, list[str]]:
    """Values (N, width) int32 and N ids of rows of plain integers, several times faster than a general reader of text.

    No values if a cell is anything else: then the general reader takes over, which also finds out what is wrong.
    """
    spots: list[str] = []

    def rows() -> Iterator[str]:
        for line in body.removesuffix(b"\n").split(b"\n"):
            spot, _, counts = line.decode().partition(separator)
            spots.append(spot.strip('"'))
            yield counts

    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # other versions of NumPy warn where they cut 1.5 to 1, and where there are no rows
        try:
            values = np.loadtxt(rows(), dtype=np.int32, delimiter=separator, comments=None, ndmin=2)
        except (ValueError, Warning):
            return None, []
    return (values if values.shape == (len(spots), width) else None), spots  # empty rows are left out
