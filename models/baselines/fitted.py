"""The baselines that are fitted once, without epochs and random numbers: training mean, ridge, retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.baselines import closed_form
from models.baselines.fitted_model import MEMORY_BUDGET, ClosedForm, neighbor_mean
from models.contract import ModelInputs, Needs, Sizes
from models.layers.precision import unit
from utils.config import Model

NUM_COMPONENTS = 256
# From next to no penalty to next to the training mean, in half decades of the mean squared singular value.
RIDGE_RATIOS = tuple(10.0 ** (step / 2) for step in range(-10, 11))
NEIGHBOR_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
RETRIEVAL_TEMPERATURE = 0.1


class TrainingMean(ClosedForm):
    """The mean expression of the training spots, whatever the image shows: the floor every model must beat."""

    mean: Tensor

    def __init__(self, *, feature_dim: int, num_genes: int) -> None:
        super().__init__(feature_dim=feature_dim, num_genes=num_genes)
        self._register_fitted("mean", (num_genes,))

    def _fit(self, features: Tensor, expression: Tensor, patients: list, slides: list | None) -> dict[str, object]:  # noqa: ARG002 - of the contract
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

    feature_mean: Tensor
    weight: Tensor
    intercept: Tensor
    alpha: Tensor

    def __init__(
        self, *, target_dim: int, neighbor_dim: int, num_genes: int, num_components: int, ratios: Sequence[float]
    ) -> None:
        """neighbor_dim 0: the target feature alone. ratios: ascending penalties, see closed_form.alpha_grid."""
        super().__init__(feature_dim=target_dim + neighbor_dim, num_genes=num_genes)
        self.needs = Needs(neighbors=neighbor_dim > 0)
        self.num_components = num_components
        self.ratios = tuple(ratios)
        self._register_fitted("feature_mean", (self.feature_dim,))
        self._register_fitted("weight", (self.feature_dim, num_genes))
        self._register_fitted("intercept", (num_genes,))
        self._register_fitted("alpha", (), dtype=torch.float64)

    def _features(self, inputs: ModelInputs) -> Tensor:
        target = super()._features(inputs)
        if not self.needs.neighbors:
            return target
        if inputs.neighbor_features is None or inputs.neighbor_is_valid is None:
            raise ValueError("ridge_neighbor needs neighbor_features and neighbor_is_valid; use ridge without them.")
        neighbors = neighbor_mean(inputs.neighbor_features, inputs.neighbor_is_valid)
        return torch.cat([target, neighbors.to(target.device)], dim=1)

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

    feature_mean: Tensor
    directions: Tensor
    bank: Tensor
    bank_expression: Tensor
    num_nearest: Tensor

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
            bank=unit(components.scores(features)),
            bank_expression=expression,
            num_nearest=counts[best],
        )
        chosen = {"num_nearest": counts[best], "num_components": len(components.squares)}
        return chosen | _tuning_report("num_nearest", counts, errors, best, folds)

    def _predict(self, features: Tensor) -> Tensor:
        queries = unit((features - self.feature_mean) @ self.directions)
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


def build_mean(_config: Model, sizes: Sizes) -> TrainingMean:
    """Build the training mean, unfitted."""
    return TrainingMean(feature_dim=sizes.feature_dim, num_genes=sizes.num_genes)


def build_ridge(_config: Model, sizes: Sizes) -> Ridge:
    """Build the ridge regression on the target feature, unfitted."""
    return _ridge(sizes, neighbor_dim=0)


def build_ridge_neighbor(config: Model, sizes: Sizes) -> Ridge:
    """Build the ridge regression on target feature and neighbor mean, unfitted; ValueError with neighbors switched off."""
    if not config.use_neighbor:
        raise ValueError(
            "ridge_neighbor without neighbors is ridge: use --model ridge, or drop MODEL.use_neighbor=false."
        )
    return _ridge(sizes, neighbor_dim=sizes.feature_dim)


def _ridge(sizes: Sizes, neighbor_dim: int) -> Ridge:
    return Ridge(
        target_dim=sizes.feature_dim,
        neighbor_dim=neighbor_dim,
        num_genes=sizes.num_genes,
        num_components=NUM_COMPONENTS,
        ratios=RIDGE_RATIOS,
    )


def build_knn(_config: Model, sizes: Sizes) -> Retrieval:
    """Build the retrieval by cosine among principal components, unfitted."""
    return Retrieval(
        feature_dim=sizes.feature_dim,
        num_genes=sizes.num_genes,
        num_components=NUM_COMPONENTS,
        counts=NEIGHBOR_COUNTS,
        temperature=RETRIEVAL_TEMPERATURE,
    )
