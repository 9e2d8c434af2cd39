"""Genes on the tissue: measured, predicted and error maps, spots drawn at their true size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.report.style import INK, LABEL_SIZE, MUTED, TICK_SIZE, color_range, new_figure, score_text, title

PANEL_INCHES = 3.4
# Beyond this many spots an SVG holds them as one embedded picture, or it would weigh tens of megabytes.
MAX_VECTOR_SPOTS = 2000
_NO_VALUE = "#c9c9c9"


@dataclass(frozen=True)
class Tissue:
    """Where the spots of one slide lie, and what lies below them.

    spatial_px: (N, 2) spot centres (x, y) in full-resolution pixels.
    spot_diameter_px: diameter of a spot in the same pixels.
    image: (H, W, 3) uint8, or None; image_scale: its pixels per full-resolution pixel.
    """

    slide: str
    spatial_px: np.ndarray
    spot_diameter_px: float
    image: np.ndarray | None = None
    image_scale: float = 1.0


def gene_maps(
    tissue: Tissue,
    gene: str,
    *,
    measured: np.ndarray,
    predicted: np.ndarray,
    unit: str,
    pearson: float | None,
) -> Figure:
    """Draw measured and predicted expression on one color scale, and predicted minus measured on a symmetric one.

    measured, predicted: (N,) in `unit`; NaN spots are drawn gray. pearson: printed in the title; None or NaN reads
    "undefined".
    Raises ValueError for a slide without spots.
    """
    measured, predicted = np.asarray(measured, dtype=float), np.asarray(predicted, dtype=float)
    error = predicted - measured
    limit = max(abs(end) for end in color_range(error))
    values, errors = _color_map("viridis"), _color_map("RdBu_r")
    figure, axes = _panels(tissue, 3)
    shared = Normalize(*color_range(measured, predicted))
    _draw(axes[0], tissue, measured, values, shared, "measured")
    mappable = _draw(axes[1], tissue, predicted, values, shared, "predicted")
    _color_bar(figure, mappable, axes[:2], unit, np.concatenate([measured, predicted]))
    mappable = _draw(axes[2], tissue, error, errors, Normalize(-limit, limit), "predicted \N{MINUS SIGN} measured")
    _color_bar(figure, mappable, axes[2:], "error, in the same unit", error)
    title(figure, f"{gene}   slide {tissue.slide}   PCC {score_text(pearson)}")
    return figure


def predicted_map(tissue: Tissue, gene: str, *, predicted: np.ndarray, unit: str) -> Figure:
    """Draw the predicted expression of a gene on a slide without counts, beside the tissue itself where there is an image.

    predicted: (N,) in `unit`. Raises ValueError for a slide without spots.
    """
    predicted = np.asarray(predicted, dtype=float)
    figure, axes = _panels(tissue, 1 if tissue.image is None else 2)
    if tissue.image is not None:
        _draw_tissue(axes[0], tissue, strength=1.0)
        axes[0].set_title("tissue", fontsize=LABEL_SIZE, color=INK)
    norm = Normalize(*color_range(predicted))
    mappable = _draw(axes[-1], tissue, predicted, _color_map("viridis"), norm, "predicted")
    _color_bar(figure, mappable, axes, unit, predicted)
    title(figure, f"{gene}   slide {tissue.slide}")
    return figure


def _color_map(name: str) -> Colormap:
    return matplotlib.colormaps[name].with_extremes(bad=_NO_VALUE)


def _window(tissue: Tissue) -> tuple[float, float, float, float]:
    """left, right, top, bottom in full-resolution pixels: the spots with a margin."""
    margin = 1.5 * tissue.spot_diameter_px
    low, high = tissue.spatial_px.min(axis=0) - margin, tissue.spatial_px.max(axis=0) + margin
    return low[0], high[0], low[1], high[1]


def visible_part(tissue: Tissue) -> tuple[np.ndarray, tuple[float, float, float, float]] | None:
    """Cut out what is seen of the image, which may be much larger than the part that holds the spots.

    returns: the pixels (H, W, 3), and their left, right, bottom, top in full-resolution pixels; None where there is no image.
    """
    if tissue.image is None:
        return None
    left, right, top, bottom = _window(tissue)
    scale, (height, width) = tissue.image_scale, tissue.image.shape[:2]
    first_x, first_y = max(0, math.floor(left * scale)), max(0, math.floor(top * scale))
    last_x, last_y = min(width, math.ceil(right * scale)), min(height, math.ceil(bottom * scale))
    if first_x >= last_x or first_y >= last_y:
        return None
    extent = (first_x / scale, last_x / scale, last_y / scale, first_y / scale)
    return tissue.image[first_y:last_y, first_x:last_x], extent


def _panels(tissue: Tissue, count: int) -> tuple[Figure, list[Axes]]:
    if len(tissue.spatial_px) == 0:
        raise ValueError(f"slide {tissue.slide} has no spots: there is nothing to draw")
    left, right, top, bottom = _window(tissue)
    # Very long or flat tissue keeps a panel that one can read.
    ratio = float(np.clip((bottom - top) / (right - left), 0.4, 1.8))
    figure = new_figure(count * PANEL_INCHES + 0.3, PANEL_INCHES * ratio + 1.2, layout="compressed")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_tissue(axes: Axes, tissue: Tissue, *, strength: float) -> None:
    left, right, top, bottom = _window(tissue)
    if (part := visible_part(tissue)) is not None:
        axes.imshow(part[0], extent=part[1], alpha=strength, interpolation="antialiased", zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw(
    axes: Axes, tissue: Tissue, values: np.ndarray, color_map: Colormap, norm: Normalize, name: str
) -> EllipseCollection:
    # The tissue steps back, so that the colors of the spots are read as values and not mixed with the stain.
    few = len(values) <= MAX_VECTOR_SPOTS
    _draw_tissue(axes, tissue, strength=0.45 if few else 0.12)
    diameter = np.full(len(values), float(tissue.spot_diameter_px))
    # A hairline keeps pale spots visible; on thousands of small ones it would be all one sees.
    spots = EllipseCollection(
        diameter, diameter, np.zeros(len(values)), units="xy", offsets=tissue.spatial_px, offset_transform=axes.transData,
        cmap=color_map, norm=norm, linewidths=0.3 if few else 0.0, edgecolors="#00000066", zorder=2,
    )  # fmt: skip
    spots.set_array(np.ma.masked_invalid(values))
    spots.set_rasterized(not few)
    axes.add_collection(spots, autolim=False)
    axes.set_title(name, fontsize=LABEL_SIZE, color=INK)
    return spots


def _color_bar(figure: Figure, mappable: EllipseCollection, axes: list[Axes], label: str, values: np.ndarray) -> None:
    """A bar whose pointed ends tell that values lie beyond it."""
    values = values[np.isfinite(values)]
    low, high = mappable.norm.vmin, mappable.norm.vmax
    below, above = bool((values < low).any()), bool((values > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    bar = figure.colorbar(
        mappable, ax=axes, extend=extend, location="bottom", shrink=0.9 / len(axes), aspect=32, pad=0.03
    )
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label, fontsize=TICK_SIZE, color=INK)
    bar.ax.tick_params(labelsize=TICK_SIZE, colors=MUTED, labelcolor=INK, width=0.6, length=2.5)
    bar.outline.set_visible(False)
