"""Curves for Weights & Biases: refused without the package, offline with it."""

from __future__ import annotations

import importlib.util

import pytest

from modes.telling.board import Board, check_wandb


def test_wandb_is_asked_for_where_it_is_missing():
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match="needs the package wandb, which is not installed: pip install wandb"):
        check_wandb()


def test_wandb_stays_offline_unasked(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fold = tmp_path / "run" / "fold_0"
    fold.mkdir(parents=True)
    for epoch in (1, 2):  # the second as when the training goes on
        board = Board(fold / "tensorboard", epoch, with_wandb=True)
        board.add({"epoch": epoch, "train/total": 0.5})
        board.close()
    assert len(list(fold.glob("wandb/offline-run-*"))) == 2
