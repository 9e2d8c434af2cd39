"""What the counts of all genes of a slide come to, so that only those of a panel need to be held."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from datasets.tables.expression import gene_sums, spot_totals


@dataclass(frozen=True)
class CountSummary:
    """Of a slide with G genes and N spots.

    log_sums: (G,) float64 by gene, the sum over the spots of log(1 + counts per 10 000 of all genes of the spot), by which a
    panel is chosen. spot_totals: (N,) counts of a spot. digest: SHA-256 of the names of spots and genes and of all counts,
    whatever the order of the genes and the storage.
    """

    log_sums: pd.Series
    spot_totals: np.ndarray
    digest: str

    @property
    def genes(self) -> pd.Index:
        """Names of all genes of the table, in its order."""
        return self.log_sums.index

    @property
    def is_empty(self) -> bool:
        """Whether no spot has a count of any gene."""
        return not self.spot_totals.any()


def summarise(table: AnnData) -> CountSummary:
    """Sum up the counts of a slide, as `datasets.tables.slide_table.load_slide` reads them with all genes."""
    return CountSummary(gene_sums(table), spot_totals(table.X), _digest(table))


def with_genes(table: AnnData, genes: Collection[str]) -> AnnData:
    """Copy a slide with those of the genes that it has, in its own order."""
    return table[:, table.var_names.isin(list(genes))].copy()


def _digest(table: AnnData) -> str:
    order = np.argsort(table.var_names.to_numpy().astype(str), kind="stable")
    counts = sparse.csr_matrix(table.X, dtype=np.float64)[:, order]
    counts.sum_duplicates()
    counts.eliminate_zeros()
    digest = hashlib.sha256("\n".join([*table.obs_names, "", *table.var_names[order]]).encode())
    for values, kind in ((counts.indptr, "<i8"), (counts.indices, "<i8"), (counts.data, "<f8")):
        digest.update(values.astype(kind))
    return digest.hexdigest()
