"""Patches stand for an image that is not there: the same features, and a clear refusal of anything else."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.extract_features_uni import main as extract
from preprocess.extraction.patch_slide import PatchSlide


@pytest.fixture(scope="module")
def layouts(tiny_data, tmp_path_factory):
    """The same slide with its image, and with its patch cache alone."""
    made = []
    for name in ("with_image", "patches_only"):
        folder = tmp_path_factory.mktemp(name) / "data"
        shutil.copytree(tiny_data, folder)
        made.append(Layout(folder, get_spec("demo", folder), patch_size=64, encoder="efficientnet-lite0"))
    shared = ["--config", "demo/dml", "--slides", "A1", "--device", "cpu"]
    extract([*shared, "--data_dir", str(made[1].data_dir), "--extract_mode", "patch"])
    shutil.rmtree(made[1].images_dir / "A" / "A1")
    for layout in made:
        extract([*shared, "--data_dir", str(layout.data_dir), "--extract_mode", "target"])
    return made


def test_features_from_patches_equal_those_from_the_image(layouts):
    with_image, patches_only = (h5py.File(layout.cache_path("target", "A1")) for layout in layouts)
    assert np.array_equal(with_image["features"][:], patches_only["features"][:])
    assert dict(with_image.attrs)["image_fingerprint"] == dict(patches_only.attrs)["image_fingerprint"]


def test_each_spot_keeps_its_own_patch(layouts):
    table = load_slide(layouts[0], "A1")
    with open_slide(layouts[0].image_path("A1")) as image, PatchSlide(layouts[1].cache_path("patch", "A1")) as patches:
        assert patches.size == image.size and patches.fingerprint() == image.fingerprint()
        for x, y in table.obsm["center"] - 32:
            region = (int(x), int(y), 64, 64)
            assert np.array_equal(image.read_region(*region), patches.read_region(*region))


def test_what_patches_cannot_give_is_refused(layouts):
    with (
        PatchSlide(layouts[1].cache_path("patch", "A1")) as patches,
        pytest.raises(ValueError, match="needs the slide image"),
    ):
        patches.read_region(0, 0, 64, 64)
    with pytest.raises(ValueError, match="A1 of demo has no image"):
        extract(
            ["--config", "demo/dml", "--slides", "A1", "--device", "cpu", "--extract_mode", "neighbor",
             "--data_dir", str(layouts[1].data_dir)]
        )  # fmt: skip
