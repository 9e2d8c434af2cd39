"""Models: tensors in, tensors out. `build_model` and `build_loss` are the only places that know the numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.encoders import FusionEncoder, GeneEncoder, build_global_encoder, build_neighbor_encoder
from models.gene_dml import Embeddings, GeneDML, Prediction
from models.layers.dropout import Dropout
from models.layers.transformer import FeedForward, TransformerLayer
from models.losses import build_loss

BASELINES = ("mean", "ridge", "ridge_neighbor", "knn", "mlp", "linear_probe", "triplex")

__all__ = ["BASELINES", "Embeddings", "GeneDML", "Prediction", "build_loss", "build_model", "start_at_mean"]


def build_model(
    config: Any, *, feature_dim: int, num_genes: int, num_neighbors: int = 5, pooled_dim: int | None = None
) -> nn.Module:
    """The model that `config.name` asks for, with random weights.

    config:        Config.MODEL. feature_dim: width D of the tokens of the patch encoder. num_genes: G of the panel.
    num_neighbors: side of the square of neighbor tiles.
    pooled_dim:    width of the pooled feature of a patch where it differs from D; neighbor and global encoder have it.
    Raises ValueError for an unknown name, and where heads do not divide a width.
    """
    if config.name == "gene_dml":
        return _build_gene_dml(
            config,
            feature_dim=feature_dim,
            pooled_dim=pooled_dim or feature_dim,
            num_genes=num_genes,
            num_neighbors=num_neighbors,
        )
    if config.name in BASELINES:
        from models.baselines.build import build_baseline

        return build_baseline(
            config, feature_dim=feature_dim, num_genes=num_genes, pooled_dim=pooled_dim, num_neighbors=num_neighbors
        )
    raise ValueError(f"Unknown model '{config.name}'. Set MODEL.name to one of: gene_dml, {', '.join(BASELINES)}.")


@torch.no_grad()
def start_at_mean(model: nn.Module, mean: Tensor) -> None:
    """Set the bias of every head's last Linear to `mean` (G,), the training mean of the targets.

    The published code starts from a bias near zero, two units below the targets, and spends its first epochs on that
    offset; the gradients of that phase are many times those of the signal. The set of functions the model can learn is
    the same.
    """
    for head in model.output_heads():
        last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
        last.bias.copy_(mean)


def _build_gene_dml(config: Any, *, feature_dim: int, pooled_dim: int, num_genes: int, num_neighbors: int) -> GeneDML:
    width = config.projection_dim
    scales = ["target"] + ["neighbor"] * config.use_neighbor + ["global"] * config.use_global
    return GeneDML(
        projection=nn.Linear(feature_dim, width),
        context_projection=nn.Linear(pooled_dim, width) if pooled_dim != feature_dim and len(scales) > 1 else None,
        neighbor_encoder=build_neighbor_encoder(config, pooled_dim, num_neighbors) if config.use_neighbor else None,
        global_encoder=build_global_encoder(config, pooled_dim) if config.use_global else None,
        fusion=FusionEncoder(
            layer=TransformerLayer(
                dim=width,
                heads=config.fusion_heads,
                hidden_dim=config.fusion_mlp_dim,
                dropout=config.fusion_dropout,
            ),
            feed_forward=FeedForward(dim=width, hidden_dim=config.fusion_mlp_dim, dropout=config.fusion_dropout),
        ),
        gene_encoder=GeneEncoder(
            num_genes=num_genes,
            dim=width,
            dropout=config.gene_dropout,
            feed_forward=FeedForward(dim=width, hidden_dim=config.gene_mlp_dim, dropout=config.gene_mlp_dropout),
        ),
        cluster_head=nn.Linear(width, width),
        fused_predictor=_predictor([width, config.predictor_dim, width, num_genes], config.predictor_dropout),
        scale_predictors={scale: _predictor([width, width, num_genes], config.predictor_dropout) for scale in scales},
    )


def _predictor(widths: list[int], dropout: float) -> nn.Sequential:
    """Linear layers with ReLU and dropout between them."""
    parts: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        parts += [nn.Linear(width_in, width_out), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*parts[:-2])
