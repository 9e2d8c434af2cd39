"""What the pages of a TIFF hold, looked at before any reader decodes them: read as 8-bit RGB, or refused with a remedy.

OpenSlide, tifffile and Pillow take different things for granted (a tiled page with 16 bits, a grey plane, a fourth
sample), so the answer must not depend on which of them opens a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffFrame, TiffPage

from datasets.images.pixel_size import microns_of_tiff
from utils.files import UnreadableFile
from utils.text import some

GREATEST_TILE_PX = 64_000_000
TO_RGB = "Convert the image to 8-bit RGB"
_TO_TILES = "Convert it to a tiled TIFF: vips tiffsave {name} {stem}_tiled.tif --tile --pyramid --compression jpeg."


@dataclass(frozen=True)
class PixelKind:
    """How the samples of a page are read.  becomes: what is done with them.  by_openslide: OpenSlide does just that."""

    becomes: str
    by_openslide: bool


# Of 8 unsigned bits a sample; grey and palette may have fewer. Everything else is refused.
PIXEL_KINDS = {
    "RGB": PixelKind("read as it is, interleaved or in planes of one page", True),
    "RGB with alpha": PixelKind("laid over white", True),
    "RGB with other samples": PixelKind("the other samples are left out", False),
    "YCbCr": PixelKind("converted to RGB", True),
    "grey": PixelKind("three equal channels", True),
    "grey with alpha": PixelKind("laid over white, then three equal channels", False),
    "grey of fewer bits": PixelKind("scaled to 8 bits, then three equal channels", False),
    "palette": PixelKind("the colours of the palette", True),
    "CMYK": PixelKind("converted to RGB without a colour profile", True),
    "three grey planes": PixelKind("the channels R, G and B of one image", False),
}
_PLANES = "three grey planes"
_COLOUR_SAMPLES: dict[int, int] = {
    PHOTOMETRIC.RGB: 3,
    PHOTOMETRIC.YCBCR: 3,
    PHOTOMETRIC.MINISBLACK: 1,
    PHOTOMETRIC.MINISWHITE: 1,
    PHOTOMETRIC.PALETTE: 1,
    PHOTOMETRIC.SEPARATED: 4,
}
_ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
_NUMBERED = re.compile(r"(channel|chan|ch|c)?[\s_:#-]*\d*(:\d+)*")  # names of channels that say nothing


@dataclass(frozen=True)
class TiffLevel:
    """One resolution. page: how its pixels are stored.  planes: the pages that hold them: one, or R, G and B in turn."""

    page: TiffPage
    planes: Sequence[TiffPage | TiffFrame]


@dataclass(frozen=True)
class TiffImage:
    """The image of a TIFF. kind: of `PIXEL_KINDS`.  levels: the finest first."""

    kind: str
    levels: Sequence[TiffLevel]
    microns_per_pixel: float | None

    @property
    def by_openslide(self) -> bool:
        """Whether OpenSlide, where it opens such a file, reads its pixels as they are meant."""
        return PIXEL_KINDS[self.kind].by_openslide


def inspect_tiff(file: tifffile.TiffFile, path: Path) -> TiffImage:
    """Look at the first image of a TIFF. Raises UnreadableFile if it is not 8-bit colour or grey in one page.

    Also for tiles above 64 megapixels, which no reader may be asked for, for pages whose data lie behind the end, and where
    another image in the file is as large.
    """
    series = file.series[0]
    page = series.keyframe
    _check_tiles(file, path)
    _check_first(file, path)
    kind = kind_of(page, path)
    num_planes = math.prod(series.shape) // math.prod(page.shape)
    order: Sequence[int] = (0,)
    if num_planes > 1:
        order, kind = _order_of_planes(series, kind, num_planes, file.pages.first.description or "", path), _PLANES
    levels = [TiffLevel(level.keyframe, [_page_of(level, plane, path) for plane in order]) for level in series.levels]
    for level in levels:
        kind_of(level.page, path)
        _check_length(level, path)
    return TiffImage(kind, levels, microns_of_tiff(file))


def check_scanner_tiff(path: Path) -> None:
    """Refuse a scanner's file with deep pixels or giant tiles. Its structure is OpenSlide's business, which knows it.

    Raises UnreadableFile.
    """
    try:
        file = tifffile.TiffFile(path, _multifile=False)
    except tifffile.TiffFileError:  # TIFF by its first bytes only
        return
    with file:
        first = file.pages.first
        if _bits_of(first) > 8:
            raise deep_pixels(path, _name_of(first), _bits_of(first))
        _check_tiles(file, path)


def kind_of(page: TiffPage, path: Path) -> str:
    """Return the name in `PIXEL_KINDS` of a page. Raises UnreadableFile for all others, and for one that does not say it."""
    if "PhotometricInterpretation" not in page.tags:  # readers guess without, each in its own way
        raise UnreadableFile(
            f"{path} does not say what its pixels are: a page lacks PhotometricInterpretation, which every TIFF has. It is "
            "damaged; download or copy it again."
        )
    name, samples, bits = _name_of(page), page.samplesperpixel, _bits_of(page)
    colours = _COLOUR_SAMPLES.get(page.photometric, 0)
    if bits > 8 or (bits < 8 and samples > 1):
        raise deep_pixels(path, name, bits)
    others = [page.extrasamples[i] if i < len(page.extrasamples) else 0 for i in range(samples - colours)]
    kind = _kind(page.photometric, bits, others) if 0 < colours <= samples else None
    is_unsigned = page.dtype is not None and page.dtype.kind in "ub"
    if kind is None or not is_unsigned or page.imagedepth != 1:
        raise UnreadableFile(
            f"{path} has pixels of the kind {name}, {samples} samples of {bits} bits ({page.dtype}); expected RGB, "
            f"greyscale, CMYK or a palette. {TO_RGB}."
        )
    return kind


def deep_pixels(path: Path, name: str, bits: int) -> UnreadableFile:
    """The refusal of more (or fewer) than 8 bits a channel, the same whoever would read the file."""
    return UnreadableFile(
        f"{path} has pixels of the kind {name} with {bits} bits; expected 8 bits per channel (RGB, RGBA or greyscale). "
        f"{TO_RGB}, its brightest value scaled to 255."
    )


def _kind(photometric: int, bits: int, others: Sequence[int]) -> str | None:
    """The kind of a page with these samples beside those of colour; None if there is none."""
    has_alpha = len(others) == 1 and others[0] in _ALPHA
    if photometric == PHOTOMETRIC.RGB:
        return "RGB with alpha" if has_alpha else "RGB with other samples" if others else "RGB"
    if photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE) and has_alpha:
        return "grey with alpha"
    if others:
        return None
    names: dict[int, str] = {PHOTOMETRIC.PALETTE: "palette", PHOTOMETRIC.YCBCR: "YCbCr", PHOTOMETRIC.SEPARATED: "CMYK"}
    return names.get(photometric, "grey" if bits == 8 else "grey of fewer bits")


def _bits_of(page: TiffPage) -> int:
    """Bits of the deepest sample."""
    return int(np.max(page.tags.valueof(258, default=1)))


def _name_of(page: TiffPage) -> str:
    name = getattr(page.photometric, "name", str(page.photometric))
    return {"MINISBLACK": "greyscale", "MINISWHITE": "greyscale", "SEPARATED": "CMYK"}.get(name, name)


def _order_of_planes(
    series: tifffile.TiffPageSeries, kind: str, num_planes: int, description: str, path: Path
) -> list[int]:
    """Which planes are R, G and B. Raises UnreadableFile unless these are declared as the channels of the image."""
    found = f"{path} holds {num_planes} images of {series.keyframe.imagewidth} x {series.keyframe.imagelength} pixels"
    found += f" ({kind}; axes {series.axes}) where one RGB image was expected"
    remedy = (
        'Keep one, or make an RGB image of the three that are red, green and blue: python -c "import numpy, tifffile; '
        f"tifffile.imwrite('rgb.tif', numpy.moveaxis(tifffile.imread('{path.name}')[[0, 1, 2]], 0, 2), photometric='rgb', "
        'tile=(256, 256))"'
    )
    if series.axes != "CYX" or num_planes != 3 or kind != "grey":
        raise UnreadableFile(f"{found}. {remedy}")
    names = [re.search(r'\bName="([^"]*)"', tag) for tag in re.findall(r"<(?:\w+:)?Channel\b[^>]*>", description)]
    given = [name[1].strip().lower() if name else "" for name in names[:3]]
    if all(_NUMBERED.fullmatch(name) for name in given):
        return [0, 1, 2]
    initials = [name[:1] for name in given if name in ("r", "g", "b", "red", "green", "blue")]
    if sorted(initials) != ["b", "g", "r"]:
        raise UnreadableFile(f"{found}, and its channels are called {', '.join(given)}. {remedy}")
    return [initials.index(colour) for colour in "rgb"]


def _page_of(level: tifffile.TiffPageSeries, plane: int, path: Path) -> TiffPage | TiffFrame:
    try:
        page = level[plane]
    except IndexError:
        page = None
    if page is None:
        raise UnreadableFile(f"{path} lacks the page of plane {plane}: it lies in another file. {TO_RGB}.")
    return page


def _check_first(file: tifffile.TiffFile, path: Path) -> None:
    """Refuse a label or a thumbnail before the slide, and two slides: a reader takes the first image for the slide."""
    own = {page.offset for level in file.series[0].levels for page in level.pages if page is not None}
    first = file.series[0].keyframe
    large, names = {file.pages.first.offset}, []
    for page in file.pages:
        found = [(f"page {page.index}", page.offset, page.keyframe)]
        for below in (page.keyframe and page.keyframe.pages) or ():
            found.append((f"below page {page.index}", below.offset, below.keyframe))
        for name, offset, stored in found:
            if stored is not None and not stored.is_mask:
                names.append(f"{name}: {stored.imagewidth} x {stored.imagelength}")
                if stored.imagewidth * stored.imagelength >= first.imagewidth * first.imagelength:
                    large.add(offset)
    if not large <= own:
        raise UnreadableFile(
            f"{path} holds several images ({some(names)} pixels), and the first is not larger than all others, as the slide "
            "should be. Save the slide alone: "
            f'vips tiffsave "{path.name}[page=N]" {path.stem}_slide.tif --tile --pyramid --compression jpeg, N its page.'
        )


def _tile_size(page: TiffPage | None) -> int:
    return page.tilewidth * page.tilelength if page is not None and page.is_tiled else 0


def _check_tiles(file: tifffile.TiffFile, path: Path) -> None:
    greatest = max(_tile_size(page.keyframe) for page in file.pages)
    if greatest > GREATEST_TILE_PX:
        raise _giant_tiles(path, greatest)


def _giant_tiles(path: Path, size: int) -> UnreadableFile:
    return UnreadableFile(
        f"{path} is stored in tiles of {size / 1e6:.0f} megapixels; more than {GREATEST_TILE_PX / 1e6:.0f} are not decoded "
        f"at a time. {_TO_TILES.format(name=path.name, stem=path.stem)}"
    )


def _check_length(level: TiffLevel, path: Path) -> None:
    """There must be as many tiles or strips as the size asks for, and all must lie inside the file."""
    page = level.page
    pieces = -(-page.imagelength // (page.tilelength if page.is_tiled else max(1, page.rowsperstrip)))
    pieces *= -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
    pieces *= page.samplesperpixel if page.planarconfig == 2 else 1
    if len(page.dataoffsets) < pieces:
        raise UnreadableFile(
            f"{path} is damaged: {page.imagewidth} x {page.imagelength} pixels are {pieces} tiles or strips, it lists "
            f"{len(page.dataoffsets)}. Download or copy it again."
        )
    ends = (offset + count for plane in level.planes for offset, count in zip(plane.dataoffsets, plane.databytecounts))
    end, length = max(ends, default=0), path.stat().st_size
    if end > length:
        raise UnreadableFile(
            f"{path} is truncated: its pixels reach to byte {end}, it has {length}. Download or copy it again."
        )
