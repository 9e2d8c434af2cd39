"""Checkpoints: found from whatever path is given, strict about what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.checkpoints import fabricated_fold
from utils.checkpoint import find_checkpoint, fold_checkpoints, load_checkpoint, load_weights, save_checkpoint


@pytest.fixture
def run(tmp_path):
    for fold in (2, 10):
        save_checkpoint(tmp_path / f"fold_{fold}" / "best.pt", fabricated_fold())
    return tmp_path


def test_found_by_run_fold_and_file(run):
    assert list(fold_checkpoints(run)) == [2, 10]
    assert find_checkpoint(run, 10) == run / "fold_10" / "best.pt"
    assert find_checkpoint(run / "fold_2") == run / "fold_2" / "best.pt"
    assert find_checkpoint(run / "fold_2" / "best.pt") == run / "fold_2" / "best.pt"


def test_a_missing_one_is_named_with_what_is_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint of fold 5.*folds with one: 2, 10"):
        find_checkpoint(run, 5)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folds with one: none.*Train first"):
        find_checkpoint(tmp_path / "empty")


def test_other_files_are_refused(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of this program.*import_reference"):
        load_checkpoint(tmp_path / "plain.pt")
    torch.save({"schema": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="schema 99, this program reads 1"):
        load_checkpoint(tmp_path / "newer.pt")
    torch.save({"schema": 1, "model": {}}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="lacks config, genes, encoder, fold, epoch"):
        load_checkpoint(tmp_path / "part.pt")


def test_weights_must_fit():
    model = nn.Linear(3, 2)
    wrong = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"3 differences.*lacks bias; has unknown extra; weight is \(2, 4\), the model has \(2, 3\)"
    ):
        load_weights(model, wrong, "x.pt")
    right = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_weights(model, right, "x.pt")
    assert torch.equal(model.weight, torch.ones(2, 3))
