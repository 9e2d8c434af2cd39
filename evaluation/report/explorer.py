"""explorer.html: every gene of every slide on its tissue, in one page that loads nothing.

Bokeh draws it: its script is a quarter of plotly's (1.3 MB of 4.7), spots keep their size on the tissue when one zooms, and
panels that share a range move together. The values are in the page as 8 bits: measured and predicted of a gene on a slide
share one range, so what is read off is right to half of 1/255 of it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from PIL import Image

from evaluation.predictions import MEASURED, read_prediction, slide_of, tissue_image
from evaluation.report.maps import Tissue, visible_part
from utils.files import write_text

MAX_BYTES = 23_000_000  # of values and pictures; the scripts are 1.3 MB
IMAGE_PX = 700
PREDICTED, STD = "predicted", "std"
_LEVELS = 255


@dataclass(frozen=True, eq=False)
class SlideView:
    """One slide of N spots and G genes as the page holds it.

    codes: {layer: (G, N) uint8}; low, step: {layer: (G,)}, so that a value is low + step * code.
    spread: (G,) standard deviation of the prediction over the spots.
    """

    tissue: Tissue
    spots: list[str]
    genes: list[str]
    codes: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    step: dict[str, np.ndarray]
    spread: np.ndarray

    @property
    def bytes_of_gene(self) -> int:
        """Bytes that one gene takes in the page."""
        return len(self.codes) * (len(self.spots) * 4 // 3 + 12)


def write_explorer(
    path: Path, predictions: Sequence[Path], *, title: str, genes: Sequence[str] = (), max_bytes: int = MAX_BYTES
) -> Path:
    """Write the page over the slides of prediction files, with or without counts; returns its path.

    genes: kept in any case. Of the others those that vary most are kept where all would take more than
    `max_bytes`, pictures included; the page says so.
    Raises FileNotFoundError or ValueError for a file that is no prediction.
    """
    from evaluation.report.explorer_page import explorer_page  # bokeh, a second of every start otherwise

    views, unit = [], ""
    for file in predictions:
        adata = read_prediction(file)
        views.append(slide_view(adata))
        unit = str(adata.uns["unit"])
    images = [_image_entry(view.tissue) for view in views]
    kept, known = _kept_genes(views, genes, max_bytes - sum(len(json.dumps(image)) for image in images))
    smoothed = (
        " Measured ones are smoothed (means over 3 x 3 spots)." if any(MEASURED in view.codes for view in views) else ""
    )
    left_out = f" Of {known} genes the {len(kept)} that vary most are here." if len(kept) < known else ""
    return write_text(
        path,
        explorer_page(
            title=title,
            lead=f"Values are in {unit}, rounded to 8 bits.{smoothed}{left_out}",
            slides=[_slide_entry(view, kept, image) for view, image in zip(views, images)],
        ),
    )


def slide_view(adata: AnnData) -> SlideView:
    """Round what a prediction file holds of each gene to 8 bits; ValueError for a file of several slides."""
    image, scale, diameter = tissue_image(adata)
    predicted = np.asarray(adata.X)
    # Both in one range, or the error of a perfect prediction would not be zero.
    together = {PREDICTED: predicted} | ({MEASURED: adata.layers[MEASURED]} if MEASURED in adata.layers else {})
    codes, low, step = _rounded(together)
    if STD in adata.layers:
        more = _rounded({STD: adata.layers[STD]})
        codes, low, step = codes | more[0], low | more[1], step | more[2]
    return SlideView(
        tissue=Tissue(slide_of(adata), np.asarray(adata.obsm["spatial"]), diameter, image, scale),
        spots=list(adata.obs_names),
        genes=list(adata.var_names),
        codes=codes,
        low=low,
        step=step,
        spread=predicted.std(axis=0),
    )


def _rounded(layers: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], ...]:
    """Codes, lowest values and steps of layers (N, G) that share one range for each gene."""
    arrays = {name: np.asarray(values, dtype=np.float32).T for name, values in layers.items()}
    low = np.min([values.min(axis=1) for values in arrays.values()], axis=0)
    high = np.max([values.max(axis=1) for values in arrays.values()], axis=0)
    step = (high - low) / _LEVELS
    divisor = np.where(step > 0, step, 1)[:, None]
    codes = {name: np.rint((values - low[:, None]) / divisor).astype(np.uint8) for name, values in arrays.items()}
    return codes, dict.fromkeys(arrays, low), dict.fromkeys(arrays, step)


def _kept_genes(views: Sequence[SlideView], chosen: Sequence[str], max_bytes: int) -> tuple[set[str], int]:
    """The genes that fit into `max_bytes`, chosen ones first, then those that vary most; and how many there are."""
    spread: dict[str, float] = {}
    size: dict[str, int] = {}
    for view in views:
        for gene, value in zip(view.genes, view.spread):
            spread[gene] = max(spread.get(gene, 0.0), float(value))
            size[gene] = size.get(gene, 0) + view.bytes_of_gene
    kept, used = {gene for gene in chosen if gene in spread}, 0
    for gene in sorted(spread, key=lambda gene: (gene not in kept, -spread[gene], gene)):
        used += size[gene]
        if used <= max_bytes:
            kept.add(gene)
    return kept, len(spread)


def _slide_entry(view: SlideView, kept: set[str], image: dict[str, Any] | None) -> dict[str, Any]:
    """The slide as the script reads it; y points upwards there, as Bokeh draws."""
    rows = [index for index, gene in enumerate(view.genes) if gene in kept]
    x, y = view.tissue.spatial_px.T
    return {
        "name": view.tissue.slide,
        "spots": view.spots,
        "genes": [view.genes[row] for row in rows],
        "radius": view.tissue.spot_diameter_px / 2,
        "x": _base64(x.astype("<f4")),
        "y": _base64(-y.astype("<f4")),
        "low": {name: _base64(values[rows].astype("<f4")) for name, values in view.low.items()},
        "step": {name: _base64(values[rows].astype("<f4")) for name, values in view.step.items()},
        "codes": {name: _base64(values[rows]) for name, values in view.codes.items()},
        "image": image,
    }


def _image_entry(tissue: Tissue) -> dict[str, Any] | None:
    """The part of the image that holds the spots, as a data URI with its place; None where there is none."""
    part = visible_part(tissue)
    if part is None:
        return None
    pixels, (left, right, bottom, top) = part
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"url": url, "x": left, "y": -top, "width": right - left, "height": bottom - top}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
