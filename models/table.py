"""The table of models: every name that MODEL.name may have, and what is behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.baselines.bleep import bleep_loss, build_bleep
from models.baselines.fitted import build_knn, build_mean, build_ridge, build_ridge_neighbor
from models.baselines.probes import build_linear_probe, build_mlp
from models.baselines.triplex import build_triplex, triplex_loss
from models.contract import ExpressionModel, LossFunction, Needs, Sizes
from models.gene_dml import build_gene_dml
from models.losses import GeneDMLLoss, fused_loss
from utils.config import Loss, Model
from utils.text import unknown


@dataclass(frozen=True)
class Row:
    """One model.

    build: makes it with random weights. needs: what it reads, known before there are data to build it for.
    loss:  makes the loss of its training; None for a closed form, which is fitted once, without epochs.
    groups_spots: its loss groups the spots of each batch into LOSS.k clusters, unless LOSS.group_weight is 0.
    """

    build: Callable[[Model, Sizes], ExpressionModel]
    needs: Callable[[Model], Needs]
    loss: Callable[[Loss], LossFunction] | None
    groups_spots: bool = False


def _features(_config: Model) -> Needs:
    return Needs()


def _features_and_neighbors(config: Model) -> Needs:
    return Needs(neighbors=config.use_neighbor)


def _features_and_training_spots(_config: Model) -> Needs:
    return Needs(training_spots=True)


def _all_scales(config: Model) -> Needs:
    return Needs(tokens=True, neighbors=config.use_neighbor, slides=config.use_global)


# All of them get the same frozen features, so that a difference in score is one of method and not of patch encoder.
MODELS = {
    "gene_dml": Row(build_gene_dml, _all_scales, GeneDMLLoss, groups_spots=True),
    "mean": Row(build_mean, _features, loss=None),
    "ridge": Row(build_ridge, _features, loss=None),
    "ridge_neighbor": Row(build_ridge_neighbor, _features_and_neighbors, loss=None),
    "knn": Row(build_knn, _features, loss=None),
    "mlp": Row(build_mlp, _features, loss=lambda _settings: fused_loss),
    "linear_probe": Row(build_linear_probe, _features, loss=lambda _settings: fused_loss),
    "bleep": Row(build_bleep, _features_and_training_spots, loss=lambda _settings: bleep_loss),
    "triplex": Row(build_triplex, _all_scales, loss=lambda _settings: triplex_loss),
}


def find_model(name: str) -> Row:
    """Find the row of a model. Raises ValueError with the nearest name and all others if there is none."""
    if name in MODELS:
        return MODELS[name]
    raise ValueError(f"{unknown('model', name, MODELS)} (--model, MODEL.name).")


def build_model(config: Model, sizes: Sizes) -> ExpressionModel:
    """Build the model that `config.name` asks for, with random weights.

    Raises ValueError for an unknown name, and where heads do not divide a width.
    """
    row = find_model(config.name)
    model = row.build(config, sizes)
    assert model.needs == row.needs(config), f"the table says otherwise of {config.name}"
    return model
