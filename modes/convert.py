"""--mode import_reference: a checkpoint of the published code becomes one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.backbones import backbone_spec
from models.import_reference import import_reference
from modes.compose import make_model, open_layout
from modes.study import find_folds, slides_of
from utils.checkpoint import load_weights, save_checkpoint
from utils.cli import say
from utils.config import Config
from utils.files import load_names, load_tensors


@dataclass(frozen=True)
class Source:
    """A published checkpoint and what it does not say about itself."""

    path: str
    config_name: str
    fold: int


def convert(config: Config, source: Source, out: str) -> Path:
    """Write our checkpoint of a published state dict: its weights, the panel of the data folder, the fold it was for.

    The training mean is unknown and stays NaN, so a test shows no baseline beside it.
    Raises ValueError when names or shapes do not fit the configuration, or the panel has another number of genes.
    """
    content = load_tensors(source.path)
    weights = import_reference(_state_dict(content, source.path))
    layout = open_layout(config)
    genes = load_names(layout.panel_path)
    spec = backbone_spec(config.DATA.encoder)
    model = make_model(config, feature_dim=spec.pooled_dim, token_dim=spec.dim, num_genes=len(genes))
    load_weights(model, weights, source.path)
    (fold,), _ = find_folds(config, layout, [source.fold])
    split = {
        "fold": fold.index,
        "name": fold.name,
        "protocol": "paper",
        "test_patients": list(fold.test_patients),
        "train_patients": list(fold.train_patients),
        "validation_patients": [],
        "test_slides": slides_of(layout, fold.test_patients),
        "train_slides": slides_of(layout, fold.train_patients),
        "validation_slides": [],
        "selection": "test",
    }
    path = Path(out)
    save_checkpoint(
        path,
        {
            "model": weights,
            "epoch": 0,
            "progress": {"epoch": 0, "best_epoch": 0, "best_score": float("-inf"), "history": []},
            "config": config.to_dict(),
            "config_name": source.config_name,
            "genes": genes,
            "encoder": {"name": spec.name, "sha256": "unknown", "dim": spec.pooled_dim, "token_dim": spec.dim},
            "fold": split,
            "training_mean": torch.full((2, len(genes)), torch.nan),
            "gene_lists": {},
            "field_of_view_um": None,
        },
    )
    say(
        f"{source.path}: {len(weights)} arrays imported as fold {fold.index} ({fold.name}) of {config.DATA.type}: {path}"
    )
    return path


def _state_dict(content: object, path: str) -> Mapping[str, Tensor]:
    """The mapping of names to tensors in a checkpoint, also when it is wrapped in {"state_dict": ...} and the like."""
    for key in ("state_dict", "model_state_dict", "model", None):
        found = content.get(key) if isinstance(content, Mapping) and key else content
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return found
    raise ValueError(
        f"{path} holds no state dict (names -> tensors), neither at the top nor under 'state_dict' or 'model'."
    )
