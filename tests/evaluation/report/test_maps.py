"""Gene maps: true positions, true sizes, one scale for both maps and a symmetric one for the error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from evaluation.report.maps import MAX_VECTOR_SPOTS, Tissue, gene_maps, predicted_map
from evaluation.report.style import save_figure

UNIT = "log10(1 + counts per 10 000 of the panel)"


@pytest.fixture
def tissue() -> Tissue:
    """12 spots of 55 px, 100 px apart, on an image of 600 x 500 px at half the size: the left half black."""
    columns, rows = np.meshgrid(np.arange(4), np.arange(3))
    image = np.full((250, 300, 3), 255, dtype=np.uint8)
    image[:, :150] = 0
    positions = np.stack([columns.ravel(), rows.ravel()], axis=1) * 100.0 + 100.0
    return Tissue("A1", positions, 55.0, image, 0.5)


def maps(tissue: Tissue, measured: np.ndarray, predicted: np.ndarray, pearson: float | None = 0.5) -> Figure:
    return gene_maps(tissue, "ERBB2", measured=measured, predicted=predicted, unit=UNIT, pearson=pearson)


def spots(figure: Figure) -> list[EllipseCollection]:
    found = [item for axes in figure.axes for item in axes.collections if isinstance(item, EllipseCollection)]
    return found


def test_values_positions_and_scales(tissue: Tissue) -> None:
    measured, predicted = np.linspace(0, 2, 12), np.linspace(0.5, 1, 12)
    figure = maps(tissue, measured, predicted)
    left, middle, error = spots(figure)
    np.testing.assert_array_equal(left.get_array(), measured)
    np.testing.assert_array_equal(middle.get_array(), predicted)
    np.testing.assert_allclose(error.get_array(), predicted - measured)
    for drawn in (left, middle, error):
        np.testing.assert_array_equal(drawn.get_offsets(), tissue.spatial_px)
    assert left.norm is middle.norm
    assert error.norm.vmin == -error.norm.vmax < 0
    assert figure.get_suptitle() == "ERBB2   slide A1   PCC 0.50"
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert UNIT in labels and "error, in the same unit" in labels


def test_spots_have_their_true_size_and_lie_on_their_tissue(tissue: Tissue) -> None:
    figure = maps(tissue, np.ones(12), np.ones(12))
    figure.canvas.draw()
    axes = figure.axes[0]
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    # The row of pixels through the centres of the first row of spots, in full-resolution coordinates.
    x_display, y_display = axes.transData.transform([(left, 100.0) for left in range(25, 480)]).T
    line = pixels[len(pixels) - 1 - np.round(y_display).astype(int), np.round(x_display).astype(int)]
    colored = np.ptp(line, axis=1) > 60
    np.testing.assert_allclose(colored[25 : 25 + 100].sum(), 55, atol=4)
    assert colored[100 - 25] and not colored[50 - 25] and colored[400 - 25]
    # Between the spots the image shows through: black (faded to gray) to the left of x = 300, white to the right.
    gray = line.mean(axis=1)
    assert gray[150 - 25] < 170 and gray[350 - 25] > 240


def test_missing_values_are_gray(tissue: Tissue) -> None:
    measured = np.linspace(0, 1, 12)
    measured[3] = np.nan
    left, middle, error = spots(maps(tissue, measured, np.zeros(12)))
    assert left.get_array().mask.tolist() == error.get_array().mask.tolist() == np.isnan(measured).tolist()
    assert not np.ma.getmaskarray(middle.get_array()).any()
    assert np.ptp(left.cmap.get_bad()[:3]) == 0


@pytest.mark.parametrize(
    ("measured", "predicted"),
    [(0.0, 0.0), (np.nan, np.nan), (np.nan, 1.0), (3.0, np.inf)],
    ids=["constant", "missing", "measured missing", "infinite"],
)
@pytest.mark.parametrize("count", [1, 12])
def test_hard_values_do_not_break_a_map(tissue: Tissue, measured: float, predicted: float, count: int, recwarn) -> None:
    part = dataclasses.replace(tissue, spatial_px=tissue.spatial_px[:count])
    figure = maps(part, np.full(count, measured), np.full(count, predicted), pearson=np.nan)
    figure.canvas.draw()
    assert "PCC undefined" in figure.get_suptitle()
    for drawn in spots(figure):
        assert np.isfinite([drawn.norm.vmin, drawn.norm.vmax]).all() and drawn.norm.vmin < drawn.norm.vmax
    assert [str(warning.message) for warning in recwarn] == []


def test_spots_beyond_the_image_and_no_image(tissue: Tissue) -> None:
    outside = dataclasses.replace(tissue, spatial_px=tissue.spatial_px + 5000.0)
    for part in (outside, dataclasses.replace(tissue, image=None)):
        figure = maps(part, np.arange(12.0), np.arange(12.0))
        figure.canvas.draw()
        assert not figure.axes[0].images


def test_no_spot_is_an_error(tissue: Tissue) -> None:
    with pytest.raises(ValueError, match="slide A1 has no spots"):
        maps(dataclasses.replace(tissue, spatial_px=np.zeros((0, 2))), np.zeros(0), np.zeros(0))


def test_predicted_map_shows_the_tissue_beside_it(tissue: Tissue, tmp_path: Path) -> None:
    figure = predicted_map(tissue, "ERBB2", predicted=np.arange(12.0), unit=UNIT)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["tissue", "predicted"]
    assert len(spots(figure)) == 1 and UNIT in [axes.get_xlabel() for axes in figure.axes]
    bare = predicted_map(dataclasses.replace(tissue, image=None), "ERBB2", predicted=np.arange(12.0), unit=UNIT)
    assert len(bare.axes) == 2  # the map and its color bar
    png, svg = save_figure(bare, tmp_path / "map")
    assert png.stat().st_size > 1000 and "predicted" in svg.read_text()


def test_many_spots_stay_a_small_file(tmp_path: Path) -> None:
    count = 4 * MAX_VECTOR_SPOTS
    positions = np.stack(np.divmod(np.arange(count), 100), axis=1) * 100.0
    dense = Tissue("visium", positions, 55.0)
    svg = save_figure(predicted_map(dense, "ERBB2", predicted=np.sin(np.arange(count)), unit=UNIT), tmp_path / "x")[1]
    assert svg.stat().st_size < 2_000_000
