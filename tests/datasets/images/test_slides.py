"""Regions, thumbnails and metadata of every kind of image, against a plain array with a white border."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets.images.geometry import neighbor_corners, neighbor_validity, patch_corner
from datasets.images.readers import OpenSlideReader, PlainReader, TiledTiffReader
from datasets.images.slides import Slide, open_slide

WIDTH, HEIGHT = 200, 144


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth colours, so that a scaled version can be compared."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x % 256, (y * 255 // HEIGHT), (x + y) // 2], axis=2).astype(np.uint8)


def _white_border(picture: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """The slow version: one pixel after the other."""
    out = np.full((height, width, 3), 255, dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            if 0 <= y + row < picture.shape[0] and 0 <= x + column < picture.shape[1]:
                out[row, column] = picture[y + row, x + column]
    return out


def _write(path, picture: np.ndarray, kind: str) -> None:
    if kind == "png":
        Image.fromarray(picture).save(path)
    elif kind == "striped":
        tifffile.imwrite(path, picture, photometric="rgb", rowsperstrip=16)
    else:
        tifffile.imwrite(path, picture, photometric="rgb", tile=(32, 48), compression="adobe_deflate")


@pytest.fixture(params=["png", "striped", "tiled", "tiled by tifffile"])
def slide(request, tmp_path, picture):
    path = tmp_path / ("slide.png" if request.param == "png" else "slide.tif")
    _write(path, picture, request.param)
    opened = Slide(path, TiledTiffReader(path)) if request.param == "tiled by tifffile" else open_slide(path)
    expected = {"tiled": OpenSlideReader, "tiled by tifffile": TiledTiffReader}.get(request.param, PlainReader)
    assert isinstance(opened._reader, expected)
    with opened:
        yield opened


@pytest.mark.parametrize(
    "region",
    [(0, 0, 200, 144), (30, 40, 50, 60), (-10, -20, 40, 50), (180, 130, 40, 40), (-500, 10, 20, 20), (47, 31, 2, 2)],
)
def test_regions_are_the_pixels_and_white_outside(slide, picture, region):
    got = slide.read_region(*region)
    assert got.dtype == np.uint8 and slide.size == (WIDTH, HEIGHT)
    assert np.array_equal(got, _white_border(picture, *region))


def test_only_plain_images_are_decoded_whole(slide, picture):
    is_plain = isinstance(slide._reader, PlainReader)
    assert slide.decoded_bytes == (picture.nbytes if is_plain else 0)
    slide.decode()
    assert not is_plain or np.array_equal(slide._reader._pixels, picture)
    assert np.array_equal(slide.read_region(30, 40, 50, 60), picture[40:100, 30:80])


def test_a_region_is_scaled_like_the_mean_of_its_pixels(slide, picture):
    got = slide.read_region(8, 16, 80, 64, size=(20, 16))
    expected = picture[16:80, 8:88].reshape(16, 4, 20, 4, 3).mean(axis=(1, 3))
    assert got.shape == (16, 20, 3)
    assert np.abs(got[:, :].astype(float) - expected).max() <= 1.0


def test_a_scaled_region_outside_is_white(slide):
    assert (slide.read_region(-400, -400, 300, 300, size=(30, 30)) == 255).all()
    half = slide.read_region(-100, 0, 200, 100, size=(50, 25))
    assert (half[:, :24] == 255).all() and (half[:, 27:, 2] < 255).all()


def test_scaling_in_pieces_equals_scaling_at_once(slide, monkeypatch):
    at_once = slide.read_region(-7, 5, 190, 130, size=(31, 23))
    monkeypatch.setattr("datasets.images.slides._PIXELS_AT_ONCE", 30 * 30)
    assert np.array_equal(slide.read_region(-7, 5, 190, 130, size=(31, 23)), at_once)


def test_thumbnail_and_its_scale(slide):
    image, scale = slide.thumbnail(50)
    assert image.shape == (36, 50, 3) and scale == pytest.approx(0.25)
    image, scale = slide.thumbnail(5000)
    assert image.shape == (HEIGHT, WIDTH, 3) and scale == 1.0, "never enlarged"


def test_golden_section_patches_and_neighbor_regions(tmp_path, golden):
    """Spots that lie wholly inside; outside the published code is black or empty where ours is white."""
    section = golden("section")
    Image.fromarray(section["image"]).save(tmp_path / "section.png")
    half, neighbors, centers = int(section["r"]), int(section["num_neighbors"]), section["out_center_xy"]
    height, width = section["image"].shape[:2]
    is_valid = neighbor_validity(centers, (width, height), 2 * half, neighbors)
    assert np.array_equal(is_valid, section["out_mask"].astype(bool))

    patch_corners = patch_corner(centers, 2 * half)
    tile_corners = neighbor_corners(centers, 2 * half, neighbors)
    compared = 0
    with open_slide(tmp_path / "section.png") as slide:
        for spot in range(len(centers)):
            if not is_valid[spot].all():
                continue
            compared += 1
            patch = slide.read_region(*patch_corners[spot], 2 * half, 2 * half)
            assert np.allclose(_normalised(patch, section), section["out_patches"][spot], atol=1e-6)
            region = slide.read_region(*tile_corners[spot, 0], 2 * half * neighbors, 2 * half * neighbors)
            assert np.allclose(_normalised(region, section), section["out_neighbor_regions"][spot], atol=1e-6)
    assert compared >= 3


def _normalised(patch: np.ndarray, section: dict) -> np.ndarray:
    return ((patch / 255 - section["mean"]) / section["std"]).transpose(2, 0, 1)


def test_transparent_pixels_are_white_and_grey_becomes_colour(tmp_path, picture):
    alpha = np.zeros((HEIGHT, WIDTH, 1), dtype=np.uint8)
    alpha[:, 100:] = 255
    Image.fromarray(np.concatenate([picture, alpha], axis=2)).save(tmp_path / "alpha.png")
    with open_slide(tmp_path / "alpha.png") as slide:
        region = slide.read_region(0, 0, WIDTH, HEIGHT)
    assert (region[:, :100] == 255).all() and np.array_equal(region[:, 100:], picture[:, 100:])

    Image.fromarray(picture[:, :, 1]).save(tmp_path / "grey.png")
    with open_slide(tmp_path / "grey.png") as slide:
        assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT), np.repeat(picture[:, :, 1:2], 3, axis=2))
    tifffile.imwrite(tmp_path / "grey.tif", picture[:, :, 1], photometric="minisblack", tile=(32, 32))
    with Slide(tmp_path / "grey.tif", TiledTiffReader(tmp_path / "grey.tif")) as slide:
        assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT), np.repeat(picture[:, :, 1:2], 3, axis=2))


def _write_pyramid(path, size: int = 1024) -> np.ndarray:
    """Four levels, each of its own colour, so that a test can tell which one was read."""
    with tifffile.TiffWriter(path) as writer:
        for level, colour in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)]):
            side = size >> level
            image = np.full((side, side, 3), colour, dtype=np.uint8)
            writer.write(
                image,
                photometric="rgb",
                tile=(64, 64),
                compression="adobe_deflate",
                subfiletype=1 if level else 0,
                resolution=(20_000 / 2**level, 20_000 / 2**level),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def test_a_pyramid_is_read_at_the_resolution_that_is_needed(tmp_path):
    _write_pyramid(tmp_path / "pyramid.tif")
    with open_slide(tmp_path / "pyramid.tif") as slide:
        assert slide.size == (1024, 1024)
        assert slide.microns_per_pixel == pytest.approx(0.5)
        assert slide.read_region(0, 0, 64, 64)[0, 0].tolist() == [200, 0, 0]
        assert slide.read_region(0, 0, 192, 192, size=(64, 64))[0, 0].tolist() == [0, 200, 0]
        assert slide.read_region(256, 256, 256, 256, size=(64, 64))[0, 0].tolist() == [0, 0, 200]
        image, scale = slide.thumbnail(100)
        assert scale == pytest.approx(100 / 1024) and image[50, 50].tolist() == [90, 90, 90]


def test_tiles_outside_the_region_are_not_read(tmp_path, picture):
    """A tiled file that is damaged in one corner still gives the others, and names itself for the damaged one."""
    path = tmp_path / "tiled.tif"
    _write(path, picture, "tiled")
    with tifffile.TiffFile(path) as file:
        last = file.pages.first.dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[last : last + 20] = b"\0" * 20
    path.write_bytes(bytes(content))
    for slide in (open_slide(path), Slide(path, TiledTiffReader(path))):
        with slide:
            assert np.array_equal(slide.read_region(0, 0, 40, 30), picture[:30, :40])
            with pytest.raises(ValueError, match=r"tiled\.tif cannot be decoded.*damaged"):
                slide.read_region(WIDTH - 5, HEIGHT - 5, 5, 5)


def test_pixel_size_from_metadata(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "scanner.jpg", dpi=(36_286, 36_286))
    assert open_slide(tmp_path / "scanner.jpg").microns_per_pixel == pytest.approx(0.7, abs=1e-4)
    Image.fromarray(picture).save(tmp_path / "screen.jpg", dpi=(72, 72))
    assert open_slide(tmp_path / "screen.jpg").microns_per_pixel is None, "72 dpi is a screen, not a scanner"
    tifffile.imwrite(
        tmp_path / "a.ome.tif", picture, photometric="rgb", metadata={"PhysicalSizeX": 0.25}, tile=(32, 32)
    )
    reader = TiledTiffReader(tmp_path / "a.ome.tif")
    assert reader.microns_per_pixel == pytest.approx(0.25)
    reader.close()


def test_fingerprint_is_of_the_content(tmp_path, picture):
    _write(tmp_path / "a.png", picture, "png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    changed = picture.copy()
    changed[70, 100] ^= 255
    _write(tmp_path / "c.png", changed, "png")
    a, b, c = (open_slide(tmp_path / f"{name}.png").fingerprint() for name in "abc")
    assert a == b and a != c


def test_large_images_are_allowed(tmp_path):
    """More pixels than Pillow's limit against decompression bombs; one bit each keeps the test quick."""
    Image.new("1", (14_000, 14_000)).save(tmp_path / "large.png")
    assert open_slide(tmp_path / "large.png").size == (14_000, 14_000)


def test_an_image_that_does_not_fit_is_refused(tmp_path):
    """200 000 x 200 000 pixels of one bit, which four megabytes could hold."""
    Image.new("1", (1, 1)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (200_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content + bytes(5_000_000))
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(ValueError, match=r"decoded whole.*tiled TIFF"):
        slide.read_region(0, 0, 10, 10)


def test_broken_files_are_named(tmp_path, picture):
    noise = np.random.default_rng(0).integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    with open_slide(tmp_path / "cut.jpg") as slide, pytest.raises(ValueError, match=r"cut\.jpg.*truncated"):
        slide.read_region(0, 0, 10, 10)

    _write(tmp_path / "striped.tif", picture, "striped")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "striped.tif").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.tif"), open_slide(tmp_path / "cut.tif") as slide:
        slide.read_region(0, 0, WIDTH, HEIGHT)

    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.jpg is not an image"):
        open_slide(tmp_path / "text.jpg")
    (tmp_path / "empty.tif").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.tif is not an image"):
        open_slide(tmp_path / "empty.tif")
    tifffile.imwrite(tmp_path / "deep.tif", picture.astype(np.uint16), photometric="rgb")
    with pytest.raises(ValueError, match=r"deep\.tif has pixels of the kind RGB with 16 bits"):
        open_slide(tmp_path / "deep.tif")
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg does not exist"):
        open_slide(tmp_path / "missing.jpg")


def test_a_real_section(her2st_raw):
    path = next((her2st_raw / "ST-imgs" / "C" / "C2").glob("*.jpg"))
    with open_slide(path) as slide:
        image, scale = slide.thumbnail(1000)
        assert max(slide.size) > 9000 and max(image.shape) == 1000
        assert image.mean() > 100 and scale == pytest.approx(1000 / max(slide.size))
