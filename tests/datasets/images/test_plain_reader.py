"""Pillow is asked for the formats that are documented, whatever a file is called, and for no other."""

from __future__ import annotations

import ast
import contextlib
import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from datasets.images.plain_reader import open_picture
from datasets.images.region import read_region
from datasets.images.slides import open_slide
from preprocess.raw.files import plain_image_size

ROOT = Path(__file__).resolve().parents[3]
PICTURE = np.full((30, 40, 3), (200, 60, 120), dtype=np.uint8)
DEEP = (PICTURE.astype(np.uint16) * 16).astype(">u2")
PPM = b"P6\n40 30\n65535\n" + DEEP.tobytes()
SGI = (b"\x01\xda\0\x02\0\x03\0\x28\0\x1e\0\x03".ljust(512, b"\0")) + np.moveaxis(DEEP, 2, 0).tobytes()
REFUSAL = (
    r"{} is not an image that can be read here \(JPEG, PNG, BMP, TIFF .*content is {}\. Convert the image to 8-bit RGB"
)


def refused(path: Path, message: str) -> None:
    """By everything that opens a picture of the user."""
    for read in (open_slide, lambda picture: read_region(picture, (40, 30)), plain_image_size):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize("suffix", [".ppm", ".jpg", ".png", ".tif"])
@pytest.mark.parametrize(("content", "kind"), [(PPM, "PPM"), (SGI, "SGI")])
def test_formats_that_lose_the_low_bits_are_refused(tmp_path, content, kind, suffix):
    path = tmp_path / f"deep{suffix}"
    path.write_bytes(content)
    with Image.open(path) as opened:
        assert np.asarray(opened)[0, 0].max() < 15, "almost black, and Pillow says nothing"
    refused(path, REFUSAL.format(rf"deep\{suffix}", kind))


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "JPEG2000", "PCX"])
def test_other_formats_are_named(tmp_path, kind):
    Image.fromarray(PICTURE).save(tmp_path / "A1.jpg", format=kind)
    refused(tmp_path / "A1.jpg", REFUSAL.format(r"A1\.jpg", kind))
    with gzip.open(tmp_path / "A1.jpg.gz", "wb") as packed:
        packed.write((tmp_path / "A1.jpg").read_bytes())
    with pytest.raises(ValueError, match=REFUSAL.format(r"A1\.jpg\.gz", kind)):
        plain_image_size(tmp_path / "A1.jpg.gz")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_what_is_documented_is_read_whatever_it_is_called(tmp_path, kind):
    path = tmp_path / "A1.png"
    Image.fromarray(PICTURE).save(path, format=kind)
    with open_slide(path) as slide, open_picture(path) as picture:
        assert np.abs(slide.read_region(0, 0, 40, 30).astype(int) - PICTURE).max() < 4
        assert picture.size == plain_image_size(path) == slide.size


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """Pillow hands an EPS to Ghostscript, also one that is called .jpg."""
    started, path = tmp_path / "started", tmp_path / "A1.jpg"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{started}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.fromarray(PICTURE).save(path, format="EPS")
    with contextlib.suppress(Exception), Image.open(path) as image:
        image.load()
    assert started.exists()
    started.unlink()
    refused(path, REFUSAL.format(r"A1\.jpg", "EPS"))
    assert not started.exists()


def test_a_tiff_that_was_not_inspected_is_not_decoded(tmp_path):
    """Pillow takes one with the bytes of its number exchanged, and narrows its 16 bits."""
    path = tmp_path / "A1.tif"
    Image.fromarray(PICTURE).save(path)
    path.write_bytes(b"II\0*" + path.read_bytes()[4:])
    with Image.open(path) as image:
        assert image.format == "TIFF"
    with pytest.raises(ValueError, match=r"A1\.tif is not an image that can be read here .* Check that the download"):
        open_slide(path)


def test_every_picture_is_opened_with_the_formats_that_are_meant():
    rooms = ("benchmarks", "datasets", "evaluation", "models", "modes", "preprocess", "utils")
    wrong = [
        f"{path}:{node.lineno}"
        for room in rooms
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "Image.open"
        and "formats" not in {word.arg for word in node.keywords}
    ]
    assert wrong == []
