"""A slide of which only the patches of its spots are at hand (HEST-1k without whole-slide images): read like an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.features.cache import opened
from datasets.images.geometry import patch_corner


class PatchSlide:
    """The patch cache of a slide behind the interface of datasets.images.slides.Slide, for the patches that it holds.

    path: the cache.  size: (width, height) of the image the patches were cut from.  microns_per_pixel: of it, or None.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with opened(self.path) as cache:
            identity, centers, self._patches = cache.identity, cache.centers, cache.read()
        self.size, self.microns_per_pixel = identity.image_size, identity.microns_per_pixel
        self._fingerprint, self._patch_size = identity.image_fingerprint, identity.patch_size
        corners = patch_corner(centers, self._patch_size)
        self._row_of_corner = {(int(x), int(y)): row for row, (x, y) in enumerate(corners)}

    def fingerprint(self) -> str:
        """That of the image the patches were cut from."""
        return self._fingerprint

    def read_region(self, x: int, y: int, width: int, height: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 (height, width, 3) patch whose top left corner is (x, y); ValueError for any other region."""
        row = self._row_of_corner.get((x, y))
        if row is None or (width, height) != (self._patch_size,) * 2 or size not in (None, (width, height)):
            raise ValueError(
                f"{self.path} holds patches of {self._patch_size} px around its spots and nothing else; the region at "
                f"({x}, {y}) of {width} x {height} px needs the slide image. Put it into ST-imgs, or leave neighbor features "
                "out (--set MODEL.use_neighbor=false)."
            )
        return self._patches[row]

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> PatchSlide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
