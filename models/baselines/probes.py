"""Baselines that are trained on the standardised pooled feature of a patch alone: a linear layer, a perceptron."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from models.contract import ExpressionModel, ModelInputs, Needs, Prediction, Sizes
from models.layers.dropout import Dropout
from models.layers.precision import full_precision
from models.layers.standardise import Standardise
from utils.config import Model


class FeatureRegressor(ExpressionModel):
    """Apply `head` to the pooled feature, standardised by the training spots."""

    def __init__(self, head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.needs = Needs()
        self.standardise = Standardise(feature_dim)
        self.head = head

    def standardise_inputs(self, features: Tensor | Iterable[Tensor]) -> None:
        """Take mean and deviation of the training spots' features; see the contract."""
        self.standardise.fit(features)

    def output_heads(self) -> list[nn.Module]:
        """Give the head that predicts expression."""
        return [self.head]

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:  # noqa: ARG002 - of the contract
        """Predict the expression (B, G) from the target features (B, F); everything else is ignored."""
        assert inputs.target_features is not None, "the model reads the pooled features"
        features = inputs.target_features.to(next(self.parameters()).dtype)
        return Prediction(fused=full_precision(self.head(self.standardise(features))))


def build_linear_probe(_config: Model, sizes: Sizes) -> FeatureRegressor:
    """Build Linear F -> genes."""
    return FeatureRegressor(nn.Linear(sizes.feature_dim, sizes.num_genes), sizes.feature_dim)


def build_mlp(config: Model, sizes: Sizes) -> FeatureRegressor:
    """Build Linear F -> hidden, GELU, dropout, Linear hidden -> genes; hidden is MODEL.predictor_dim."""
    hidden = nn.Linear(sizes.feature_dim, config.predictor_dim)
    output = nn.Linear(config.predictor_dim, sizes.num_genes)
    head = nn.Sequential(hidden, nn.GELU(), Dropout(config.predictor_dropout), output)
    return FeatureRegressor(head, sizes.feature_dim)
