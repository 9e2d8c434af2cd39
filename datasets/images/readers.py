"""The three ways to get pixels out of a slide image: decoded whole, tile by tile, or by OpenSlide.

Each reader has `level_sizes` (width, height per resolution, the finest first), `microns_per_pixel` (float or None) and
`read(level, x, y, width, height)`: a uint8 (height, width, 3) array of a rectangle that lies inside that level. All of
them may be read from several threads. Errors of the libraries come out as ValueError that names the file.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image, UnidentifiedImageError

# Pillow refuses images above 179 megapixels as possible decompression bombs. Slides are that large by nature (a skinst
# image has 252), so the limit is lifted here, and `_check_memory` takes its place: what would not fit is refused.
Image.MAX_IMAGE_PIXELS = None

_ROWS_AT_ONCE = 1024  # of a plain image, converted to an array at a time: never two whole copies
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
_BITS_PER_SAMPLE = 258  # a TIFF tag; Pillow would silently drop the low bits of 16
_DECODED_WITHOUT_A_CODEC = (1, 8, 32773, 32946)  # TIFF compression: none, deflate, PackBits, old deflate
_PLAUSIBLE_MICRONS = (0.05, 10.0)  # per pixel, of a slide scanner; 72 or 300 dpi describe a print
_LIBRARY_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    tifffile.TiffFileError,
    openslide.OpenSlideError,
    openslide.OpenSlideUnsupportedFormatError,
)


@contextmanager
def naming_the_file(path: Path):
    """Turn whatever an image library raises on a broken file into one ValueError with the file and the remedy."""
    try:
        yield
    except (PermissionError, FileNotFoundError, UnreadableSlideError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableSlideError(
            f"{path} is not an image that can be read here (JPEG, PNG, TIFF or a whole-slide format of OpenSlide). "
            "Check that the download is complete and that it is the image file itself."
        ) from error
    except _LIBRARY_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableSlideError(
            f"{path} cannot be decoded: {reason}. The file is truncated or damaged; download or copy it again "
            f"(it has {os.path.getsize(path)} bytes)."
        ) from error


class UnreadableSlideError(ValueError):
    """A slide image that is broken or of no known kind; the message names the file and the remedy."""


class PlainReader:
    """A JPEG, PNG or untiled TIFF: decoded once, whole, at the first pixel asked for, and kept."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._pixels: np.ndarray | None = None
        with naming_the_file(path), Image.open(path) as image:
            self.level_sizes = [image.size]
            self._format = image.format
            kind = image.mode if image.mode in _EIGHT_BIT_MODES else f"{image.mode!r}"
            bits = max(np.atleast_1d(image.tag_v2.get(_BITS_PER_SAMPLE, 8))) if image.format == "TIFF" else 8
            self.microns_per_pixel = _microns_of_dpi(image.info.get("dpi"))
        if kind not in _EIGHT_BIT_MODES or bits > 8:
            raise UnreadableSlideError(
                f"{path} has pixels of the kind {kind} with {bits} bits; expected 8 bits per channel (RGB, RGBA or "
                "greyscale). Convert the image to 8-bit RGB."
            )

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        assert level == 0
        return self.decode()[y : y + height, x : x + width]

    def preview(self, size: tuple[int, int]) -> Image.Image | None:
        """A JPEG decoded at 1/2, 1/4 or 1/8, at least `size`: much quicker than the whole. None where not possible."""
        if self._format != "JPEG" or self._pixels is not None:
            return None
        with naming_the_file(self._path), Image.open(self._path) as image:
            if image.draft("RGB", size) is None:
                return None
            return image.convert("RGB")

    def close(self) -> None:
        self._pixels = None

    def decode(self) -> np.ndarray:
        """uint8 (height, width, 3): the whole image, decoded now if it was not yet."""
        with self._lock:
            if self._pixels is None:
                width, height = self.level_sizes[0]
                _check_memory(self._path, width, height)
                pixels = np.empty((height, width, 3), dtype=np.uint8)
                with naming_the_file(self._path), Image.open(self._path) as image:
                    image.load()
                    for top in range(0, height, _ROWS_AT_ONCE):
                        strip = image.crop((0, top, width, min(height, top + _ROWS_AT_ONCE)))
                        pixels[top : top + _ROWS_AT_ONCE] = over_white(strip)
                self._pixels = pixels
            return self._pixels


class TiledTiffReader:
    """A tiled TIFF, plain or with a pyramid: only the tiles under the rectangle are decoded."""

    def __init__(self, path: Path):
        self._path = path
        with naming_the_file(path):
            self._file = tifffile.TiffFile(path)
            try:
                self._pages = [level.keyframe for level in self._file.series[0].levels]
                if not all(_is_tiled_rgb(page) for page in self._pages):
                    raise UnidentifiedImageError("not a tiled 8-bit TIFF")
                self.level_sizes = [(page.imagewidth, page.imagelength) for page in self._pages]
                self.microns_per_pixel = _microns_of_tiff(self._file)
            except BaseException:
                self._file.close()
                raise

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        page = self._pages[level]
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        with naming_the_file(self._path):
            for row in range(y // page.tilelength, (y + height - 1) // page.tilelength + 1):
                for column in range(x // page.tilewidth, (x + width - 1) // page.tilewidth + 1):
                    self._paste(page, row, column, out, x, y)
        return out

    def close(self) -> None:
        self._file.close()

    def _paste(self, page: tifffile.TiffPage, row: int, column: int, out: np.ndarray, x: int, y: int) -> None:
        """Copy the part of a tile that lies in the rectangle `out` at (x, y)."""
        tiles_across = -(-page.imagewidth // page.tilewidth)
        index = row * tiles_across + column
        length = page.databytecounts[index]
        if length == 0:
            return  # a sparse file leaves empty tiles out: background
        raw = os.pread(self._file.filehandle.fileno(), length, page.dataoffsets[index])
        if len(raw) < length:
            raise EOFError(f"tile {index} of {len(page.dataoffsets)} ends early")
        tile = page.decode(raw, index, jpegtables=page.jpegtables)[0][0]
        left, top = column * page.tilewidth, row * page.tilelength
        first_x, first_y = max(left, x), max(top, y)
        part = tile[first_y - top : y + out.shape[0] - top, first_x - left : x + out.shape[1] - left]
        rgb = over_white(Image.fromarray(part[:, :, 0] if part.shape[2] == 1 else part))
        out[first_y - y : first_y - y + len(rgb), first_x - x : first_x - x + rgb.shape[1]] = rgb


class OpenSlideReader:
    """A whole-slide image in one of the formats of OpenSlide, generic tiled TIFF included."""

    def __init__(self, path: Path):
        self._path = path
        with naming_the_file(path):
            self._slide = openslide.OpenSlide(path)
            self.level_sizes = list(self._slide.level_dimensions)
            self.microns_per_pixel = _microns_of_properties(self._slide.properties)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        scale = self._slide.level_downsamples[level]
        with naming_the_file(self._path):
            return over_white(self._slide.read_region((round(x * scale), round(y * scale)), level, (width, height)))

    def close(self) -> None:
        self._slide.close()


def open_reader(path: Path) -> PlainReader | TiledTiffReader | OpenSlideReader:
    """The reader that gets at regions of this file with the least decoding."""
    with naming_the_file(path):
        is_whole_slide = openslide.OpenSlide.detect_format(path) is not None
    if is_whole_slide:
        return OpenSlideReader(path)
    if _is_tiff(path):
        try:
            return TiledTiffReader(path)
        except UnreadableSlideError:
            pass  # striped, or compressed by a codec that only Pillow has: decoded whole
    return PlainReader(path)


def over_white(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3); transparent pixels show the white background of a slide."""
    if image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def _check_memory(path: Path, width: int, height: int) -> None:
    needed = 7 * width * height  # Pillow holds four bytes a pixel while the array of three is filled
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        raise UnreadableSlideError(
            f"{path} has {width} x {height} pixels and must be decoded whole, which takes {needed / 1e9:.1f} GB; this "
            f"machine has {installed / 1e9:.1f} GB. Convert it to a tiled TIFF, which is read by region "
            f"(for example: vips tiffsave {path.name} {path.stem}.tif --tile --pyramid --compression jpeg)."
        )


def _is_tiff(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _is_tiled_rgb(page: tifffile.TiffPage) -> bool:
    """Can the tiles be decoded one by one, with what is installed, to 8-bit colour or grey?"""
    return (
        page.is_tiled
        and page.dtype == np.uint8
        and page.samplesperpixel in (1, 3, 4)
        and page.planarconfig == 1
        and page.imagedepth == 1
        and page.photometric in (1, 2)
        and page.compression in _DECODED_WITHOUT_A_CODEC
    )


def _plausible(microns: float) -> float | None:
    return float(microns) if _PLAUSIBLE_MICRONS[0] <= microns <= _PLAUSIBLE_MICRONS[1] else None


def _microns_of_dpi(dpi: tuple[float, float] | None) -> float | None:
    return _plausible(25_400 / float(dpi[0])) if dpi and dpi[0] else None


def _microns_of_tiff(file: tifffile.TiffFile) -> float | None:
    """OME, then Aperio's note in the description, then the resolution tags."""
    page = file.pages.first
    description = page.description or ""
    physical = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', description)
    if physical and ('PhysicalSizeXUnit="' not in description or re.search(r'XUnit="(µm|um)"', description)):
        return _plausible(float(physical[1]))
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if aperio:
        return _plausible(float(aperio[1]))
    microns_per_unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.resolutionunit))
    pixels_per_unit = page.resolution[0]
    return _plausible(microns_per_unit / pixels_per_unit) if microns_per_unit and pixels_per_unit else None


def _microns_of_properties(properties: Mapping[str, str]) -> float | None:
    """OpenSlide's own figure, else the TIFF resolution tags that it passes on."""
    stated = properties.get(openslide.PROPERTY_NAME_MPP_X)
    if stated:
        return _plausible(float(stated))
    microns_per_unit = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""))
    pixels_per_unit = float(properties.get("tiff.XResolution") or 0)
    return _plausible(microns_per_unit / pixels_per_unit) if microns_per_unit and pixels_per_unit else None
