"""An image that is decoded whole, by Pillow: JPEG, PNG, BMP and striped TIFF."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from datasets.images.pixel_size import microns_of_dpi
from datasets.images.tiff_pages import TO_RGB, TiffImage, deep_pixels
from utils.devices import available_memory
from utils.files import UnreadableFile, reason_of
from utils.text import ended

# Pillow refuses images above 179 megapixels as possible decompression bombs. Slides are that large by nature (a skinst
# image has 252), so the limit is lifted here, and two checks take its place: what would not fit into the memory is
# refused, and what has more pixels than its bytes can hold.
Image.MAX_IMAGE_PIXELS = None

# What is handed to Pillow. It knows forty more formats: some of them start other programs (EPS), or lose the low bits of
# 16 without a word (PPM, SGI, JPEG 2000).
_PLAIN = ("JPEG", "PNG", "BMP")
_FORMATS = (*_PLAIN, "TIFF")
_HEAD = 16  # bytes by which Pillow tells formats

_ROWS_AT_ONCE = 1024  # of a plain image, converted to an array at a time: never two whole copies
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
_PNG_HEADER, _PNG_BITS = b"\x89PNG\r\n\x1a\n", 24  # the byte with the bits; Pillow silently drops the low 8 of 16
_GREATEST_PX_PER_BYTE = 10_000  # a blank PNG of one bit, deflated as far as that goes, has 8256


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Turn whatever an image library raises on a broken file into one ValueError with the file and the remedy."""
    try:
        yield
    except (FileNotFoundError, UnreadableFile):
        raise
    except Exception as error:
        reason, advice = reason_of(error)
        if isinstance(error, MemoryError):
            advice = "Convert the image to a tiled TIFF, which is read by region, or free memory."
        advice = advice or (
            f"The file is truncated or damaged; download or copy it again (it has {os.path.getsize(path)} bytes)."
        )
        raise UnreadableFile(f"{path} cannot be decoded: {ended(reason)} {advice}") from error


def open_picture(path: Path, file: IO[bytes] | None = None, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """Open an image by Pillow; its pixels are not decoded. No other place opens one that a user gives.

    file: its content, where that is compressed as a whole.
    Raises UnreadableFile, which names the format of its content, if it is of none of `formats`.
    """
    try:
        return Image.open(file or path, formats=formats)
    except UnidentifiedImageError as error:
        named = _format_of(path, file)
        raise UnreadableFile(
            f"{path} is not an image that can be read here (JPEG, PNG, BMP, TIFF or a whole-slide format of OpenSlide)"
            + (
                f": its content is {named}. {TO_RGB}, saved as PNG or TIFF."
                if named
                else ". Check that the download is complete and that it is the image file itself."
            )
        ) from error


def _format_of(path: Path, file: IO[bytes] | None) -> str | None:
    """Name what Pillow would take a file for that is not read here, by its first bytes alone."""
    if file is None:
        with open(path, "rb") as opened:
            return _format_of(path, opened)
    file.seek(0)
    head = file.read(_HEAD).ljust(_HEAD, b"\0")
    Image.init()
    return next((name for name, (_, fits) in Image.OPEN.items() if name not in _FORMATS and fits and fits(head)), None)


class PlainReader:
    """A JPEG, PNG, BMP or untiled TIFF: decoded once, whole, at the first pixel asked for, and kept.

    tiff: what `inspect_tiff` has found, for a TIFF.
    """

    def __init__(self, path: Path, tiff: TiffImage | None = None):
        self._path = path
        self._lock = threading.Lock()
        self._pixels: np.ndarray | None = None
        self._tiff = tiff
        self._planes = _frames_of(tiff)
        with naming_the_file(path), _opened(path, tiff) as image:
            self.level_sizes = [image.size]
            self._format = image.format
            mode, dpi = image.mode, image.info.get("dpi")
        self.microns_per_pixel = tiff.microns_per_pixel if tiff else microns_of_dpi(dpi)
        if (bits := _bits_of_png(path)) > 8 or mode not in _EIGHT_BIT_MODES:
            raise deep_pixels(path, mode, bits if bits > 8 else 16 if mode.startswith("I;16") else 32)
        _check_density(path, *self.level_sizes[0])

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        assert level == 0
        return self.decode()[y : y + height, x : x + width]

    def preview(self, size: tuple[int, int]) -> Image.Image | None:
        """A JPEG decoded at 1/2, 1/4 or 1/8, at least `size`: much quicker than the whole. None where not possible."""
        if self._format != "JPEG" or self._pixels is not None:
            return None
        with naming_the_file(self._path), _opened(self._path, self._tiff) as image:
            if image.draft("RGB", size) is None:
                return None
            return image.convert("RGB")

    def close(self) -> None:
        self._pixels = None

    def decode(self) -> np.ndarray:
        """uint8 (height, width, 3): the whole image, decoded now if it was not yet."""
        with self._lock:
            if self._pixels is None:
                _check_memory(self._path, *self.level_sizes[0])
                with naming_the_file(self._path), _opened(self._path, self._tiff) as image:
                    if image.format == "PNG":  # while Pillow decodes it, it passes over the checksums of the pixels
                        image.verify()
                with naming_the_file(self._path), _opened(self._path, self._tiff) as image:
                    self._pixels = _pixels_of(image, self._planes)
            return self._pixels


def _pixels_of(image: Image.Image, planes: Sequence[int]) -> np.ndarray:
    """uint8 (height, width, 3) of an open image; `planes`: the frames that are R, G and B, none for an image in one."""
    width, height = image.size
    pixels: np.ndarray | None = None
    for channel, frame in enumerate(planes or (0,)):
        if planes:
            image.seek(frame)
        image.load()  # before the array is taken: a header without pixels ends here
        if pixels is None:
            pixels = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, _ROWS_AT_ONCE):
            rgb = over_white(image.crop((0, top, width, min(height, top + _ROWS_AT_ONCE))))
            if planes:
                pixels[top : top + _ROWS_AT_ONCE, :, channel] = rgb[:, :, 0]
            else:
                pixels[top : top + _ROWS_AT_ONCE] = rgb
    assert pixels is not None
    return pixels


def over_white(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3); transparent pixels show the white background of a slide."""
    if image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def _opened(path: Path, tiff: TiffImage | None) -> Image.Image:
    """The image by Pillow. Raises UnreadableFile, which names the compression of a TIFF that it does not know.

    A file that was not inspected is not opened as TIFF: Pillow takes more beginnings for one than others do.
    """
    if tiff is None:
        return open_picture(path, formats=_PLAIN)
    try:
        return open_picture(path, formats=("TIFF",))
    except UnreadableFile as error:
        stored = tiff.levels[0].page.compression
        compression = getattr(stored, "name", str(stored))
        raise UnreadableFile(
            f"{path} is a TIFF of the kind {tiff.kind} compressed by {compression}, which cannot be decoded here. {TO_RGB}, "
            "compressed by JPEG, LZW or deflate."
        ) from error


def _frames_of(tiff: TiffImage | None) -> list[int]:
    """Numbers of the pages that are R, G and B; none for an image in one page."""
    planes = tiff.levels[0].planes if tiff else ()
    return [int(page.index) for page in planes] if len(planes) > 1 else []


def _bits_of_png(path: Path) -> int:
    """Bits a sample of a PNG; 8 for any other file."""
    with open(path, "rb") as file:
        head = file.read(_PNG_BITS + 1)
    return head[_PNG_BITS] if head.startswith(_PNG_HEADER) and len(head) > _PNG_BITS else 8


def _check_density(path: Path, width: int, height: int) -> None:
    length = os.path.getsize(path)
    if width * height > _GREATEST_PX_PER_BYTE * length:
        raise UnreadableFile(
            f"{path} should have {width} x {height} pixels, which {length} bytes cannot hold. The file is truncated or "
            "damaged; download or copy it again."
        )


def _check_memory(path: Path, width: int, height: int) -> None:
    needed = 7 * width * height  # Pillow holds four bytes a pixel while the array of three is filled
    available = available_memory()
    if needed > available:
        raise UnreadableFile(
            f"{path} has {width} x {height} pixels and must be decoded whole, which takes {needed / 1e9:.1f} GB; "
            f"{available / 1e9:.1f} GB are available here. Convert it to a tiled TIFF, which is read by region "
            f"(for example: vips tiffsave {path.name} {path.stem}.tif --tile --pyramid --compression jpeg)."
        )
