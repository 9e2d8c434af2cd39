"""Raw counts of a slide from any accepted file, checked: spots x genes, non-negative integers, unique names."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from anndata import AnnData
from scipy import sparse

from utils.files import require_file
from utils.text import some

_SPOT_ID = re.compile(r"^(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)$")
GREATEST_COUNT = 2**31 - 1
_LINES_AT_ONCE = 64  # of a text table


def read_counts(path: str | Path, genes: Sequence[str] | None = None) -> AnnData:
    """Read `.parquet`, `.tsv.gz`, `.tsv`, `.csv` or `.h5ad` counts.

    genes:   read only these, in this order (much faster for parquet); None = all.
    returns: AnnData, X (N, G) csr int32 raw counts, obs_names = spot ids "XxY" rounded, var_names = genes.
    Raises FileNotFoundError, or one ValueError that names the file and everything that is wrong: no table, duplicated
    spots or genes, ids that are no "XxY", missing genes, NaN, negative, non-integer or non-numeric counts.
    """
    path = require_file(path, "It should hold the raw counts of a slide, spots x genes.")
    try:
        if path.name.endswith(".parquet"):
            table = _read_parquet(path, genes)
        elif path.name.endswith(".h5ad"):
            table = _read_h5ad(path, genes)
        else:
            table = _read_text(path)
    except (pa.ArrowException, OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable table of counts (truncated?): {str(error).splitlines()[0]}"
        ) from error
    return check_counts(*table, source=str(path), genes=genes)


def check_counts(
    matrix: object, spots: Sequence[str], columns: Sequence[str], *, source: str, genes: Sequence[str] | None = None
) -> AnnData:
    """Counts from anywhere, checked; see `read_counts`. `source` names them in the message.

    matrix: (N, M) dense, sparse, or a pyarrow Table; spots: N ids; columns: M genes.
    """
    problems = []
    ids, wrong = round_ids(spots)
    if wrong:
        problems.append(f"spot ids should look like '10x13', found {some(wrong)}")
    if len(spots) == 0 or len(columns) == 0:
        problems.append(f"found {len(spots)} spots x {len(columns)} genes")
    for what, names in (("spots", ids), ("genes", columns)):
        twice = pd.Index(names)[pd.Index(names).duplicated()].unique().tolist()
        if twice:
            problems.append(f"duplicated {what}: {some(twice)}")
    if genes is not None and (missing := sorted(set(genes) - set(columns))):
        problems.append(f"genes asked for but not there: {some(missing)}")
    if not problems:
        if genes is not None:
            chosen = pd.Index(columns).get_indexer(list(genes))
            matrix = matrix.select(chosen.tolist()) if isinstance(matrix, pa.Table) else matrix[:, chosen]
            columns = list(genes)
        matrix, problems = _checked(matrix, ids, columns)
    if problems:
        raise ValueError(
            f"{source}: {'; '.join(problems)}. Expected raw counts, spots x genes; correct or replace the file."
        )
    return AnnData(matrix, obs=pd.DataFrame(index=ids), var=pd.DataFrame(index=columns))


def read_gene_names(path: str | Path) -> list[str]:
    """The genes of a table of text, without reading the counts."""
    path = require_file(path, "It should hold the raw counts of a slide, spots x genes.")
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            header, first = file.readline(), file.readline()
        return _text_columns(path, header, first)[1:]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable table of counts (truncated?): {error}") from error


def spot_names(path: str | Path) -> list[str]:
    """The spot ids of a table of counts as they are written, in its order, without taking the counts apart."""
    path = require_file(path, "It should hold the raw counts of a slide, spots x genes.")
    try:
        if path.name.endswith(".parquet"):
            file = pa.parquet.ParquetFile(path)
            index = _index_columns(file.schema_arrow)
            return file.read(columns=index[:1]).column(0).to_pylist() if index else []
        if path.name.endswith(".h5ad"):
            data = anndata.read_h5ad(path, backed="r")
            data.file.close()
            return data.obs_names.tolist()
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            file.readline()
            separator = _separator(path).encode()
            return [line.partition(separator)[0].decode().strip('"') for line in file if line.strip()]
    except (pa.ArrowException, OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable table of counts (truncated?): {str(error).splitlines()[0]}. Take the original file "
            "again."
        ) from error


def gene_names(path: str | Path) -> list[str]:
    """Names of the genes of a table of counts, in its order; of parquet and text only the header is read."""
    path = require_file(path, "It should hold the raw counts of a slide, spots x genes.")
    if path.name.endswith(".h5ad"):
        return list(read_counts(path).var_names)
    if not path.name.endswith(".parquet"):
        return read_gene_names(path)
    try:
        schema = pa.parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable table of counts: {str(error).splitlines()[0]}") from error
    index = _index_columns(schema)
    return [name for name in schema.names if name not in index]


def round_ids(spots: Sequence[str]) -> tuple[list[str], list[str]]:
    """Spot ids in the form "round(x)xround(y)", and those that are no "XxY"."""
    ids, wrong = [], []
    for spot in map(str, spots):
        match = _SPOT_ID.match(spot)
        if match is None:
            wrong.append(spot)
            ids.append(spot)
        else:
            ids.append(f"{round(float(match[1]))}x{round(float(match[2]))}")
    return ids, wrong


Table = tuple[object, list[str], list[str]]  # values (dense, sparse or a pyarrow Table of columns), spots, genes


def _read_parquet(path: Path, genes: Sequence[str] | None) -> Table:
    file = pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)  # many short columns: no read-ahead
    names, index = file.schema_arrow.names, _index_columns(file.schema_arrow)
    if not index:
        raise ValueError(f"{path} has no column of spot ids; write it with the ids as the index of the table.")
    columns = [name for name in names if name not in index]
    if genes is not None:
        wanted = set(genes)
        columns = [name for name in columns if name in wanted]
    table = file.read(columns=index[:1] + columns)
    return table.select(columns), table.column(index[0]).to_pylist(), columns


def _index_columns(schema: pa.Schema) -> list[str]:
    """Columns that hold the spot ids: the index of pandas, or, without one, the first column of text."""
    listed = (schema.pandas_metadata or {}).get("index_columns", [])
    index = [name for name in listed if isinstance(name, str) and name in schema.names]
    return index or [field.name for field in schema if _is_text(field.type)][:1]


def _read_text(path: Path) -> Table:
    """Tab or comma separated text; the header may leave out the name of the first column, as R writes it."""
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        content = file.read()
    header, _, body = content.replace(b"\r\n", b"\n").partition(b"\n")
    names = _text_columns(path, header, body.partition(b"\n")[0])
    width, separator = len(names), _separator(path)
    plain = _read_plain_integers(body, separator.encode(), width)
    if plain is not None:
        return *plain, names[1:]
    table = pa.csv.read_csv(
        pa.BufferReader(body),
        read_options=pa.csv.ReadOptions(column_names=[str(i) for i in range(width)], block_size=max(len(body), 1)),
        parse_options=pa.csv.ParseOptions(delimiter=separator),
        convert_options=pa.csv.ConvertOptions(column_types={"0": pa.string()}),
    )
    return table.select(range(1, width)), table.column(0).to_pylist(), names[1:]


def _separator(path: Path) -> str:
    return "," if ".csv" in path.suffixes else "\t"


def _text_columns(path: Path, header: bytes, first_row: bytes) -> list[str]:
    """Names of all columns, that of the ids included, checked against the first row."""
    separator = _separator(path)
    names = [name.strip('"') for name in header.decode().rstrip("\r\n").split(separator)]
    if not first_row.strip():
        raise ValueError(f"{path} holds no spots: it ends after its first line.")
    width = first_row.decode().count(separator) + 1
    if width == len(names) + 1:
        names = ["", *names]
    if width != len(names) or width < 2:
        raise ValueError(
            f"{path}: the header names {len(names)} columns, the first row has {width}, separated by {separator!r}. "
            "Expected a row of genes, then one row a spot: its id and the counts."
        )
    return names


def _read_plain_integers(body: bytes, separator: bytes, width: int) -> tuple[np.ndarray, list[str]] | None:
    """Values and ids of a table of plain integers, several times faster than a general reader of text.

    The digits of all cells are added up place by place. None if a cell is anything but one to nine digits: then the
    general reader takes over, which also finds out what is wrong.
    """
    lines = body.removesuffix(b"\n").split(b"\n")
    spots, blocks = [], []
    for start in range(0, len(lines), _LINES_AT_ONCE):
        rows = [line.partition(separator) for line in lines[start : start + _LINES_AT_ONCE]]
        spots += [row[0].decode().strip('"') for row in rows]
        text = np.frombuffer(separator.join(row[2] for row in rows) + separator, dtype=np.uint8)
        ends = np.flatnonzero(text == separator[0])
        lengths = np.diff(ends, prepend=-1) - 1
        digits = text - np.uint8(ord("0"))  # below "0" wraps around to large numbers
        if any(row[2].count(separator) != width - 2 for row in rows) or lengths.min() < 1 or lengths.max() > 9:
            return None
        if np.count_nonzero(digits > 9) != len(ends):
            return None
        values = digits[ends - 1].astype(np.int32)
        for place in range(1, lengths.max()):
            longer = np.flatnonzero(lengths > place)
            values[longer] += digits[ends[longer] - 1 - place] * np.int32(10**place)
        blocks.append(values.reshape(len(rows), width - 1))
    return np.concatenate(blocks), spots


def _read_h5ad(path: Path, genes: Sequence[str] | None) -> Table:
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not a readable .h5ad file (truncated?).")
    data = anndata.read_h5ad(path)
    if genes is not None and data.var_names.is_unique:
        data = data[:, [gene for gene in genes if gene in data.var_names]]
    return data.X, data.obs_names.tolist(), data.var_names.tolist()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _checked(matrix: object, spots: list[str], genes: list[str]) -> tuple[sparse.csr_matrix | None, list[str]]:
    """The counts as csr int32, or the reasons why they are none."""
    if isinstance(matrix, pa.Table):
        matrix, problems = _numeric(matrix, spots, genes)
        if problems:
            return None, problems
    compressed = sparse.csr_matrix(matrix)
    values = compressed.data
    problems = []
    for what, is_wrong in (
        ("missing counts (NaN)", np.isnan(values)),
        ("negative counts", values < 0),
        ("counts that are no integers", np.isfinite(values) & (values != np.round(values))),
        (f"counts above {GREATEST_COUNT}", values > GREATEST_COUNT),
    ):
        if is_wrong.any():
            rows = np.repeat(np.arange(len(spots)), np.diff(compressed.indptr))[is_wrong]
            column = compressed.indices[is_wrong][0]
            example = (
                f"{values[is_wrong][0]:g} for gene {genes[column]}" if "NaN" not in what else f"gene {genes[column]}"
            )
            ids = [spots[row] for row in dict.fromkeys(rows.tolist())]
            problems.append(f"{what} ({example}) in spots {some(ids)}")
    if problems:
        return None, problems
    compressed = compressed.astype(np.int32)
    compressed.eliminate_zeros()
    return compressed, []


def _numeric(table: pa.Table, spots: list[str], genes: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """Columns of one type as a dense matrix; text or empty cells become problems that name gene and spots."""
    problems = []
    kinds = {kind for kind in table.schema.types}
    for position, kind in enumerate(table.schema.types):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            column = table.column(position).to_pandas()
            bad = np.flatnonzero(pd.to_numeric(column, errors="coerce").isna())
            found = repr(column.iloc[bad[0]]) if len(bad) else str(kind)
            where = [spots[row] for row in bad]
            problems.append(f"non-numeric counts ({found} for gene {genes[position]}) in spots {some(where)}")
    if problems:
        return None, [some(problems, shown=3)] if len(problems) > 3 else problems
    dtype = np.int32 if all(pa.types.is_integer(kind) and kind.bit_width <= 32 for kind in kinds) else np.float64
    dense = np.empty((table.num_rows, table.num_columns), dtype=dtype)
    for position, column in enumerate(table.itercolumns()):
        dense[:, position] = column.to_numpy()
    return dense, []
