"""What a model is: which inputs it asks for, how it is called, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

FUSED = "fused"
TARGET, NEIGHBOR, GLOBAL = SCALES = ("target", "neighbor", "global")


@dataclass(frozen=True)
class Needs:
    """Which inputs a model reads beside the pooled features of its spots, so that nothing else is loaded.

    tokens: all tokens of the target patches. neighbors: the features of the tiles around a spot. slides: the features of
    all spots of a slide, which `encode_slides` turns into global tokens. training_spots: what `remember` takes over.
    """

    tokens: bool = False
    neighbors: bool = False
    slides: bool = False
    training_spots: bool = False


@dataclass(frozen=True)
class Sizes:
    """What the data say about a model: widths of the pooled feature of a patch and of its tokens (they differ for some
    patch encoders), genes of the panel, side of the square of neighbor tiles."""

    feature_dim: int
    token_dim: int
    num_genes: int
    num_neighbors: int


@dataclass(frozen=True)
class ModelInputs:
    """B spots as a model is given them. What its `needs` do not name is not read and may be None.

    target_features:   (B, F) pooled features of the patches.
    target_tokens:     (B, T, D) all tokens of the frozen patch encoder.
    neighbor_features: (B, n*n, F) pooled features of the tiles around the spots, row-major.
    neighbor_is_valid: (B, n*n) bool, False for a tile that leaves the image; None when all are valid.
    global_tokens:     (B, F) from `encode_slides`.
    """

    target_features: Tensor | None = None
    target_tokens: Tensor | None = None
    neighbor_features: Tensor | None = None
    neighbor_is_valid: Tensor | None = None
    global_tokens: Tensor | None = None


@dataclass(frozen=True)
class Embeddings:
    """Vectors of B spots that the alignment losses compare, each (B, P), float32.

    scales: of the image, by the scales there are (`SCALES`). gene: of the expression. Both are unit vectors in Gene-DML.
    Only of a model whose loss groups spots: fused, mean of all fused tokens, *not* normalised; fused_cluster and
    gene_cluster, unit vectors in which the spots are grouped.
    """

    scales: dict[str, Tensor]
    gene: Tensor
    fused: Tensor | None = None
    fused_cluster: Tensor | None = None
    gene_cluster: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """Predicted expression of B spots, each (B, G) in the unit of the targets, float32.

    fused is the prediction, NaN from a model that predicts nothing while it trains. scales are those of single scales, by
    name (`SCALES`), for a model that has them. embeddings are there when the measured expression was given to a model that
    aligns with it.
    """

    fused: Tensor
    scales: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Embeddings | None = None

    def by_scale(self) -> dict[str, Tensor]:
        """Give everything that is predicted, by name, the fused prediction first."""
        return {FUSED: self.fused, **self.scales}


# (prediction of B spots, measured expression (B, G)) -> named terms, "prediction" and "total" among them, all scalars.
LossFunction = Callable[[Prediction, Tensor], dict[str, Tensor]]


class ExpressionModel(nn.Module):
    """A model that predicts the expression of spots; everything that a caller may ask of one.

    A class, not a `typing.Protocol`: a protocol cannot say that a model is also a module, with weights and modes.
    """

    needs: Needs

    if TYPE_CHECKING:  # torch types the call of every module as Any

        def __call__(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction: ...

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:
        """Predict the expression of B spots, in their order.

        expression: (B, G) measured; only for the embeddings, never for the prediction.
        """
        raise NotImplementedError

    def encode_slides(
        self, slide_features: Tensor, grid_xy: Tensor, lengths: list[int], rows: Tensor | None = None
    ) -> Tensor:
        """Encode the global tokens of the spots `rows` of several whole slides; only of a model with `needs.slides`.

        slide_features: (R, F), all spots of the slides one after the other; grid_xy: (R, 2) integer (x, y).
        lengths:        spots of each slide. rows: (B,) index into the R rows, None for all.
        returns:        (B, F), independent of the order of the spots. Memory grows linearly with the spots when no
                        gradient is asked for.
        """
        raise NotImplementedError

    def remember(self, inputs: ModelInputs, expression: Tensor) -> None:
        """Take over the training spots that the prediction is looked up in; only of a model with `needs.training_spots`.

        Called in evaluation mode whenever the weights have changed, before anything is predicted. expression: (N, G) of
        the same spots. What is taken over is part of the state dict.
        """
        raise NotImplementedError

    def output_heads(self) -> list[nn.Module]:
        """Give the heads that predict expression, fused first; none for a model without such heads."""
        return []

    def standardise_inputs(self, features: Tensor | Iterable[Tensor]) -> None:
        """Take mean and deviation of the training spots' pooled features (N, F), if the model standardises them.

        features: whole, or in parts, which are taken only by a model that does.
        """

    @property
    def sized_at_load(self) -> set[str]:
        """Buffers whose size the training data decide: a checkpoint may hold them in another size than a fresh model."""
        return set()

    @torch.no_grad()
    def start_at_mean(self, mean: Tensor) -> None:
        """Set the bias of every head's last Linear to `mean` (G,), the training mean of the targets.

        The published code starts from a bias near zero, two units below the targets, and spends its first epochs on that
        offset; the gradients of that phase are many times those of the signal. The set of functions the model can learn
        is the same.
        """
        for head in self.output_heads():
            last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
            last.bias.copy_(mean)
