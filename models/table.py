"""The table of models: every name that MODEL.name may have, and what is behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from models.contract import ExpressionModel, LossFunction, Needs, Sizes
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


def _at(place: str) -> Any:
    """What is called "module:name". Its module is imported only now, so that one model does not load all the others."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _made_by(place: str) -> Callable[..., Any]:
    return lambda *settings: _at(place)(*settings)


def _same_for_all(place: str) -> Callable[[Loss], LossFunction]:
    return lambda _settings: _at(place)


# All of them get the same frozen features, so that a difference in score is one of method and not of patch encoder.
MODELS = {
    "gene_dml": Row(
        _made_by("models.gene_dml:build_gene_dml"),
        _all_scales,
        loss=_made_by("models.losses:GeneDMLLoss"),
        groups_spots=True,
    ),
    "mean": Row(_made_by("models.baselines.fitted:build_mean"), _features, loss=None),
    "ridge": Row(_made_by("models.baselines.fitted:build_ridge"), _features, loss=None),
    "ridge_neighbor": Row(_made_by("models.baselines.fitted:build_ridge_neighbor"), _features_and_neighbors, loss=None),
    "knn": Row(_made_by("models.baselines.fitted:build_knn"), _features, loss=None),
    "mlp": Row(_made_by("models.baselines.probes:build_mlp"), _features, _same_for_all("models.losses:fused_loss")),
    "linear_probe": Row(
        _made_by("models.baselines.probes:build_linear_probe"), _features, _same_for_all("models.losses:fused_loss")
    ),
    "bleep": Row(
        _made_by("models.baselines.bleep:build_bleep"),
        _features_and_training_spots,
        _same_for_all("models.baselines.bleep:bleep_loss"),
    ),
    "triplex": Row(
        _made_by("models.baselines.triplex:build_triplex"),
        _all_scales,
        _same_for_all("models.baselines.triplex:triplex_loss"),
    ),
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
