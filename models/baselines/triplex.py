"""A TRIPLEX-style baseline: three scales with their own heads, joined by cross-attention, taught by the fusion.

After "Accurate Spatial Gene Expression Prediction by Integrating Multi-Resolution Features" (CVPR 2024), written from its
description. The neighbor and global encoders are those of Gene-DML and the patch encoder is the same frozen one; what
remains different is the method: no alignment with the expression, a fusion by cross-attention, and distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.encoders import GlobalEncoder, NeighborEncoder, build_global_encoder, build_neighbor_encoder, mean_tokens
from models.gene_dml import Prediction, full_precision
from models.layers.attention import attend
from models.layers.dropout import Dropout
from models.layers.transformer import FeedForward

TRUTH_WEIGHT = 0.7
DISTILLATION_WEIGHT = 0.3


class CrossAttention(nn.Module):
    """One query per spot asks the tokens of one scale; pre-norm on both sides."""

    def __init__(self, *, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"A width of {dim} cannot be shared among {heads} attention heads. Choose MODEL.fusion_heads so that it "
                f"divides {dim} (MODEL.projection_dim)."
            )
        self.heads = heads
        self.query_norm = nn.LayerNorm(dim)
        self.token_norm = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.project = nn.Sequential(nn.Linear(dim, dim), Dropout(dropout))

    def forward(self, query: Tensor, tokens: Tensor, token_is_valid: Tensor | None) -> Tensor:
        """query (B, P), tokens (B, T, P), token_is_valid (B, T) bool or None -> (B, P)."""
        batch, count, dim = tokens.shape
        asked = self.to_query(self.query_norm(query)).view(batch, self.heads, 1, dim // self.heads)
        key_value = self.to_key_value(self.token_norm(tokens)).view(batch, count, 2, self.heads, dim // self.heads)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        return self.project(attend(asked, key, value, key_is_valid=token_is_valid).reshape(batch, dim))


class ScaleFusion(nn.Module):
    """q + sum over the scales with tokens of CrossAttention(q, tokens), then x + FeedForward(LN x)."""

    def __init__(self, *, attentions: dict[str, CrossAttention], feed_forward: FeedForward, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleDict(attentions)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = feed_forward

    def forward(self, query: Tensor, tokens: dict[str, Tensor], is_valid: dict[str, Tensor | None]) -> Tensor:
        """query (B, P): the global token; tokens: by scale (B, T, P) with (B, T) bool or None -> (B, P)."""
        fused = query
        for name, attention in self.attentions.items():
            fused = fused + attention(query, tokens[name], is_valid[name])
        return fused + self.feed_forward(self.norm(fused))


class Triplex(nn.Module):
    """Each scale and their fusion predict the expression (`Prediction.target`, `.neighbor`, `.global_`, `.fused`)."""

    needs_tokens = True
    is_closed_form = False

    def __init__(
        self,
        *,
        neighbor_encoder: NeighborEncoder | None,
        global_encoder: GlobalEncoder | None,
        projections: dict[str, nn.Linear],
        fusion: ScaleFusion,
        heads: dict[str, nn.Module],
    ) -> None:
        """neighbor_encoder, global_encoder: None leaves that scale out; then it has no projection and no head either.
        projections: by scale, feature width to P. heads: by scale and "fused", P to genes."""
        super().__init__()
        self.neighbor_encoder = neighbor_encoder
        self.global_encoder = global_encoder
        self.projections = nn.ModuleDict(projections)
        self.fusion = fusion
        self.heads = nn.ModuleDict(heads)
        self.needs_neighbors = neighbor_encoder is not None
        self.needs_slides = global_encoder is not None

    def output_heads(self) -> list[nn.Module]:
        """The heads that predict expression."""
        return list(self.heads.values())

    def encode_slides(
        self, slide_features: Tensor, grid_xy: Tensor, lengths: list[int], rows: Tensor | None = None
    ) -> Tensor:
        """Global token (B, D) of the spots `rows` of several whole slides, as GeneDML.encode_slides."""
        if self.global_encoder is None:
            return slide_features if rows is None else slide_features[rows.to(slide_features.device)]
        return self.global_encoder(slide_features, grid_xy, lengths, rows)

    def forward(
        self,
        *,
        target_tokens: Tensor,
        neighbor_features: Tensor | None = None,
        neighbor_is_valid: Tensor | None = None,
        global_tokens: Tensor | None = None,
        target_features: Tensor | None = None,
        expression: Tensor | None = None,
    ) -> Prediction:
        """Predict the expression of B spots, in their order.

        target_tokens (B, T, D), neighbor_features (B, 25, D) with neighbor_is_valid (B, 25), global_tokens (B, D) from
        `encode_slides`; target_features and expression are not used.
        """
        tokens: dict[str, Tensor] = {"target": self._project("target", target_tokens)}
        is_valid: dict[str, Tensor | None] = {"target": None}
        vectors = {"target": mean_tokens(tokens["target"])}
        if self.neighbor_encoder is not None:
            assert neighbor_features is not None, "the model was built with use_neighbor"
            tokens["neighbor"] = self._project("neighbor", self.neighbor_encoder(neighbor_features, neighbor_is_valid))
            is_valid["neighbor"] = neighbor_is_valid
            vectors["neighbor"] = _mean_of_valid(tokens["neighbor"], neighbor_is_valid)
        if self.global_encoder is not None:
            assert global_tokens is not None, "the model was built with use_global"
            vectors["global"] = self._project("global", global_tokens)
        # Without the global scale the patch itself asks.
        query = vectors.get("global", vectors["target"])
        vectors["fused"] = self.fusion(query, tokens, is_valid)
        predicted = {name: full_precision(self.heads[name](vector)) for name, vector in vectors.items()}
        return Prediction(
            fused=predicted["fused"],
            target=predicted["target"],
            neighbor=predicted.get("neighbor"),
            global_=predicted.get("global"),
        )

    def _project(self, scale: str, tokens: Tensor) -> Tensor:
        """Linear D -> P of a scale; cached half-precision tokens are widened unless autocast takes them."""
        projection = self.projections[scale]
        if not torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(projection.weight.dtype)
        return projection(tokens)


def _mean_of_valid(tokens: Tensor, is_valid: Tensor | None) -> Tensor:
    """Mean over the valid tokens (B, T, P) -> (B, P) in float32: a tile outside the image says nothing."""
    if is_valid is None:
        return mean_tokens(tokens)
    weights = is_valid.unsqueeze(-1).to(full_precision(tokens).dtype)
    return (full_precision(tokens) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def triplex_loss(prediction: Prediction, expression: Tensor) -> dict[str, Tensor]:
    """MSE(fused, truth) + sum over the scales of 0.7 MSE(scale, truth) + 0.3 MSE(scale, fused).

    The fused prediction is detached in the last term: it is the teacher, and must not be drawn towards weaker scales.
    returns: "prediction", for each scale there is "<scale>" and "<scale>_distillation" (unweighted), and "total".
    """
    truth, teacher = expression.to(prediction.fused.dtype), prediction.fused.detach()
    terms = {"prediction": functional.mse_loss(prediction.fused, truth)}
    total = terms["prediction"]
    for name, predicted in prediction.scales().items():
        terms[name] = functional.mse_loss(predicted, truth)
        terms[f"{name}_distillation"] = functional.mse_loss(predicted, teacher)
        total = total + TRUTH_WEIGHT * terms[name] + DISTILLATION_WEIGHT * terms[f"{name}_distillation"]
    return {**terms, "total": total}


def build_triplex(config: object, *, token_dim: int, pooled_dim: int, num_genes: int, num_neighbors: int) -> Triplex:
    """Build from the MODEL section: the encoders' numbers are those of Gene-DML, so is the width of the fusion.

    token_dim: width of the target tokens; pooled_dim: of neighbor and slide features; num_neighbors: tiles a side.
    """
    dim = config.projection_dim
    widths = {"target": token_dim}
    widths |= {"neighbor": pooled_dim} if config.use_neighbor else {}
    widths |= {"global": pooled_dim} if config.use_global else {}
    attentions = {
        name: CrossAttention(dim=dim, heads=config.fusion_heads, dropout=config.fusion_dropout)
        for name in widths
        if name != "global"
    }
    feed_forward = FeedForward(dim=dim, hidden_dim=config.fusion_mlp_dim, dropout=config.fusion_dropout)
    heads = {name: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_genes)) for name in (*widths, "fused")}
    return Triplex(
        neighbor_encoder=build_neighbor_encoder(config, pooled_dim, num_neighbors) if config.use_neighbor else None,
        global_encoder=build_global_encoder(config, pooled_dim) if config.use_global else None,
        projections={name: nn.Linear(width, dim) for name, width in widths.items()},
        fusion=ScaleFusion(attentions=attentions, feed_forward=feed_forward, dim=dim),
        heads=heads,
    )
