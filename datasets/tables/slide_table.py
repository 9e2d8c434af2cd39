"""Counts and spot table of a slide, joined into one checked AnnData; their form is that of docs/data.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.layout import Layout
from datasets.spec import DatasetSpec
from datasets.tables.counts import read_counts
from utils.files import reading, require_file
from utils.text import shortened, some
from utils.untrusted.text import cells_of, text_of

T = TypeVar("T")

SPOT_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
GREATEST_COORDINATE = 10**9  # of an array or an image
SELECTED = "selected"  # an optional column: 0 where whoever aligned the array saw no tissue


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


def read_spots(path: str | Path) -> pd.DataFrame:
    """Read a spot table: tab separated with x, y, pixel_x, pixel_y; other columns (new_x, ...) are kept.

    returns: table indexed by "round(x)xround(y)", in the order of the file.
    Raises FileNotFoundError, or one ValueError naming the file and everything that is wrong: missing columns, values
    that are no numbers or beyond any array and image, duplicated ids.
    """
    path = require_file(path, "It should list the spots of a slide, tab separated: x, y, pixel_x, pixel_y.")
    with reading(path, "a tab separated table of spots"):
        table = cells_of(text_of(path), "\t").reset_index(drop=True)
    for name in table.columns.difference(SPOT_COLUMNS):
        numbers = pd.to_numeric(table[name], errors="coerce")
        table[name] = table[name] if numbers.isna().any() else numbers
    return check_spots(table, str(path))


def check_spots(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Check a spot table and index it by id; `source` names it in messages. Errors as in `read_spots`."""
    missing = [name for name in SPOT_COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(
            f"{source}: column(s) {', '.join(missing)} missing; found {some(list(table.columns), 10)}. "
            f"Expected a tab separated table with {', '.join(SPOT_COLUMNS)}."
        )
    numbers = table.loc[:, list(SPOT_COLUMNS)].apply(pd.to_numeric, errors="coerce")
    problems = []
    for name in SPOT_COLUMNS:
        values = numbers[name].to_numpy(dtype=np.float64)
        for what, is_wrong in (
            ("missing or no number", ~np.isfinite(values)),
            (f"beyond {GREATEST_COORDINATE:,}", np.isfinite(values) & (np.abs(values) > GREATEST_COORDINATE)),
        ):
            wrong = np.flatnonzero(is_wrong)
            where = [f"row {row + 2} ({shortened(f'{table.x.iloc[row]}x{table.y.iloc[row]}', 60)})" for row in wrong]
            problems += [f"{name} is {what} in {some(where)}"] if where else []
    if not len(table):
        problems.append("no spots in it")
    if not problems:
        ids = spot_ids(numbers["x"].to_numpy(), numbers["y"].to_numpy())
        twice = pd.Index(ids)[pd.Index(ids).duplicated()].unique().tolist()
        if twice:
            problems.append(f"spots listed twice: {some(twice)}")
    if SELECTED in table.columns:
        words = table[SELECTED].astype(str).str.strip().str.lower()
        is_selected = words.map({"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0})
        other = sorted({shortened(word, 20) for word in words[is_selected.isna()]})
        problems += [f"{SELECTED} should be 1 or, for a spot to be left out, 0; found {some(other)}"] if other else []
        numbers[SELECTED] = is_selected
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}. Correct these rows or take the original file again.")
    return table.assign(**numbers).set_index(pd.Index(ids, name="spot"))


def spot_ids(x: np.ndarray, y: np.ndarray) -> list[str]:
    """Name each spot "round(x)xround(y)"."""
    return [f"{column}x{row}" for column, row in zip(_rounded(x), _rounded(y), strict=True)]


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
            "remove it."
        )
    table = spots.loc[shared]
    table_x, table_y = _rounded(table["x"]), _rounded(table["y"])
    order = np.lexsort((table_x, table_y) if spec.sort_by == "yx" else (table_y, table_x))
    table = table.iloc[order]
    grid = np.stack([table_x, table_y], axis=1)[order]
    spatial = table[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    if spec.exchanged_pixels:
        # In these sets x counts rows of the array and pixel_x is the image row: both turn, so the axes agree again.
        grid, spatial = grid[:, ::-1], spatial[:, ::-1]
    adata = counts[table.index].copy()
    adata.obsm["spatial"] = np.ascontiguousarray(spatial)
    adata.obsm["center"] = np.floor(spatial).astype(np.int64)
    adata.obsm["grid"] = np.ascontiguousarray(grid)
    adata.uns["dropped"] = {
        "spots_without_counts": selected.index.difference(shared, sort=False).tolist(),
        "counts_without_spot": counts.obs_names.difference(listed, sort=False).tolist(),
    }
    adata.uns["not_selected"] = listed.difference(shared, sort=False).tolist()
    return adata


def check_inside(adata: AnnData, image_size: tuple[int, int], image: str | Path = "the image") -> None:
    """Raise ValueError, with slide and ids, if the centre of a spot lies outside the image.

    image_size: (width, height) in pixels; image: its path, for the message.
    """
    width, height = image_size
    x, y = adata.obsm["center"].T
    outside = (x < 0) | (y < 0) | (x >= width) | (y >= height)
    if not outside.any():
        return
    listed = [f"{adata.obs_names[i]} at ({x[i]}, {y[i]})" for i in np.flatnonzero(outside)]
    exchanged = ((y >= 0) & (x >= 0) & (y < width) & (x < height)).all()
    if exchanged and not outside.all():
        remedy = (
            "With the two pixel columns exchanged all of them would be inside: see exchanged_pixels of the data set."
        )
    elif outside.mean() > 0.2:
        remedy = "So many point to an image that is not the full-resolution one, or to the image of another slide."
    else:
        remedy = "Correct their pixel_x and pixel_y in the spot table, or remove them from it."
    raise ValueError(
        f"Slide {adata.uns.get('slide', '?')}: {outside.sum()} of {adata.n_obs} spots lie outside {image} "
        f"({width} x {height} pixels): {some(listed)}. {remedy}"
    )


def _rounded(values: np.ndarray | pd.Series) -> np.ndarray:
    return np.rint(np.asarray(values, dtype=np.float64)).astype(np.int64)
