"""Mathematics of the baselines that need no gradient: inner folds, principal components, ridge, retrieval.

Everything here is a pure function of tensors in float64 and uses no random numbers. All of it works from second moments
(sums over spots of x x^T and x y^T), because the moments of "all patients but one" are a subtraction: tuning over P
patients then costs one pass over the features and P eigenvalue problems, not P passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers.precision import unit

# Directions whose variance is below this fraction of the largest one are rounding noise of the float32 (or float16)
# features and of the eigenvalue solver; a ridge with a small penalty would amplify them.
RELATIVE_VARIANCE_FLOOR = 1e-10
# Blocks used when nothing but the order of the spots is left to split by.
NUM_BLOCKS = 5


@dataclass(frozen=True)
class InnerFolds:
    """Held-out rows of every inner fold, what a fold holds out, and a sentence when it is not a patient."""

    held_out: tuple[Tensor, ...]
    unit: str
    note: str | None


@dataclass(frozen=True)
class Moments:
    """Sums over `count` spots: features (D,), expression (G,), feature x feature (D, D), feature x expression (D, G)."""

    count: int
    features: Tensor
    expression: Tensor
    squares: Tensor
    products: Tensor

    def joined(self, other: Moments) -> Moments:
        """Give the moments of the spots of both."""
        return Moments(
            count=self.count + other.count,
            features=self.features + other.features,
            expression=self.expression + other.expression,
            squares=self.squares + other.squares,
            products=self.products + other.products,
        )

    def without(self, part: Moments) -> Moments:
        """Give the moments of the spots that are here but not in `part`, which must be a subset."""
        assert part.count < self.count, "a fold must leave at least one training spot"
        return Moments(
            count=self.count - part.count,
            features=self.features - part.features,
            expression=self.expression - part.expression,
            squares=self.squares - part.squares,
            products=self.products - part.products,
        )


@dataclass(frozen=True)
class PrincipalComponents:
    """mean (D,), directions (D, C) orthonormal columns, squares (C,) sum over the spots of each squared score."""

    mean: Tensor
    directions: Tensor
    squares: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Project features (N, D) to (N, C). Not whitened: the leading components keep their larger scale."""
        return (features - self.mean) @ self.directions


def inner_folds(patients: Sequence[Hashable], slides: Sequence[Hashable] | None = None) -> InnerFolds:
    """Split training spots for tuning: one fold per patient, so that no patient is on both sides.

    patients: one label per spot, any order.
    slides:   one label per spot; used only when all spots come from one patient.
    returns:  folds in the sorted order of the labels. One patient: one fold per slide; one slide (or slides not given):
              `NUM_BLOCKS` contiguous blocks of spots. Both are said in `note`, because they score too optimistically.
    errors:   ValueError for fewer than two spots.
    """
    if len(patients) < 2:
        raise ValueError(
            f"Tuning a baseline needs at least 2 training spots, found {len(patients)}. Add training slides, or use "
            "--model mean, which has nothing to tune."
        )
    if len(set(patients)) > 1:
        return InnerFolds(held_out=_rows_of_each(patients), unit="patient", note=None)
    if slides is not None and len(set(slides)) > 1:
        note = f"Only one training patient ({patients[0]}): tuned by leaving one of its {len(set(slides))} slides out."
        return InnerFolds(held_out=_rows_of_each(slides), unit="slide", note=note)
    blocks = torch.arange(len(patients)).chunk(min(NUM_BLOCKS, len(patients)))
    note = f"Only one training patient ({patients[0]}): tuned on {len(blocks)} contiguous blocks of its spots."
    return InnerFolds(held_out=tuple(blocks), unit="block", note=note)


def _rows_of_each(labels: Sequence[Hashable]) -> tuple[Tensor, ...]:
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return tuple(torch.tensor(rows[label]) for label in sorted(rows, key=str))


def complement(rows: Tensor, count: int) -> Tensor:
    """Give the row numbers in range(count) that are not in `rows`, ascending."""
    is_left = torch.ones(count, dtype=torch.bool)
    is_left[rows] = False
    return is_left.nonzero().squeeze(1)


def moments(features: Tensor, expression: Tensor) -> Moments:
    """Sum over the rows of features (N, D) and expression (N, G)."""
    return Moments(
        count=features.shape[0],
        features=features.sum(dim=0),
        expression=expression.sum(dim=0),
        squares=features.T @ features,
        products=features.T @ expression,
    )


def principal_components(sums: Moments, max_components: int) -> PrincipalComponents:
    """Find the leading principal components of the spots in `sums`, largest variance first.

    returns: at most min(max_components, spots - 1, D) components, fewer when the features span fewer directions
             (`RELATIVE_VARIANCE_FLOOR`); none when all spots are equal.
    """
    mean = sums.features / sums.count
    scatter = sums.squares - sums.count * torch.outer(mean, mean)
    squares, directions = torch.linalg.eigh(scatter)
    squares, directions = squares.flip(0), directions.flip(1)
    is_signal = (squares > RELATIVE_VARIANCE_FLOOR * squares[0]) & (squares > 0)
    kept = min(max_components, sums.count - 1, int(is_signal.sum()))
    return PrincipalComponents(mean=mean, directions=directions[:, :kept], squares=squares[:kept])


def component_products(sums: Moments, components: PrincipalComponents) -> Tensor:
    """Multiply Z^T (Y - mean Y), (C, G): with orthogonal scores Z all that a ridge needs besides `components.squares`."""
    centred = sums.products - torch.outer(sums.features, sums.expression / sums.count)
    return components.directions.T @ centred


def ridge_coefficients(sums: Moments, components: PrincipalComponents, alpha: float) -> Tensor:
    """Minimise |Y - mean Y - Z B|^2 + alpha |B|^2 over B (C, G), the convention of scikit-learn's Ridge.

    The columns of Z are orthogonal on the training spots, so Z^T Z is diagonal and every alpha costs one division. The
    intercept is not penalised: it is the mean of Y, because the scores have mean zero.
    """
    return component_products(sums, components) / (components.squares + alpha)[:, None]


def alpha_grid(components: PrincipalComponents, ratios: Sequence[float]) -> list[float]:
    """Give penalties as multiples of the mean of Z^T Z's diagonal, so that the grid fits features of any scale."""
    scale = float(components.squares.mean()) if len(components.squares) else 1.0
    return [ratio * scale for ratio in ratios]


@dataclass(frozen=True)
class Ridge:
    """A ridge ready for any penalty.

    mean (G,): of the expression of its training spots; components: of their features; products (C, G): see
    `component_products`.
    """

    mean: Tensor
    components: PrincipalComponents
    products: Tensor

    @classmethod
    def of(cls, sums: Moments, max_components: int) -> Ridge:
        """Fit to the spots in `sums`."""
        components = principal_components(sums, max_components)
        return cls(sums.expression / sums.count, components, component_products(sums, components))

    def deviation(self, scores: Tensor, alpha: float) -> Tensor:
        """Predict by how much the expression of spots with these `scores` (n, C) differs from `mean`, (n, G)."""
        return scores @ (self.products / (self.components.squares + alpha)[:, None])


def ridge_inner_errors(
    features: Tensor,
    expression: Tensor,
    folds: InnerFolds,
    total: Moments,
    max_components: int,
    alphas: Sequence[float],
) -> Tensor:
    """Return the mean squared error of every held-out part under every penalty, (folds, alphas).

    features (N, D), expression (N, G), total: their `moments`. Each ridge is fitted to the spots that are not in its part.
    """
    errors = torch.empty(len(folds.held_out), len(alphas), dtype=torch.float64)
    for index, rows in enumerate(folds.held_out):
        held_features, held_expression = features[rows], expression[rows]
        ridge = Ridge.of(total.without(moments(held_features, held_expression)), max_components)
        scores, residual = ridge.components.scores(held_features), held_expression - ridge.mean
        for column, alpha in enumerate(alphas):
            errors[index, column] = (residual - ridge.deviation(scores, alpha)).square().mean()
    return errors


def retrieve(
    queries: Tensor, bank: Tensor, bank_expression: Tensor, counts: Sequence[int], temperature: float, budget: int
) -> list[Tensor]:
    """Average the expression, weighted, of the nearest bank spots by cosine, for several numbers of neighbors at once.

    queries (B, C) and bank (N, C) are unit rows; bank_expression (N, G). The weight of a neighbor is
    exp(cosine / temperature), normalised over the neighbors used.
    counts:  ascending numbers of neighbors, none above N.
    budget:  the largest number of elements of an intermediate tensor; queries are taken in chunks to keep it.
    returns: one (B, G) per count, in the order of `queries`. Equal cosines at the border of the k nearest are resolved
             by torch.topk, the same way at every call.
    """
    assert counts[-1] <= len(bank), "cannot use more neighbors than the bank holds"
    chunk = max(1, budget // max(len(bank), counts[-1] * bank_expression.shape[1]))
    parts: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(1, len(queries)), chunk):
        cosine, nearest = (queries[start : start + chunk] @ bank.T).topk(counts[-1], dim=1)
        # Relative to the nearest spot, so that no exponential overflows; the factor cancels in the mean.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        sums = bank_expression.new_zeros(len(cosine), bank_expression.shape[1])
        norms, previous = weights.new_zeros(len(cosine), 1), 0
        for part, count in zip(parts, counts, strict=True):
            ring = weights[:, previous:count]
            sums = sums + torch.einsum("bk,bkg->bg", ring, bank_expression[nearest[:, previous:count]])
            norms = norms + ring.sum(dim=1, keepdim=True)
            part.append(sums / norms)
            previous = count
    return [torch.cat(part) for part in parts]


def retrieval_inner_errors(
    features: Tensor,
    expression: Tensor,
    folds: InnerFolds,
    total: Moments,
    max_components: int,
    counts: Sequence[int],
    temperature: float,
    budget: int,
) -> Tensor:
    """Measure the mean squared error of every held-out part for every number of neighbors, (folds, counts)."""
    errors = torch.empty(len(folds.held_out), len(counts), dtype=torch.float64)
    for index, rows in enumerate(folds.held_out):
        sums = total.without(moments(features[rows], expression[rows]))
        components = principal_components(sums, max_components)
        kept = complement(rows, len(features))
        # float32: the search is one large matrix product, and its result needs no more.
        bank = unit(components.scores(features[kept])).float()
        queries = unit(components.scores(features[rows])).float()
        predictions = retrieve(queries, bank, expression[kept].float(), counts, temperature, budget)
        for column, prediction in enumerate(predictions):
            errors[index, column] = (expression[rows] - prediction).square().mean()
    return errors
