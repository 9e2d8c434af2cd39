"""Counts and spot table of a slide, joined into one checked AnnData; their form is that of docs/data.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.layout import Layout
from datasets.spec import DatasetSpec
from datasets.tables.counts import read_counts
from datasets.tables.spot_table import SELECTED, read_spots, rounded
from utils.text import some

T = TypeVar("T")


def load_slide(layout: Layout, slide: str, genes: Sequence[str] | None = None) -> AnnData:
    """Read, join, check and sort one slide. Spots that the table marks with selected = 0 are left out.

    genes:   only these, in this order (the panel); None = all.
    returns: AnnData of the N spots that both files have, in the order of the spec ("yx": by row y, then x):
             X raw counts (N, G) csr int32; obs_names "round(x)xround(y)"; var_names genes;
             obsm["spatial"] (N, 2) float64 centre (x, y) in full-resolution pixels; obsm["center"] its floor, int64;
             obsm["grid"]    (N, 2) int64 (column x, row y) of the array, the axes pointing as those of the image;
             uns["slide"], uns["patient"], uns["dropped"]: {"spots_without_counts", "counts_without_spot"} lists of ids;
             uns["not_selected"] ids of spots with counts that are marked so.
    Raises FileNotFoundError, or ValueError naming slide, file and ids; see `read_counts` and `read_spots`.
    """
    patient = layout.spec.patient_of(slide)
    counts_path, spots_path = layout.counts_path(slide), layout.spots_path(slide)
    counts, spots = read_both(slide, lambda: read_counts(counts_path, genes), lambda: read_spots(spots_path))
    adata = join(counts, spots, layout.spec, f"Slide {slide}: {counts_path} and {spots_path}")
    adata.uns["slide"], adata.uns["patient"] = slide, patient
    return adata


def read_both(
    slide: str, counts: Callable[[], AnnData], spots: Callable[[], pd.DataFrame]
) -> tuple[AnnData, pd.DataFrame]:
    """Read both files of a slide; the problems of the two are told at once, with the slide."""
    (found_counts, first_problem), (found_spots, second_problem) = _attempt(counts), _attempt(spots)
    if found_counts is None or found_spots is None:
        raise ValueError(f"Slide {slide}: " + "\n".join(filter(None, (first_problem, second_problem))))
    return found_counts, found_spots


def _attempt(read: Callable[[], T]) -> tuple[T | None, str | None]:
    """What was read, or what is wrong with it."""
    try:
        return read(), None
    except ValueError as error:
        return None, str(error)


def join(counts: AnnData, spots: pd.DataFrame, spec: DatasetSpec, source: str) -> AnnData:
    """Match counts and spots on the id and sort them; `source` names both in messages. See `load_slide`."""
    selected = spots[spots[SELECTED] != 0] if SELECTED in spots else spots
    listed, shared = (chosen.index.intersection(counts.obs_names) for chosen in (spots, selected))
    if listed.empty:
        raise ValueError(
            f"{source} have no spot in common: counts are of {some(list(counts.obs_names), 3)}, spots are "
            f"{some(list(spots.index), 3)}. The two files belong to different slides, or x and y are exchanged in one."
        )
    if shared.empty:
        raise ValueError(
            f"{source}: {SELECTED} is 0 for all {len(listed)} spots with counts, so none is left. Correct the column, or "
            "leave it out."
        )
    table = spots.loc[shared]
    table_x, table_y = rounded(table["x"]), rounded(table["y"])
    order = np.lexsort((table_x, table_y) if spec.sort_by == "yx" else (table_y, table_x))
    table = table.iloc[order]
    grid = np.stack([table_x, table_y], axis=1)[order]
    spatial = table[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    if spec.exchanged_pixels:
        # In these sets x counts rows of the array and pixel_x is the image row: both turn, so the axes agree again.
        grid, spatial = grid[:, ::-1], spatial[:, ::-1]
    # In this order already: nothing to copy, of what may be gigabytes.
    is_ordered = counts.obs_names.equals(table.index)
    matrix = counts.X if is_ordered else counts.X[counts.obs_names.get_indexer(table.index)]
    adata = AnnData(matrix, obs=counts.obs.loc[table.index], var=counts.var)
    adata.obsm["spatial"] = np.ascontiguousarray(spatial)
    adata.obsm["center"] = np.floor(spatial).astype(np.int64)
    adata.obsm["grid"] = np.ascontiguousarray(grid)
    adata.uns["dropped"] = {
        "spots_without_counts": selected.index.difference(shared, sort=False).tolist(),
        "counts_without_spot": counts.obs_names.difference(listed, sort=False).tolist(),
    }
    adata.uns["not_selected"] = listed.difference(shared, sort=False).tolist()
    return adata
