"""Widths of patches: given by the data set, or by the pitch of its arrays."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.field_of_view import field_of_view, microns_of
from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec


def square(pitch_px: float, turn: float = 0.03) -> np.ndarray:
    """Spots of a square array, turned a little and each a little off its place."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(17)), axis=-1).reshape(-1, 2) * pitch_px
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return grid @ rotation + random.normal(0, 0.03 * pitch_px, grid.shape)


def test_pitch_of_the_array_gives_the_size_of_a_pixel_where_none_is_known():
    """290 px between spots that are 200 um apart."""
    for name, slide in (("skinst", "P2_ST_rep1"), ("stnet", "BC23209_C1")):
        assert SPECS[name].microns_of(slide) is None
        assert microns_of(SPECS[name], slide, square(290.0)) == pytest.approx(200 / 290, rel=0.005)
        assert microns_of(SPECS[name], slide, None) is None
    assert microns_of(SPECS["her2st"], "A1", square(290.0)) == 0.93, "what is known is not measured again"


def test_spots_on_no_array_and_sets_of_unknown_pitch_stay_unknown():
    scattered = np.random.default_rng(1).uniform(0, 5000, (200, 2))
    assert microns_of(SPECS["stnet"], "BC23209_C1", scattered) is None
    assert microns_of(SPECS["stnet"], "BC23209_C1", np.array([[0.0, 0.0], [290.0, 0.0], [580.0, 0.0]])) is None
    assert microns_of(DatasetSpec(name="own"), "S", square(290.0)) is None


def test_width_is_the_mean_over_the_slides_that_know_it(tmp_path):
    layout = Layout(tmp_path, SPECS["her2st"], patch_size=224)
    assert field_of_view(layout, {"A1": None, "B1": None}) == pytest.approx(224 * (0.93 + 0.68) / 2)
    assert field_of_view(Layout(tmp_path, SPECS["skinst"]), {"P2_ST_rep1": None}) is None


def test_the_published_breast_slides_differ_from_her2st_by_more_than_a_fifth():
    for number in (1, 2, 3):
        name = f"10x_breast_ff{number}"
        assert 224 * SPECS[name].microns_of(name) == pytest.approx(82, abs=0.5)
