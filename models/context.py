"""The neighbor and the global encoder in the sizes of a configuration, for every model that sees the surroundings."""

from __future__ import annotations

from typing import Any

from models.attention import TransformerLayer
from models.encoders import GlobalEncoder, NeighborEncoder
from models.position import GridConvolution


def build_neighbor_encoder(config: Any, dim: int, num_neighbors: int) -> NeighborEncoder:
    """config: Config.MODEL. dim: width of the neighbor features. num_neighbors: side of the square of tiles."""
    layers = [
        TransformerLayer(
            dim=dim,
            heads=config.neighbor_heads,
            hidden_dim=round(config.neighbor_mlp_ratio * dim),
            dropout=config.neighbor_dropout,
            grid_side=num_neighbors,
        )
        for _ in range(config.neighbor_depth)
    ]
    return NeighborEncoder(layers=layers, dim=dim)


def build_global_encoder(config: Any, dim: int) -> GlobalEncoder:
    """config: Config.MODEL. dim: width of the features of the slide's spots."""
    layers = [
        TransformerLayer(
            dim=dim,
            heads=config.global_heads,
            hidden_dim=round(config.global_mlp_ratio * dim),
            dropout=config.global_dropout,
        )
        for _ in range(config.global_depth)
    ]
    return GlobalEncoder(layers=layers, position=GridConvolution(dim=dim), dim=dim)
