"""Readers of images of every kind. The independent readers are Pillow and tifffile, without any check of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from datasets.images.slides import open_slide
from tests.soak.fuzz import Reader

SIDE = 96


def picture() -> np.ndarray:
    """Uneven colours, so that a moved or exchanged part shows."""
    y, x = np.mgrid[:SIDE, :SIDE]
    noise = np.random.default_rng(3).integers(0, 20, (SIDE, SIDE, 3))
    return (np.stack([x * 2, y * 2, x + y], axis=2) + noise).astype(np.uint8)


def by_name(folder: Path, *, name: str, **how: object) -> Path:
    Image.fromarray(picture()).save(folder / name, **how)
    return folder / name


def tiff(folder: Path, *, name: str = "A1.tif", levels: int = 1, **how: object) -> Path:
    with tifffile.TiffWriter(folder / name, ome=name.endswith(".ome.tif")) as file:
        pixels = picture()
        file.write(pixels, photometric="rgb", subifds=levels - 1 if name.endswith(".ome.tif") else 0, **how)
        for level in range(1, levels):
            file.write(pixels[:: 2**level, :: 2**level], photometric="rgb", subfiletype=1, **how)
    return folder / name


def pixels_of(path: Path) -> object:
    """Everything that training and prediction ask of an image."""
    with open_slide(path) as slide:
        whole = slide.read_region(0, 0, *slide.size)
        small, scale = slide.thumbnail(32)
        assert small.shape[2] == 3 and scale <= 1
        return {"size": list(slide.size), "pixels": whole}


def _found(pixels: np.ndarray) -> object:
    return {"size": [pixels.shape[1], pixels.shape[0]], "pixels": pixels}


def by_pillow(path: Path) -> object:
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        image.verify()  # of a PNG: one with wrong checksums is no other image
    with Image.open(path) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return _found(np.asarray(image.convert("RGB")))


def by_tifffile(path: Path) -> object:
    with tifffile.TiffFile(path, _multifile=False) as file:
        return _found(file.pages.first.asarray())


def by_tifffile_on_white(path: Path) -> object:
    """Tile by tile, or strip by strip, with white where one is left out of the file."""
    with tifffile.TiffFile(path, _multifile=False) as file:
        page = file.pages.first
        pixels = np.full(page.shape, 255, dtype=np.uint8)
        for index, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts)):
            if count > 0:
                file.filehandle.seek(offset)
                content = file.filehandle.read(count)
                tile, (_, _, top, left, _), _ = page.decode(content, index, jpegtables=page.jpegtables)
                part = pixels[top : top + tile.shape[1], left : left + tile.shape[2]]
                part[:] = tile[0, : part.shape[0], : part.shape[1]]
        return _found(pixels)


def _image(title: str, make: Callable[..., Path], **how: object) -> Reader:
    name = str(how.get("name", "A1.tif"))
    oracles = (by_tifffile, by_tifffile_on_white, by_pillow) if name.endswith(".tif") else (by_pillow,)
    return Reader(f"image, {title}", partial(make, **how), pixels_of, oracles)


READERS = [
    _image("JPEG", by_name, name="A1.jpg", quality=80),
    _image("JPEG, progressive", by_name, name="A1.jpg", quality=80, progressive=True),
    _image("PNG", by_name, name="A1.png"),
    _image("BMP", by_name, name="A1.bmp"),
    _image("TIFF in strips", tiff, rowsperstrip=32),
    _image("TIFF in strips, LZW", by_name, name="A1.tif", compression="tiff_lzw"),
    _image("TIFF in strips, JPEG", by_name, name="A1.tif", compression="jpeg"),
    _image("TIFF in tiles", tiff, tile=(32, 32)),
    _image("TIFF in tiles, deflate", tiff, tile=(32, 32), compression="zlib"),
    _image("TIFF in tiles, pyramid", tiff, tile=(32, 32), levels=2),
    _image("OME-TIFF", tiff, name="A1.ome.tif", tile=(32, 32), metadata={"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}),
]
