"""Encoders of the three inputs that are learned: the neighbors of a spot, the whole slide, the expression."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from models.contract import Sizes
from models.layers.dropout import Dropout
from models.layers.packing import SlidePacking
from models.layers.position import GridConvolution, grid_neighbors
from models.layers.transformer import FeedForward, TransformerLayer
from utils.config import Model
from utils.devices import to_device


class NeighborEncoder(nn.Module):
    """Transformer with relative position bias over the square of tiles around a spot."""

    def __init__(self, *, layers: list[TransformerLayer], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, is_valid: Tensor | None) -> Tensor:
        """Encode the neighbors of each spot.

        tokens:   (B, n*n, D) features of the tiles, row-major.
        is_valid: (B, n*n) bool, False for a tile that leaves the image: it is seen by no other tile but still gets an
                  output; None when all are valid.
        returns:  (B, n*n, D).
        """
        tokens = tokens.to(self.norm.weight.dtype)
        for layer in self.layers:
            tokens = layer(tokens, key_is_valid=is_valid)
        return self.norm(tokens)


class GlobalEncoder(nn.Module):
    """Transformer over all spots of a slide with a positional convolution after its first layer."""

    def __init__(self, *, layers: list[TransformerLayer], position: GridConvolution, dim: int) -> None:
        """layers: at least one, or ValueError. position: applied after the first."""
        super().__init__()
        if not layers:
            raise ValueError(
                "MODEL.global_depth is 0; the global encoder needs at least one layer. Set use_global=False to leave it out."
            )
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        features: Tensor,
        grid_xy: Tensor,
        lengths: list[int],
        rows: Tensor | None = None,
        *,
        padded: bool | None = None,
    ) -> Tensor:
        """Encode the spots of several slides, each spot seeing all spots of its slide.

        features: (R, D), all spots of slide 0, then all of slide 1, ...; any order inside a slide.
        grid_xy:  (R, 2) integer grid position (x, y) of the same rows, no duplicates inside a slide.
        lengths:  spots of each slide.
        rows:     (B,) index into the R rows whose result is wanted, or None for all. The last layer computes queries
                  and feed-forward for these only, which changes no number.
        padded:   see `SlidePacking`.
        returns:  (B, D) in the order of `rows`, or (R, D) in the order of `features`.
        Positions and rows may lie on the host while the features lie on a device; then nothing waits for the device.
        """
        device, layers = features.device, [cast(TransformerLayer, layer) for layer in self.layers]
        neighbors = to_device(grid_neighbors(grid_xy, lengths), device)
        everything = SlidePacking(lengths, device=device, padded=padded)
        tokens = layers[0].forward_packed(features.to(self.norm.weight.dtype), everything)
        tokens = self.position(tokens, neighbors)
        for layer in layers[1:-1]:
            tokens = layer.forward_packed(tokens, everything)
        if len(layers) > 1:
            asked = everything if rows is None else SlidePacking(lengths, device=device, rows=rows, padded=padded)
            tokens = layers[-1].forward_packed(tokens, asked)
        elif rows is not None:
            tokens = tokens.index_select(0, rows.to(device))
        return self.norm(tokens)


class ProjectionHead(nn.Module):
    """LN(Dropout(W2 GELU(p) + b2) + p) with p = W1 x + b1, the head of BLEEP."""

    def __init__(self, *, input_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(input_dim, dim)
        self.hidden = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, values: Tensor) -> Tensor:
        """values: (B, D). Returns (B, P), not normalised to length 1."""
        projected = self.projection(values)
        hidden = self.dropout(self.hidden(functional.gelu(projected)))
        return self.norm(hidden + projected)


class GeneEncoder(ProjectionHead):
    """Expression of a spot to a vector of the width of the image tokens: a projection head and a feed-forward."""

    def __init__(self, *, num_genes: int, dim: int, dropout: float, feed_forward: FeedForward) -> None:
        super().__init__(input_dim=num_genes, dim=dim, dropout=dropout)
        self.feed_forward = feed_forward

    def forward(self, expression: Tensor) -> Tensor:
        """expression: (B, G) in the unit of the targets. Returns (B, P), not normalised."""
        return self.feed_forward(super().forward(expression))


class FusionEncoder(nn.Module):
    """One pre-norm layer over the tokens of all scales, then a feed-forward without residual or normalisation."""

    def __init__(self, *, layer: TransformerLayer, feed_forward: FeedForward) -> None:
        super().__init__()
        self.layer = layer
        self.feed_forward = feed_forward

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T, P) of all scales. Returns (B, T, P)."""
        return self.feed_forward(self.layer(tokens))


def build_neighbor_encoder(config: Model, sizes: Sizes) -> NeighborEncoder:
    """Build the encoder of the neighbor features, whose width it keeps. Raises ValueError where heads do not divide it."""
    dim = sizes.feature_dim
    layers = [
        TransformerLayer(
            dim=dim,
            heads=config.neighbor_heads,
            hidden_dim=round(config.neighbor_mlp_ratio * dim),
            dropout=config.neighbor_dropout,
            grid_side=sizes.num_neighbors,
        )
        for _ in range(config.neighbor_depth)
    ]
    return NeighborEncoder(layers=layers, dim=dim)


def build_global_encoder(config: Model, sizes: Sizes) -> GlobalEncoder:
    """Build the encoder of a slide's features, whose width it keeps. Raises ValueError where heads do not divide it."""
    dim = sizes.feature_dim
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
