"""A slide and its predictions as a file `.h5ad`, with a down-scaled image where the image is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets.images.slides import open_slide
from datasets.spots import SlideRecord
from evaluation.predictions import write_prediction
from evaluation.slide_result import SlideResult
from modes.prediction.place_spots import THUMBNAIL_PX, spot_diameter
from utils.text import UNIT


def write_slide(
    path: Path, record: SlideRecord, result: SlideResult, *, patch_size: int, provenance: Mapping[str, object]
) -> None:
    """Write the prediction of a measured slide. patch_size: px, the size of its spots where there is but one.

    Raises ValueError where its image cannot be decoded.
    """
    image, scale = thumbnail(record)
    write_prediction(
        path,
        slide=record.name,
        spot_ids=result.spot_ids,
        genes=result.genes,
        predictions=result.predictions,
        spatial_px=record.table.obsm["spatial"],
        grid_xy=record.table.obsm["grid"],
        measured=result.measured,
        measured_unsmoothed=result.measured_unsmoothed,
        image=image,
        image_scale=scale,
        spot_diameter_px=spot_diameter(record.table.obsm["spatial"], patch_size),
        unit=UNIT,
        provenance=provenance,
    )


def thumbnail(record: SlideRecord) -> tuple[np.ndarray | None, float]:
    """Scale the slide's image down: (image, its pixels per full-resolution pixel); (None, 1) where there is none.

    Raises ValueError where the image cannot be decoded.
    """
    if record.image is None:
        return None, 1.0
    with open_slide(record.image) as slide:
        return slide.thumbnail(THUMBNAIL_PX)
