"""Expression targets of the slides of a run for a panel, and what their counts lack for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from datasets.spots import SlideRecord, SpotStore
from datasets.tables.expression import expression_targets
from utils.text import some

MOST_ABSENT = 0.1  # of a panel may be absent from the counts of a test slide


def slide_targets(
    table: AnnData, genes: Sequence[str], smoothing: bool = True, *, absent_is_zero: bool = False
) -> np.ndarray:
    """Compute the targets of a slide for a gene panel: float32 (N, G), log10(1 + counts per 10 000 of the panel).

    absent_is_zero: a panel gene that the table lacks was not found on the slide, as in the tables of ST counts, which
        leave such genes out. At most a tenth of the panel: beyond that the names are of another kind.
    Raises ValueError as `check_panel`.
    """
    absent = absent_genes(table, genes)
    if not absent_is_zero or len(absent) > MOST_ABSENT * len(genes):
        check_panel(table, genes)
    found = [gene for gene in genes if gene in table.var_names]
    counts = table[:, found].X
    panel = np.zeros((table.n_obs, len(genes)))
    panel[:, [gene in table.var_names for gene in genes]] = counts.toarray() if hasattr(counts, "toarray") else counts
    return expression_targets(panel, table.obsm["grid"], smoothing=smoothing)


def absent_genes(table: AnnData, genes: Sequence[str]) -> list[str]:
    """Find the panel genes that the slide has no counts of."""
    return [gene for gene in genes if gene not in table.var_names]


def check_panel(table: AnnData, genes: Sequence[str]) -> None:
    """Raise ValueError that names the slide and the panel genes it does not hold."""
    absent = absent_genes(table, genes)
    if absent:
        raise ValueError(
            f"slide {table.uns['slide']} has no counts for {len(absent)} of the {len(genes)} panel genes "
            f"({', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}). {other_panel()}"
        )


def other_panel(which: str = "--config CONFIG") -> str:
    """Advise to choose another panel for a data set, in a file of its own: the one that is there may be the published one."""
    return (
        "Choose a panel of the genes that all slides have, in a file of its own: python preprocess/select_genes.py "
        f"{which} --out FILE.npy. Then add --set DATA.genes=FILE.npy."
    )


def note_on_counts(slides: Iterable[SlideRecord]) -> str | None:
    """Return a sentence about the slides of which no spot has a count of any gene that was read; None without one."""
    empty = [f"{slide.name} ({slide.table.n_obs} spots)" for slide in slides if slide.counts.is_empty]
    if not empty:
        return None
    return f"WARNING: no spot has a count of any gene on {some(empty)}: taken as tissue where nothing is expressed."


def store_targets(
    store: SpotStore,
    slides: Iterable[str],
    genes: Sequence[str],
    smoothing: bool = True,
    *,
    absent_is_zero: bool = False,
) -> Tensor:
    """Compute the targets (R, G) of the named slides at their rows; NaN at all others, so that none is used by mistake.

    Raises ValueError as `slide_targets`.
    """
    targets = torch.full((store.slides[-1].stop, len(genes)), torch.nan)
    for slide in store.named(slides):
        found = slide_targets(slide.table, genes, smoothing, absent_is_zero=absent_is_zero)
        targets[slide.start : slide.stop] = torch.from_numpy(found)
    return targets
