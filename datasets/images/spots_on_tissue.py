"""Do a table of spots and an image belong together? Spots lie on tissue, and dark tissue gives more counts.

A table whose pixel columns are exchanged, that is mirrored, scaled, or of another slide, fits neither as well as the true
one, but trains to believable scores. So both are measured on a small picture, for the table as it is and for what it would
be if somebody had turned it. docs/installation.md has the figures of real sections from which the limits are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.spatial import cKDTree

from datasets.images.slides import Slide
from datasets.images.tissue import SquareMeans, section_of, tissue_of

PICTURE_PX = 1024  # longer side of the picture
_SQUARE = 0.5  # side of the square that stands for a spot, in distances of neighbors
_LEAST_SPOTS = 50  # for a rank correlation, and for a share that is more than chance
# Limits; where true and false tables of real sections lie is in docs/installation.md.
_LEAST_ON_TISSUE = 0.5
_LEAST_LIFT, _LEAST_FIT = 0.75, 0.95
_GREATEST_AROUND = 0.9  # where tissue fills the rectangle, spots on it prove nothing
_CLEARLY_DARKER, _CLEARLY_MORE = (
    0.4,
    0.15,
)  # of a table that is said to fit better: correlation, or more spots on tissue


@dataclass(frozen=True)
class Fit:
    """How a table fits. on_tissue: share of spots on tissue.  around: share of tissue in the rectangle around them.

    darkness: rank correlation of the darkness at the spots with their total counts; None where it cannot be known (no
    counts, few spots, all the same).
    """

    num_spots: int
    on_tissue: float
    around: float
    darkness: float | None

    @property
    def score(self) -> float:
        """What tables are compared by."""
        return self.on_tissue + (self.darkness or 0.0)

    @property
    def lift(self) -> float:
        """How much more often than by chance the spots meet tissue: 0 like a random place, 1 always."""
        return (self.on_tissue - self.around) / max(1 - self.around, 1e-9)

    @property
    def complaint(self) -> str | None:
        """What speaks against it, for itself; None for nothing."""
        if self.on_tissue < _LEAST_ON_TISSUE:
            return "Most spots lie on glass: is it the table of another slide, or of the image at another size?"
        says_something = self.num_spots >= _LEAST_SPOTS and self.around < _GREATEST_AROUND
        if says_something and self.lift < _LEAST_LIFT and self.lift + (self.darkness or 0.0) < _LEAST_FIT:
            return "They follow neither the tissue nor its darkness: is it the table of another slide?"
        return None

    def __str__(self) -> str:
        darkness = "unknown" if self.darkness is None else f"{self.darkness:.2f}"
        return f"{100 * self.on_tissue:.0f} % of the spots on tissue, darkness against counts {darkness}"


@dataclass(frozen=True)
class SpotsOnTissue:
    """What was found for one slide.

    given: the table as it is.  better, better_fit: the change with which it would fit clearly better, if there is one.
    is_on_tissue (N,) bool: of each spot.
    """

    given: Fit
    better: str | None
    better_fit: Fit | None
    is_on_tissue: np.ndarray

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it that table and image belong together."""
        return self.better is None and self.given.complaint is None

    def __str__(self) -> str:
        """One sentence with the numbers, and for a bad fit what it may be."""
        numbers = f"{self.given}; {100 * self.given.around:.0f} % of the rectangle around them is tissue."
        if self.better is not None:
            return f"{numbers} {self.better} would fit better: {self.better_fit}."
        return numbers if self.given.complaint is None else f"{numbers} {self.given.complaint}"


class TissuePicture:
    """A small picture of a slide: where tissue is, and how dark.

    picture (H, W, 3) uint8.  scale: its pixels per level-0 pixel.  size: (width, height) of level 0.
    is_tissue (H, W) bool: if not given the section with its holes, so that spots on fat are on it.
    tissue_share, darkness: means over squares; darkness from 0, white, to 255, black.
    """

    def __init__(self, picture: np.ndarray, scale: float, size: tuple[int, int], is_tissue: np.ndarray | None = None):
        self.picture, self.scale, self.size = picture, scale, size
        self.is_tissue = section_of(tissue_of(picture)) if is_tissue is None else is_tissue
        self.tissue_share = SquareMeans(self.is_tissue, scale)
        self.darkness = SquareMeans(255 - picture.mean(axis=2), scale)

    @classmethod
    def of(cls, slide: Slide) -> TissuePicture:
        """The picture of an open slide. Raises ValueError naming the file if it cannot be decoded."""
        picture, scale = slide.thumbnail(PICTURE_PX)
        return cls(picture, scale, slide.size)

    def is_on_tissue(self, centers: np.ndarray, side: float) -> np.ndarray:
        """(N,) bool: more than half of the square of `side` level-0 px around a spot is tissue; outside there is none."""
        return self.tissue_share(centers, side) > 0.5

    def tissue_around(self, centers: np.ndarray) -> float:
        """Share of tissue in the rectangle around the spots."""
        low = np.floor(centers.min(axis=0) * self.scale).astype(int)
        high = np.ceil(centers.max(axis=0) * self.scale).astype(int) + 1
        (left, top), (right, bottom) = np.maximum(low, 0), np.maximum(high, 1)
        inside = self.is_tissue[top:bottom, left:right]
        return float(inside.mean()) if inside.size else 0.0


def check_spots_on_tissue(picture: TissuePicture, centers: np.ndarray, totals: np.ndarray | None) -> SpotsOnTissue:
    """Compare a table of spots with an image, and with what would be if the table had been turned.

    centers (N, 2): level-0 px (x, y).  totals (N,): total counts of each spot, None without counts.
    """
    assert len(centers) > 0
    side = _SQUARE * spacing(centers)
    ranks = None if totals is None or len(totals) < _LEAST_SPOTS else stats.rankdata(totals)
    given = _fit(picture, centers, ranks, side)
    better, better_fit = _best_alternative(picture, centers, ranks, side, given)
    return SpotsOnTissue(given, better, better_fit, picture.is_on_tissue(centers, side))


def spacing(centers: np.ndarray) -> float:
    """Distance of a spot to its nearest neighbor, the median over all; of a single spot, 1 px."""
    if len(centers) < 2:
        return 1.0
    return max(1.0, float(np.median(cKDTree(centers).query(centers, k=2)[0][:, 1])))


def _fit(picture: TissuePicture, centers: np.ndarray, ranks: np.ndarray | None, side: float) -> Fit:
    on_tissue, around = float(picture.is_on_tissue(centers, side).mean()), picture.tissue_around(centers)
    darkness = stats.rankdata(picture.darkness(centers, side))
    if ranks is None or np.ptp(darkness) == 0 or np.ptp(ranks) == 0:
        return Fit(len(centers), on_tissue, around, None)
    return Fit(len(centers), on_tissue, around, float(np.corrcoef(darkness, ranks)[0, 1]))


def _best_alternative(
    picture: TissuePicture, centers: np.ndarray, ranks: np.ndarray | None, side: float, given: Fit
) -> tuple[str | None, Fit | None]:
    """The change after which the table would fit clearly better, with its fit; nothing where there is none."""
    found: tuple[str | None, Fit | None] = (None, None)
    best = given.score + 0.1 + 1.5 / math.sqrt(len(centers))  # fewer spots, more chance
    for name, factor, changed in _alternatives(centers, picture.size):
        fit = _fit(picture, changed, ranks, side * factor)
        is_sure = (fit.darkness or 0.0) > _CLEARLY_DARKER or fit.on_tissue > given.on_tissue + _CLEARLY_MORE
        if fit.score > best and is_sure and fit.complaint is None and fit.on_tissue >= given.on_tissue:
            found, best = (name, fit), fit.score
    return found


def _alternatives(centers: np.ndarray, size: tuple[int, int]) -> Iterator[tuple[str, float, np.ndarray]]:
    """What a table may have suffered, in words: name, factor of its distances, changed positions."""
    last = np.array(size) - 1
    box = centers.min(axis=0) + centers.max(axis=0)
    exchanged = centers[:, ::-1]
    middle = (box - box[::-1]) / 2
    left_right, up_down, both = np.array([1, 0]), np.array([0, 1]), np.array([1, 1])
    yield "Exchanging the pixel columns", 1, exchanged
    for name, flips in (("left to right", left_right), ("up to down", up_down)):
        yield f"Mirroring them on the image from {name}", 1, _flipped(centers, flips, last)
    yield "Turning them with the image by 180 degrees", 1, _flipped(centers, both, last)
    yield "Turning them with the image by 90 degrees", 1, _flipped(exchanged, left_right, last)
    yield "Turning them with the image by 270 degrees", 1, _flipped(exchanged, up_down, last)
    yield "Exchanging the pixel columns and turning by 180 degrees", 1, _flipped(exchanged, both, last)
    for name, flips in (("left to right", left_right), ("up to down", up_down)):
        yield f"Mirroring them in their place from {name}", 1, _flipped(centers, flips, box)
    yield "Turning them in their place by 180 degrees", 1, _flipped(centers, both, box)
    in_place = exchanged + middle
    yield "Exchanging x and y in their place", 1, in_place
    yield "Turning them in their place by 90 degrees", 1, _flipped(in_place, left_right, box)
    yield "Turning them in their place by 270 degrees", 1, _flipped(in_place, up_down, box)
    yield "Doubling the pixel columns", 2, 2 * centers
    yield "Halving the pixel columns", 0.5, centers / 2


def _flipped(centers: np.ndarray, flips: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Positions with x, y or both counted from the other end of `span`."""
    return np.where(flips == 1, span - centers, centers)
