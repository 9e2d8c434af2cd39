"""Figures drawn side by side are those drawn one after the other, and a fold that fails spoils no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evaluation.report.drawing import draw_side_by_side, main
from evaluation.report.fold_figures import figures_of, figures_on_disk


@pytest.fixture
def folds(finished_run: Path, tmp_path: Path) -> list[Path]:
    shutil.copytree(finished_run, tmp_path / "run")
    return sorted((tmp_path / "run").glob("fold_*"))


def test_side_by_side_is_one_after_the_other(folds, tmp_path):
    assert draw_side_by_side(folds, count=1, genes=["ZYX"], most_processes=2) == 2
    alone = tmp_path / "alone"
    shutil.copytree(folds[1], alone)
    shutil.rmtree(alone / "figures")
    figures_of(alone, count=1, genes=["ZYX"])
    expected = sorted(path.name for path in (alone / "figures").iterdir())
    assert expected == sorted(path.name for path in (folds[1] / "figures").iterdir())
    for name in expected:
        assert (alone / "figures" / name).read_bytes() == (folds[1] / "figures" / name).read_bytes(), name
    assert all(figures_on_disk(fold, count=1, genes=["ZYX"]) for fold in folds)
    assert draw_side_by_side(folds, count=1, genes=["ZYX"], most_processes=2) == 0, "nothing was left to draw"


def test_a_fold_that_cannot_be_drawn_is_left_to_the_next(folds):
    (folds[1] / "per_gene_slide.csv").unlink()
    draw_side_by_side(folds, count=1, most_processes=3)
    assert figures_on_disk(folds[0], count=1) and figures_on_disk(folds[2], count=1)
    assert figures_on_disk(folds[1], count=1) is None
    with pytest.raises(FileNotFoundError, match="per_gene_slide"):
        figures_of(folds[1], count=1)


def test_few_folds_or_one_core_start_no_process(folds):
    assert draw_side_by_side(folds[:2], most_processes=2) == 0
    assert draw_side_by_side(folds, most_processes=1) == 0
    assert all(figures_on_disk(fold) is None for fold in folds)


def test_the_command_draws_the_folds_it_is_given(folds):
    main(["--count", "1", "--genes=ZYX", "--", str(folds[0])])
    assert figures_on_disk(folds[0], count=1, genes=["ZYX"])
    assert figures_on_disk(folds[1], count=1, genes=["ZYX"]) is None
