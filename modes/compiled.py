"""TRAINING.compile: the model's forward through torch.compile where that works, aloud without it where it does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.cli import say


class CompiledForward:
    """Call it like the model. The weights stay the model's own, so that checkpoints do not know of it.

    Compiling, of the backward pass as well, happens in the first call and for its shapes only: a batch of another size (the
    last one of an epoch) passes the model as it is, so nothing is compiled again and nothing can fail in mid-training. If
    compiling fails (no C compiler, an unsupported device), that is said once and the model runs as it is. Random
    numbers are drawn in another order than without compiling, so dropout differs.
    """

    def __init__(self, model: nn.Module):
        self._model, self._shapes = model, None
        self._forward = torch.compile(model, dynamic=False)

    @property
    def is_compiled(self) -> bool:
        """False once compiling has failed."""
        return self._forward is not self._model

    def __call__(self, **inputs: object) -> object:
        shapes = {name: value.shape for name, value in inputs.items() if isinstance(value, Tensor)}
        if self._shapes is not None:
            return self._forward(**inputs) if shapes == self._shapes else self._model(**inputs)
        try:
            found = self._forward(**inputs)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError too, but no failure of the compiler
            raise
        except RuntimeError as error:  # all errors of the compiler are; one of the model comes again just below
            reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
            say(f"TRAINING.compile: torch.compile failed ({reason}); training goes on without it.")
            self._forward = self._model
            found = self._model(**inputs)
        self._shapes = shapes
        return found
