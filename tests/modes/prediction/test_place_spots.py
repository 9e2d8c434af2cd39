"""Positions that cannot be meant are refused before anything is computed, and why is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.images.slides import open_slide
from modes.prediction.place_spots import SlideSpots, spots_of_file

PATCH = 64


@pytest.fixture
def image(tmp_path) -> Path:
    """Tissue on the left half of the slide but for a margin."""
    picture = np.random.default_rng(0).normal(243, 3, (600, 1000, 3))
    picture[50:550, 50:450] += np.array([180, 110, 170]) - 243
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "slide.png")
    return tmp_path / "slide.png"


def _place(image: Path, centers: np.ndarray, **columns: object) -> SlideSpots:
    path = image.with_name("spots.csv")
    pd.DataFrame({"x": centers[:, 0], "y": centers[:, 1], **columns}).to_csv(path, index=False)
    with open_slide(image) as slide:
        return spots_of_file(slide, path, PATCH)


def _lattice(left: int, top: int, pitch: int, columns: int, rows: int) -> np.ndarray:
    y, x = np.mgrid[top : top + rows * pitch : pitch, left : left + columns * pitch : pitch]
    return np.stack([x.ravel(), y.ravel()], axis=1)


def test_spots_on_the_tissue_are_taken_without_a_word(image):
    centers = _lattice(70, 70, 40, 9, 12)
    spots = _place(image, centers)
    assert np.array_equal(spots.centers, centers)
    assert spots.note == "108 spots of spots.csv (pixel positions); square array, 40 px apart."
    assert len(_place(image, centers[:1]).centers) == 1, "a single spot has no spacing"


def test_spots_far_closer_than_a_patch_are_refused(image):
    with pytest.raises(
        ValueError, match=r"spots\.csv: the spots are 7 px apart .* 64 px: expected at least 8\. .*Visium HD"
    ):
        _place(image, _lattice(70, 70, 7, 12, 12))
    assert len(_place(image, _lattice(70, 70, 8, 12, 12)).centers) == 144
    with pytest.raises(
        ValueError, match=r"1 px apart.*If x and y are positions in the array, give pixel_x and pixel_y"
    ):
        _place(image, _lattice(0, 0, 1, 30, 30))


def test_spots_on_glass_are_refused_and_doubtful_ones_warned_of(image):
    with pytest.raises(ValueError, match=r"spots\.csv does not belong to .*slide\.png: 0 % of the spots on tissue"):
        _place(image, _lattice(560, 70, 40, 9, 12))
    note = _place(image, _lattice(270, 70, 40, 12, 12)).note
    assert "WARNING: these spots may not belong to the image: " in note and "% of the spots on tissue" in note


def test_without_any_stain_the_positions_are_believed(image):
    grey = np.random.default_rng(0).normal(200, 20, (300, 400, 1)).repeat(3, axis=2)
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(image)
    assert _place(image, _lattice(70, 70, 40, 6, 4)).note.endswith("cannot be told.")


def test_spots_that_are_not_selected_are_left_out(image):
    centers = _lattice(70, 70, 40, 9, 12)
    selected = (np.arange(len(centers)) >= 8).astype(int)
    columns = {"pixel_x": centers[:, 0], "pixel_y": centers[:, 1], "selected": selected}
    spots = _place(image, (centers - 70) // 40, **columns)
    assert np.array_equal(spots.centers, centers[8:]) and "8 beside the tissue left out" in spots.note
    with pytest.raises(
        ValueError, match=r"none of 108 spots is under tissue \(in_tissue or selected is 0 everywhere\)"
    ):
        _place(image, (centers - 70) // 40, **{**columns, "selected": 0})
