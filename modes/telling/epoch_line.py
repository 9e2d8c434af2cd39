"""What a training says of an epoch: one line, the same on a terminal and in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from utils.config import Config
from utils.trained_fold import Progress, SplitRecord

_SCORES = {"pcc_all": "PCC", "mse": "MSE"}
_ONLY_SHOWN = (
    "Test scores in the lines below are only shown: the number of epochs is fixed, nothing is chosen by them, and the last "
    "epoch counts."
)


def word_on_test_scores(splits: Sequence[SplitRecord]) -> str:
    """Say that test scores choose nothing where the lines of a fold show them and its epochs are fixed; else ""."""
    return _ONLY_SHOWN if any(split.selection == "fixed" and split.test_slides for split in splits) else ""


@dataclass
class EpochLine:
    """Words of the epochs of one fold, with the time of each and how long the fold may still take."""

    config: Config
    split: SplitRecord
    _times: list[float] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def of(self, progress: Progress) -> str:
        """Describe the last epoch of the progress, which has just ended.

        "Fold 0 (A) epoch 7/200  loss 4.21 (prediction .081, instance 3.1)  validation PCC .312 MSE .074  1.1 s, at most 3 min
        left". Validation, or the test patients where none is held out for it; what is left is of this fold, from the median
        of the latest epochs, and "at most" where the training ends once its score no longer rises.
        """
        now = time.monotonic()
        self._times.append(now - self._began)
        self._began = now
        fixed = self.config.EVALUATION.fixed_epochs
        epochs = fixed or self.config.TRAINING.epochs
        parts = [f"{self.split.title} epoch {progress.epoch}/{epochs}"]
        record = progress.history[-1]
        parts += [_loss(record), _scores(record)]
        latest = sorted(self._times[-9:])
        left = (epochs - progress.epoch) * latest[len(latest) // 2]
        if progress.is_finished(self.config, self.split.score_name):
            parts.append(f"{self._times[-1]:.1f} s")
        else:
            bound = "about" if self.split.score_name is None else "at most"
            parts.append(f"{self._times[-1]:.1f} s, {bound} {_duration(left)} left")
        return "  ".join(filter(None, parts))


def _loss(record: Mapping[str, float]) -> str:
    terms = {name.removeprefix("train/"): value for name, value in record.items() if name.startswith("train/")}
    total = terms.pop("total")
    listed = ", ".join(f"{name} {_short(value)}" for name, value in terms.items())
    return f"loss {_short(total)}" + (f" ({listed})" if listed else "")


def _scores(record: Mapping[str, float]) -> str:
    for part in ("validation", "test"):
        if f"{part}/pcc_all" in record:
            return f"{part} " + " ".join(f"{name} {_short(record[f'{part}/{key}'])}" for key, name in _SCORES.items())
    return ""


def _short(value: float) -> str:
    """Three digits that matter, no zero before the point: ".081", "4.21", "312"."""
    if value != value:
        return "undefined"
    text = f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
