"""A small picture of a slide with its spots, to see whether they belong together."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets.images.slides import Slide
from datasets.images.spots_on_tissue import SpotsOnTissue, TissuePicture, check_spots_on_tissue, spacing
from datasets.images.tissue import MIN_TISSUE, TissueMask, find_tissue
from datasets.images.tissue import THUMBNAIL_PX as TISSUE_PX
from utils.files import writing

_ON_TISSUE, _ON_GLASS, _EDGE = (0, 120, 30), (255, 60, 0), (60, 60, 60)
_DIAMETER = 0.55  # of a spot, in distances of neighbors: that of the arrays (55 of 100 um, 100 of 200 um)
_COLOURS = 128


def draw_overlay(picture: TissuePicture, centers: np.ndarray, is_on_tissue: np.ndarray) -> Image.Image:
    """Draw the spots (N, 2), level-0 px, green on tissue and orange on glass, and the edge of the section in grey."""
    pixels = picture.picture.copy()
    tissue = picture.is_tissue
    pixels[:-1, :-1][(tissue[1:, :-1] != tissue[:-1, :-1]) | (tissue[:-1, 1:] != tissue[:-1, :-1])] = _EDGE
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    radius = max(1.0, _DIAMETER / 2 * spacing(centers) * picture.scale) if len(centers) > 1 else 2.0
    for (x, y), is_on in zip(centers * picture.scale, is_on_tissue):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), outline=_ON_TISSUE if is_on else _ON_GLASS, width=2
        )
    return image


def write_overlay(picture: TissuePicture, centers: np.ndarray, is_on_tissue: np.ndarray, path: Path) -> None:
    """Write the overlay as PNG, unless it is there and the same. Raises OSError with the path if it cannot be written."""
    _write(draw_overlay(picture, centers, is_on_tissue), path)


def write_tissue(slide: Slide, mask: TissueMask | None, centers: np.ndarray, covered_px: int, path: Path) -> None:
    """Write a picture of the tissue that was found on a slide and of the spots (N, 2), level-0 px, that are predicted.

    mask: None where it is still to be found.  covered_px: width of a patch.  Raises as `write_overlay`.
    """
    mask = find_tissue(slide) if mask is None else mask
    pixels, scale = slide.thumbnail(TISSUE_PX)
    is_on = mask.share_of_squares(centers, covered_px) >= MIN_TISSUE
    _write(draw_overlay(TissuePicture(pixels, scale, slide.size, mask.is_tissue), centers, is_on), path)


def _write(drawn: Image.Image, path: Path) -> None:
    """A picture that a kill has cut short differs, so the next program that looks at the slide writes it again."""
    content = io.BytesIO()
    drawn.quantize(_COLOURS, Image.Quantize.FASTOCTREE).save(content, format="PNG")
    if path.is_file() and path.read_bytes() == content.getvalue():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())


def compare_with_image(image: Slide, centers: np.ndarray, totals: np.ndarray | None, overlay: Path) -> str | None:
    """Compare the spots of a slide with its image and write the picture of both to `overlay`.

    centers (N, 2): level-0 px (x, y).  totals (N,): total counts of each spot, None without counts.
    returns: what to say where they do not seem to belong together; None where nothing speaks against it.
    Raises ValueError naming the image if it cannot be decoded, OSError naming the overlay if it cannot be written.
    """
    picture = TissuePicture.of(image)
    found = check_spots_on_tissue(picture, centers, totals)
    write_overlay(picture, centers, found.is_on_tissue, overlay)
    return doubt(found, overlay)


def doubt(found: SpotsOnTissue, overlay: Path) -> str | None:
    """Return what to say where table and image do not seem to belong together; None where nothing speaks against it."""
    if found.fits:
        return None
    return f"spots and image may not belong together: {found} The picture: {overlay}."
