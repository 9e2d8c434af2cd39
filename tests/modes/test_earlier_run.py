"""A run that was written before a trained fold was a type (tests/data/earlier_run) still loads, tests and predicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from modes.predict import PredictOptions, predict
from modes.test import test as run_test
from tests.checkpoints import edit
from utils.checkpoint import has_ended, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
EARLIER = Path(__file__).resolve().parents[1] / "data" / "earlier_run"


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "run"))


def test_everything_in_the_file_is_read():
    fold = load_checkpoint(EARLIER / "fold_0" / "best.pt")
    assert (fold.epoch, fold.finished, fold.optimization, fold.config_name) == (3, True, None, "tiny.yaml")
    assert fold.progress.epoch == 3 and [record["epoch"] for record in fold.progress.history] == [1, 2, 3]
    assert (fold.config.MODEL.projection_dim, fold.config.LOSS.k, fold.config.DATA.num_genes) == (8, 4, 24)
    assert (fold.encoder.name, fold.encoder.dim, fold.encoder.token_pool) == ("efficientnet-lite0", 112, 1)
    assert fold.split.to_dict() == {
        key: value
        for key, value in json.loads((EARLIER / "fold_0" / "split.json").read_text()).items()
        if key not in ("tokens", "run_notes")
    }
    assert fold.genes == (EARLIER / "fold_0" / "genes.txt").read_text().split()
    assert fold.weights["projection.weight"].shape == (8, 112) and fold.training_mean.shape == (2, 24)
    assert set(fold.gene_lists) == {"highly_variable", "highly_predictive"} and fold.field_of_view_um == 102.4


def test_written_again_it_is_the_same_but_for_settings_that_are_no_more(tmp_path):
    path = EARLIER / "fold_0" / "best.pt"
    save_checkpoint(tmp_path / "again.pt", load_checkpoint(path))
    before, after = (torch.load(file, weights_only=True) for file in (path, tmp_path / "again.pt"))
    assert (before["config"]["TRAINING"].pop("compile"), before["config"]["LOSS"].pop("kmeans_init")) == (
        False,
        "first",
    )
    assert after["config"]["DATA"].pop("genes") is None, "came later"
    assert after["config"]["DATA"].pop("patch_um", None) is None, "came later"
    assert after["config"]["TRAINING"].pop("weight_decay") == 0, "came later"
    weights = [content.pop("model") for content in (before, after)]
    means = [content.pop("training_mean") for content in (before, after)]
    assert before == after and torch.equal(*means) and list(weights[0]) == list(weights[1])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_it_is_tested_and_predicts_as_before(run, tiny_run, tmp_path):
    """The scores of result.json, which the earlier version wrote, to what another CPU may change."""
    overrides = [f"DATA.data_dir={tiny_run.data_dir}"]
    run_test(str(run), None, overrides, CPU, with_report=False)
    then, now = (json.loads((folder / "fold_0" / "result.json").read_text()) for folder in (EARLIER, run))
    for scale in ("fused", "target"):
        for metric in ("mse", "mae", "pcc_all", "ssim"):
            expected = then["scores"]["smoothed"][scale][metric]
            assert now["scores"]["smoothed"][scale][metric] == pytest.approx(expected, abs=2e-3)
    assert now["training_mean"] == pytest.approx(then["training_mean"], rel=1e-5)
    tested = anndata.read_h5ad(run / "fold_0" / "predictions" / "A1.h5ad")
    root = tiny_run.data_dir / "demo"
    image = next((root / "ST-imgs" / "A" / "A1").iterdir())
    options = PredictOptions(image, tmp_path / "a1.h5ad", root / "ST-spotfiles" / "A1_selection.tsv")
    predicted = anndata.read_h5ad(predict(run, options, None, overrides, CPU))
    assert list(predicted.var_names) == list(tested.var_names)
    np.testing.assert_allclose(predicted[tested.obs_names].X, tested.X, atol=0.02)  # the cache holds 16-bit tokens


def test_older_still_without_the_mark_of_the_end(run):
    """Nothing is left to train where no last.pt is; the width of pooled tokens came later than the first checkpoints."""
    edit(run / "fold_0" / "best.pt", lambda content: content.pop("finished"))
    edit(run / "fold_0" / "best.pt", lambda content: content["encoder"].pop("token_pool"))
    fold = load_checkpoint(run / "fold_0" / "best.pt")
    assert fold.finished is None and fold.encoder.token_pool == 1 and has_ended(run / "fold_0" / "best.pt")
