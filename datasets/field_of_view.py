"""How wide a patch is in micrometres: what decides whether cells look as large as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from datasets.tables.array_grid import grid_of_pixels

if TYPE_CHECKING:
    from datasets.layout import Layout
    from datasets.spec import DatasetSpec

MOST_MICRONS = 100  # of a pixel, below which each is
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


def field_of_view(
    layout: Layout,
    pixels_of_slide: Mapping[str, np.ndarray | None],
    covered_px: Mapping[str, int | None] | None = None,
) -> float | None:
    """Average the width of a patch in micrometres over the slides whose pixel size is known; None where it is of none.

    pixels_of_slide: (N, 2) centres of the spots of each slide, None where they are not at hand.
    covered_px: level-0 px that a patch covers, where that is not the patch size.
    """
    if layout.patch_um is not None:
        return layout.patch_um
    sizes = {slide: microns_of(layout.spec, slide, pixels) for slide, pixels in pixels_of_slide.items()}
    known = {slide: size for slide, size in sizes.items() if size is not None}
    if not known:
        return None
    covered = covered_px or {}
    if not any(covered.get(slide) for slide in known):
        return layout.patch_size * sum(known.values()) / len(known)
    widths = [size * (covered.get(slide) or layout.patch_size) for slide, size in known.items()]
    return sum(widths) / len(widths)


def pixels_of_width(width_um: float, microns: float) -> int:
    """Find the even number of level-0 px nearest to a width. microns: of a pixel."""
    return max(2, 2 * round(width_um / microns / 2))


def covered_px(layout: Layout, slide: str, pixels: np.ndarray, stated: float | None) -> int | None:
    """Find the level-0 px that a patch of the asked width covers; None where it is the patch size.

    pixels (N, 2): centres of the spots.  stated: micrometres per pixel by the image itself.
    Raises ValueError where a width is asked for and the size of a pixel is not known.
    """
    if layout.patch_um is None:
        return None
    microns = microns_of(layout.spec, slide, pixels) or stated
    if microns is None:
        raise ValueError(
            f"Slide {slide}: patches {layout.patch_um:g} um wide are asked for (DATA.patch_um), and the size of a pixel is "
            f"known neither to the image nor to the data set. Write microns_per_pixel into {layout.spec_path}."
        )
    covered = pixels_of_width(layout.patch_um, microns)
    return None if covered == layout.patch_size else covered


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
