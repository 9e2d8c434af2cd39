"""Turn Ensembl ids into gene symbols, by a table that the user gives; counts of ids that share a symbol are added up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from datasets.tables.counts import GREATEST_COUNT, check_counts
from datasets.tables.genes_in_common import WHERE, without_version
from datasets.tables.sparse import runs_of_lines
from utils.files import reading, require_file
from utils.text import checked_names, is_ensembl, some
from utils.untrusted.text import cells_of, text_of

_AT_A_TIME = 1 << 24  # counts
SYMBOL_COLUMNS = (
    "symbol",
    "symbols",
    "gene_symbols",
    "gene_names",
    "feature_name",
    "gene_symbol",
    "gene symbol",
    "gene_name",
    "gene name",
    "external_gene_name",
    "hgnc_symbol",
    "approved_symbol",
)
GIVE_MAP = f"Give --gene_map FILE, {WHERE}, or prepare them as two data sets."


def read_gene_map(path: str | Path) -> dict[str, str]:
    """Ensembl id (without version) -> symbol, from a table separated by tabs or commas, with a header or without.

    The column of ids is the one that holds them; the symbols are in the column with a usual name of it, and in the next where
    there is no header, or no third column.
    Raises ValueError naming the file if either is not found, the symbols are ids or numbers, or a gene has several symbols.
    Rows without a symbol are left out.
    """
    path = require_file(path, f"--gene_map should be {WHERE}.")
    with reading(path, "a table of genes", remedy=f"Expected {WHERE}."):
        table = cells_of(text_of(path), has_header=False)
    share = {column: float(table[column].map(is_ensembl).mean()) for column in table}
    ids = max(share, key=lambda column: share[column])
    if not share[ids]:
        raise ValueError(
            f"{path}: no column holds Ensembl ids; the first row is {some(table.iloc[0].tolist())}. Expected {WHERE}."
        )
    symbols = _column_of_symbols(table, ids, path)
    rows = table.loc[table[ids].map(is_ensembl) & (table[symbols] != "")]
    if rows[symbols].map(lambda name: name.isdigit() or name.startswith("ENS")).mean() > 0.5:
        raise ValueError(
            f"{path}: what should be symbols are ids: {some(rows[symbols].tolist(), 3)}. Expected {WHERE}."
        )
    genes = rows[ids].map(without_version)
    conflicts = rows[symbols].groupby(genes).unique()
    conflicts = conflicts[conflicts.map(len) > 1]
    if len(conflicts):
        listed = [f"{gene} ({', '.join(names)})" for gene, names in conflicts.items()]
        raise ValueError(f"{path} gives several symbols to one gene: {some(listed, 3)}. Keep one row for each of them.")
    return dict(zip(genes, checked_names(rows[symbols].tolist(), "genes", path), strict=True))


def _column_of_symbols(table: pd.DataFrame, ids: int, path: Path) -> int:
    if not is_ensembl(table.loc[0, ids]):
        header = [re.sub(r"\s+", "_", str(name).strip().lower()) for name in table.iloc[0]]
        known = next((i for i, name in enumerate(header) if name in SYMBOL_COLUMNS), None)
        if known is not None:
            return known
        if table.shape[1] > 2:
            raise ValueError(
                f"{path}: none of its columns has a usual name of symbols; found {some(table.iloc[0].tolist(), 10)}. Call "
                "the one that holds them gene_name."
            )
    if ids + 1 not in table:
        raise ValueError(f"{path}: no column of symbols follows the Ensembl ids. Expected {WHERE}.")
    return ids + 1


def symbols_of(names: Sequence[str], gene_map: Mapping[str, str] | None) -> list[str]:
    """Find the symbol of each name; a name that carries both ("TP53_ENSG...", "ENSG...|TP53") gives its own; an Ensembl id
    that the map does not know stays, without its version."""
    symbols = []
    for name in names:
        parts = [part for part in re.split(r"[_|;:, ]", name) if part]
        own = [part for part in parts if not is_ensembl(part)]
        if len(parts) == 2 and len(own) == 1:
            symbols.append(own[0])
        else:
            gene = without_version(name)
            symbols.append((gene_map or {}).get(gene, gene))
    return symbols


def with_genes(counts: AnnData, symbols: Sequence[str], genes: Sequence[str], source: str) -> AnnData:
    """Give the same spots other columns: column i goes to `symbols[i]`, those of one symbol are added up.

    counts: X csr; its numbers are overwritten, because two matrices of gigabytes are not held side by side.
    genes: the new columns, in order; a symbol that is none of them is left out, a gene that no column goes to is zero.
    source: for messages.
    returns: checked counts, X (N, len(genes)) csr int32. Errors as in `datasets.tables.counts.check_counts`.
    """
    place = pd.Index(genes).get_indexer(list(symbols))
    found = np.flatnonzero(place >= 0)
    ones = np.ones(len(found), dtype=np.int64)  # a sum may be beyond 32 bits, and is checked then
    columns = sparse.csr_matrix((ones, (found, place[found])), shape=(counts.n_vars, len(genes)))
    matrix, spots = sparse.csr_matrix(counts.X).astype(np.int32, copy=False), counts.obs_names.tolist()
    lengths, filled = [np.zeros(1, dtype=np.int64)], 0
    for start, stop in runs_of_lines(matrix.indptr, _AT_A_TIME):
        part = matrix[start:stop] @ columns
        if part.nnz and part.data.max() > GREATEST_COUNT:
            check_counts(part, spots[start:stop], list(genes), source=source)
        end = filled + part.nnz  # a row never has more entries than before
        matrix.data[filled:end], matrix.indices[filled:end] = part.data, part.indices
        lengths.append(np.diff(part.indptr))
        filled = end
    arrays = (matrix.data[:filled], matrix.indices[:filled], np.cumsum(np.concatenate(lengths)))
    result = sparse.csr_matrix(arrays, shape=(counts.n_obs, len(genes)))
    return check_counts(result, spots, list(genes), source=source)
