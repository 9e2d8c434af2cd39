"""The model of a configuration, and that of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.contract import ExpressionModel, Needs, Sizes
from models.table import build_model, find_model
from utils.checkpoint import load_weights
from utils.config import Config, differences, with_overrides
from utils.trained_fold import TrainedFold

# What a test may set differently from the training; everything else is part of the trained model.
FREE_KEYS = (
    "GENERAL.log_path",
    "GENERAL.exp_id",
    "DATA.data_dir",
    "DATA.weights",
    "DATA.tokens",
    "DATA.residence",
    "DATA.num_workers",
    "TRAINING.precision",
    "EVALUATION.chunk_size",
)

POOLED = "pooled"  # DATA.tokens of the variant whose target is one token


def needs_of(config: Config) -> Needs:
    """Say which inputs must be at hand for the configured model. Raises ValueError for an unknown name."""
    needs = find_model(config.MODEL.name).needs(config.MODEL)
    return replace(needs, tokens=False) if config.DATA.tokens == POOLED else needs


def has_pooled_target(config: Config) -> bool:
    """Tell whether the configured model reads target tokens and is given the pooled feature as the only one."""
    return config.DATA.tokens == POOLED and find_model(config.MODEL.name).needs(config.MODEL).tokens


def make_model(config: Config, *, feature_dim: int, token_dim: int, num_genes: int) -> ExpressionModel:
    """Build the model of the configuration for features of `feature_dim` and target tokens of `token_dim`."""
    return build_model(config.MODEL, Sizes(feature_dim, token_dim, num_genes, config.DATA.num_neighbors))


def restored_model(fold: TrainedFold, checkpoint: Path, device: torch.device) -> ExpressionModel:
    """Build the model of a checkpoint with its weights. Raises ValueError if these do not fit its configuration."""
    model = make_model(
        fold.config,
        feature_dim=fold.encoder.dim,
        token_dim=fold.encoder.token_dim,
        num_genes=len(fold.genes),
    ).to(device)
    load_weights(model, fold.weights, checkpoint)
    return model


def restored_config(fold: TrainedFold, checkpoint: Path, overrides: Sequence[str]) -> Config:
    """Take the configuration of a checkpoint with what this machine does differently (paths, memory, precision).

    Raises ValueError for an override that would make it another model, with those that are free.
    """
    config = with_overrides(fold.config, overrides)
    fixed = {"DATA.tokens"} if POOLED in (fold.config.DATA.tokens, config.DATA.tokens) else set()  # another model
    changed = differences(fold.config, config, but_for=set(FREE_KEYS) - fixed)
    if changed:
        listed = "\n  ".join(changed)
        raise ValueError(
            f"{checkpoint} was trained with other settings, which cannot be changed afterwards:\n  {listed}\n"
            f"Free are: {', '.join(FREE_KEYS)}."
        )
    return config
