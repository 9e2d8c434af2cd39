"""Ensembl ids to gene symbols, by a table that the user gives; counts of ids that share a symbol are added up."""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from utils.files import require_file
from utils.text import some

_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{6,}(\.\d+)?$")
_SYMBOL_COLUMNS = (
    "symbol",
    "gene_symbol",
    "gene symbol",
    "gene_name",
    "gene name",
    "external_gene_name",
    "hgnc_symbol",
)
WHERE = (
    "a table with both, for example a features.tsv.gz of any Space Ranger output, or an export of BioMart with the columns "
    "'Gene stable ID' and 'Gene name'"
)


def is_ensembl(name: str) -> bool:
    return _ENSEMBL.match(name) is not None


def without_version(name: str) -> str:
    """ENSG00000141510.18 -> ENSG00000141510; other names as they are."""
    return name.rpartition(".")[0] if is_ensembl(name) and "." in name else name


def read_gene_map(path: str | Path) -> dict[str, str]:
    """Ensembl id (without version) -> symbol, from a table separated by tabs or commas, with a header or without.

    The column of ids is the one that holds them; the symbols are in the column with a usual name of it, or in the next.
    Raises ValueError naming the file if either is not found. Rows without a symbol are left out.
    """
    path = require_file(path, f"--gene_map should be {WHERE}.")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            separator = "\t" if "\t" in file.readline() else ","
        table = pd.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable table: {error}. Expected {WHERE}.") from error
    share = {column: table[column].map(is_ensembl).mean() for column in table}
    ids = max(share, key=share.get)
    if not share[ids]:
        raise ValueError(
            f"{path}: no column holds Ensembl ids; the first row is {some(table.iloc[0].tolist())}. Expected {WHERE}."
        )
    header = [] if is_ensembl(table.loc[0, ids]) else [str(name).strip().lower() for name in table.iloc[0]]
    symbols = next((i for i, name in enumerate(header) if name in _SYMBOL_COLUMNS), ids + 1)
    if symbols not in table:
        raise ValueError(f"{path}: no column of symbols follows the Ensembl ids. Expected {WHERE}.")
    rows = table.loc[table[ids].map(is_ensembl) & (table[symbols] != "")]
    return {without_version(gene): symbol for gene, symbol in zip(rows[ids], rows[symbols], strict=True)}


def symbols_of(names: Sequence[str], gene_map: Mapping[str, str] | None) -> list[str]:
    """The symbol of each name; a name that carries both ("TP53_ENSG...", "ENSG...|TP53") gives its own; an Ensembl id
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


def with_genes(counts: AnnData, symbols: Sequence[str], genes: Sequence[str]) -> AnnData:
    """The same spots with other columns: column i goes to `symbols[i]`, those of one symbol are added up.

    genes: the new columns, in order; they hold all symbols. Genes that no column goes to are zero.
    """
    place = pd.Index(genes).get_indexer(list(symbols))
    assert (place >= 0).all(), "every symbol is one of the genes"
    shape = (counts.n_vars, len(genes))
    columns = sparse.csr_matrix(
        (np.ones(counts.n_vars, dtype=np.int32), (np.arange(counts.n_vars), place)), shape=shape
    )
    return AnnData(sparse.csr_matrix(counts.X @ columns), obs=counts.obs, var=pd.DataFrame(index=list(genes)))
