"""Baselines that are trained on the pooled feature of a patch alone: a linear layer, a perceptron."""

from __future__ import annotations

from torch import Tensor, nn

from models.contract import ExpressionModel, ModelInputs, Needs, Prediction, Sizes
from models.layers.dropout import Dropout
from models.layers.precision import full_precision
from utils.config import Model


class FeatureRegressor(ExpressionModel):
    """Apply `head` to the pooled feature."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.needs = Needs()
        self.head = head

    def output_heads(self) -> list[nn.Module]:
        """Give the head that predicts expression."""
        return [self.head]

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:  # noqa: ARG002 - of the contract
        """Predict the expression (B, G) from the target features (B, F); everything else is ignored."""
        assert inputs.target_features is not None, "the model reads the pooled features"
        features = inputs.target_features.to(next(self.parameters()).dtype)
        return Prediction(fused=full_precision(self.head(features)))


def build_linear_probe(_config: Model, sizes: Sizes) -> FeatureRegressor:
    """Build Linear F -> genes."""
    return FeatureRegressor(nn.Linear(sizes.feature_dim, sizes.num_genes))


def build_mlp(config: Model, sizes: Sizes) -> FeatureRegressor:
    """Build Linear F -> hidden, GELU, dropout, Linear hidden -> genes; hidden is MODEL.predictor_dim."""
    hidden = nn.Linear(sizes.feature_dim, config.predictor_dim)
    output = nn.Linear(config.predictor_dim, sizes.num_genes)
    return FeatureRegressor(nn.Sequential(hidden, nn.GELU(), Dropout(config.predictor_dropout), output))
