"""TRAINING.compile: the model's forward through torch.compile where that works, aloud without it where it does not."""

from __future__ import annotations

import torch
from torch import nn

from utils.cli import say


class CompiledForward:
    """Call it like the model. The weights stay the model's own, so that checkpoints do not know of it.

    Compiling happens in the first call. If it fails (no C compiler, an unsupported device), that is said once and the
    model runs as it is. Random numbers are drawn in another order than without compiling, so dropout differs.
    """

    def __init__(self, model: nn.Module):
        self._model, self._is_proven = model, False
        self._forward = torch.compile(model)

    @property
    def is_compiled(self) -> bool:
        """False once compiling has failed."""
        return self._forward is not self._model

    def __call__(self, **inputs: object) -> object:
        if self._is_proven:
            return self._forward(**inputs)
        try:
            found = self._forward(**inputs)
        except RuntimeError as error:  # all errors of the compiler are; one of the model comes again just below
            reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
            say(f"TRAINING.compile: torch.compile failed ({reason}); training goes on without it.")
            self._forward = self._model
            found = self._model(**inputs)
        self._is_proven = True
        return found
