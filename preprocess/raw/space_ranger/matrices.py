"""Counts as Space Ranger writes them: one `.h5` file, or matrix.mtx with barcodes.tsv and features.tsv beside it.

Both are read here and not by scanpy: `read_10x_h5` makes every count a 32-bit float, and neither it nor `read_10x_mtx`
survives a damaged file (the process ends, or a spot has the counts of its neighbor).
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from scipy import sparse

from datasets.tables.counts import GREATEST_COUNT, wrong_counts
from datasets.tables.sparse import Stored, checked_sparse, runs_of_lines
from preprocess.raw.files import find_optional
from utils.files import reading
from utils.text import brief, checked_names, some
from utils.untrusted.hdf5 import opened_hdf5
from utils.untrusted.text import text_of, unpacked_bytes

_EXPRESSION = "Gene Expression"
_WHAT = "a matrix of Space Ranger"
_REMEDY = "Take the file of Space Ranger again."
_COUNTS_AT_A_TIME = 1 << 24
_BIN_NAME = re.compile(rb"s_\d{3}um_(?P<row>\d{5})_(?P<column>\d{5})(-\d+)?")
_H5 = r"(.*_)?filtered_(feature|gene)_bc_matri(x|ces)(_h5)?\.h5(\.gz)?"
_MTX = r"(.*_)?matrix\.mtx(\.gz)?"


@dataclass(frozen=True)
class GeneCounts:
    """matrix (barcodes, genes) csr raw counts; ids and symbols of the genes, equal where the file has only one.

    left_out: how many features of other types than genes the file has, by type.
    """

    matrix: sparse.csr_matrix
    barcodes: list[str]
    ids: list[str]
    symbols: list[str]
    path: Path
    left_out: dict[str, int] = field(default_factory=dict)


def read_matrix(files: Sequence[Path], source: Path, expected: str) -> GeneCounts:
    """Read the counts of the one sample among `files`, all below `source`.

    expected: what the source should hold, for the message.
    Raises FileNotFoundError if there is no matrix, ValueError if there are several, or if it is damaged or holds other
    numbers than counts.
    """
    path = find_optional(files, _H5, f"Counts in {source}")
    if path is None:
        path = _matrix_market_file(files, source, expected)
        counts = _read_matrix_market(path)
    else:
        counts = _read_h5(path)
    _check_counts_of(path, counts.matrix)
    twice = pd.Index(counts.barcodes)[pd.Index(counts.barcodes).duplicated()]
    if len(twice):
        raise ValueError(f"{path} lists barcodes twice: {some(twice.tolist())}.")
    return counts


def _check_counts_of(path: Path, matrix: sparse.csr_matrix) -> None:
    if wrong := wrong_counts(matrix.data):
        first = matrix.data[wrong[0][1]][0]
        raise ValueError(f"{path} holds {first:g} where raw counts were expected. Take the matrix of Space Ranger.")


def _matrix_market_file(files: Sequence[Path], source: Path, expected: str) -> Path:
    """The matrix of the spots under tissue; that of all spots ("raw") stands beside it."""
    found = [path for path in files if re.fullmatch(_MTX, path.name)]
    filtered = [path for path in found if "filtered" in str(path.relative_to(source))]
    found = filtered or [path for path in found if "raw" not in str(path.relative_to(source))]
    path = find_optional(found, _MTX, f"Counts in {source}")
    if path is None:
        raise FileNotFoundError(f"{source} holds no filtered_feature_bc_matrix, .h5 or folder. Expected {expected}.")
    return path


def _read_h5(path: Path) -> GeneCounts:
    """Version 3 (group `matrix` with `features`) and version 2 (one group a genome) of the 10x format."""
    with _without_compression(path) as plain, opened_hdf5(plain, _WHAT, _REMEDY) as file:
        group = file["matrix" if "matrix" in file else _only_genome(file)]
        genes = _genes_of(group)
        num_barcodes = int(group["shape"][1])
        barcodes = group["barcodes"].asstr()[:].tolist()
        _check_length("barcodes", barcodes, num_barcodes)
        data, indices, indptr = (group[name][:] for name in ("data", "indices", "indptr"))
        matrix = checked_sparse(Stored(data, indices, indptr, (num_barcodes, len(genes.ids)), by_rows=True))
    return _genes_only(GeneCounts(matrix, barcodes, genes.ids, genes.symbols, path), genes.kinds)


def read_pooled(path: Path, place: np.ndarray, names: Sequence[str]) -> GeneCounts:
    """Read the matrix of a slide of Visium HD and add up its bins, some millions of counts at a time.

    place (rows, columns) of the array: which of `names` a bin is added to, -1 for none.  names: those of the squares.
    returns: counts (squares, genes). Raises ValueError naming the file if it is damaged, lists a bin twice or holds no
    counts, or a sum is beyond 32 bits.
    """
    with _without_compression(path) as plain, opened_hdf5(plain, _WHAT, _REMEDY) as file:
        if "matrix" not in file:
            raise ValueError(f"expected the group 'matrix', found {some(list(file)) or 'nothing'}")
        group = file["matrix"]
        genes = _genes_of(group)
        barcodes = group["barcodes"][:]
        _check_length("barcodes", barcodes, int(group["shape"][1]))
        target = _targets_of_bins(barcodes, place)
        indptr = group["indptr"][:].astype(np.int64)
        if len(indptr) != len(target) + 1:
            raise ValueError(f"its sparse matrix is damaged: indptr has {len(indptr)} entries for {len(target)} bins")
        total = sparse.csr_matrix((len(names), len(genes.ids)), dtype=np.int32)
        for start, stop in runs_of_lines(indptr, _COUNTS_AT_A_TIME):
            first, last = indptr[start], indptr[stop]
            stored = Stored(
                group["data"][first:last],
                group["indices"][first:last],
                indptr[start : stop + 1] - first,
                (stop - start, len(genes.ids)),
                by_rows=True,
            )
            part = checked_sparse(stored)
            _check_counts_of(path, part)
            total = _added(total, _pooled(part, target[start:stop], len(names)))
    return _genes_only(GeneCounts(total, list(names), genes.ids, genes.symbols, path), genes.kinds)


def _targets_of_bins(barcodes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(N,) the square of each bin, by its name "s_008um_<row>_<column>-1"; -1 for none.

    Ten millions of them are no Python strings: the digits of all names are at the same places.
    """
    letters = np.ascontiguousarray(barcodes.astype("S")) if len(barcodes) else np.zeros(0, dtype="S21")
    match = _BIN_NAME.fullmatch(letters[0]) if len(letters) else None
    if match is None:
        raise ValueError(
            f"its barcodes should be bins like 's_008um_00012_00345-1', found {brief(letters[:1].tolist())}"
        )
    table = letters.view(np.uint8).reshape(len(letters), -1)
    row, column = (table[:, slice(*match.span(part))].astype(np.int64) - ord("0") for part in ("row", "column"))
    other = np.ones(table.shape[1], dtype=bool)
    other[slice(*match.span("row"))] = other[slice(*match.span("column"))] = False
    is_alike = (table[:, other] == table[0, other]).all(axis=1)
    for digits in (row, column):
        is_alike &= ((digits >= 0) & (digits <= 9)).all(axis=1)
    if not is_alike.all():
        wrong = letters[np.flatnonzero(~is_alike)[0]]
        raise ValueError(f"its barcodes are bins like {brief(bytes(letters[0]))}, but one is {brief(bytes(wrong))}")
    row, column = (digits @ 10 ** np.arange(digits.shape[1])[::-1] for digits in (row, column))
    inside = (row < place.shape[0]) & (column < place.shape[1])
    flat = row[inside] * place.shape[1] + column[inside]
    if len(np.unique(flat)) < len(flat):
        raise ValueError("a bin of it is listed twice")
    target = np.full(len(letters), -1, dtype=np.int64)
    target[inside] = place.ravel()[flat]
    return target


def _pooled(part: sparse.csr_matrix, target: np.ndarray, num_squares: int) -> sparse.csr_matrix:
    """Rows of one target added up: (num_squares, genes) int64."""
    kept = np.flatnonzero(target >= 0)
    ones = np.ones(len(kept), dtype=np.int64)
    return sparse.csr_matrix((ones, (target[kept], kept)), shape=(num_squares, part.shape[0])) @ part


def _added(total: sparse.csr_matrix, part: sparse.csr_matrix) -> sparse.csr_matrix:
    """Both added up, int32; ValueError where a sum may be beyond it."""
    if total.nnz and part.nnz and int(total.data.max()) + int(part.data.max()) > GREATEST_COUNT:
        raise ValueError(f"its counts add up to more than {GREATEST_COUNT} in one square")
    if part.nnz and int(part.data.max()) > GREATEST_COUNT:
        raise ValueError(f"its counts add up to more than {GREATEST_COUNT} in one square")
    return total + part.astype(np.int32)


@dataclass(frozen=True)
class _Genes:
    """Features of a file, one entry each; kinds: None where it has no types."""

    ids: list[str]
    symbols: list[str]
    kinds: list[str] | None


def _genes_of(group: h5py.Group) -> _Genes:
    is_version_3 = "features" in group
    ids = group["features/id" if is_version_3 else "genes"].asstr()[:].tolist()
    symbols = group["features/name" if is_version_3 else "gene_names"].asstr()[:].tolist()
    kinds = group["features/feature_type"].asstr()[:].tolist() if "features/feature_type" in group else None
    num_genes = int(group["shape"][0])
    lists = {"genes": ids, "names of genes": symbols, "types of features": kinds}
    for what, names in lists.items():
        if names is not None:
            _check_length(what, names, num_genes)
    return _Genes(ids, symbols, kinds)


def _check_length(what: str, names: Sequence[str] | np.ndarray, expected: int) -> None:
    if len(names) != expected:
        raise ValueError(f"the matrix is for {expected} {what}, but {len(names)} are listed")


@contextmanager
def _without_compression(path: Path) -> Iterator[Path]:
    """The file, or an unpacked copy of it; what is said about the copy is said about the file."""
    if path.suffix != ".gz":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.stem
        with reading(path, _WHAT, f"Unpack it (gunzip). {_REMEDY}"):
            copy.write_bytes(unpacked_bytes(path))
        try:
            yield copy
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(path))) from error


def _only_genome(file: h5py.File) -> str:
    genomes = [name for name in file if isinstance(file[name], h5py.Group) and "barcodes" in file[name]]
    if len(genomes) != 1:
        raise ValueError(f"expected the group 'matrix' or one genome, found {some(list(file)) or 'nothing'}")
    return genomes[0]


def _read_matrix_market(path: Path) -> GeneCounts:
    """matrix.mtx, and beside it barcodes.tsv and features.tsv (genes.tsv before version 3), compressed or not."""
    prefix = path.name.removesuffix(".gz").removesuffix("matrix.mtx")
    barcodes = [row[0] for row in _rows(_beside(path, prefix, "barcodes.tsv"))]
    genes = _rows(_beside(path, prefix, "features.tsv", "genes.tsv"))
    with reading(path, _WHAT, _REMEDY):
        matrix = _matrix_of(unpacked_bytes(path), len(genes), len(barcodes))
    ids, symbols = [row[0] for row in genes], [row[min(1, len(row) - 1)] for row in genes]
    kinds = [row[2] for row in genes] if len(genes[0]) > 2 else None
    return _genes_only(GeneCounts(matrix, barcodes, ids, symbols, path), kinds)


def _beside(matrix: Path, prefix: str, *names: str) -> Path:
    """The file of one of these names that belongs to a matrix: in its folder, with its prefix."""
    possible = [matrix.with_name(f"{prefix}{name}{packed}") for name in names for packed in ("", ".gz")]
    found = next((path for path in possible if path.is_file()), None)
    if found is None:
        listed = " or ".join(f"{prefix}{name}" for name in names)
        raise FileNotFoundError(f"{matrix.parent} holds no {listed}, compressed or not, for {matrix.name}.")
    return found


def _rows(path: Path) -> list[list[str]]:
    """Cells of a table without a header; rows or cells may be quoted, lines end as on Windows, the last without an end."""
    with reading(path, "a table of Space Ranger", _REMEDY):
        lines = [line.strip().strip('"') for line in text_of(path).rstrip().split("\n")]
        rows = [[cell.strip().strip('"') for cell in line.split("\t")] for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]) or not row[0]:
            raise ValueError(
                f"{path}, line {number}: expected {len(rows[0])} cells as in the first line, found {brief(row)}. {_REMEDY}"
            )
    return rows


def _matrix_of(content: bytes, num_genes: int, num_barcodes: int) -> sparse.csr_matrix:
    """The (barcodes, genes) matrix of a file in the format of Matrix Market, which lists (genes, barcodes) from 1 on."""
    head = re.match(rb"%%MatrixMarket matrix coordinate (integer|real) general\s*\n(?:%[^\n]*\n|\s*\n)*", content, re.I)
    if head is None:
        raise ValueError(
            f"it begins with {brief(content[:60].decode(errors='replace'))}, not with "
            "'%%MatrixMarket matrix coordinate integer general'"
        )
    sizes, _, body = content[head.end() :].partition(b"\n")
    if not re.fullmatch(rb"\s*\d{1,15}\s+\d{1,15}\s+\d{1,15}\s*", sizes):
        raise ValueError(f"its line of sizes is {brief(sizes.decode(errors='replace'))}")
    rows, columns, entries = (int(size) for size in sizes.split())
    if (rows, columns) != (num_genes, num_barcodes):
        raise ValueError(
            f"the matrix is ({rows}, {columns}), but there are {num_genes} genes and {num_barcodes} barcodes"
        )
    is_real = head[1].lower() == b"real"
    gene, barcode, values = _entries(body, is_real, 1 + head[0].count(b"\n") + 1)
    if len(values) != entries:
        raise ValueError(f"it should have {entries} entries, found {len(values)}")
    for what, places, length in (("gene", gene, num_genes), ("barcode", barcode, num_barcodes)):
        outside = places[(places < 1) | (places > length)]
        if len(outside):
            raise ValueError(f"it has an entry for {what} {outside[0]} of {length}")
    matrix = sparse.csr_matrix((values, (barcode - 1, gene - 1)), shape=(num_barcodes, num_genes))
    if matrix.nnz != entries:
        raise ValueError(f"{entries - matrix.nnz} of its entries are there twice")
    return matrix


def _entries(body: bytes, is_real: bool, first_line: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three columns of plain numbers, separated by single blanks; `first_line` is the number of the first one."""
    letters = rb"[^0-9 \r\n.eE+-]" if is_real else rb"[^0-9 \r\n]"
    if strange := re.search(letters, body):
        number = first_line + body.count(b"\n", 0, strange.start())
        start = body.rfind(b"\n", 0, strange.start()) + 1
        line = body[start : start + 60].partition(b"\n")[0].decode(errors="replace")
        raise ValueError(f"line {number}: expected gene, barcode and count, found {brief(line)}")
    if not body.strip():
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    kinds = {"gene": pa.int64(), "barcode": pa.int64(), "count": pa.float64() if is_real else pa.int64()}
    table = pa.csv.read_csv(
        pa.BufferReader(body),
        read_options=pa.csv.ReadOptions(column_names=list(kinds)),
        parse_options=pa.csv.ParseOptions(delimiter=" ", quote_char=False),
        convert_options=pa.csv.ConvertOptions(column_types=kinds, null_values=[]),
    )
    gene, barcode, values = (table.column(name).to_numpy() for name in kinds)
    return gene, barcode, values


def _genes_only(counts: GeneCounts, kinds: Sequence[str] | None) -> GeneCounts:
    """Without antibody, CRISPR and other features. Raises ValueError if nothing is left, or names are not plain."""
    if kinds is not None and any(kind != _EXPRESSION for kind in kinds):
        keep = [i for i, kind in enumerate(kinds) if kind == _EXPRESSION]
        if not keep:
            found = some(sorted(set(kinds)))
            raise ValueError(f"{counts.path} holds no features of the type {_EXPRESSION!r}; found {found}.")
        ids, symbols = ([names[i] for i in keep] for names in (counts.ids, counts.symbols))
        left_out = dict(Counter(kind for kind in kinds if kind != _EXPRESSION))
        counts = GeneCounts(counts.matrix[:, keep], counts.barcodes, ids, symbols, counts.path, left_out)
    for what, names in (("barcodes", counts.barcodes), ("genes", counts.ids), ("genes", counts.symbols)):
        checked_names(names, what, counts.path)
    return counts
