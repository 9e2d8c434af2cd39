"""The three ways to get pixels out of a slide image: decoded whole, tile by tile, or by OpenSlide.

Each reader has `level_sizes` (width, height per resolution, the finest first), `microns_per_pixel` (float or None) and
`read(level, x, y, width, height)`: a uint8 (height, width, 3) array of a rectangle that lies inside that level. All of
them may be read from several threads. Errors of the libraries come out as ValueError that names the file.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import openslide
import tifffile
from PIL import Image
from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffPage

from datasets.images.pixel_size import microns_of_properties
from datasets.images.plain_reader import PlainReader, naming_the_file, over_white
from datasets.images.tiff_pages import TiffImage, check_scanner_tiff, inspect_tiff
from utils.files import UnreadableFile

_DECODED_WITHOUT_A_CODEC = (1, 8, 32773, 32946)  # TIFF compression: none, deflate, PackBits, old deflate
_DECODED_BYTES = 1 << 25  # of tiles that a reader keeps, as OpenSlide does
_GENERIC_TIFF = "generic-tiff"  # OpenSlide's name for a tiled TIFF of no scanner


class Reader(Protocol):
    """What every reader offers; see the head of this file."""

    level_sizes: list[tuple[int, int]]
    microns_per_pixel: float | None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray: ...

    def close(self) -> None: ...


class TiledTiffReader:
    """A tiled TIFF, plain or with a pyramid: only the tiles under the rectangle are decoded."""

    def __init__(self, path: Path):
        self._path = path
        with naming_the_file(path):
            self._file = tifffile.TiffFile(path, _multifile=False)
            try:
                tiff = inspect_tiff(self._file, path)
                self._levels = tiff.levels
                if not all(_is_decodable(level.page) for level in self._levels):
                    raise UnreadableFile(f"{path} has tiles that need a codec, or none.")
                self.level_sizes = [(level.page.imagewidth, level.page.imagelength) for level in self._levels]
                self.microns_per_pixel = tiff.microns_per_pixel
            except BaseException:
                self._file.close()
                raise
        # The regions asked for are often smaller than the tiles of the file, and lie beside each other.
        largest = max(3 * level.page.tilewidth * level.page.tilelength for level in self._levels)
        self._tile = lru_cache(maxsize=max(1, _DECODED_BYTES // largest))(self._decoded_tile)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        page, planes = self._levels[level].page, self._levels[level].planes
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        with naming_the_file(self._path):
            for row in range(y // page.tilelength, (y + height - 1) // page.tilelength + 1):
                for column in range(x // page.tilewidth, (x + width - 1) // page.tilewidth + 1):
                    for channel in range(len(planes)):
                        part = out if len(planes) == 1 else out[:, :, channel : channel + 1]
                        self._paste(level, channel, row, column, part, x, y)
        return out

    def close(self) -> None:
        self._tile.cache_clear()
        self._file.close()

    def _paste(self, level: int, channel: int, row: int, column: int, out: np.ndarray, x: int, y: int) -> None:
        """Copy the part of a tile that lies in the rectangle `out` at (x, y); of a plane into its one channel."""
        page = self._levels[level].page
        tile = self._tile(level, channel, row * -(-page.imagewidth // page.tilewidth) + column)
        if tile is None:
            return
        left, top = column * page.tilewidth, row * page.tilelength
        first_x, first_y = max(left, x), max(top, y)
        part = tile[first_y - top : y + out.shape[0] - top, first_x - left : x + out.shape[1] - left]
        rgb = _rgb_of(part, page)[:, :, : out.shape[2]]
        out[first_y - y : first_y - y + len(rgb), first_x - x : first_x - x + rgb.shape[1]] = rgb

    def _decoded_tile(self, level: int, channel: int, index: int) -> np.ndarray | None:
        """(height, width, samples) of a tile; None where a sparse file leaves it out, which is background."""
        page, plane = self._levels[level].page, self._levels[level].planes[channel]
        length = plane.databytecounts[index]
        if length == 0:
            return None
        raw = os.pread(self._file.filehandle.fileno(), length, plane.dataoffsets[index])
        if len(raw) < length:
            raise EOFError(f"tile {index} of {len(plane.dataoffsets)} ends early")
        tile = page.decode(raw, index, jpegtables=page.jpegtables)[0]
        assert tile is not None
        return tile[0]


class OpenSlideReader:
    """A whole-slide image in one of the formats of OpenSlide, generic tiled TIFF included.

    tiff: what `inspect_tiff` has found, for a TIFF of no scanner; it knows more descriptions than OpenSlide.
    """

    def __init__(self, path: Path, tiff: TiffImage | None = None):
        self._path = path
        with naming_the_file(path):
            self._slide = openslide.OpenSlide(path)
            self.level_sizes = list(self._slide.level_dimensions)
            self.microns_per_pixel = tiff.microns_per_pixel if tiff else microns_of_properties(self._slide.properties)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        scale = self._slide.level_downsamples[level]
        with naming_the_file(self._path):
            return over_white(self._slide.read_region((round(x * scale), round(y * scale)), level, (width, height)))

    def close(self) -> None:
        self._slide.close()


def open_reader(path: Path) -> Reader:
    """Return the reader that gets at regions of this file with the least decoding.

    A TIFF is inspected first, so that the same pixels come out, or the same refusal, whoever reads it.
    Raises ValueError that names the file.
    """
    with naming_the_file(path):
        vendor = openslide.OpenSlide.detect_format(path)
        if not _is_tiff(path):
            return PlainReader(path) if vendor is None else OpenSlideReader(path)
        if vendor not in (None, _GENERIC_TIFF):
            check_scanner_tiff(path)
            return OpenSlideReader(path)
        with tifffile.TiffFile(path, _multifile=False) as file:
            tiff = inspect_tiff(file, path)
    if vendor is not None and tiff.by_openslide:
        try:
            return OpenSlideReader(path, tiff)
        except UnreadableFile:
            pass  # compressed in a way that it does not know
    try:
        return TiledTiffReader(path)
    except UnreadableFile:
        return PlainReader(path, tiff)  # striped, or compressed by a codec that only Pillow has: decoded whole


def _rgb_of(part: np.ndarray, page: TiffPage) -> np.ndarray:
    """uint8 (height, width, 3) of a piece of a decoded tile (height, width, samples)."""
    if part.shape[2] == 1:
        grey = part[:, :, 0]
        return over_white(Image.fromarray(255 - grey if page.photometric == PHOTOMETRIC.MINISWHITE else grey))
    has_alpha = EXTRASAMPLE.UNASSALPHA in page.extrasamples
    return over_white(Image.fromarray(np.ascontiguousarray(part if has_alpha else part[:, :, :3])))


def _is_tiff(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _is_decodable(page: TiffPage) -> bool:
    """Can the tiles be decoded one by one with what is installed?"""
    is_plain = page.photometric in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
    return (
        page.is_tiled
        and is_plain
        and page.bitspersample == 8
        and page.planarconfig == 1
        and page.compression in _DECODED_WITHOUT_A_CODEC
        and EXTRASAMPLE.ASSOCALPHA not in page.extrasamples
    )
