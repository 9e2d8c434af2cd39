"""BLEEP through the modes: its bank of training spots follows the weights, and travels with the checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from models.baselines.bleep import Bleep
from models.layers.precision import unit
from modes.external_test import external_test
from modes.predict import PredictOptions, predict
from modes.prediction.model import restored_model
from modes.test import test as evaluate
from modes.train import TrainOptions, train
from preprocess.extract_features_uni import main as extract
from tests.checkpoints import edit
from tests.shortcuts import keep_spots
from utils.checkpoint import load_checkpoint
from utils.config import load_config

CPU = torch.device("cpu")
OPTIONS = TrainOptions(
    config_name="tiny",
    run_name="bleep",
    device=CPU,
    folds=[0, 1],
    resume=False,
    checkpoint_seconds=0.0,
)


@pytest.fixture(scope="module")
def settings(tiny_run, tmp_path_factory) -> dict[str, object]:
    torch.set_num_threads(1)
    logs = tmp_path_factory.mktemp("bleep") / "logs"
    return {
        "MODEL.name": "bleep",
        "DATA.data_dir": tiny_run.data_dir,
        "GENERAL.log_path": logs,
        "EVALUATION.fixed_epochs": 3,
    }


def _config(tiny_run, settings, **changes):
    return load_config(tiny_run.config_name, [f"{key}={value}" for key, value in (settings | changes).items()])


@pytest.fixture(scope="module")
def run(tiny_run, settings) -> Path:
    """BLEEP on two folds of the tiny data, with its report."""
    return train(_config(tiny_run, settings), OPTIONS)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).weights


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_the_bank_of_a_checkpoint_is_that_of_its_weights(run, name):
    """All training spots, and none of the others, embedded by the weights that stand beside them."""
    for fold in (0, 1):
        path = run / f"fold_{fold}" / name
        checkpoint = load_checkpoint(path)
        model = restored_model(checkpoint, path, CPU).eval()
        assert isinstance(model, Bleep)
        with torch.no_grad():
            torch.testing.assert_close(unit(model.gene_head(model.bank_expression)), model.bank)
        assert len(model.bank) == int(model.num_training_spots) > 0
        torch.testing.assert_close(model.bank_expression.mean(dim=0), checkpoint.training_mean[0])


def test_an_epoch_is_scored_with_the_bank_of_its_own_weights(run):
    for fold in (0, 1):
        records = [json.loads(line) for line in (run / f"fold_{fold}/metrics.jsonl").read_text().splitlines()]
        result = json.loads((run / f"fold_{fold}/result.json").read_text())
        assert records[-1]["test/mse"] == pytest.approx(result["mse"], rel=1e-5)
        assert len({record["test/mse"] for record in records}) == len(records)
        assert set(records[0]) >= {"train/instance", "train/total"} and "train/prediction" not in records[0]
    assert (run / "report.html").is_file()


def test_a_run_that_goes_on_comes_to_the_same(run, tiny_run, settings):
    stopped = replace(OPTIONS, run_name="stopped", folds=[1], with_report=False)
    cut = train(_config(tiny_run, settings, **{"EVALUATION.fixed_epochs": 1}), stopped)
    (cut / "fold_1/result.json").unlink()
    (cut / "config.yaml").write_text((run / "config.yaml").read_text())
    whole = load_checkpoint(run / "fold_1/best.pt").config.to_dict()
    for name in ("best.pt", "last.pt"):
        edit(cut / "fold_1" / name, lambda content: content.update(config=whole))
    train(_config(tiny_run, settings), replace(stopped, resume=True))
    expected, found = _weights(run / "fold_1/best.pt"), _weights(cut / "fold_1/best.pt")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_test_external_test_and_prediction_use_the_bank(run, tiny_run, tmp_path):
    before = json.loads((run / "fold_0/result.json").read_text())
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    evaluate(str(copy), 0, [f"DATA.data_dir={tiny_run.data_dir}"], CPU)
    assert json.loads((copy / "fold_0/result.json").read_text())["mse"] == before["mse"]
    data_dir = Path(shutil.copytree(tiny_run.data_dir / "test", tmp_path / "data" / "test")).parent
    root = data_dir / "test" / "demo_external"
    keep_spots(root)
    flags = ["--config", tiny_run.config_name, "--mode", "external", "--test_name", "demo_external"]
    flags += ["--extract_mode", "target", "--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "1"]
    extract(flags)
    folder = external_test(copy, "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    tested = anndata.read_h5ad(folder / "predictions" / "X1.h5ad")
    spots = root / "ST-spotfiles/X1_selection.tsv"
    image = root / "ST-imgs/X/X1/X1.jpg"
    out = predict(copy, PredictOptions(image, tmp_path / "X1.h5ad", spots), None, [], CPU)
    predicted = anndata.read_h5ad(out)[tested.obs_names, tested.var_names]
    np.testing.assert_allclose(predicted.X, tested.X, atol=1e-4)
    assert set(tested.layers) >= {"measured"} and "target" not in tested.layers
