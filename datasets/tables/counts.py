"""Raw counts of a slide from any accepted file, checked: spots x genes, non-negative integers, unique names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse

from datasets.tables.count_files import (
    is_number,
    parquet_genes,
    read_parquet,
    read_text,
    sparse_of,
    text_genes,
)
from datasets.tables.h5ad import read_h5ad, read_names
from utils.files import reading, require_file
from utils.text import brief, checked_names, shortened, some

_SPOT_ID = re.compile(r"(-?\d{1,9}(?:\.\d{1,30})?)x(-?\d{1,9}(?:\.\d{1,30})?)", re.ASCII)
GREATEST_COUNT = 2**31 - 1
_WHAT = "a table of counts"
_REMEDY = "It may be damaged or no table of counts: take the original file again."

Matrix: TypeAlias = np.ndarray | sparse.csr_matrix


def read_counts(path: str | Path, genes: Sequence[str] | None = None) -> AnnData:
    """Read `.parquet`, `.tsv.gz`, `.tsv`, `.csv` or `.h5ad` counts.

    genes:   read only these, in this order (much faster for parquet); None = all.
    returns: AnnData, X (N, G) csr int32 raw counts, obs_names = spot ids "XxY" rounded, var_names = genes.
    Raises FileNotFoundError, or one ValueError that names the file and everything that is wrong: no table, duplicated
    spots or genes, ids that are no "XxY", missing genes, names that are not plain, NaN, negative, non-integer or
    non-numeric counts.
    """
    path = _required(path)
    with reading(path, _WHAT, remedy=_REMEDY):
        table: tuple[Matrix | pa.Table, list[str], list[str]]
        if path.name.endswith(".parquet"):
            table = read_parquet(path, genes)
        elif path.name.endswith(".h5ad"):
            data = read_h5ad(path)
            table = data.X, data.obs_names.tolist(), data.var_names.tolist()
        else:
            table = read_text(path)
        return check_counts(*table, source=str(path), genes=genes)


def check_counts(
    matrix: Matrix | pa.Table,
    spots: Sequence[str],
    columns: Sequence[str],
    *,
    source: str,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Check counts from anywhere; see `read_counts`, for the errors, too. `source` names them in the message.

    matrix: (N, M) dense, sparse (as `checked_sparse` gives it), or a pyarrow Table; spots: N ids; columns: M genes.
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
    if are_numbered(columns):
        problems.append("genes have no names but 0, 1, 2, ...")
    if genes is not None and (missing := sorted(set(genes) - set(columns))):
        problems.append(f"genes asked for but not there: {some(missing)}")
    if not problems:
        checked_names(columns, "genes", source)
        if genes is not None:
            chosen = pd.Index(columns).get_indexer(list(genes))
            matrix = matrix.select(chosen.tolist()) if isinstance(matrix, pa.Table) else matrix[:, chosen]
            columns = list(genes)
        compressed, problems = _checked(matrix, ids, columns)
    if problems:
        raise ValueError(
            f"{source}: {'; '.join(problems)}. Expected raw counts, spots x genes; correct or replace the file."
        )
    return AnnData(compressed, obs=pd.DataFrame(index=ids), var=pd.DataFrame(index=columns))


def are_numbered(genes: Sequence[str]) -> bool:
    """Tell whether genes are called 0, 1, 2, ..., as pandas and AnnData call what was given no names."""
    return len(genes) > 0 and list(genes) == [str(number) for number in range(len(genes))]


def gene_names(path: str | Path) -> list[str]:
    """Read the names of the genes of a table of counts, in its order, without the counts.

    Raises FileNotFoundError, or ValueError naming the file if they cannot be read or are no plain names.
    """
    path = _required(path)
    with reading(path, _WHAT, remedy=_REMEDY):
        if path.name.endswith(".h5ad"):
            names = read_names(path, "var")
        else:
            names = parquet_genes(path) if path.name.endswith(".parquet") else text_genes(path)
        return checked_names(names, "genes", str(path))


def _required(path: str | Path) -> Path:
    return require_file(path, "It should hold the raw counts of a slide, spots x genes.")


def round_ids(spots: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return spot ids in the form "round(x)xround(y)", and those that are no "XxY" of at most nine digits each."""
    ids, wrong = [], []
    for spot in map(str, spots):
        match = _SPOT_ID.fullmatch(spot)
        if match is None:
            wrong.append(shortened(spot, 80))
            ids.append(spot)
        else:
            ids.append(f"{round(float(match[1]))}x{round(float(match[2]))}")
    return ids, wrong


def wrong_counts(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return what is wrong with numbers that should be counts, each with a bool for every one of them (K,) that is so.

    Asked before they are narrowed to 32 bits, which makes 3e9 a negative number.
    """
    kinds: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("missing counts (NaN)", lambda: np.isnan(values)),
        ("negative counts", lambda: values < 0),
        ("counts that are no integers", lambda: np.isfinite(values) & (values != np.round(values))),
        (f"counts above {GREATEST_COUNT}", lambda: values > GREATEST_COUNT),
    ]
    if values.dtype.kind in "iu":  # the other two take memory, and cannot be
        kinds = kinds[1::2]
    found = ((what, test()) for what, test in kinds)
    return [(what, is_wrong) for what, is_wrong in found if is_wrong.any()]


def _checked(
    matrix: Matrix | pa.Table, spots: list[str], genes: Sequence[str]
) -> tuple[sparse.csr_matrix | None, list[str]]:
    """The counts as csr int32, or the reasons why they are none."""
    if isinstance(matrix, pa.Table):
        matrix, problems = _numeric(matrix, spots, genes)
        if matrix is None:
            return None, problems
    compressed = sparse.csr_matrix(matrix)
    values = compressed.data
    problems = []
    for what, is_wrong in wrong_counts(values):
        rows = np.repeat(np.arange(len(spots)), np.diff(compressed.indptr))[is_wrong]
        gene = f"gene {genes[compressed.indices[is_wrong][0]]}"
        example = gene if "NaN" in what else f"{values[is_wrong][0]:g} for {gene}"
        ids = [spots[row] for row in dict.fromkeys(rows.tolist())]
        problems.append(f"{what} ({example}) in spots {some(ids)}")
    if problems:
        return None, problems
    if not values.all():
        compressed = compressed.copy()  # its arrays may be those of the caller
        compressed.eliminate_zeros()
    return compressed.astype(np.int32, copy=False), []


def _numeric(table: pa.Table, spots: list[str], genes: Sequence[str]) -> tuple[sparse.csr_matrix | None, list[str]]:
    """Columns of numbers as a sparse matrix; text or empty cells become problems that name gene and spots."""
    problems = []
    for position, kind in enumerate(table.schema.types):
        if not is_number(kind):
            column = table.column(position).to_pandas()
            bad = np.flatnonzero(pd.to_numeric(column, errors="coerce").isna())
            found = brief(column.iloc[bad[0]]) if len(bad) else str(kind)
            where = [spots[row] for row in bad]
            problems.append(f"non-numeric counts ({found} for gene {genes[position]}) in spots {some(where)}")
    if problems:
        return None, [some(problems, shown=3)] if len(problems) > 3 else problems
    return sparse_of(table), []
