"""Baselines with the interface of GeneDML, and the one place that builds them all.

Training mean, ridge and retrieval are here; the trained ones live in `probes.py` and `triplex.py`. All of them get the
same frozen features as GeneDML, so that a difference in score is a difference of method and not of encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.baselines import closed_form
from models.baselines.spot_model import (
    MEMORY_BUDGET,
    ClosedForm,
    linear_probe,
    neighbor_mean,
    perceptron,
    prediction_loss,
)
from models.baselines.triplex import build_triplex, triplex_loss
from models.gene_dml import Prediction

BASELINES = ("mean", "ridge", "ridge_neighbor", "knn", "mlp", "linear_probe", "triplex")
CLOSED_FORMS = ("mean", "ridge", "ridge_neighbor", "knn")  # fitted once, without epochs and random numbers

NUM_COMPONENTS = 256
# From next to no penalty to next to the training mean, in half decades of the mean squared singular value.
RIDGE_RATIOS = tuple(10.0 ** (step / 2) for step in range(-10, 11))
NEIGHBOR_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
RETRIEVAL_TEMPERATURE = 0.1


class TrainingMean(ClosedForm):
    """The mean expression of the training spots, whatever the image shows: the floor every model must beat."""

    def __init__(self, *, feature_dim: int, num_genes: int) -> None:
        super().__init__(feature_dim=feature_dim, num_genes=num_genes)
        self._register_fitted("mean", (num_genes,))

    def _fit(self, features: Tensor, expression: Tensor, patients: list, slides: list | None) -> dict[str, object]:
        self._store(mean=expression.mean(dim=0))
        return {"notes": []}

    def _predict(self, features: Tensor) -> Tensor:
        return self.mean.expand(len(features), -1).clone()


class Ridge(ClosedForm):
    """PCA and ridge regression with an intercept; the penalty is the one with the least held-out error (MSE).

    The features are centred but neither standardised nor whitened, before or after the PCA: with whitened scores the
    penalty would press on the strong and on the noisy directions alike. Neighbors, if used, are appended as the mean of
    the valid tiles, in the same unit. PCA and ridge are both linear, so what is stored is their product, one (D, G).
    """

    def __init__(
        self, *, target_dim: int, neighbor_dim: int, num_genes: int, num_components: int, ratios: Sequence[float]
    ) -> None:
        """neighbor_dim 0: the target feature alone. ratios: ascending penalties, see closed_form.alpha_grid."""
        super().__init__(feature_dim=target_dim + neighbor_dim, num_genes=num_genes)
        self.needs_neighbors = neighbor_dim > 0
        self.num_components = num_components
        self.ratios = tuple(ratios)
        self._register_fitted("feature_mean", (self.feature_dim,))
        self._register_fitted("weight", (self.feature_dim, num_genes))
        self._register_fitted("intercept", (num_genes,))
        self._register_fitted("alpha", (), dtype=torch.float64)

    def _features(
        self, target_features: Tensor, neighbor_features: Tensor | None, neighbor_is_valid: Tensor | None
    ) -> Tensor:
        target = torch.as_tensor(target_features).float()
        if not self.needs_neighbors:
            return target
        if neighbor_features is None or neighbor_is_valid is None:
            raise ValueError("ridge_neighbor needs neighbor_features and neighbor_is_valid; use ridge without them.")
        return torch.cat([target, neighbor_mean(neighbor_features, neighbor_is_valid).to(target.device)], dim=1)

    def _fit(self, features: Tensor, expression: Tensor, patients: list, slides: list | None) -> dict[str, object]:
        folds = closed_form.inner_folds(patients, slides)
        # Moments are differences of sums: centring first keeps their rounding errors small.
        offset, level = features.mean(dim=0), expression.mean(dim=0)
        features, expression = features - offset, expression - level
        total = closed_form.moments(features, expression)
        components = closed_form.principal_components(total, self.num_components)
        alphas = closed_form.alpha_grid(components, self.ratios)
        errors = closed_form.ridge_inner_errors(features, expression, folds, total, self.num_components, alphas)
        best = int(errors.mean(dim=0).argmin())
        coefficients = closed_form.ridge_coefficients(total, components, alphas[best])
        self._store(
            feature_mean=offset,
            weight=components.directions @ coefficients,
            intercept=level,
            alpha=alphas[best],
        )
        chosen = {"alpha": alphas[best], "num_components": len(components.squares)}
        return chosen | _tuning_report("alpha", alphas, errors, best, folds)

    def _predict(self, features: Tensor) -> Tensor:
        return (features - self.feature_mean) @ self.weight + self.intercept


class Retrieval(ClosedForm):
    """Weighted mean expression of the k training spots whose features are nearest by cosine among principal components.

    k is the one with the least held-out error (MSE); the weight of a neighbor is exp(cosine / temperature).
    """

    def __init__(
        self, *, feature_dim: int, num_genes: int, num_components: int, counts: Sequence[int], temperature: float
    ) -> None:
        """counts: ascending numbers of neighbors to choose from."""
        super().__init__(feature_dim=feature_dim, num_genes=num_genes)
        self.num_components = num_components
        self.counts = tuple(counts)
        self.temperature = temperature
        self._register_fitted("feature_mean", (feature_dim,))
        self._register_fitted("directions", (feature_dim, None))
        self._register_fitted("bank", (None, None))
        self._register_fitted("bank_expression", (None, num_genes))
        self._register_fitted("num_nearest", (), dtype=torch.int64)

    def _fit(self, features: Tensor, expression: Tensor, patients: list, slides: list | None) -> dict[str, object]:
        folds = closed_form.inner_folds(patients, slides)
        offset = features.mean(dim=0)
        features = features - offset
        total = closed_form.moments(features, expression)
        smallest_bank = len(features) - max(len(rows) for rows in folds.held_out)
        counts = [count for count in self.counts if count <= smallest_bank]
        errors = closed_form.retrieval_inner_errors(
            features, expression, folds, total, self.num_components, counts, self.temperature, MEMORY_BUDGET
        )
        best = int(errors.mean(dim=0).argmin())
        components = closed_form.principal_components(total, self.num_components)
        self._store(
            feature_mean=offset,
            directions=components.directions,
            bank=closed_form.unit(components.scores(features)),
            bank_expression=expression,
            num_nearest=counts[best],
        )
        chosen = {"num_nearest": counts[best], "num_components": len(components.squares)}
        return chosen | _tuning_report("num_nearest", counts, errors, best, folds)

    def _predict(self, features: Tensor) -> Tensor:
        queries = closed_form.unit((features - self.feature_mean) @ self.directions)
        counts = [int(self.num_nearest)]
        (fused,) = closed_form.retrieve(
            queries, self.bank, self.bank_expression, counts, self.temperature, MEMORY_BUDGET
        )
        return fused


def _tuning_report(
    name: str, grid: Sequence[float], errors: Tensor, best: int, folds: closed_form.InnerFolds
) -> dict[str, object]:
    """Every grid value with its held-out MSE (mean over the folds), what was held out, remarks for the reader."""
    notes = [folds.note] if folds.note else []
    if len(grid) > 1 and best in (0, len(grid) - 1):
        notes.append(f"The chosen {name} {grid[best]:g} lies at an end of the grid {grid[0]:g} .. {grid[-1]:g}.")
    return {
        "grid": list(grid),
        "inner_mse": errors.mean(dim=0).tolist(),
        "num_inner_folds": len(folds.held_out),
        "held_out": folds.unit,
        "notes": notes,
    }


def build_baseline(
    config: object, *, feature_dim: int, num_genes: int, pooled_dim: int | None = None, num_neighbors: int = 5
) -> nn.Module:
    """Build the baseline that `config.name` (the MODEL section) names.

    feature_dim:   width D of a token. pooled_dim: width of the pooled features of spots and neighbors, if it differs.
    num_neighbors: side of the square of neighbor tiles.
    errors:        ValueError for an unknown name, and for ridge_neighbor with neighbors switched off.
    """
    pooled = pooled_dim or feature_dim
    if config.name not in BASELINES:
        raise ValueError(f"MODEL.name is '{config.name}'; the baselines are {', '.join(BASELINES)} (--model NAME).")
    if config.name == "ridge_neighbor" and not config.use_neighbor:
        raise ValueError("ridge_neighbor without neighbors is ridge: use --model ridge, or drop --no_neighbor.")
    if config.name == "mean":
        return TrainingMean(feature_dim=pooled, num_genes=num_genes)
    if config.name in ("ridge", "ridge_neighbor"):
        neighbor_dim = pooled if config.name == "ridge_neighbor" else 0
        return Ridge(
            target_dim=pooled,
            neighbor_dim=neighbor_dim,
            num_genes=num_genes,
            num_components=NUM_COMPONENTS,
            ratios=RIDGE_RATIOS,
        )
    if config.name == "knn":
        return Retrieval(
            feature_dim=pooled,
            num_genes=num_genes,
            num_components=NUM_COMPONENTS,
            counts=NEIGHBOR_COUNTS,
            temperature=RETRIEVAL_TEMPERATURE,
        )
    if config.name == "linear_probe":
        return linear_probe(feature_dim=pooled, num_genes=num_genes)
    if config.name == "mlp":
        return perceptron(
            feature_dim=pooled, hidden_dim=config.predictor_dim, num_genes=num_genes, dropout=config.predictor_dropout
        )
    return build_triplex(
        config, token_dim=feature_dim, pooled_dim=pooled, num_genes=num_genes, num_neighbors=num_neighbors
    )


def build_baseline_loss(name: str) -> Callable[[Prediction, Tensor], dict[str, Tensor]]:
    """The loss of a baseline: (prediction, expression (B, G)) -> named terms with "prediction" and "total"."""
    if name not in BASELINES:
        raise ValueError(f"There is no baseline '{name}'; the baselines are {', '.join(BASELINES)}.")
    return triplex_loss if name == "triplex" else prediction_loss
