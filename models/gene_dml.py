"""Gene-DML: image tokens of three scales, fused, predict the expression of a spot and are aligned with it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.contract import (
    GLOBAL,
    NEIGHBOR,
    TARGET,
    Embeddings,
    ExpressionModel,
    ModelInputs,
    Needs,
    Prediction,
    Sizes,
)
from models.encoders import (
    FusionEncoder,
    GeneEncoder,
    GlobalEncoder,
    NeighborEncoder,
    build_global_encoder,
    build_neighbor_encoder,
)
from models.layers.dropout import Dropout
from models.layers.precision import full_precision, mean_tokens, project, unit
from models.layers.transformer import FeedForward, TransformerLayer
from utils.config import Model


class GeneDML(ExpressionModel):
    """The model behind the frozen patch encoder."""

    def __init__(
        self,
        *,
        projection: nn.Linear,
        context_projection: nn.Linear | None = None,
        neighbor_encoder: NeighborEncoder | None,
        global_encoder: GlobalEncoder | None,
        fusion: FusionEncoder,
        gene_encoder: GeneEncoder,
        cluster_head: nn.Linear,
        fused_predictor: nn.Module,
        scale_predictors: dict[str, nn.Module],
    ) -> None:
        """neighbor_encoder, global_encoder: None leaves that scale out. scale_predictors: one for each scale there is,
        named target, neighbor, global. projection: of the tokens of all scales; context_projection: of neighbor and
        global tokens instead, only for patch encoders whose pooled feature has another width than their tokens."""
        super().__init__()
        self.projection = projection
        self.context_projection = context_projection
        self.neighbor_encoder = neighbor_encoder
        self.global_encoder = global_encoder
        self.fusion = fusion
        self.gene_encoder = gene_encoder
        self.cluster_head = cluster_head
        self.fused_predictor = fused_predictor
        self.scale_predictors = nn.ModuleDict(scale_predictors)
        self.needs = Needs(tokens=True, neighbors=neighbor_encoder is not None, slides=global_encoder is not None)

    def output_heads(self) -> list[nn.Module]:
        """Give the heads that predict expression, fused first."""
        return [self.fused_predictor, *self.scale_predictors.values()]

    def encode_slides(
        self, slide_features: Tensor, grid_xy: Tensor, lengths: list[int], rows: Tensor | None = None
    ) -> Tensor:
        """Run the global encoder; see the contract."""
        assert self.global_encoder is not None, "the model was built without use_global"
        return self.global_encoder(slide_features, grid_xy, lengths, rows)

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:
        """Predict the expression of B spots, in their order; embeddings are added if `expression` (B, G) is given."""
        tokens = self._tokens(inputs)
        fused_tokens = self.fusion(torch.cat(list(tokens.values()), dim=1))
        parts = fused_tokens.split([part.shape[1] for part in tokens.values()], dim=1)
        scales = {name: unit(mean_tokens(part)) for name, part in zip(tokens, parts, strict=True)}
        fused = mean_tokens(fused_tokens)
        # Detached: these heads report what one scale knows and must not change what the rest of the model learns.
        heads = {name: full_precision(self.scale_predictors[name](scales[name].detach())) for name in scales}
        return Prediction(
            fused=full_precision(self.fused_predictor(fused)),
            scales=heads,
            embeddings=None if expression is None else self._embed(scales, fused, expression),
        )

    def _tokens(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Projected tokens (B, T, P) of the scales there are, in the order in which they are fused."""
        assert inputs.target_tokens is not None, "the model reads the tokens of the target patches"
        context_projection = self.projection if self.context_projection is None else self.context_projection
        tokens = {TARGET: project(self.projection, inputs.target_tokens)}
        if self.neighbor_encoder is not None:
            assert inputs.neighbor_features is not None, "the model was built with use_neighbor"
            neighbors = self.neighbor_encoder(inputs.neighbor_features, inputs.neighbor_is_valid)
            tokens[NEIGHBOR] = project(context_projection, neighbors)
        if self.global_encoder is not None:
            assert inputs.global_tokens is not None, "the model was built with use_global"
            tokens[GLOBAL] = project(context_projection, inputs.global_tokens[:, None])
        return tokens

    def _embed(self, scales: dict[str, Tensor], fused: Tensor, expression: Tensor) -> Embeddings:
        gene = unit(self.gene_encoder(expression))
        return Embeddings(
            scales=scales,
            gene=gene,
            fused=fused,
            fused_cluster=unit(self.cluster_head(fused)),
            gene_cluster=unit(self.cluster_head(gene)),
        )


def build_gene_dml(config: Model, sizes: Sizes) -> GeneDML:
    """Build Gene-DML with random weights, in the sizes of the MODEL section and of the data."""
    width = config.projection_dim
    scales = [TARGET] + [NEIGHBOR] * config.use_neighbor + [GLOBAL] * config.use_global
    feature_dim, num_genes = sizes.feature_dim, sizes.num_genes
    has_other_width = len(scales) > 1 and feature_dim != sizes.token_dim
    return GeneDML(
        projection=nn.Linear(sizes.token_dim, width),
        context_projection=nn.Linear(feature_dim, width) if has_other_width else None,
        neighbor_encoder=build_neighbor_encoder(config, sizes) if config.use_neighbor else None,
        global_encoder=build_global_encoder(config, sizes) if config.use_global else None,
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
