"""The picture at the head of the README, from one prediction file of the demo.

    python docs/images/make_overview.py --prediction demo/logs/demo/dml/demo/fold_0/predictions/A1.h5ad --gene PLVAP

writes docs/images/overview.png and overview.svg. Any prediction file with measured values will do.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root, so that this runs as a script

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from evaluation.metrics import pearson
from evaluation.predictions import read_prediction, tissue_image
from evaluation.report.style import INK, MUTED, SCALE_COLORS, new_figure
from utils.cli import run, say
from utils.files import write_atomically

WIDTH, HEIGHT = 12.7, 4.95  # inches; one unit of every coordinate below
PNG_DPI, SVG_DPI = 124, 110  # of the embedded pictures in the SVG
NUM_NEIGHBORS = 5
MODEL, MAPS = 5.5, 9.95  # left edges of the parts
TARGET, NEIGHBOR, GLOBAL = (SCALE_COLORS[name] for name in ("target", "neighbor", "global"))
EXPRESSION, BOX = "#7a4fa3", "#f4f4f2"
LANES = (3.62, 2.37, 1.12)  # centre of the lanes of target, neighbor and global


@dataclass(frozen=True)
class Sheet:
    """One slide: its image (full resolution in the demo), spots in image pixels, one gene measured and predicted."""

    image: np.ndarray
    spots: np.ndarray
    pitch: float
    gene: str
    measured: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, adata: AnnData, gene: str) -> Sheet:
        image, scale, diameter = tissue_image(adata)
        if image is None or "measured" not in adata.layers or gene not in adata.var_names:
            raise ValueError(f"The prediction file needs an image, measured values and the gene {gene}.")
        chosen = adata[:, gene]
        measured, predicted = np.asarray(chosen.layers["measured"]).ravel(), np.asarray(chosen.X).ravel()
        return cls(image, adata.obsm["spatial"] * scale, 2 * diameter * scale, gene, measured, predicted)

    @property
    def spot(self) -> np.ndarray:
        """The spot that is shown: high in the gene, with its whole neighborhood inside the image."""
        height, width = self.image.shape[:2]
        margin = NUM_NEIGHBORS / 2 * self.pitch
        inside = (self.spots >= margin).all(axis=1) & (self.spots <= np.array([width, height]) - margin).all(axis=1)
        places = np.flatnonzero(inside)
        if len(places) == 0:
            raise ValueError("No spot has its whole neighborhood inside the image; choose another slide.")
        return self.spots[places[np.argsort(self.measured[places])[-max(1, len(places) // 3)]]]

    def crop(self, tiles: int) -> np.ndarray:
        """The window of tiles x tiles patches around the spot."""
        x, y = self.spot.astype(int)
        half = int(tiles * self.pitch / 2)
        return self.image[y - half : y + half, x - half : x + half]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prediction", type=Path, required=True, help="an .h5ad of a test slide")
    parser.add_argument("--gene", required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("overview"), help="without suffix")
    arguments = parser.parse_args()
    sheet = Sheet.of(read_prediction(arguments.prediction), arguments.gene)
    figure = overview(sheet)
    for path in save(figure, arguments.out):
        say(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def overview(sheet: Sheet) -> Figure:
    """Section and scales, model, one gene: three parts on one canvas in inches."""
    figure = new_figure(WIDTH, HEIGHT, layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    headings = ((0.2, "A spot at three scales"), (MODEL, "Model"), (MAPS, f"{sheet.gene}, held-out patient"))
    for x, text in headings:
        axes.text(x, 4.68, text, fontsize=13, fontweight="bold", color=INK, va="center")
    draw_section(axes, sheet)
    draw_scales(axes, sheet)
    draw_model(axes)
    draw_maps(axes, sheet)
    return figure


def place(axes: Axes, image: np.ndarray, left: float, bottom: float, width: float, color: str | None = None) -> float:
    """Put an image on the canvas, `width` wide, with a frame; returns its height."""
    height = width * image.shape[0] / image.shape[1]
    axes.imshow(image, extent=(left, left + width, bottom, bottom + height), interpolation="antialiased", zorder=1)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")
    if color:
        axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=color, linewidth=2.6, zorder=4))
    return height


def draw_section(axes: Axes, sheet: Sheet) -> None:
    """The section with the patch, its neighborhood, and itself as the third scale."""
    left, width = 0.2, 3.3
    scale = width / sheet.image.shape[1]
    bottom = LANES[1] - scale * sheet.image.shape[0] / 2
    height = place(axes, sheet.image, left, bottom, width, GLOBAL)
    x, y = left + sheet.spot[0] * scale, bottom + height - sheet.spot[1] * scale
    side = sheet.pitch * scale
    half = NUM_NEIGHBORS * side / 2
    for index in range(NUM_NEIGHBORS**2):
        row, column = divmod(index, NUM_NEIGHBORS)
        corner = (x - half + column * side, y - half + row * side)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.7, zorder=2))
    axes.add_patch(
        Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=NEIGHBOR, linewidth=2.6, zorder=3)
    )
    axes.add_patch(
        Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor=TARGET, linewidth=2.6, zorder=4)
    )
    axes.text(left, bottom - 0.2, "simulated H&E section", fontsize=9, color=MUTED, va="center")


def draw_scales(axes: Axes, sheet: Sheet) -> None:
    """The three pictures at the head of the lanes."""
    names = ("target", "neighbor", "global")
    details = ("1 patch", "25 patches", "all spots")
    pictures = (sheet.crop(1), sheet.crop(NUM_NEIGHBORS), squared(sheet.image))
    for lane, name, detail, picture in zip(LANES, names, details, pictures):
        color = SCALE_COLORS[name]
        place(axes, picture, 3.92, lane - 0.42, 0.84, color)
        axes.text(3.92, lane + 0.54, name, fontsize=10, color=color, fontweight="bold", va="center")
        axes.text(4.74, lane + 0.55, detail, fontsize=8.5, color=MUTED, va="center")


def squared(image: np.ndarray) -> np.ndarray:
    """The middle square of an image."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, color: str, **style) -> None:
    """A rounded box with a text in its middle."""
    shape = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.09",
                           facecolor=style.pop("facecolor", "white"), edgecolor=color, linewidth=1.6, zorder=3)  # fmt: skip
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9.5, color=INK, zorder=4,
              linespacing=1.25, **style)  # fmt: skip


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, **style) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style.pop("arrowstyle", "-|>"), mutation_scale=11, color=color,
                        linewidth=1.5, shrinkA=0, shrinkB=0, zorder=2, **style)
    )  # fmt: skip


def draw_model(axes: Axes) -> None:
    """Frozen encoder, scale encoders, fusion, predictor; the gene encoder and what it is compared with in training."""
    low, high = LANES[2] - 0.42, LANES[0] + 0.42
    encoder, scales, fusion, predictor = MODEL, MODEL + 0.98, MODEL + 2.5, MODEL + 3.34
    box(axes, encoder, low, 0.5, high - low, "frozen patch encoder", MUTED, facecolor=BOX, rotation=90)
    box(axes, scales, LANES[1] - 0.34, 1.05, 0.68, "neighbor\nencoder", NEIGHBOR)
    box(axes, scales, LANES[2] - 0.34, 1.05, 0.68, "global\nencoder", GLOBAL)
    box(axes, fusion, low, 0.5, high - low, "fusion", INK, facecolor=BOX, rotation=90)
    box(axes, predictor, LANES[1] - 0.34, 0.8, 0.68, "gene\npredictor", INK)
    for lane, color in zip(LANES, (TARGET, NEIGHBOR, GLOBAL)):
        arrow(axes, (4.82, lane), (encoder - 0.02, lane), color)
    arrow(axes, (encoder + 0.5, LANES[0]), (fusion - 0.02, LANES[0]), TARGET)
    axes.text(scales + 0.52, LANES[0] + 0.16, "patch tokens", fontsize=9.5, color=TARGET, ha="center", va="center")
    for lane, color in zip(LANES[1:], (NEIGHBOR, GLOBAL)):
        arrow(axes, (encoder + 0.5, lane), (scales - 0.02, lane), color)
        arrow(axes, (scales + 1.05, lane), (fusion - 0.02, lane), color)
    arrow(axes, (fusion + 0.5, LANES[1]), (predictor - 0.02, LANES[1]), INK)
    arrow(axes, (predictor + 0.8, LANES[1]), (MAPS - 0.06, LANES[1]), INK)
    draw_training(axes, scale_vectors=fusion - 0.24, fused=fusion + 0.25, low=low)


def draw_training(axes: Axes, *, scale_vectors: float, fused: float, low: float) -> None:
    """What exists in training alone, dashed: gene vectors are compared with each scale and with the fused vector."""
    y = 0.3
    box(axes, MODEL, y - 0.18, 1.55, 0.36, "gene encoder", EXPRESSION)
    axes.text(4.78, y, "measured expression", fontsize=9, color=EXPRESSION, va="center", ha="right")
    arrow(axes, (4.84, y), (MODEL - 0.02, y), EXPRESSION)
    axes.plot((MODEL + 1.55, fused), (y, y), color=EXPRESSION, linewidth=1.5, zorder=2, solid_capstyle="round")
    dashed = {"color": EXPRESSION, "linewidth": 1.5, "linestyle": (0, (3, 2)), "zorder": 2}
    axes.plot((scale_vectors, scale_vectors), (y, LANES[0]), **dashed)
    axes.plot((fused, fused), (y, low), **dashed)
    ends = [(scale_vectors, lane) for lane in LANES] + [(fused, low)]
    axes.scatter(*zip(*ends), s=34, color=EXPRESSION, edgecolors="white", linewidths=1.0, zorder=5)
    text = "in training: instance-level\nand group-level losses"
    axes.text(fused + 0.14, y, text, fontsize=8, color=EXPRESSION, va="center", linespacing=1.25)


def draw_maps(axes: Axes, sheet: Sheet) -> None:
    """The gene as measured and as predicted, on one color scale."""
    pale = (0.45 * sheet.image.mean(axis=2, keepdims=True) + 0.55 * 255).repeat(3, axis=2).astype(np.uint8)
    both = np.concatenate([sheet.measured, sheet.predicted])
    normalize = Normalize(*np.percentile(both, (1, 99)))
    left, width = MAPS, 2.06
    scale = width / sheet.image.shape[1]
    correlation = float(pearson(sheet.measured[:, None], sheet.predicted[:, None])[0])
    texts = ("measured", f"predicted, PCC {correlation:.2f}")
    for bottom, values, text in zip((2.48, 0.22), (sheet.measured, sheet.predicted), texts):
        height = place(axes, pale, left, bottom, width)
        centers = np.column_stack([left + sheet.spots[:, 0] * scale, bottom + height - sheet.spots[:, 1] * scale])
        size = np.full(len(centers), 0.84 * sheet.pitch * scale)
        axes.add_collection(
            EllipseCollection(size, size, np.zeros(len(centers)), units="xy", offsets=centers, array=values,
                              offset_transform=axes.transData, cmap="viridis", norm=normalize, linewidths=0, zorder=3)
        )  # fmt: skip
        axes.text(left, bottom + height + 0.12, text, fontsize=9.5, color=INK, va="center")
    bar = axes.inset_axes((left + width + 0.12, 0.87, 0.09, 2.7), transform=axes.transData)
    colors = axes.figure.colorbar(ScalarMappable(normalize, "viridis"), cax=bar)
    colors.outline.set_visible(False)
    colors.set_label("log10(1 + counts per 10 000)", fontsize=8, color=MUTED)
    colors.ax.tick_params(labelsize=7.5, length=0, labelcolor=MUTED, pad=2)


def save(figure: Figure, out: Path) -> list[Path]:
    """PNG and SVG."""
    png, svg = out.with_suffix(".png"), out.with_suffix(".svg")
    write_atomically(png, lambda path: figure.savefig(path, format="png", dpi=PNG_DPI))
    write_atomically(svg, lambda path: figure.savefig(path, format="svg", dpi=SVG_DPI, metadata={"Date": None}))
    return [png, svg]


if __name__ == "__main__":
    run(main)
