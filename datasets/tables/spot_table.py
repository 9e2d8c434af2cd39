"""The spots of a slide by themselves: their table, their ids, and whether they lie on the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from utils.files import reading, require_file
from utils.text import shortened, some
from utils.untrusted.text import cells_of, text_of

SPOT_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
GREATEST_COORDINATE = 10**9  # of an array or an image
SELECTED = "selected"  # an optional column: 0 where whoever aligned the array saw no tissue


def read_spots(path: str | Path) -> pd.DataFrame:
    """Read a spot table: tab separated with x, y, pixel_x, pixel_y; other columns (new_x, ...) are kept.

    returns: table indexed by "round(x)xround(y)", in the order of the file.
    Raises FileNotFoundError, or one ValueError naming the file and everything that is wrong: missing columns, values
    that are no numbers or beyond any array and image, duplicated ids.
    """
    path = require_file(path, "It should list the spots of a slide, tab separated: x, y, pixel_x, pixel_y.")
    with reading(path, "a tab separated table of spots"):
        table = cells_of(text_of(path), "\t").reset_index(drop=True)
    for name in table.columns:
        if name not in SPOT_COLUMNS and not (numbers := pd.to_numeric(table[name], errors="coerce")).isna().any():
            table[name] = numbers
    return check_spots(table, str(path))


def check_spots(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Check a spot table and index it by id; `source` names it in messages. Errors as in `read_spots`."""
    missing = [name for name in SPOT_COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(
            f"{source}: column(s) {', '.join(missing)} missing; found {some(list(table.columns), 10)}. "
            f"Expected a tab separated table with {', '.join(SPOT_COLUMNS)}."
        )
    numbers = {name: pd.to_numeric(table[name], errors="coerce") for name in SPOT_COLUMNS}
    index, problems = pd.Index([]), []
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
        index = pd.Index(spot_ids(numbers["x"], numbers["y"]), name="spot")
        if not index.is_unique:
            problems.append(f"spots listed twice: {some(index[index.duplicated()].unique().tolist())}")
    if SELECTED in table.columns:
        words = table[SELECTED].astype(str).str.strip().str.lower()
        is_selected = words.map({"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0})
        other = sorted({shortened(word, 20) for word in words[is_selected.isna()]})
        problems += [f"{SELECTED} should be 1 or, for a spot to be left out, 0; found {some(other)}"] if other else []
        numbers[SELECTED] = is_selected
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}. Correct these rows or take the original file again.")
    return table.assign(**numbers).set_index(index)


def spot_ids(x: np.ndarray | pd.Series, y: np.ndarray | pd.Series) -> list[str]:
    """Name each spot "round(x)xround(y)"."""
    return [f"{column}x{row}" for column, row in zip(rounded(x).tolist(), rounded(y).tolist(), strict=True)]


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
        remedy = "Correct their pixel_x and pixel_y in the spot table, or mark them selected = 0 there."
    raise ValueError(
        f"Slide {adata.uns.get('slide', '?')}: {outside.sum()} of {adata.n_obs} spots lie outside {image} "
        f"({width} x {height} pixels): {some(listed)}. {remedy}"
    )


def rounded(values: np.ndarray | pd.Series) -> np.ndarray:
    """Round array positions to int64."""
    return np.rint(np.asarray(values, dtype=np.float64)).astype(np.int64)
