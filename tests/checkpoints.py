"""Checkpoints for tests: one made without any training, and the keys of a file changed in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from utils.config import Config
from utils.trained_fold import PatchEncoderRecord, Progress, SplitRecord, TrainedFold


def fabricated_fold(**changes: object) -> TrainedFold:
    """A fold of one training patient B and one test patient A, with one weight."""
    split = SplitRecord(
        fold=0,
        name="A",
        protocol="clean",
        test_patients=["A"],
        train_patients=["B"],
        validation_patients=[],
        test_slides=["A1"],
        train_slides=["B1"],
        validation_slides=[],
        selection="fixed",
    )
    fold = TrainedFold(
        weights={"weight": torch.ones(1)},
        epoch=3,
        progress=Progress(),
        config=Config(),
        config_name="her2st/dml",
        genes=["TP53", "CD3E"],
        encoder=PatchEncoderRecord("uni", "unknown", dim=4, token_dim=4),
        split=split,
        training_mean=torch.zeros(2, 2),
        gene_lists={},
        field_of_view_um=None,
    )
    return replace(fold, **changes)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change the content of a checkpoint as it lies in the file."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
