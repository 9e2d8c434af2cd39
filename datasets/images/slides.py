"""Slide images of any supported kind, read by region: plain images, tiled TIFFs, whole-slide formats.

Positions and sizes are level-0 pixels of the file as stored (an EXIF orientation is not applied: spot tables refer to
the stored pixels). Whatever lies outside the image is white, the background of a brightfield slide.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.images.readers import PlainReader, Reader, open_reader
from utils.files import require_file

_PIECES, _PIECE_BYTES = 16, 1 << 16  # of the file, evenly spread, that the fingerprint looks at
_PIXELS_AT_ONCE = 1 << 25  # of a level, read at a time when a large region is scaled down


class Slide:
    """An open slide image. Regions may be read from several threads at once.

    path: the file.  size: (width, height) in level-0 pixels.  microns_per_pixel: from the metadata, or None.
    """

    def __init__(self, path: Path, reader: Reader):
        self.path = path
        self._reader = reader
        width, height = reader.level_sizes[0]
        self.size = (int(width), int(height))
        self.microns_per_pixel: float | None = reader.microns_per_pixel

    def read_region(self, x: int, y: int, width: int, height: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 (height, width, 3): the rectangle with its top left corner at (x, y), white outside the image.

        size: (width, height) of the result when it should be scaled; the coarsest stored resolution that still has
            the detail is read, and a large region in pieces, so that memory is bounded.
        Raises ValueError that names the file if it cannot be decoded.
        """
        if size is None or tuple(size) == (width, height):
            return self._read_padded(0, x, y, width, height)
        return self._read_scaled(x, y, width, height, size)

    def thumbnail(self, max_px: int) -> tuple[np.ndarray, float]:
        """The whole slide with its longer side at most `max_px`, and the scale: thumbnail pixels per level-0 pixel."""
        width, height = self.size
        scale = min(1.0, max_px / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        preview = self._reader.preview(size) if isinstance(self._reader, PlainReader) else None
        if preview is not None:
            return np.asarray(preview.resize(size, Image.Resampling.BOX)), scale
        return self.read_region(0, 0, width, height, size), scale

    def fingerprint(self) -> str:
        """A name of the content that costs milliseconds: size in pixels, length of the file, a sample of its bytes."""
        length = os.path.getsize(self.path)
        digest = hashlib.sha256(str(length).encode())
        with open(self.path, "rb") as file:
            for piece in range(_PIECES):
                file.seek(max(0, length - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
        width, height = self.size
        return f"{width}x{height}-{length}-{digest.hexdigest()[:32]}"

    @property
    def decoded_bytes(self) -> int:
        """Memory that the pixels take once the first of them was read; 0 where only regions are decoded."""
        return 3 * self.size[0] * self.size[1] if isinstance(self._reader, PlainReader) else 0

    def decode(self) -> None:
        """Decode now what would be decoded whole at the first region. Raises ValueError as `read_region` does."""
        if isinstance(self._reader, PlainReader):
            self._reader.decode()

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read_padded(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """A rectangle of one stored resolution, in its pixels, white outside."""
        level_width, level_height = self._reader.level_sizes[level]
        left, right = max(x, 0), min(x + width, level_width)
        top, bottom = max(y, 0), min(y + height, level_height)
        if (left, right, top, bottom) == (x, x + width, y, y + height):
            return self._reader.read(level, x, y, width, height)
        region = np.full((height, width, 3), 255, dtype=np.uint8)
        if left < right and top < bottom:
            inside = self._reader.read(level, left, top, right - left, bottom - top)
            region[top - y : bottom - y, left - x : right - x] = inside
        return region

    def _read_scaled(self, x: int, y: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
        """Scale by way of the best stored resolution: whole-number box reduction in pieces, then bicubic."""
        level, downsample = self._level_for(min(width / size[0], height / size[1]))
        left, top = math.floor(x / downsample), math.floor(y / downsample)
        right, bottom = math.ceil((x + width) / downsample), math.ceil((y + height) / downsample)
        factor = max(1, math.floor(min((right - left) / size[0], (bottom - top) / size[1])))
        reduced = self._read_reduced(level, left, top, right - left, bottom - top, factor)
        box = (
            (x / downsample - left) / factor,
            (y / downsample - top) / factor,
            min(((x + width) / downsample - left) / factor, reduced.shape[1]),
            min(((y + height) / downsample - top) / factor, reduced.shape[0]),
        )
        return np.asarray(Image.fromarray(reduced).resize(size, Image.Resampling.BICUBIC, box=box))

    def _level_for(self, scale: float) -> tuple[int, float]:
        """The coarsest level that still has the detail of `scale` level-0 pixels per pixel, and its downsampling."""
        downsamples = [self.size[0] / level_width for level_width, _ in self._reader.level_sizes]
        fine_enough = [level for level, downsample in enumerate(downsamples) if downsample <= max(scale, 1.0) + 1e-6]
        level = max(fine_enough, key=lambda level: downsamples[level])
        return level, downsamples[level]

    def _read_reduced(self, level: int, x: int, y: int, width: int, height: int, factor: int) -> np.ndarray:
        """The rectangle with blocks of factor x factor pixels averaged (the last ones may be smaller)."""
        out = np.empty((-(-height // factor), -(-width // factor), 3), dtype=np.uint8)
        step = max(1, math.isqrt(_PIXELS_AT_ONCE) // factor)
        for row in range(0, out.shape[0], step):
            for column in range(0, out.shape[1], step):
                left, top = column * factor, row * factor
                piece_size = (min(step * factor, width - left), min(step * factor, height - top))
                piece = self._read_padded(level, x + left, y + top, *piece_size)
                if factor > 1:
                    piece = np.asarray(Image.fromarray(np.ascontiguousarray(piece)).reduce(factor))
                out[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
        return out


def open_slide(path: str | Path) -> Slide:
    """Open a slide image; nothing is decoded yet.

    Whole-slide formats and tiled TIFFs (OpenSlide, then tifffile) are read by region. JPEG, PNG, BMP and untiled
    TIFF are decoded whole at the first region and kept until closed.
    Raises FileNotFoundError, or ValueError naming the file when it is no image or is damaged.
    """
    path = require_file(path, "Expected the image of a slide there.")
    return Slide(path, open_reader(path))
