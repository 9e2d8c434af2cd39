"""Where the tissue is on a slide, and a regular grid of spots on it, for slides without measured spots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from datasets.images.slides import Slide

THUMBNAIL_PX = 2048  # longer side of the picture that tissue is looked for on
MIN_TISSUE = 0.5  # share of a patch that must be tissue
# Colourfulness of a pixel (greatest minus smallest of R, G, B, 0..255, once the background is white). Otsu's threshold is
# kept between these: without the lower one a blank slide would be cut through its noise, without the upper one a slide
# covered by tissue would be cut into pale and dark tissue.
_LEAST_THRESHOLD, _GREATEST_THRESHOLD = 12.0, 30.0
_BRIGHT, _NEARLY_GREY = 200, 25  # what may be background
_LEAST_BACKGROUND = 0.002  # share of the picture that must look like background to be measured
_SMOOTHING_PX, _LEAST_AREA_PX = 1.5, 30  # of the thumbnail
# Colourfulness of ink. Of real sections, blue nuclei have at most 130 and 99.9 % of them below 101, red ones below 53.
_LEAST_INK, _BLUE_INK, _RED_INK, _RED_SATURATION = 25.0, 115.0, 120.0, 0.75
_CELL_PX, _LEAST_OF_A_CELL, _BRIDGED = 8, 0.2, 3  # of a section: size, tissue in it, cells on either side of a gap
_RIM_PX = 4  # of the thumbnail: where ink fades into the glass it has the colour of a pale stain


class SquareMeans:
    """The mean of a picture (H, W) over squares anywhere, from its cumulated sums. scale: its pixels per level-0 pixel."""

    def __init__(self, picture: np.ndarray, scale: float):
        self.scale = scale
        self._sums = np.zeros((picture.shape[0] + 1, picture.shape[1] + 1))
        self._sums[1:, 1:] = picture.cumsum(axis=0).cumsum(axis=1)

    def __call__(self, centers: np.ndarray, size: float) -> np.ndarray:
        """Return (N,) the means of the squares of `size` level-0 px around `centers` (N, 2); outside the picture is 0."""
        sums, height, width = self._sums, self._sums.shape[0] - 1, self._sums.shape[1] - 1
        low = np.floor((centers - size / 2) * self.scale).astype(np.int64)
        high = np.maximum(low + 1, np.ceil((centers + size / 2) * self.scale).astype(np.int64))
        area = (high - low).prod(axis=1)
        left, top = np.clip(low, 0, (width, height)).T
        right, bottom = np.clip(high, 0, (width, height)).T
        return (sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]) / area


@dataclass(frozen=True)
class TissueMask:
    """is_tissue (H, W) bool on the thumbnail; scale: thumbnail pixels per level-0 pixel."""

    is_tissue: np.ndarray
    scale: float

    @property
    def share(self) -> float:
        """Tissue as a share of the slide."""
        return float(self.is_tissue.mean())

    def share_of_squares(self, centers: np.ndarray, size: float) -> np.ndarray:
        """(N,) share of tissue in the squares of `size` level-0 px around `centers` (N, 2); outside there is none."""
        return SquareMeans(self.is_tissue, self.scale)(centers, size)


@dataclass(frozen=True)
class SpotGrid:
    """centers (N, 2) int64 level-0 px (x, y), row by row; grid (N, 2) int64 (column, row) of the same spots."""

    centers: np.ndarray
    grid: np.ndarray


def find_tissue(slide: Slide, max_px: int = THUMBNAIL_PX) -> TissueMask:
    """Tissue of a stained slide: what is more colourful than the glass, found on a thumbnail."""
    thumbnail, scale = slide.thumbnail(max_px)
    return TissueMask(tissue_of(thumbnail), scale)


def tissue_of(image: np.ndarray) -> np.ndarray:
    """Return (H, W) bool of a picture (H, W, 3) uint8: True on stained tissue.

    The background is made white first (scanners tint it), then Otsu's threshold on the smoothed colourfulness, within
    bounds. Grey and black things (glass edges, black borders, dust, marker lines in black) have no colour, marks of a blue,
    green or red pen have one that H&E has not: both are left out. Specks of fewer than 30 pixels are dropped and holes of
    that size closed.
    """
    values = image * (np.float32(255) / background_color(image))
    brightest, darkest = _extremes(values)
    colourfulness = brightest - darkest
    colourfulness[brightest < 40] = 0  # JPEG noise on black
    colourfulness[pen_marks(values, colourfulness)] = 0
    colourfulness = ndimage.gaussian_filter(colourfulness, _SMOOTHING_PX)
    threshold = float(np.clip(otsu_threshold(colourfulness), _LEAST_THRESHOLD, _GREATEST_THRESHOLD))
    is_tissue = _without_specks(colourfulness > threshold)
    return ~_without_specks(~is_tissue)


def _extremes(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the greatest and the smallest of R, G, B of colours (..., 3): ten times as fast as max and min of an axis."""
    red, green, blue = np.moveaxis(colours, -1, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def pen_marks(values: np.ndarray, colourfulness: np.ndarray) -> np.ndarray:
    """Return (H, W) bool of colours (H, W, 3) on a white background: True on marks of a pen and on their rims.

    H&E runs from the blue-violet of nuclei over pink to the red of blood. Nothing in it is green, and its blue and its red
    do not reach the colourfulness of ink (docs/predict.md).
    """
    rows, columns = np.nonzero(colourfulness > _LEAST_INK)
    colours, colour = values[rows, columns], colourfulness[rows, columns]
    hue, brightest = _hue(colours, colour), _extremes(colours)[0]
    is_pen = np.zeros(colourfulness.shape, dtype=bool)
    is_pen[rows, columns] = (
        ((hue >= 60) & (hue < 200))
        | ((hue >= 200) & (hue < 270) & (colour > _BLUE_INK))
        | (((hue < 60) | (hue >= 335)) & (colour > _RED_INK) & (colour > _RED_SATURATION * brightest))
    )
    is_pen = _without_specks(is_pen)
    return ndimage.binary_dilation(is_pen, iterations=_RIM_PX) if is_pen.any() else is_pen


def _hue(colours: np.ndarray, colourfulness: np.ndarray) -> np.ndarray:
    """(N,) hue in degrees of colours (N, 3): red 0, green 120, blue 240."""
    red, green, blue = colours.T
    brightest = np.where(red >= np.maximum(green, blue), 0, np.where(green >= blue, 1, 2))
    turned = np.choose(brightest, [green - blue, blue - red, red - green]) / colourfulness
    return 60 * ((turned + 2 * brightest) % 6)


def background_color(image: np.ndarray) -> np.ndarray:
    """(3,) median colour of the bright and nearly grey pixels; white if there are hardly any."""
    brightest, darkest = _extremes(image)
    candidate = (darkest > _BRIGHT) & (brightest - darkest < _NEARLY_GREY)
    if candidate.mean() < _LEAST_BACKGROUND:
        return np.full(3, 255.0, dtype=np.float32)
    return np.median(image[candidate], axis=0).astype(np.float32)


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """The value that splits a histogram into the two classes of greatest variance between them."""
    counts, edges = np.histogram(values, bins=bins)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    valid = (below > 0) & (above > 0)
    if not valid.any():
        return float(edges[-1])
    mean_below = sums[valid] / below[valid]
    mean_above = (sums[-1] - sums[valid]) / above[valid]
    between = below[valid].astype(np.float64) * above[valid] * (mean_below - mean_above) ** 2
    return float(edges[1:][valid][np.argmax(between)])


def section_of(is_tissue: np.ndarray) -> np.ndarray:
    """Return (H, W) bool of a mask of a picture of about 1000 px: the whole section, with the fat and the holes in it.

    Gaps of up to 6 cells of 8 x 8 px are bridged and what is enclosed is filled; pieces below 1 % of the largest are dust.
    """
    height, width = is_tissue.shape
    rows, columns = -(-height // _CELL_PX), -(-width // _CELL_PX)
    padded = np.zeros((rows * _CELL_PX, columns * _CELL_PX), dtype=bool)
    padded[:height, :width] = is_tissue
    cells = padded.reshape(rows, _CELL_PX, columns, _CELL_PX).mean(axis=(1, 3)) > _LEAST_OF_A_CELL
    y, x = np.ogrid[-_BRIDGED : _BRIDGED + 1, -_BRIDGED : _BRIDGED + 1]
    closed = ndimage.binary_closing(np.pad(cells, _BRIDGED + 1), x * x + y * y <= _BRIDGED**2 + 1)
    labels, count = ndimage.label(
        ndimage.binary_fill_holes(closed)[_BRIDGED + 1 : -_BRIDGED - 1, _BRIDGED + 1 : -_BRIDGED - 1]
    )
    if count:
        areas = np.bincount(labels.ravel())
        areas[0] = 0
        cells = (areas >= 0.01 * areas.max())[labels]
    return cells.repeat(_CELL_PX, axis=0).repeat(_CELL_PX, axis=1)[:height, :width]


def tissue_grid(
    mask: TissueMask, image_size: tuple[int, int], pitch_px: float, patch_px: int, min_tissue: float = MIN_TISSUE
) -> SpotGrid:
    """Square grid of spots over the slide, those kept whose patch is tissue to at least `min_tissue`.

    image_size: (width, height) px.  pitch_px: distance of two spots; patch_px: side of the patch that must be tissue.
    Raises ValueError if the pitch is below one pixel or no spot is left, with the share of tissue found.
    """
    width, height = image_size
    if not pitch_px >= 1:
        raise ValueError(f"The pitch of the grid is {pitch_px:g} px; expected at least one pixel.")
    columns, rows = max(1, int(width // pitch_px)), max(1, int(height // pitch_px))
    left, top = (width - (columns - 1) * pitch_px) / 2, (height - (rows - 1) * pitch_px) / 2
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    grid = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)
    centers = np.floor(grid * pitch_px + (left, top)).astype(np.int64)
    keep = mask.share_of_squares(centers, patch_px) >= min_tissue
    if not keep.any():
        raise ValueError(
            f"No spot of the {columns} x {rows} grid (pitch {pitch_px:g} px) lies on tissue: {100 * mask.share:.1f} % of the "
            f"slide looks like stained tissue, and a patch of {patch_px} px should be tissue to at least "
            f"{100 * min_tissue:g} %. Give the positions with --spots, or try a smaller --min_tissue or pitch."
        )
    return SpotGrid(centers[keep], grid[keep])


def _without_specks(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return (areas >= _LEAST_AREA_PX)[labels]
