"""How wide a patch is in micrometres: what decides whether cells look as large as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from datasets.tables.array_grid import grid_of_pixels

if TYPE_CHECKING:
    from datasets.layout import Layout
    from datasets.spec import DatasetSpec

TOLERANCE = 0.2  # by so much of its width a patch may differ before cells look larger or smaller


def microns_of(spec: DatasetSpec, slide: str, pixels: np.ndarray | None) -> float | None:
    """Find the size of a pixel in micrometres; None where it is not known.

    It is what the data set says, else the known distance of neighboring spots of its square arrays over theirs in the
    image.
    pixels: (N, 2) centres of the slide's spots, None if they are not at hand.
    """
    microns = spec.microns_of(slide)
    if microns is not None or spec.pitch_um is None or pixels is None:
        return microns
    pixels = np.unique(pixels, axis=0)
    array = grid_of_pixels(pixels)
    if array.kind != "square" or array.grid.max(axis=0).min() == 0:
        return None
    # Fitted to the whole array: the distance to the nearest of four neighbors is too small where spots are a little off.
    steps = np.linalg.lstsq(np.column_stack([array.grid, np.ones(len(pixels))]), pixels, rcond=None)[0][:2]
    return spec.pitch_um / float(np.sqrt(abs(np.linalg.det(steps))))


def field_of_view(layout: Layout, pixels_of_slide: Mapping[str, np.ndarray | None]) -> float | None:
    """Average the width of a patch in micrometres over the slides whose pixel size is known; None where it is of none.

    pixels_of_slide: (N, 2) centres of the spots of each slide, None where they are not at hand.
    """
    sizes = [microns_of(layout.spec, slide, pixels) for slide, pixels in pixels_of_slide.items()]
    known = [size for size in sizes if size is not None]
    return layout.patch_size * sum(known) / len(known) if known else None


def compare_fields_of_view(trained: float | None, here: float | None, what: str) -> tuple[str, bool]:
    """Say how wide a patch was in training and is here (micrometres), and whether that differs by more than `TOLERANCE`."""
    if trained is None or here is None:
        unknown = " and ".join(
            name for name, value in (("in training", trained), (f"on {what}", here)) if value is None
        )
        return f"The width of a patch {unknown} is unknown, so it cannot be compared.", False
    sentence = f"A patch is {here:.0f} um wide on {what} and was {trained:.0f} um wide in training"
    if abs(here / trained - 1) <= TOLERANCE:
        return f"{sentence}.", False
    return (
        f"{sentence}, a factor of {here / trained:.2f}: cells look {'smaller' if here > trained else 'larger'} than those "
        "the model has learned from.",
        True,
    )
