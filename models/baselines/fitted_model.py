"""Models that hold what training data say: buffers of free size, and the base of those that are fitted in closed form."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from models.contract import ExpressionModel, ModelInputs, Needs, Prediction

# Elements of the largest intermediate tensor: 64 MB in float32.
MEMORY_BUDGET = 2**24


class FittedModel(ExpressionModel):
    """A model with buffers that training data fill, and whose sizes they may decide.

    Its checkpoint loads with strict keys into a model that has seen no data: the free sizes come from the checkpoint.
    """

    num_training_spots: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._fitted_shapes: dict[str, tuple[int | None, ...]] = {}
        self._register_fitted("num_training_spots", (), dtype=torch.int64)

    @property
    def sized_at_load(self) -> set[str]:
        """Buffers with a free size; see the contract."""
        return {name for name, shape in self._fitted_shapes.items() if None in shape}

    def _register_fitted(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float32) -> None:
        """Register a buffer; None in the shape is a size that only the training data decide (0 until then)."""
        self._fitted_shapes[name] = shape
        self.register_buffer(name, torch.zeros([size or 0 for size in shape], dtype=dtype))

    def _store(self, **values: Tensor | float | int) -> None:
        for name, value in values.items():
            buffer = getattr(self, name)
            setattr(self, name, torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device).clone())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the free sizes of the buffers from the checkpoint; torch then reports every other difference."""
        for name, shape in self._fitted_shapes.items():
            incoming = state_dict.get(prefix + name)
            if isinstance(incoming, Tensor) and _fits(incoming.shape, shape):
                setattr(self, name, getattr(self, name).new_empty(incoming.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_is_fitted(self) -> None:
        if int(self.num_training_spots) == 0:
            raise ValueError(
                f"This {type(self).__name__} baseline has not been fitted. Call fit() with the training spots, or "
                "load a checkpoint of a finished run (--model_path)."
            )


class ClosedForm(FittedModel):
    """A model without parameters, fitted once. A child registers its buffers and implements `_fit` (learn, report) and
    `_predict`; both see features (N, feature_dim)."""

    def __init__(self, *, feature_dim: int, num_genes: int) -> None:
        super().__init__()
        self.needs = Needs()
        self.feature_dim = feature_dim
        self.num_genes = num_genes

    @torch.no_grad()
    def fit(
        self,
        inputs: ModelInputs | Iterable[ModelInputs],
        expression: Tensor,
        *,
        patients: Sequence[Hashable],
        slides: Sequence[Hashable] | None = None,
    ) -> dict[str, object]:
        """Learn from training spots; what is tuned is tuned on inner folds that hold one patient out. No random numbers.

        inputs: of the N training spots, tensors or arrays, whole or in parts one after the other, of which only what the
        model reads is held; expression (N, G); patients one label per spot; slides one label per spot, used for tuning when
        there is only one patient.
        returns: what was chosen, in numbers, strings, lists and dicts only; "notes" are sentences for the reader.
        errors:  ValueError that names every mismatch of shapes, values that are not finite, or too few spots to tune.
        """
        parts = [inputs] if isinstance(inputs, ModelInputs) else inputs
        features = _float64(torch.cat([self._features(part) for part in parts]))
        expression = _float64(expression).to(features.device)
        patients, slides = _labels(patients), None if slides is None else _labels(slides)
        self._check_training_data(features, expression, patients, slides)
        report = self._fit(features, expression, patients, slides)
        self._store(num_training_spots=len(features))
        return {"num_training_spots": len(features), **report}

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:  # noqa: ARG002 - of the contract
        """Predict the expression (B, G) from the features of B spots, in their order.

        Always float32: under autocast a retrieval would confuse near neighbors. Raises ValueError before `fit`.
        """
        self._check_is_fitted()
        features = self._features(inputs)
        with torch.autocast(device_type=features.device.type, enabled=False):
            return Prediction(fused=self._predict(features))

    def _features(self, inputs: ModelInputs) -> Tensor:
        return torch.as_tensor(inputs.target_features).float()

    def _fit(self, features: Tensor, expression: Tensor, patients: list, slides: list | None) -> dict[str, object]:
        raise NotImplementedError

    def _predict(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_training_data(self, features: Tensor, expression: Tensor, patients: list, slides: list | None) -> None:
        problems = []
        for name, values, width in (
            ("features", features, self.feature_dim),
            ("expression", expression, self.num_genes),
        ):
            if values.ndim != 2 or values.shape[1] != width:
                problems.append(f"{name} have shape {tuple(values.shape)}, expected (spots, {width})")
            elif broken := int((~values.isfinite()).any(dim=1).sum()):
                problems.append(
                    f"{broken} rows of {name} hold values that are not finite; extract or prepare them again"
                )
        counts = {"features": len(features), "expression": len(expression), "patients": len(patients)}
        counts |= {} if slides is None else {"slides": len(slides)}
        if len(set(counts.values())) > 1 or len(features) == 0:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            problems.append(f"rows found: {found}; expected the same number of each, at least 1")
        if problems:
            raise ValueError("The training data do not fit the baseline: " + "; ".join(problems) + ".")


def _fits(found: torch.Size, expected: tuple[int | None, ...]) -> bool:
    return len(found) == len(expected) and all(
        size is None or size == given for given, size in zip(found, expected, strict=True)
    )


def _labels(values: Sequence[Hashable]) -> list:
    # A tensor's own elements hash by identity, so they would never be equal.
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _float64(values: Tensor) -> Tensor:
    tensor = torch.as_tensor(values).detach()
    # Apple's GPU has no float64.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def neighbor_mean(neighbor_features: Tensor, neighbor_is_valid: Tensor) -> Tensor:
    """Average the valid neighbors, float32 (N, D) from (N, 25, D) and (N, 25); zero for a spot that has none.

    The middle tile, which is the spot's own patch, counts as one of them. Taken in chunks: the features may be float16
    and large, and a float32 copy of all of them would not fit.
    """
    features, is_valid = torch.as_tensor(neighbor_features), torch.as_tensor(neighbor_is_valid).bool()
    chunk = max(1, MEMORY_BUDGET // max(1, features.shape[1] * features.shape[2]))
    means = torch.zeros(features.shape[0], features.shape[2], device=features.device)
    for start in range(0, len(features), chunk):
        is_kept = is_valid[start : start + chunk].to(features.device).unsqueeze(-1)
        # where, not a product: the feature of a tile outside the image may be anything.
        kept = torch.where(is_kept, features[start : start + chunk].float(), 0.0)
        means[start : start + chunk] = kept.sum(dim=1) / is_kept.sum(dim=1).clamp(min=1)
    return means
