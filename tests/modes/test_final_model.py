"""--all_patients: one model on every patient, after a cross-validation; used, never scored."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import anndata
import pytest
import torch

from evaluation.predictions import read_held_out
from tests.checkpoints import edit
from tests.command_line import Left, call_main
from utils.checkpoint import load_checkpoint


def train_final(tiny_run, log_path: Path, *arguments: object) -> Left:
    return call_main(
        *("--mode", "train", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir, "--all_patients"),
        *("--log_path", log_path, "--device", "cpu", "--num_workers", "1", "--no_report", *arguments),
    )


@pytest.fixture(scope="module")
def final(tiny_run, tmp_path_factory) -> Path:
    """The run folder of a final model, which follows `tiny_run`."""
    logs = tmp_path_factory.mktemp("final")
    left = train_final(tiny_run, logs, "--epochs_from", tiny_run.path)
    assert left.status == 0, left.said
    assert "the median of those chosen" in left.said and "no patient is held out and it has no score" in left.said
    assert "held out none of C" in left.said, "two folds of three were trained"
    return logs / "tiny" / "exp_0_all_patients"


def test_it_trains_on_every_patient_for_the_median_of_the_epochs(final, tiny_run):
    trained = load_checkpoint(final / "all_patients" / "best.pt")
    split = trained.split
    assert split.is_final and (split.test_patients, split.train_patients) == ([], ["A", "B", "C"])
    epochs = [json.loads((tiny_run.path / f"fold_{fold}" / "result.json").read_text())["epoch"] for fold in (0, 1)]
    assert trained.finished and trained.epoch == trained.config.EVALUATION.fixed_epochs == round(sum(epochs) / 2)
    held_out = read_held_out(final)
    assert held_out == read_held_out(tiny_run.path) and held_out.patients == ["A", "B"]
    assert not list(final.rglob("result.json")) and not (final / "summary.json").exists()


def test_it_goes_on_and_is_complete(final, tiny_run):
    again = train_final(tiny_run, final.parents[1], "--epochs_from", tiny_run.path, "--resume")
    assert again.status == 0 and "The model on all patients: complete, nothing to do." in again.said


def test_a_continued_one_equals_an_undisturbed_one(tiny_run, tmp_path):
    wanted = ("--fixed_epochs", 2, "--checkpoint_seconds", 0)
    assert train_final(tiny_run, tmp_path / "whole", *wanted).status == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    folder = tmp_path / "part" / "tiny" / "exp_0_all_patients" / "all_patients"
    (folder / "last.pt").unlink()
    edit(folder / "best.pt", lambda content: content.update(finished=False))
    assert train_final(tiny_run, tmp_path / "part", *wanted, "--resume").status == 0
    one, other = (
        load_checkpoint(tmp_path / name / "tiny" / "exp_0_all_patients" / "all_patients" / "best.pt")
        for name in ("whole", "part")
    )
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


def test_predict_takes_it_and_test_and_compare_do_not(final, tiny_run, tmp_path):
    root = tiny_run.data_dir / "demo"
    image = next((root / "ST-imgs" / "A" / "A1").iterdir())
    shared = ("--model_path", final, "--data_dir", tiny_run.data_dir, "--device", "cpu")
    spots = root / "ST-spotfiles" / "A1_selection.tsv"
    predicted = call_main(
        *("--mode", "predict", "--image", image, "--spots", spots, "--out", tmp_path / "a.h5ad", *shared)
    )
    assert predicted.status == 0 and "all patients" in predicted.said, predicted.said
    assert "no score of its own" in str(anndata.read_h5ad(tmp_path / "a.h5ad").uns["gene_dml"]["held_out"])
    tested = call_main("--mode", "test", *shared)
    assert tested.status and "was trained on all patients" in tested.said and "external_test" in tested.said
    one_fold = call_main("--mode", "test", *shared, "--fold", 0)
    assert one_fold.status and "no checkpoint of fold 0" in one_fold.said
    compared = call_main("--mode", "compare", "--runs", final, tiny_run.path, "--out", tmp_path / "compared")
    assert compared.status and "trained on all patients: it has no held-out scores" in compared.said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no patient is left to choose the epoch on.*--epochs_from RUN, or a number, --fixed_epochs N"),
        (("--epochs_from", "nowhere"), "nowhere/config.yaml does not exist"),
        (("--epochs_from", "RUN", "--batch_size", 32), "another configuration:.*TRAINING.batch_size"),
        (("--epochs_from", "RUN", "--encoder", "resnet50"), "another configuration:.*DATA.encoder"),
        (("--fixed_epochs", 1, "--fold", 0), "--all_patients trains one model in place of the folds"),
    ],
)
def test_what_cannot_be_followed_is_refused(tiny_run, tmp_path, arguments, message):

    given = [tiny_run.path if word == "RUN" else word for word in arguments]
    left = train_final(tiny_run, tmp_path / "logs", *given)
    assert left.status and re.search(message, left.said, re.DOTALL), left.said
    assert not (tmp_path / "logs").exists()


def test_features_of_other_weights_than_those_of_the_cross_validation(tiny_run, tmp_path):
    run = tiny_run.copy(tmp_path)
    for path in run.glob("fold_*/split.json"):
        content = json.loads(path.read_text())
        content["features"]["encoder_sha256"] = "0" * 64
        path.write_text(json.dumps(content))
    left = train_final(tiny_run, tmp_path / "logs", "--epochs_from", run)
    assert left.status and "were trained on features of efficientnet-lite0 (weights 000000000000" in left.said


def test_without_a_cross_validation_only_the_number_is_taken(tiny_run, tmp_path):
    left = train_final(tiny_run, tmp_path / "logs", "--model", "ridge")
    assert left.status == 0 and not list(tmp_path.rglob("held_out.json"))
