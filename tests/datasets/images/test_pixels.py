"""Every kind of pixels is read to the same colours, or refused with the same words, however the file is stored."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets.images.readers import OpenSlideReader, PlainReader, TiledTiffReader
from datasets.images.slides import Slide, open_slide
from datasets.images.tiff_pages import GREATEST_TILE_PX, PIXEL_KINDS

WIDTH, HEIGHT = 200, 144
TISSUE, STAIN = (200, 60, 120), (10, 220, 90)
STORED = ("striped", "tiled", "pyramidal")


def _picture() -> np.ndarray:
    """Two colours; the second one top left."""
    picture = np.full((HEIGHT, WIDTH, 3), TISSUE, dtype=np.uint8)
    picture[:72, :100] = STAIN
    return picture


def _alpha() -> np.ndarray:
    """Opaque, transparent on the right."""
    alpha = np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)
    alpha[:, 152:] = 0
    return alpha


RGB, ALPHA = _picture(), _alpha()
GREY = RGB[:, :, 0]
OVER_WHITE = np.where(ALPHA == 0, 255, RGB).astype(np.uint8)
INDEX = np.where(STAIN[0] == GREY, 2, 1).astype(np.uint8)
COLOUR_MAP = np.zeros((3, 256), dtype=np.uint16)
COLOUR_MAP[:, 1], COLOUR_MAP[:, 2] = np.array(TISSUE) * 257, np.array(STAIN) * 257
PLANES = np.moveaxis(RGB, 2, 0)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _with(*samples: np.ndarray) -> np.ndarray:
    return np.concatenate(samples, axis=2)


# name: pixels as written, how, pixels as they should be read, kind of PIXEL_KINDS
READ = {
    "interleaved": (RGB, {"photometric": "rgb"}, RGB, "RGB"),
    "planar": (PLANES, {"photometric": "rgb", "planarconfig": "separate"}, RGB, "RGB"),
    "alpha": (_with(RGB, ALPHA), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, OVER_WHITE, "RGB with alpha"),
    "premultiplied alpha": (
        _with(np.where(ALPHA == 0, 0, RGB).astype(np.uint8), ALPHA),
        {"photometric": "rgb", "extrasamples": ["assocalpha"]},
        OVER_WHITE,
        "RGB with alpha",
    ),
    "a fourth sample": (
        _with(RGB, ALPHA),
        {"photometric": "rgb", "extrasamples": ["unspecified"]},
        RGB,
        "RGB with other samples",
    ),
    "five samples": (
        _with(RGB, ALPHA, ALPHA),
        {"photometric": "rgb", "extrasamples": ["unspecified"] * 2},
        RGB,
        "RGB with other samples",
    ),
    "grey": (GREY, {"photometric": "minisblack"}, _three(GREY), "grey"),
    "grey, zero is white": (255 - GREY, {"photometric": "miniswhite"}, _three(GREY), "grey"),
    "grey with alpha": (
        _with(GREY[:, :, None], ALPHA),
        {"photometric": "minisblack", "extrasamples": ["unassalpha"]},
        np.where(ALPHA == 0, 255, _three(GREY)).astype(np.uint8),
        "grey with alpha",
    ),
    "bilevel": (
        TISSUE[0] == GREY,
        {"photometric": "minisblack"},
        _three(np.where(TISSUE[0] == GREY, 255, 0).astype(np.uint8)),
        "grey of fewer bits",
    ),
    "palette": (INDEX, {"photometric": "palette", "colormap": COLOUR_MAP}, RGB, "palette"),
    "cmyk": (np.asarray(Image.fromarray(RGB).convert("CMYK")), {"photometric": "separated"}, RGB, "CMYK"),
    "planes of OME-TIFF": (
        PLANES,
        {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CYX"}},
        RGB,
        "three grey planes",
    ),
    "planes called blue, green, red": (
        PLANES[::-1],
        {
            "photometric": "minisblack",
            "ome": True,
            "metadata": {"axes": "CYX", "Channel": {"Name": ["Blue", "Green", "Red"]}},
        },
        RGB,
        "three grey planes",
    ),
    "planes of ImageJ": (
        PLANES,
        {"photometric": "minisblack", "imagej": True, "metadata": {"axes": "CYX"}},
        RGB,
        "three grey planes",
    ),
}
SIXTEEN = "has pixels of the kind {} with 16 bits; expected 8 bits per channel .* Convert the image to 8-bit RGB"
REFUSED = {
    "16 bits": (RGB.astype(np.uint16) * 16, {"photometric": "rgb"}, SIXTEEN.format("RGB")),
    "grey of 16 bits": (GREY.astype(np.uint16) * 16, {"photometric": "minisblack"}, SIXTEEN.format("greyscale")),
    "floating point": (RGB / np.float32(255), {"photometric": "rgb"}, "has pixels of the kind RGB with 32 bits"),
    "signed": (
        RGB.astype(np.int8),
        {"photometric": "rgb"},
        r"has pixels of the kind RGB, 3 samples of 8 bits \(int8\)",
    ),
    "lab": (RGB, {"photometric": "cielab"}, "has pixels of the kind CIELAB, 3 samples"),
    "grey with two more": (
        RGB,
        {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unspecified"] * 2},
        "has pixels of the kind greyscale, 3 samples",
    ),
    "four planes": (
        np.stack([GREY] * 4),
        {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CYX"}},
        "holds 4 images of 200 x 144 pixels .*axes CYX.* python -c",
    ),
    "planes of no known meaning": (PLANES, {"photometric": "minisblack"}, "holds 3 images .*axes [QI]YX"),
    "planes of fluorescence": (
        PLANES,
        {
            "photometric": "minisblack",
            "ome": True,
            "metadata": {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy3"]}},
        },
        "holds 3 images .* its channels are called dapi, fitc, cy3",
    ),
    "focal planes": (
        np.stack([RGB, RGB]),
        {"photometric": "rgb", "ome": True, "metadata": {"axes": "ZYXS"}},
        "holds 2 images .*axes ZYXS",
    ),
}


def _write(path: Path, pixels: np.ndarray, options: dict, stored: str) -> Path:
    """A TIFF in strips, in tiles, or in tiles at three resolutions (those of planes as sub-images)."""
    options = dict(options)
    storage = {"rowsperstrip": 16} if stored == "striped" else {"tile": (64, 64)}
    if stored != "pyramidal":
        tifffile.imwrite(path, pixels, **options, **storage)
        return path
    file_options = {name: options.pop(name) for name in ("ome", "imagej") if name in options}
    metadata = options.pop("metadata", None)
    has_planes = pixels.ndim - (pixels.shape[-1] <= 5) == 3 and options.get("planarconfig") != "separate"
    smaller = [
        pixels[..., :: 2**i, :: 2**i] if pixels.shape[-1] > 5 else pixels[..., :: 2**i, :: 2**i, :] for i in (1, 2)
    ]
    with tifffile.TiffWriter(path, **file_options) as writer:
        below = {"subifds": 2} if has_planes else {}
        writer.write(pixels, metadata=metadata, **options, **storage, **below)
        for level in smaller:
            writer.write(level, subfiletype=1, metadata=None, **options, **storage)
    return path


POSSIBLE = [(name, stored) for name in READ for stored in STORED if (name, stored) != ("planes of ImageJ", "pyramidal")]


@pytest.mark.parametrize(("name", "stored"), POSSIBLE)
def test_pixels_are_read_alike_however_they_are_stored(tmp_path, name, stored):
    pixels, options, expected, _ = READ[name]
    path = _write(tmp_path / "slide.tif", pixels, options, stored)
    with open_slide(path) as slide:
        assert slide.size == (WIDTH, HEIGHT)
        whole = slide.read_region(0, 0, WIDTH, HEIGHT)
        piece = slide.read_region(80, 60, 100, 50)
        half = slide.read_region(0, 0, WIDTH, HEIGHT, size=(WIDTH // 2, HEIGHT // 2))
    assert np.array_equal(whole, expected)
    assert np.array_equal(piece, expected[60:110, 80:180])
    for y, x in ((10, 10), (10, 60), (60, 10), (60, 90), (30, 70)):
        assert np.abs(half[y, x].astype(int) - expected[2 * y, 2 * x]).max() <= 2


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", REFUSED)
def test_other_pixels_are_refused_in_the_same_words(tmp_path, name, stored):
    pixels, options, message = REFUSED[name]
    path = _write(tmp_path / "slide.tif", pixels, options, stored)
    with pytest.raises(ValueError, match=rf"slide\.tif {message}"):
        open_slide(path)


def test_the_page_says_what_is_done_with_each_kind():
    page = (Path(__file__).resolve().parents[3] / "docs" / "your_data.md").read_text()
    for name, kind in PIXEL_KINDS.items():
        assert f"| {name} | {kind.becomes} |" in page


def test_every_kind_of_the_table_is_read_by_a_test():
    assert {kind for _, _, _, kind in READ.values()} | {"YCbCr"} == set(PIXEL_KINDS)


@pytest.mark.parametrize("name", [name for name, (*_, kind) in READ.items() if not PIXEL_KINDS[kind].by_openslide])
def test_openslide_is_not_asked_for_what_it_takes_for_something_else(tmp_path, name):
    pixels, options, _, _ = READ[name]
    with open_slide(_write(tmp_path / "slide.tif", pixels, options, "tiled")) as slide:
        assert isinstance(slide._reader, TiledTiffReader | PlainReader)


@pytest.mark.parametrize("name", ["interleaved", "a fourth sample", "grey, zero is white", "grey with alpha"])
def test_tifffile_reads_the_same_tiles(tmp_path, name):
    pixels, options, expected, _ = READ[name]
    path = _write(tmp_path / "slide.tif", pixels, options, "tiled")
    with Slide(path, TiledTiffReader(path)) as slide:
        assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT), expected)


def test_files_of_a_scanner_are_inspected_too(tmp_path):
    """OpenSlide takes a file for Aperio's by its description, and knows its structure; 16 bits are refused there, too."""
    options = {"photometric": "rgb", "tile": (64, 64), "description": "Aperio Image|MPP = 0.25", "metadata": None}
    tifffile.imwrite(tmp_path / "slide.svs", RGB, **options)
    with open_slide(tmp_path / "slide.svs") as slide:
        assert isinstance(slide._reader, OpenSlideReader) and slide.microns_per_pixel == pytest.approx(0.25)
        assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT), RGB)
    tifffile.imwrite(tmp_path / "deep.svs", RGB.astype(np.uint16) * 16, **options)
    with pytest.raises(ValueError, match=rf"deep\.svs {SIXTEEN.format('RGB')}"):
        open_slide(tmp_path / "deep.svs")


def test_jpeg_in_a_tiff_is_converted_from_ycbcr(tmp_path):
    """In strips, as Pillow writes it."""
    Image.fromarray(RGB).convert("YCbCr").save(tmp_path / "slide.tif", compression="jpeg", quality=95)
    with tifffile.TiffFile(tmp_path / "slide.tif") as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
    with open_slide(tmp_path / "slide.tif") as slide:
        read = slide.read_region(0, 0, WIDTH, HEIGHT)
    assert np.abs(read[100, 150].astype(int) - TISSUE).max() < 6 and np.abs(read[20, 20].astype(int) - STAIN).max() < 6


@pytest.mark.parametrize("compression", ["adobe_deflate", "packbits"])
def test_planes_are_read_in_whatever_compression(tmp_path, compression):
    options = {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CYX"}, "compression": compression}
    for stored in STORED:
        with open_slide(_write(tmp_path / f"{stored}.tif", PLANES, options, stored)) as slide:
            assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT), RGB)


def test_png_of_16_bits_is_refused_like_a_tiff(tmp_path):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + (row.astype(">u2") * 16).tobytes() for row in RGB)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(ValueError, match=rf"deep\.png {SIXTEEN.format('RGB')}"):
        open_slide(tmp_path / "deep.png")
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=rf"grey\.png {SIXTEEN.format('I;16')}"):
        open_slide(tmp_path / "grey.png")


@pytest.mark.parametrize(("size", "unit", "microns"), [(0.25, "µm", 0.25), (250, "nm", 0.25), (0.0005, "mm", 0.5)])
@pytest.mark.parametrize("stored", STORED)
def test_size_of_a_pixel_of_ome_tiff(tmp_path, stored, size, unit, microns):
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    path = _write(tmp_path / "slide.ome.tif", RGB, {"photometric": "rgb", "ome": True, "metadata": metadata}, stored)
    with open_slide(path) as slide:
        assert isinstance(slide._reader, PlainReader if stored == "striped" else OpenSlideReader)
        assert slide.microns_per_pixel == pytest.approx(microns)


def test_size_of_a_pixel_of_ome_tiff_goes_before_the_tags_and_needs_a_length(tmp_path):
    for unit, microns in (("µm", 0.25), ("pixel", 0.5)):
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": unit}
        tifffile.imwrite(
            tmp_path / "slide.ome.tif",
            RGB,
            photometric="rgb",
            tile=(64, 64),
            metadata=metadata,
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
        )
        with open_slide(tmp_path / "slide.ome.tif") as slide:
            assert slide.microns_per_pixel == pytest.approx(microns)


def test_size_of_a_pixel_in_the_tags_of_striped_and_tiled_files(tmp_path):
    for stored in STORED:
        options = {"photometric": "rgb", "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
        with open_slide(_write(tmp_path / f"{stored}.tif", RGB, options, stored)) as slide:
            assert slide.microns_per_pixel == pytest.approx(0.5)
    Image.fromarray(RGB).save(tmp_path / "dpi.tif", dpi=(50_800, 50_800))
    with open_slide(tmp_path / "dpi.tif") as slide:
        assert slide.microns_per_pixel == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("unit", "microns"),
    [("um", 0.25), (r"\u00B5m", 0.25), ("micron", 0.25), ("nm", None), ("pixel", None), ("", None), ("kelvin", None)],
)
@pytest.mark.parametrize("stored", ["striped", "tiled"])
def test_size_of_a_pixel_of_imagej(tmp_path, stored, unit, microns):
    """Its resolution counts pixels a unit, which the description names; 4 a nanometre are no slide."""
    options = {"photometric": "rgb", "imagej": True, "resolution": (4, 4), "metadata": {"unit": unit}}
    with open_slide(_write(tmp_path / "slide.tif", RGB, options, stored)) as slide:
        assert slide.microns_per_pixel == microns


@pytest.mark.parametrize(("unit", "microns_of_unit"), [("mm", 1e3), ("cm", 1e4), ("inch", 25_400)])
def test_longer_units_of_imagej(tmp_path, unit, microns_of_unit):
    resolution = (microns_of_unit * 2, microns_of_unit * 2)
    options = {"photometric": "rgb", "imagej": True, "resolution": resolution, "metadata": {"unit": unit}}
    with open_slide(_write(tmp_path / "slide.tif", RGB, options, "striped")) as slide:
        assert slide.microns_per_pixel == pytest.approx(0.5)


@pytest.mark.parametrize("stored", ["striped", "tiled"])
@pytest.mark.parametrize("name", ["pages.tif", "pages.ome.tif"])
def test_a_label_or_thumbnail_before_the_slide_is_refused_and_one_behind_it_is_not(tmp_path, name, stored):
    storage = {"photometric": "rgb"} | ({"rowsperstrip": 16} if stored == "striped" else {"tile": (64, 64)})
    label, path = RGB[:80, :80], tmp_path / name
    for images, refusal in (
        (
            [label, RGB],
            r"several images \(page 0: 80 x 80, page 1: 200 x 144 pixels\).* the slide alone: vips tiffsave",
        ),
        ([label, label[:40], RGB], r"several images \(page 0: 80 x 80, page 1: 80 x 40, page 2: 200 x 144 pixels\)"),
        ([RGB, RGB], r"(several images \(page 0: 200 x 144, page 1: 200 x 144 pixels\)|2 images of 200 x 144 pixels)"),
        ([RGB, label], None),
    ):
        with tifffile.TiffWriter(path, ome=name.endswith(".ome.tif")) as file:
            for image in images:
                file.write(image, **storage, metadata={} if "ome" in name else None)
        if refusal is None:
            with open_slide(path) as slide:
                assert np.array_equal(slide.read_region(0, 0, *slide.size), RGB)
        else:
            with pytest.raises(ValueError, match=f"{name} holds {refusal}"):
                open_slide(path)


def test_a_slide_below_its_thumbnail_is_refused_and_a_mask_of_it_is_no_slide(tmp_path):
    with tifffile.TiffWriter(tmp_path / "raw.tif") as file:
        file.write(RGB[:80, :80], photometric="rgb", subifds=1, metadata=None)
        file.write(RGB, photometric="rgb", metadata=None)
    with pytest.raises(ValueError, match=r"raw\.tif holds several images .*below page 0: 200 x 144.*vips tiffsave"):
        open_slide(tmp_path / "raw.tif")
    with tifffile.TiffWriter(tmp_path / "masked.tif") as file:
        file.write(RGB, photometric="rgb", metadata=None)
        file.write(GREY > 100, photometric="mask", subfiletype=4, metadata=None)
    with open_slide(tmp_path / "masked.tif") as slide:
        assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT), RGB)


def test_a_giant_tile_is_refused_before_it_is_decoded(tmp_path):
    """A header that claims one tile of 40 000 x 40 000: OpenSlide would ask for 6.4 GB and abort the process."""
    side = 40_000
    assert side * side > GREATEST_TILE_PX
    path = _write(tmp_path / "bomb.tif", RGB, {"photometric": "rgb"}, "tiled")
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("ImageWidth", "ImageLength", "TileWidth", "TileLength"):
            file.pages.first.tags[name].overwrite(side)
    with pytest.raises(ValueError, match=r"bomb\.tif is stored in tiles of 1600 megapixels.*vips tiffsave"):
        open_slide(path)


def test_a_header_without_pixels_is_refused_at_once(tmp_path):
    """69 bytes that claim 50 000 x 50 000 pixels."""
    Image.new("RGB", (1, 1)).save(tmp_path / "header.png")
    content = bytearray((tmp_path / "header.png").read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "header.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"header\.png should have 50000 x 50000 pixels, which \d+ bytes cannot hold"):
        open_slide(tmp_path / "header.png")


def test_a_tiff_without_its_end_is_refused_when_it_is_opened(tmp_path):
    for stored in STORED:
        path = _write(tmp_path / f"{stored}.tif", RGB, {"photometric": "rgb"}, stored)
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=rf"{stored}\.tif (is truncated|cannot be decoded)"):
            open_slide(path)


def test_a_tiff_that_does_not_say_what_its_pixels_are_is_refused(tmp_path):
    """Its tag number changed, which left a grey picture of the levels of an RGB image, dark and bright exchanged."""
    for stored in STORED:
        path = _write(tmp_path / f"{stored}.tif", RGB, {"photometric": "rgb"}, stored)
        with tifffile.TiffFile(path) as file:
            offset = file.pages.first.tags["PhotometricInterpretation"].offset
        content = bytearray(path.read_bytes())
        content[offset] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{stored}\.tif does not say what its pixels are: .*PhotometricInterpretation"
        ):
            open_slide(path)


def test_a_size_that_the_tiles_do_not_fill_is_refused_when_it_is_opened(tmp_path):
    """One wrong byte made 4 million columns of it, and a thumbnail took for ever."""
    for stored, tag in (("tiled", "ImageWidth"), ("pyramidal", "ImageLength"), ("striped", "ImageLength")):
        path = _write(tmp_path / f"{stored}.tif", RGB, {"photometric": "rgb"}, stored)
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages.first.tags[tag].overwrite(4_000_000)
        with pytest.raises(ValueError, match=rf"{stored}\.tif is damaged: .*4000000.* tiles or strips, it lists \d+"):
            open_slide(path)


def test_a_png_with_changed_pixels_is_told_by_its_checksums(tmp_path):
    path = tmp_path / "A1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path, compress_level=0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with (
        open_slide(path) as slide,
        pytest.raises(ValueError, match=r"A1\.png cannot be decoded: .*The file is truncated"),
    ):
        slide.read_region(0, 0, 50, 40)
