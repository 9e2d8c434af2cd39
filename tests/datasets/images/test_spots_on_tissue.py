"""Tables that belong to their image pass; exchanged, mirrored, scaled and other slides' tables do not, and why is said."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import spearmanr

from datasets.images.overlay import compare_with_image, doubt, draw_overlay, write_overlay
from datasets.images.slides import open_slide
from datasets.images.spots_on_tissue import TissuePicture, check_spots_on_tissue, spacing
from datasets.images.tissue import section_of

ROOT = Path(__file__).resolve().parents[3]
WIDTH, HEIGHT, PITCH = 900, 700, 30
GLASS, PALE, DARK = (244, 243, 245), (226, 190, 212), (150, 90, 160)


def _section(seed: int = 0, left: int = 100, top: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture with a wedge of tissue, darker to the left; centres of the spots on it, and counts that follow."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    is_tissue = (x > left) & (x < left + 500) & (y > top) & (y < top + 320) & (y - top > (x - left) * 0.4)
    share = np.clip(0.9 - (x - left) / 600, 0.1, 0.9)[..., None]
    tissue = np.array(PALE) * (1 - share) + np.array(DARK) * share
    picture = np.where(is_tissue[..., None], tissue, GLASS) + random.normal(0, 3, (HEIGHT, WIDTH, 1))
    row, column = np.mgrid[PITCH : HEIGHT - PITCH : PITCH, PITCH : WIDTH - PITCH : PITCH]
    centers = np.stack([column.ravel(), row.ravel()], axis=1)
    centers = centers[is_tissue[centers[:, 1], centers[:, 0]]]
    totals = 1000 * np.exp(random.normal(0, 0.5, len(centers)) - (centers[:, 0] - left) / 300)
    return picture.clip(0, 255).astype(np.uint8), centers, totals.round()


@pytest.fixture(scope="module")
def section() -> tuple[TissuePicture, np.ndarray, np.ndarray]:
    picture, centers, totals = _section()
    return TissuePicture(picture, 1.0, (WIDTH, HEIGHT)), centers, totals


def test_a_true_table_fits(section):
    picture, centers, totals = section
    found = check_spots_on_tissue(picture, centers, totals)
    assert found.fits and found.better is None and doubt(found, Path("o.png")) is None
    assert found.given.on_tissue > 0.95 and found.given.darkness > 0.5 and found.given.lift > 0.9
    assert 0.5 < found.given.around < 0.8 and found.is_on_tissue.shape == (len(centers),)
    assert re.fullmatch(
        r"\d+ % of the spots on tissue, darkness against counts 0\.\d\d; \d+ % of the rectangle around them is tissue\.",
        str(found),
    )


LAST = np.array([WIDTH, HEIGHT]) - 1


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        (lambda xy: xy[:, ::-1], "Exchanging the pixel columns"),
        (lambda xy: np.stack([LAST[0] - xy[:, 0], xy[:, 1]], 1), "Mirroring them on the image from left to right"),
        (lambda xy: np.stack([xy[:, 0], LAST[1] - xy[:, 1]], 1), "Mirroring them on the image from up to down"),
        (lambda xy: LAST - xy, "Turning them with the image by 180 degrees"),
        (lambda xy: xy / 2, "Doubling the pixel columns"),
        (lambda xy: np.stack([xy[:, 0].min() + xy[:, 0].max() - xy[:, 0], xy[:, 1]], 1), "in their place from left to"),
        (lambda xy: np.stack([xy[:, 1], LAST[0] - xy[:, 0]], 1), "Turning them with the image by 90 degrees"),
    ],
)
def test_a_changed_table_is_told_what_would_mend_it(section, changed, remedy):
    picture, centers, totals = section
    true = check_spots_on_tissue(picture, centers, totals).given
    found = check_spots_on_tissue(picture, changed(centers), totals)
    assert not found.fits and remedy in found.better
    assert found.better_fit.on_tissue == pytest.approx(true.on_tissue, abs=0.02)
    assert found.better_fit.darkness == pytest.approx(true.darkness, abs=0.02)
    message = doubt(found, Path("data/overlay_A1.png"))
    assert f"{found.given}; " in message and f"would fit better: {found.better_fit}" in message
    assert message.endswith("The picture: data/overlay_A1.png.")


def test_the_table_of_another_slide_fits_neither_tissue_nor_darkness(section):
    picture, _, _ = section
    _, centers, totals = _section(seed=1, left=350, top=60)
    found = check_spots_on_tissue(picture, centers, totals)
    assert not found.fits and "another slide" in str(found)


def test_without_counts_only_the_place_speaks(section):
    picture, centers, totals = section
    found = check_spots_on_tissue(picture, centers, None)
    assert found.fits and found.given.darkness is None and "against counts unknown" in str(found)
    assert check_spots_on_tissue(picture, centers, np.full(len(centers), 7)).given.darkness is None
    assert check_spots_on_tissue(picture, centers[:30], totals[:30]).given.darkness is None, "too few for a correlation"
    far = check_spots_on_tissue(picture, centers + np.array([250, -280]), None)
    assert not far.fits and "Most spots lie on glass" in str(far)


def test_darkness_is_the_rank_correlation_with_the_counts(section):
    picture, centers, totals = section
    side = 0.5 * spacing(centers)
    slow = [
        255 - picture.picture[y0:y1, x0:x1].mean()
        for (x0, y0), (x1, y1) in zip(
            np.floor(centers - side / 2).astype(int).tolist(), np.ceil(centers + side / 2).astype(int).tolist()
        )
    ]
    found = check_spots_on_tissue(picture, centers, totals)
    assert found.given.darkness == pytest.approx(spearmanr(slow, np.log(totals)).statistic)
    assert spacing(centers) == PITCH and spacing(centers[:1]) == 1


def test_fat_and_holes_are_of_the_section():
    is_tissue = np.zeros((400, 500), dtype=bool)
    is_tissue[100:300, 100:400] = True
    is_tissue[150:250, 200:300] = False  # a hole
    is_tissue[100:300, 320:330] = False  # a crack
    is_tissue[350:354, 30:34] = True  # dust
    found = section_of(is_tissue)
    assert found[104:296, 104:396].all() and not found[:90].any() and not found[320:].any()
    assert found.shape == is_tissue.shape and not section_of(np.zeros((30, 20), dtype=bool)).any()


def test_overlay_shows_spots_and_is_written_once(section, tmp_path):
    picture, centers, _ = section
    is_on = np.arange(len(centers)) % 2 == 0
    drawn = np.asarray(draw_overlay(picture, centers, is_on)).astype(int)
    assert drawn.shape == picture.picture.shape
    changed = np.abs(drawn - picture.picture).sum(axis=2) > 0
    for (x, y), on in zip(centers, is_on):
        ring = drawn[y - 9 : y + 10, x - 9 : x + 10][changed[y - 9 : y + 10, x - 9 : x + 10]]
        assert (ring == ((0, 120, 30) if on else (255, 60, 0))).all(axis=1).any()
    path = tmp_path / "overlays" / "overlay_A1.png"
    write_overlay(picture, centers, is_on, path)
    with Image.open(path) as image:
        assert image.size == (WIDTH, HEIGHT) and path.stat().st_size < 400_000
    before = path.stat().st_mtime_ns
    write_overlay(picture, centers, is_on, path)
    assert path.stat().st_mtime_ns == before
    write_overlay(picture, centers, ~is_on, path)
    assert path.stat().st_mtime_ns > before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"overlay\.png cannot be written"):
        write_overlay(picture, centers, is_on, tmp_path / "file" / "overlay.png")


def test_an_open_slide_is_compared_on_a_small_picture(tmp_path):
    picture, centers, totals = _section()
    Image.fromarray(picture.repeat(2, axis=0).repeat(2, axis=1)).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png") as slide:
        assert compare_with_image(slide, centers * 2 + 1, totals, tmp_path / "overlay.png") is None
        problem = compare_with_image(slide, centers[:, ::-1] * 2 + 1, totals, tmp_path / "overlay.png")
    assert "Exchanging the pixel columns would fit better" in problem
    with Image.open(tmp_path / "overlay.png") as image:
        assert max(image.size) == 1024


# --- real sections ----------------------------------------------------------------------------------------------------


def _real(image: Path, spots: Path, counts: Path) -> tuple[TissuePicture, np.ndarray, np.ndarray]:
    """The picture, the centres of the selected spots with counts, and their totals."""
    table = pd.read_csv(spots, sep="\t")
    table.index = [f"{round(x)}x{round(y)}" for x, y in zip(table["x"], table["y"])]
    totals = pd.read_csv(counts, sep="\t", index_col=0).sum(axis=1)
    table = table[table["selected"] == 1].loc[lambda t: t.index.isin(totals.index)]
    with open_slide(image) as slide:
        picture = TissuePicture.of(slide)
    return picture, table[["pixel_x", "pixel_y"]].to_numpy(), totals[table.index].to_numpy()


@pytest.fixture(scope="module")
def real_sets(her2st_raw, mob_raw) -> list[dict[str, tuple]]:
    images = {slide: next((her2st_raw / "ST-imgs").glob(f"*/{slide}/*.jpg")) for slide in ("B4", "C2", "C3", "C4")}
    her2st = {
        slide: _real(
            image, her2st_raw / "ST-spotfiles" / f"{slide}_selection.tsv", her2st_raw / "ST-cnts" / f"{slide}.tsv.gz"
        )
        for slide, image in images.items()
    }
    mob = {
        f"MOB{i}": _real(mob_raw / f"MOB{i}.jpg", mob_raw / f"MOB{i}_spots.tsv", mob_raw / f"MOB{i}_counts.tsv.gz")
        for i in (1, 2, 3, 4)
    }
    return [her2st, mob]


def _tables(real_sets: list[dict[str, tuple]]):
    """(row of the page, picture, centers, totals) of every true and every false table of the eight sections."""
    for sections in real_sets:
        for name, (picture, centers, totals) in sections.items():
            last = np.array(picture.size) - 1
            yield "as they are", picture, centers, totals
            yield "pixel columns exchanged", picture, centers[:, ::-1], totals
            yield "mirrored left to right", picture, np.stack([last[0] - centers[:, 0], centers[:, 1]], 1), totals
            yield "mirrored up to down", picture, np.stack([centers[:, 0], last[1] - centers[:, 1]], 1), totals
            yield "scaled by a half", picture, centers / 2, totals
            for other, (_, theirs, their_totals) in sections.items():
                if other != name:
                    yield "of another slide of the set", picture, theirs, their_totals


def test_true_tables_of_real_sections_pass_and_false_ones_do_not(real_sets):
    """And the page says the figures of both."""
    found: dict[str, list] = {}
    for row, picture, centers, totals in _tables(real_sets):
        found.setdefault(row, []).append(check_spots_on_tissue(picture, centers, totals))
    page = (ROOT / "docs" / "installation.md").read_text()
    for row, results in found.items():
        warned = sum(not result.fits for result in results)
        assert warned == (0 if row == "as they are" else len(results)), row
        measured = [
            (min(values), max(values))
            for values in (
                [100 * result.given.on_tissue for result in results],
                [100 * result.given.around for result in results],
                [100 * result.given.darkness for result in results],
            )
        ]
        said = re.search(rf"\| {row} \|(.*)\|(.*)\|(.*)\| {warned} of {len(results)} \|", page)
        assert said is not None, f"{row}: {measured}, {warned} of {len(results)}"
        for (least, greatest), text in zip(measured, said.groups()):
            stated = [float(number) * (1 if "%" in text else 100) for number in re.findall(r"-?[\d.]+", text)]
            assert stated == pytest.approx([least, greatest], abs=2), (row, text, measured)


def test_what_is_to_be_done_is_named_for_real_sections(real_sets):
    remedies = {
        "pixel columns exchanged": "Exchanging the pixel columns",
        "mirrored left to right": "Mirroring them on the image from left to right",
        "mirrored up to down": "Mirroring them on the image from up to down",
        "scaled by a half": "Doubling the pixel columns",
    }
    for row, picture, centers, totals in _tables(real_sets):
        if row in remedies:
            assert check_spots_on_tissue(picture, centers, totals).better == remedies[row]
