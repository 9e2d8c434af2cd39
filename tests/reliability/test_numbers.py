"""Numbers: what is not finite is an error where it enters, and no file of NaN leaves with status 0."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from datasets.known_sets import get_spec
from datasets.layout import Layout
from tests.caches import as_earlier
from tests.checkpoints import edit
from tests.command_line import Left, call_main


def predict(run: Path, data_dir: Path, out: Path) -> Left:
    image = data_dir / "test" / "demo_external" / "ST-imgs/X/X1/X1.jpg"
    return call_main(
        "--mode", "predict", "--image", image, "--model_path", run, "--fold", 0, "--out", out, "--pitch_px", 128,
        "--device", "cpu",
    )  # fmt: skip


def score(run: Path, data_dir: Path) -> Left:
    return call_main(
        "--mode", "test", "--model_path", run, "--fold", 0, "--data_dir", data_dir, "--device", "cpu", "--no_report"
    )


def refused(left: Left, *texts: str) -> None:
    assert left.status == 2, left.said
    assert "Traceback" not in left.said and left.said.count("error:") == 1
    for text in texts:
        assert text in left.said, left.said


@pytest.fixture
def place(tiny_run, tmp_path) -> Layout:
    data_dir = Path(shutil.copytree(tiny_run.data_dir, tmp_path / "data"))
    return Layout(data_dir, get_spec("demo", data_dir), patch_size=64, num_neighbors=3, encoder="efficientnet-lite0")


@pytest.mark.parametrize(("value", "text"), [(np.nan, "are not finite"), (1.5e37, "not finite")])
def test_a_broken_weight_makes_no_prediction_and_no_score(value, text, tiny_run, tmp_path):
    """NaN, and a flipped exponent bit with which the arithmetic runs over."""
    run, out = tiny_run.copy(tmp_path), tmp_path / "x.h5ad"
    before = (run / "fold_0" / "result.json").read_bytes()

    def spoil(content: dict) -> None:
        content["model"]["projection.weight"][0, 0] = value
        content["model"]["projection.weight"][1, :] = value

    edit(run / "fold_0" / "best.pt", spoil)
    refused(predict(run, tiny_run.data_dir, out), text)
    assert not out.exists()
    refused(score(run, tiny_run.data_dir), text)
    assert (run / "fold_0" / "result.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["target", "neighbor", "token"])
@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_broken_feature_names_its_file_and_spot(kind, is_earlier, place, tiny_run, tmp_path):
    """Of a test slide: otherwise the whole slide would drop out of the headline."""
    run, path = tiny_run.copy(tmp_path), place.cache_path(kind, "A1")
    if is_earlier:
        as_earlier(path)
    with h5py.File(path, "r+") as file:
        numbers, spot = file["tokens" if kind == "token" else "features"], file["spot_id"].asstr()[5]
        numbers[(5, *(0,) * (numbers.ndim - 1))] = np.nan
    refused(score(run, place.data_dir), str(path), f"{spot}", "not finite" if is_earlier else "not what was written")


def test_a_slide_without_counts_is_said(place, tiny_run, tmp_path):
    """A test slide: while its fold is trained, and in the result."""
    path = place.counts_path("A1")
    table = pd.read_parquet(path)
    (table * 0).astype(table.dtypes).to_parquet(path)
    left = call_main(
        "--mode", "train", "--config_name", tiny_run.config_name, "--data_dir", place.data_dir, "--log_path", tmp_path,
        "--run_name", "run", "--fold", 0, "--epochs", 1, "--device", "cpu", "--no_report",
    )  # fmt: skip
    assert left.status == 0, left.said
    assert "WARNING: no spot has a count of any gene on A1 (" in left.said
    (result,) = tmp_path.rglob("fold_0/result.json")
    assert "Slide A1: no count of any gene of the panel" in result.read_text()


def test_published_features_that_are_not_finite(place, tiny_run, tmp_path):
    run = tiny_run.copy(tmp_path)
    for kind in ("target", "neighbor"):
        for slide in ("A1", "B1", "C1"):
            path = place.cache_path(kind, slide)
            with h5py.File(path) as file:
                values = torch.from_numpy(file["features"][:])
            path.unlink()
            if (kind, slide) == ("target", "A1"):
                values[:] = torch.nan
            torch.save(values, path.with_suffix(".pt"))
    left = score(run, place.data_dir)
    assert left.status == 2 and "not finite" in left.said and "A1.pt" in left.said, left.said
