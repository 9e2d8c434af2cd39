"""Charts: they show the numbers they are given, and no constant, missing or single value breaks them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.comparison.write import comparison_intervals
from evaluation.report import figures
from evaluation.report.style import color_range, save_figure, score_text

UNIT = "log10(1 + counts per 10 000 of the panel)"
NAN = float("nan")
GENERATOR = np.random.default_rng(1)


def curves(*scores: float | None) -> list[dict]:
    return [{"epoch": epoch, "train/total": 1.0, "test/pcc_all": score} for epoch, score in enumerate(scores, start=1)]


def comparison(means: list[float], interval: tuple[float, float]) -> pd.DataFrame:
    rows = {"metric": "pcc_all", "method": [f"m{i}" for i in range(len(means))], "mean": means}
    return pd.DataFrame(rows | {"low": interval[0], "high": interval[1]})


def scatter(measured, predicted, pearson) -> Figure:
    return figures.scatter("ERBB2", measured=measured, predicted=predicted, unit=UNIT, pearson=pearson)


HARD_CASES: dict[str, Callable[[], Figure]] = {
    "scatter of constants": lambda: scatter(np.zeros(5), np.zeros(5), NAN),
    "scatter of one spot": lambda: scatter(np.ones(1), np.zeros(1), None),
    "scatter of nothing known": lambda: scatter(np.full(3, NAN), np.ones(3), None),
    "scatter with infinities": lambda: scatter(np.array([1.0, np.inf, 2.0]), np.ones(3), NAN),
    "scatter of many": lambda: scatter(GENERATOR.normal(size=9000), GENERATOR.normal(size=9000), 0.0),
    "distribution of nothing": lambda: figures.pcc_distribution({"fused": np.full(4, NAN)}),
    "distribution of a constant": lambda: figures.pcc_distribution({"fused": np.ones(4), "target": np.full(4, NAN)}),
    "curves of nothing": lambda: figures.training_curves([]),
    "curves of one epoch": lambda: figures.training_curves(curves(0.3), selected_epoch=1),
    "curves with undefined epochs": lambda: figures.training_curves(curves(0.1, None, NAN, 0.2)),
    "bars of one gene": lambda: figures.gene_bars(["A"], np.array([0.5])),
    "bars of nothing known": lambda: figures.gene_bars(["A", "B"], np.full(2, NAN), spread=np.full(2, NAN)),
    "dots of nothing known": lambda: figures.patient_dots({"A": [NAN]}, mean=NAN, interval=None),
    "dots of one slide": lambda: figures.patient_dots({"A": [0.2]}, mean=0.2, interval=(NAN, NAN)),
    "clusters of one spot": lambda: figures.cluster_composition(np.zeros(1), np.zeros(1), ["A"]),
    "clusters of no spot": lambda: figures.cluster_composition(np.zeros(0), np.zeros(0), []),
    "comparison without intervals": lambda: comparison_intervals(comparison([0.3, NAN], (NAN, NAN))),
}


@pytest.mark.parametrize("name", HARD_CASES)
def test_hard_values_do_not_break_a_picture(name: str, recwarn) -> None:
    figure = HARD_CASES[name]()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    assert (pixels[..., :3] < 128).any(), "the picture is blank"
    assert [str(warning.message) for warning in recwarn if "font" not in str(warning.message).lower()] == []


def test_scatter_shows_every_known_spot_on_equal_axes() -> None:
    measured, predicted = np.array([0.0, 1.0, 4.0, NAN]), np.array([1.0, 2.0, 3.0, 1.0])
    axes = scatter(measured, predicted, 0.98).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([measured, predicted], axis=1)[:3])
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_title(loc="left") == "ERBB2\nPCC 0.98   3 spots"
    assert UNIT in axes.get_xlabel() and UNIT in axes.get_ylabel()


def test_distribution_marks_median_and_counts_undefined_genes() -> None:
    scores = {"fused": np.array([0.1, 0.5, 0.3, NAN]), "target": np.array([0.0, 0.2])}
    axes = figures.pcc_distribution(scores).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.30", "0.10"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["fused\n3 genes, 1 undefined", "target\n2 genes"]
    np.testing.assert_array_equal(axes.collections[0].get_offsets()[:, 0], [0.1, 0.3, 0.5])


def test_curves_show_what_was_recorded_and_the_evaluated_epoch() -> None:
    figure = figures.training_curves(curves(0.1, None, 0.4), selected_epoch=3)
    loss, mse, pcc = figure.axes
    assert [line.get_label() for line in loss.lines][:1] == ["total"]
    assert [text.get_text() for text in mse.texts] == ["not recorded"]
    np.testing.assert_array_equal(pcc.lines[0].get_xydata(), [[1, 0.1], [3, 0.4]])
    assert pcc.get_title(loc="right") == "evaluated: epoch 3"
    np.testing.assert_array_equal(pcc.lines[1].get_xdata(), [3, 3])


def test_bars_hold_the_best_and_the_worst_genes_in_order() -> None:
    pearson = np.array([0.2, NAN, 0.9, -0.4, 0.5, 0.1])
    best, worst = figures.gene_bars(list("abcdef"), pearson, count=2).axes
    assert [text.get_text() for text in best.get_yticklabels()] == ["c", "e"]
    assert [text.get_text() for text in worst.get_yticklabels()] == ["f", "d"]
    assert [bar.get_width() for bar in worst.patches] == [0.1, -0.4]
    # With fewer genes than asked for, none stands in both lists.
    best, worst = figures.gene_bars(list("abcdef"), pearson, count=15).axes
    shown = [text.get_text() for axes in (best, worst) for text in axes.get_yticklabels()]
    assert len(shown) == len(set(shown)) == 4


def test_dots_show_slides_their_mean_and_the_interval() -> None:
    axes = figures.patient_dots({"A": [0.1, 0.3], "B": [0.5, NAN]}, mean=0.35, interval=(0.2, 0.5)).axes[0]
    drawn = [collection.get_offsets()[:, 0].tolist() for collection in axes.collections]
    assert drawn == [[0.1, 0.3], [0.2], [0.5], [0.5], [0.35]]
    assert any(list(line.get_xdata()) == [0.2, 0.5] for line in axes.lines)


def test_cluster_bars_add_up_and_fold_small_groups() -> None:
    image_clusters = np.array([0, 0, 0, 1, 1, 4])
    gene_clusters = np.array([2, 2, 2, 2, 2, 2])
    patients = ["A", "A", "B", "B", "A", "C"]
    figure = figures.cluster_composition(image_clusters, gene_clusters, patients, max_groups=2)
    image_axes, gene_axes = figure.axes
    tops: dict[float, float] = {}
    for bar in image_axes.patches:
        tops[bar.get_x()] = tops.get(bar.get_x(), 0) + bar.get_height()
    assert list(tops.values()) == [3, 2, 1]  # largest first
    assert [bar.get_height() for bar in gene_axes.patches] == [3, 2, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B", "other (1)"]


def test_color_range_is_never_empty() -> None:
    assert color_range(np.array([NAN, np.inf])) == (0.0, 1.0)
    assert color_range(np.full(3, 2.0), np.array([NAN])) == (1.5, 2.5)
    low, high = color_range(np.arange(101.0))
    assert (low, high) == (1.0, 99.0)


def test_score_text() -> None:
    assert [score_text(value) for value in (0.123, -0.5, NAN, None)] == [
        "0.12",
        "\N{MINUS SIGN}0.50",
        *["undefined"] * 2,
    ]


def test_equal_figures_give_equal_files_and_no_global_state(tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    for name in ("first", "second"):
        save_figure(figures.gene_bars(["A", "B"], np.array([0.5, 0.1])), tmp_path / name)
    assert dict(matplotlib.rcParams) == settings
    for suffix in ("png", "svg"):
        assert (tmp_path / f"first.{suffix}").read_bytes() == (tmp_path / f"second.{suffix}").read_bytes()
    with Image.open(tmp_path / "first.png") as image:
        edge = np.asarray(image.convert("L"))
    # Cropped to what is drawn, with a margin.
    assert (edge[:3] == 255).all() and (edge[:, :3] == 255).all() and (edge[:40] < 200).any()
    assert ">best 1 of 2 genes<" in (tmp_path / "first.svg").read_text()
