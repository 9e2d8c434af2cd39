"""A TRIPLEX-style baseline: three scales with their own heads, joined by cross-attention, taught by the fusion.

After "Accurate Spatial Gene Expression Prediction by Integrating Multi-Resolution Features" (CVPR 2024), written from its
description. The neighbor and global encoders are those of Gene-DML and the patch encoder is the same frozen one; what
remains different is the method: no alignment with the expression, a fusion by cross-attention, and distillation.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.contract import (
    FUSED,
    GLOBAL,
    NEIGHBOR,
    TARGET,
    ExpressionModel,
    ModelInputs,
    Needs,
    Prediction,
    Sizes,
)
from models.encoders import GlobalEncoder, NeighborEncoder, build_global_encoder, build_neighbor_encoder
from models.layers.attention import attend
from models.layers.dropout import Dropout
from models.layers.precision import full_precision, mean_tokens, project
from models.layers.transformer import FeedForward
from utils.config import Model

TRUTH_WEIGHT = 0.7
DISTILLATION_WEIGHT = 0.3


class CrossAttention(nn.Module):
    """One query per spot asks the tokens of one scale; pre-norm on both sides."""

    def __init__(self, *, dim: int, heads: int, dropout: float) -> None:
        """Raises ValueError if the heads do not divide the width."""
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


class Triplex(ExpressionModel):
    """Each scale and their fusion predict the expression."""

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
        self.needs = Needs(tokens=True, neighbors=neighbor_encoder is not None, slides=global_encoder is not None)

    def output_heads(self) -> list[nn.Module]:
        """Give the heads that predict expression."""
        return list(self.heads.values())

    def encode_slides(
        self, slide_features: Tensor, grid_xy: Tensor, lengths: list[int], rows: Tensor | None = None
    ) -> Tensor:
        """Run the global encoder; see the contract."""
        assert self.global_encoder is not None, "the model was built without use_global"
        return self.global_encoder(slide_features, grid_xy, lengths, rows)

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:  # noqa: ARG002 - of the contract
        """Predict the expression of B spots, in their order; the measured one is not used."""
        assert inputs.target_tokens is not None, "the model reads the tokens of the target patches"
        tokens = {TARGET: project(self.projections[TARGET], inputs.target_tokens)}
        is_valid: dict[str, Tensor | None] = {TARGET: None}
        vectors = {TARGET: mean_tokens(tokens[TARGET])}
        if self.neighbor_encoder is not None:
            assert inputs.neighbor_features is not None, "the model was built with use_neighbor"
            is_valid[NEIGHBOR] = inputs.neighbor_is_valid
            neighbors = self.neighbor_encoder(inputs.neighbor_features, inputs.neighbor_is_valid)
            tokens[NEIGHBOR] = project(self.projections[NEIGHBOR], neighbors)
            vectors[NEIGHBOR] = _mean_of_valid(tokens[NEIGHBOR], inputs.neighbor_is_valid)
        if self.global_encoder is not None:
            assert inputs.global_tokens is not None, "the model was built with use_global"
            vectors[GLOBAL] = project(self.projections[GLOBAL], inputs.global_tokens)
        # Without the global scale the patch itself asks.
        query = vectors.get(GLOBAL, vectors[TARGET])
        fused = self.fusion(query, tokens, is_valid)
        predicted = {name: full_precision(self.heads[name](vector)) for name, vector in vectors.items()}
        return Prediction(fused=full_precision(self.heads[FUSED](fused)), scales=predicted)


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
    for name, predicted in prediction.scales.items():
        terms[name] = functional.mse_loss(predicted, truth)
        terms[f"{name}_distillation"] = functional.mse_loss(predicted, teacher)
        total = total + TRUTH_WEIGHT * terms[name] + DISTILLATION_WEIGHT * terms[f"{name}_distillation"]
    return {**terms, "total": total}


def build_triplex(config: Model, sizes: Sizes) -> Triplex:
    """Build TRIPLEX: the encoders' numbers are those of Gene-DML, so is the width of the fusion."""
    dim = config.projection_dim
    widths = {TARGET: sizes.token_dim}
    widths |= {NEIGHBOR: sizes.feature_dim} if config.use_neighbor else {}
    widths |= {GLOBAL: sizes.feature_dim} if config.use_global else {}
    attentions = {
        name: CrossAttention(dim=dim, heads=config.fusion_heads, dropout=config.fusion_dropout)
        for name in widths
        if name != GLOBAL
    }
    feed_forward = FeedForward(dim=dim, hidden_dim=config.fusion_mlp_dim, dropout=config.fusion_dropout)
    heads: dict[str, nn.Module] = {
        name: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, sizes.num_genes)) for name in (*widths, FUSED)
    }
    return Triplex(
        neighbor_encoder=build_neighbor_encoder(config, sizes) if config.use_neighbor else None,
        global_encoder=build_global_encoder(config, sizes) if config.use_global else None,
        projections={name: nn.Linear(width, dim) for name, width in widths.items()},
        fusion=ScaleFusion(attentions=attentions, feed_forward=feed_forward, dim=dim),
        heads=heads,
    )
