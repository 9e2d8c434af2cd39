"""Tissue is found on stained slides of any background, and on no blank one; grids lie on it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from datasets.images.slides import open_slide
from datasets.images.tissue import (
    TissueMask,
    background_color,
    find_tissue,
    otsu_threshold,
    pen_marks,
    tissue_grid,
    tissue_of,
)

WHITE, STROMA, NUCLEI = (244, 243, 245), (226, 190, 212), (150, 90, 160)


def _slide(background=WHITE, tissue=STROMA, noise: float = 4.0, size=(240, 320)) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a rectangle of tissue in the middle, nuclei in it; and where it is."""
    random = np.random.default_rng(0)
    inside = np.zeros(size, dtype=bool)
    inside[60:180, 80:240] = True
    picture = np.where(inside[..., None], tissue, background).astype(float)
    nuclei = inside & (random.random(size) < 0.2)
    picture[nuclei] = NUCLEI
    return (picture + random.normal(0, noise, picture.shape)).clip(0, 255).astype(np.uint8), inside


def _agreement(found: np.ndarray, inside: np.ndarray) -> float:
    """Intersection over union."""
    return (found & inside).sum() / (found | inside).sum()


@pytest.mark.parametrize("background", [WHITE, (238, 234, 222), (228, 230, 238), (255, 255, 255)])
def test_stained_tissue_is_found_on_tinted_glass(background):
    picture, inside = _slide(background)
    assert _agreement(tissue_of(picture), inside) > 0.93


def test_black_borders_and_grey_shadows_are_no_tissue():
    picture, inside = _slide()
    picture[:20], picture[-20:, :100] = 0, (120, 120, 121)
    assert _agreement(tissue_of(picture), inside) > 0.93


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(
    "ink", [(30, 60, 190), (60, 110, 220), (30, 140, 60), (0, 160, 160), (200, 30, 40), (20, 20, 25)]
)
def test_pen_is_no_tissue_beside_it_nor_on_it(ink, scale):
    """Also its rim, where it fades into the glass and has the colour of a pale stain."""
    picture, inside = _slide()
    picture[20:220, 280:300] = ink
    picture[150:230, 120:126] = ink
    enlarged = Image.fromarray(picture).resize((320 * scale, 240 * scale), Image.Resampling.BICUBIC)
    found = tissue_of(np.asarray(enlarged))[::scale, ::scale]
    assert not found[:, 265:].any() and not found[190:].any()
    assert found[inside].mean() > 0.9


def test_stains_of_nuclei_eosin_and_blood_are_no_pen():
    for colour in ((60, 80, 165), (90, 70, 160), (225, 110, 165), (235, 150, 160), (170, 60, 60), (110, 70, 40)):
        picture, inside = _slide(tissue=colour)
        assert _agreement(tissue_of(picture), inside) > 0.93, colour


def test_real_sections_lose_no_tissue_to_the_rule_for_pens(her2st_raw):
    path = next((her2st_raw / "ST-imgs" / "C" / "C2").glob("*.jpg"))
    with open_slide(path) as slide:
        picture, _ = slide.thumbnail(1024)
    values = picture * (np.float32(255) / background_color(picture))
    assert not pen_marks(values, np.ptp(values, axis=2)).any()
    assert 0.15 < tissue_of(picture).mean() < 0.18


def test_blank_slide_has_none_and_full_slide_is_all_tissue():
    random = np.random.default_rng(1)
    blank = random.normal(240, 4, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    assert tissue_of(blank).mean() == 0
    full = (np.array(STROMA) + random.normal(0, 4, (200, 200, 3))).astype(np.uint8)
    full[random.random((200, 200)) < 0.3] = NUCLEI
    assert tissue_of(full).mean() > 0.99


def test_specks_are_dropped_and_small_holes_closed():
    picture, inside = _slide(noise=0)
    picture[20:22, 20:22] = NUCLEI
    picture[100:102, 100:102] = WHITE
    found = tissue_of(picture)
    assert not found[15:30, 15:30].any() and found[95:108, 95:108].all() and inside[100, 100]


def test_otsu_splits_two_heaps_like_a_search_over_all_thresholds():
    random = np.random.default_rng(2)
    values = np.concatenate([random.normal(5, 1, 700), random.normal(20, 3, 300)])
    candidates = np.linspace(values.min(), values.max(), 257)[1:-1]

    def between(threshold: float) -> float:
        low, high = values[values < threshold], values[values >= threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    assert otsu_threshold(values) == pytest.approx(max(candidates, key=between), abs=0.5)
    assert otsu_threshold(np.ones(10)) >= 1


def test_background_is_white_where_there_is_hardly_any():
    assert background_color(np.full((10, 10, 3), 120, dtype=np.uint8)).tolist() == [255, 255, 255]
    assert background_color(_slide((238, 234, 222), noise=0)[0]).tolist() == [238, 234, 222]


def test_share_of_squares_equals_counting():
    random = np.random.default_rng(3)
    mask = TissueMask(random.random((50, 70)) < 0.5, scale=0.25)
    centers = random.integers(-20, 300, (40, 2))
    for center, share in zip(centers, mask.share_of_squares(centers, 32)):
        left, top = np.floor((center - 16) * 0.25).astype(int)
        right, bottom = np.ceil((center + 16) * 0.25).astype(int)
        inside = [
            mask.is_tissue[y, x] for y in range(top, bottom) for x in range(left, right) if 0 <= y < 50 and 0 <= x < 70
        ]
        assert share == pytest.approx(sum(inside) / ((right - left) * (bottom - top)))


def test_grid_lies_on_the_tissue_and_is_regular(tmp_path):
    picture, inside = _slide(size=(240, 320))
    Image.fromarray(picture.repeat(4, axis=0).repeat(4, axis=1)).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png") as slide:
        mask = find_tissue(slide, max_px=320)
        grid = tissue_grid(mask, slide.size, pitch_px=50.0, patch_px=64)
    x, y = grid.centers.T // 4
    assert inside[y, x].all() and mask.scale == 0.25
    assert len(grid.grid) == pytest.approx(inside.sum() * 16 / 50**2, rel=0.15)
    steps = (grid.centers - grid.centers[0]) - 50 * (grid.grid - grid.grid[0])
    assert np.abs(steps).max() <= 1 and len(np.unique(grid.grid, axis=0)) == len(grid.grid)
    assert (np.lexsort((grid.grid[:, 0], grid.grid[:, 1])) == np.arange(len(grid.grid))).all()


def test_strict_share_leaves_spots_at_the_border_out():
    mask = TissueMask(np.pad(np.ones((10, 10), dtype=bool), 10), scale=1.0)
    counts = [len(tissue_grid(mask, (30, 30), 2.0, 6, share).grid) for share in (0.01, 0.5, 1.0)]
    assert counts[0] > counts[1] > counts[2] == 9  # 13, 15 and 17 keep their 6 px within 10 to 20


def test_impossible_grids_tell_why():
    empty = TissueMask(np.zeros((10, 10), dtype=bool), scale=1.0)
    with pytest.raises(
        ValueError, match=r"No spot of the 2 x 1 grid .*0.0 % of the slide looks like stained tissue.*--spots"
    ):
        tissue_grid(empty, (20, 10), 10.0, 4)
    with pytest.raises(ValueError, match=r"pitch of the grid is 0.5 px"):
        tissue_grid(empty, (20, 10), 0.5, 4)


def test_slide_smaller_than_the_pitch_gets_one_spot_in_its_middle():
    grid = tissue_grid(TissueMask(np.ones((8, 8), dtype=bool), scale=1.0), (8, 8), 100.0, 8, 0.5)
    assert grid.centers.tolist() == [[4, 4]] and grid.grid.tolist() == [[0, 0]]
