"""The look of every figure: one palette, one type scale, no global state."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from evaluation.slide_result import SCALES
from utils.files import write_atomically

INK = "#222222"
MUTED = "#6b6b6b"
RULE = "#d9d9d9"
# Okabe and Ito's palette, told apart with every common form of color blindness.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00")
SCALE_COLORS = dict(zip(SCALES, PALETTE))
TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 10.5, 9.0, 8.0
PNG_DPI = 160


def new_figure(width: float, height: float, *, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """Make an empty white figure (inches) that no pyplot session knows about."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white", dpi=PNG_DPI)
    FigureCanvasAgg(figure)
    return figure


def title(target: Axes | Figure, text: str) -> None:
    """Write a left-aligned title on an axes, a centred one on a figure."""
    if isinstance(target, Figure):
        target.suptitle(text, fontsize=TITLE_SIZE + 1, color=INK, fontweight="bold")
    else:
        target.set_title(text, fontsize=TITLE_SIZE, color=INK, loc="left")


def plain_axes(
    axes: Axes, *, x_label: str = "", y_label: str = "", grid: Literal["x", "y", "both"] | None = None
) -> None:
    """Give axes two quiet spines, readable labels and, where it helps reading, light grid lines."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(labelsize=TICK_SIZE, colors=MUTED, labelcolor=INK, width=0.8, length=3)
    axes.set_xlabel(x_label, fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel(y_label, fontsize=LABEL_SIZE, color=INK)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.6)


def legend(axes: Axes, **placement) -> None:
    """Add a legend without a frame that covers no line, when there is anything to explain."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, fontsize=TICK_SIZE, labelcolor=INK, handlelength=1.4, edgecolor="none", framealpha=0.85,
            borderpad=0.2, **placement,
        )  # fmt: skip


def note(axes: Axes, text: str) -> None:
    """Write what an empty picture says instead of data."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=LABEL_SIZE, zorder=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 4},
    )  # fmt: skip


def color_range(*arrays: np.ndarray, percentiles: tuple[float, float] = (1.0, 99.0)) -> tuple[float, float]:
    """Find lower and upper end of a color scale over all finite values; never empty, also for constants and nothing."""
    values = np.concatenate([np.ravel(array) for array in arrays])
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, percentiles))
    return widened(low, high)


def widened(low: float, high: float) -> tuple[float, float]:
    """Return the same range, or one around it when it is too narrow to draw."""
    if high - low > 1e-9 * max(1.0, abs(low), abs(high)):
        return low, high
    return low - 0.5, high + 0.5


def score_text(value: float | None) -> str:
    """Show a correlation as text: "0.42", or "undefined" where a value is constant or missing."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}") if value is not None and np.isfinite(value) else "undefined"


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write `path` (without suffix) as PNG and SVG, each whole or not at all; equal figures give equal bytes."""
    # Drawing is what takes the time, so one drawing gives the layout of both files and the pixels of the first.
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg), "figures come from new_figure"
    canvas.draw()
    figure.set_layout_engine(None)  # "none" would lay out a second time for the SVG
    box = figure.get_tightbbox().padded(0.08)
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    left, right = max(0, int(box.x0 * figure.dpi)), int(box.x1 * figure.dpi)
    top, bottom = max(0, len(pixels) - int(box.y1 * figure.dpi)), len(pixels) - int(box.y0 * figure.dpi)
    png = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))

    def write_svg(temporary: Path) -> None:
        # Text stays text, so that a figure can be edited for a paper; the salt makes ids independent of the process.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gene-dml"}):
            figure.savefig(temporary, bbox_inches=box, metadata={"Date": None})

    resolution = (figure.dpi, figure.dpi)
    return (
        write_atomically(Path(f"{path}.png"), lambda temporary: png.save(temporary, dpi=resolution, compress_level=4)),
        write_atomically(Path(f"{path}.svg"), write_svg),
    )
