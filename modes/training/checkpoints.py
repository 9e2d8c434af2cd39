"""The checkpoints of a fold in training: the best weights in memory, best.pt and last.pt on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from modes.training.compose import Optimization
from utils.checkpoint import WITHOUT_LAST, load_checkpoint, load_weights, save_checkpoint
from utils.cli import say
from utils.files import check_writable
from utils.trained_fold import Progress, TrainedFold
from utils.untrusted.tensors import check_tensors


class FoldCheckpoints:
    """Keeps the best weights of a fold, and writes best.pt and last.pt at most every `seconds`.

    fold: what the files say beside weights and progress, as `modes.training.fold.untrained_fold` gives it.
    """

    def __init__(self, folder: Path, fold: TrainedFold, seconds: float) -> None:
        self.best_path, self.last_path = folder / "best.pt", folder / "last.pt"
        self.fold, self.seconds = fold, seconds
        self._best: TrainedFold | None = None  # None: not since this process started; best.pt holds it then
        self._best_is_written = True
        self._last_saved = time.monotonic()

    def restore(self, model: nn.Module, optimization: Optimization) -> Progress:
        """Fill model and optimiser from last.pt and return how far it was; an untouched start where there is none.

        Raises ValueError for a last.pt that is damaged or of another model, and for a best.pt with whose weights the training
        could not end.
        """
        if not self.last_path.exists():
            return Progress()
        last = load_checkpoint(self.last_path)
        try:
            load_weights(model, last.weights, self.last_path)
        except ValueError as error:
            raise ValueError(f"{error} {WITHOUT_LAST}") from error
        assert last.optimization is not None, "last.pt holds the optimiser"
        self._check_best(last.progress)
        optimization.load_state(last.optimization)
        say(f"{self.fold.split.title}: goes on after epoch {last.epoch}.")
        return last.progress

    def _check_best(self, progress: Progress) -> None:
        """Read best.pt, which holds the best epoch so far; ValueError where it is lost or damaged."""
        try:
            check_tensors(self.best_path, load_checkpoint(self.best_path).weights)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{str(error).removesuffix(' Check the path.')} It holds epoch {progress.best_epoch} of {progress.epoch}, the "
                f"best so far. Restore it; or move it and {self.last_path} elsewhere, and the same command trains the fold "
                "again from its start, to the same result."
            ) from error

    def check_room(self, model: nn.Module) -> None:
        """See that the files will fit on the disk, before the first epoch: the weights, with two moments of each in last.pt.

        Raises OSError with the room there is.
        """
        weights = sum(value.nbytes for value in model.state_dict().values())
        there = sum(path.stat().st_size for path in (self.best_path, self.last_path) if path.exists())
        # Each file is there twice while it is written.
        check_writable(self.last_path, needed=max(0, 4 * weights - there) + 3 * weights)

    def save(self, model: nn.Module, optimization: Optimization, progress: Progress, is_better: bool) -> None:
        """Keep the weights of an epoch if they are the best so far; write both files if it is time, and at the end.

        best.pt is written before last.pt, which speaks of it: after a crash in between, the epochs since the older last.pt
        are trained again, with the same result.
        """
        if is_better:
            copy = {name: value.detach().clone() for name, value in model.state_dict().items()}
            self._best = replace(self.fold, weights=copy, progress=replace(progress, history=[*progress.history]))
            self._best_is_written = False
        is_last = progress.is_finished(self.fold.config, self.fold.split.score_name)
        if not is_last and time.monotonic() - self._last_saved < self.seconds:
            return
        if is_last or not self._best_is_written:
            best = self._best or load_checkpoint(self.best_path)
            self.write_best(best.weights, progress, finished=is_last)
        last = replace(self.fold, weights=model.state_dict(), epoch=progress.epoch, progress=progress, finished=is_last)
        save_checkpoint(self.last_path, replace(last, optimization=optimization.state()))
        self._last_saved = time.monotonic()

    def write_best(self, weights: Mapping[str, Tensor], progress: Progress, *, finished: bool) -> None:
        """Write best.pt: what testing and predicting need, and the epoch it is from.

        finished: the training has ended; a test and the other modes take these weights for those of the fold.
        """
        best = replace(self.fold, weights=dict(weights), epoch=progress.best_epoch, progress=progress)
        save_checkpoint(self.best_path, replace(best, finished=finished))
        self._best_is_written = True

    def keep(self, progress: Progress) -> None:
        """Keep the best weights, which are a copy, of a training stopped inside an epoch; say where --resume will go on.

        last.pt stays as it is: the model and the optimiser are in the middle of an epoch.
        """
        if self._best is not None and not self._best_is_written:
            self.write_best(self._best.weights, self._best.progress, finished=False)
        saved = load_checkpoint(self.last_path, memory_map=True).epoch if self.last_path.exists() else None
        goes_on = f"goes on after epoch {saved}" if saved else "starts this fold anew"
        say(
            f"{self.fold.split.title}: stopped, epochs done: {progress.epoch}; --resume "
            f"{goes_on} (--checkpoint_seconds: {self.seconds:g} s between two checkpoints) and comes to the same."
        )
