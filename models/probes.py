"""The two plain baselines trained by the loop: a linear map and a perceptron on the pooled feature of a spot."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.dropout import Dropout
from models.gene_dml import Prediction
from models.spot_model import SpotModel


class FeatureRegressor(SpotModel):
    """Apply `head` to the pooled feature."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def output_heads(self) -> list[nn.Module]:
        """The head that predicts expression."""
        return [self.head]

    def forward(
        self,
        *,
        target_features: Tensor,
        target_tokens: Tensor | None = None,
        neighbor_features: Tensor | None = None,
        neighbor_is_valid: Tensor | None = None,
        global_tokens: Tensor | None = None,
        expression: Tensor | None = None,
    ) -> Prediction:
        """target_features (B, D) -> fused (B, G), in the order of the spots; everything else is ignored."""
        fused = self.head(target_features.to(next(self.parameters()).dtype))
        return Prediction(fused=fused, target=None, neighbor=None, global_=None, embeddings=None)


def linear_probe(*, feature_dim: int, num_genes: int) -> FeatureRegressor:
    """Linear D -> genes."""
    return FeatureRegressor(nn.Linear(feature_dim, num_genes))


def perceptron(*, feature_dim: int, hidden_dim: int, num_genes: int, dropout: float) -> FeatureRegressor:
    """Linear D -> hidden, GELU, dropout, Linear hidden -> genes."""
    return FeatureRegressor(
        nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.GELU(), Dropout(dropout), nn.Linear(hidden_dim, num_genes))
    )


def prediction_loss(prediction: Prediction, expression: Tensor) -> dict[str, Tensor]:
    """Mean squared error of the fused prediction, which is the whole loss of a model with one head."""
    error = functional.mse_loss(prediction.fused.float(), expression.float())
    return {"prediction": error, "total": error}
