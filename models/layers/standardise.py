"""Features of a frozen patch encoder brought to mean 0 and deviation 1 of the training spots."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """Subtract a mean and divide by a deviation that `fit` has taken from training spots; before it changes nothing.

    A perceptron or a linear layer with its usual start expects such inputs, while the features of some patch encoders have
    deviations of several units. Weights of runs from before this layer load, and see the features as they are.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    @torch.no_grad()
    def fit(self, features: Tensor | Iterable[Tensor]) -> None:
        """Take mean and deviation of the features (N, F), whole or in parts; one that is constant is only shifted."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for part in [features] if isinstance(features, Tensor) else features:
            variance, of_part = torch.var_mean(part.double(), dim=0, correction=0)
            both, shift = count + len(part), of_part - mean
            squares = squares + len(part) * variance + shift.square() * (count * len(part) / both)
            count, mean = both, mean + shift * (len(part) / both)
        deviation = (squares / count).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise the features (B, F)."""
        return (features - self.mean) / self.deviation

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        state_dict.setdefault(prefix + "mean", torch.zeros_like(self.mean))
        state_dict.setdefault(prefix + "deviation", torch.ones_like(self.deviation))
        super()._load_from_state_dict(state_dict, prefix, *args)
