"""Gene-DML: image tokens of three scales, fused, predict the expression of a spot and are aligned with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.encoders import FusionEncoder, GeneEncoder, GlobalEncoder, NeighborEncoder, mean_tokens


@dataclass
class Embeddings:
    """Vectors of B spots that the alignment losses compare, each (B, P), float32.

    target, neighbor, global_: unit vectors of the scales; None for a scale that is switched off.
    fused: mean of all fused tokens, *not* normalised. gene: unit vector of the expression.
    fused_cluster, gene_cluster: unit vectors of the shared head, in which spots are grouped.
    """

    target: Tensor
    neighbor: Tensor | None
    global_: Tensor | None
    fused: Tensor
    gene: Tensor
    fused_cluster: Tensor
    gene_cluster: Tensor

    def scales(self) -> dict[str, Tensor]:
        """The scale vectors that exist, by name."""
        named = {"target": self.target, "neighbor": self.neighbor, "global": self.global_}
        return {name: vectors for name, vectors in named.items() if vectors is not None}


@dataclass
class Prediction:
    """Predicted expression of B spots, each (B, G) in the unit of the targets, float32.

    fused is the prediction; target, neighbor and global_ are those of the single scales, None where a model or an
    ablation has none. embeddings are there when the measured expression was given.
    """

    fused: Tensor
    target: Tensor | None = None
    neighbor: Tensor | None = None
    global_: Tensor | None = None
    embeddings: Embeddings | None = None

    def scales(self) -> dict[str, Tensor]:
        """The predictions of single scales that exist, by name."""
        named = {"target": self.target, "neighbor": self.neighbor, "global": self.global_}
        return {name: values for name, values in named.items() if values is not None}


def unit(vectors: Tensor) -> Tensor:
    """vectors / max(norm, 1e-12) over the last axis; in float32 at least, because half precision has no 1e-12."""
    return functional.normalize(full_precision(vectors), dim=-1, eps=1e-12)


def full_precision(values: Tensor) -> Tensor:
    """Half precision to float32; other types as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class GeneDML(nn.Module):
    """The model behind the frozen patch encoder."""

    needs_tokens = True
    is_closed_form = False

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

    @property
    def needs_neighbors(self) -> bool:
        """True if `forward` needs the neighbor features."""
        return self.neighbor_encoder is not None

    @property
    def needs_slides(self) -> bool:
        """True if `forward` needs global tokens; otherwise `encode_slides` need not be called."""
        return self.global_encoder is not None

    def output_heads(self) -> list[nn.Module]:
        """The heads that predict expression, fused first."""
        return [self.fused_predictor, *self.scale_predictors.values()]

    def encode_slides(
        self, slide_features: Tensor, grid_xy: Tensor, lengths: list[int], rows: Tensor | None = None
    ) -> Tensor:
        """Global token of the spots `rows` of several whole slides.

        slide_features: (R, D), all spots of the slides one after the other; grid_xy: (R, 2) integer (x, y).
        lengths:        spots of each slide. rows: (B,) index into the R rows, None for all.
        returns:        (B, D), independent of the order of the spots. Memory grows linearly with the spots when no
                        gradient is asked for. Without a global encoder: the features of those rows, which go unused.
        """
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
        """Predict the expression of B spots.

        target_tokens:     (B, T, D) tokens of the frozen encoder, all of them.
        neighbor_features: (B, n*n, D) pooled features of the tiles; neighbor_is_valid: (B, n*n) bool.
        global_tokens:     (B, D) from `encode_slides`.
        target_features:   not used by this model.
        expression:        (B, G) measured; only for the embeddings, never for the prediction.
        """
        tokens = self._tokens(target_tokens, neighbor_features, neighbor_is_valid, global_tokens)
        fused_tokens = self.fusion(torch.cat(list(tokens.values()), dim=1))
        parts = fused_tokens.split([part.shape[1] for part in tokens.values()], dim=1)
        scales = {name: unit(mean_tokens(part)) for name, part in zip(tokens, parts, strict=True)}
        fused = mean_tokens(fused_tokens)
        # Detached: these heads report what one scale knows and must not change what the rest of the model learns.
        heads = {name: full_precision(self.scale_predictors[name](scales[name].detach())) for name in scales}
        return Prediction(
            fused=full_precision(self.fused_predictor(fused)),
            target=heads["target"],
            neighbor=heads.get("neighbor"),
            global_=heads.get("global"),
            embeddings=None if expression is None else self._embed(scales, fused, expression),
        )

    def _tokens(
        self,
        target_tokens: Tensor,
        neighbor_features: Tensor | None,
        neighbor_is_valid: Tensor | None,
        global_tokens: Tensor | None,
    ) -> dict[str, Tensor]:
        """Projected tokens (B, T, P) of the scales there are, in the order in which they are fused."""
        context_projection = self.projection if self.context_projection is None else self.context_projection
        tokens = {"target": _project(self.projection, target_tokens)}
        if self.neighbor_encoder is not None:
            assert neighbor_features is not None, "the model was built with use_neighbor"
            tokens["neighbor"] = _project(
                context_projection, self.neighbor_encoder(neighbor_features, neighbor_is_valid)
            )
        if self.global_encoder is not None:
            assert global_tokens is not None, "the model was built with use_global"
            tokens["global"] = _project(context_projection, global_tokens[:, None])
        return tokens

    def _embed(self, scales: dict[str, Tensor], fused: Tensor, expression: Tensor) -> Embeddings:
        gene = unit(self.gene_encoder(expression))
        return Embeddings(
            target=scales["target"],
            neighbor=scales.get("neighbor"),
            global_=scales.get("global"),
            fused=fused,
            gene=gene,
            fused_cluster=unit(self.cluster_head(fused)),
            gene_cluster=unit(self.cluster_head(gene)),
        )


def _project(projection: nn.Linear, tokens: Tensor) -> Tensor:
    """Linear D -> P; cached half-precision tokens are widened unless autocast takes them as they are."""
    if not torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.to(projection.weight.dtype)
    return projection(tokens)
