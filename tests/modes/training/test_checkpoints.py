"""best.pt and last.pt of a fold in training: when they are written, what they hold, what is left of an interruption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from modes.training.checkpoints import FoldCheckpoints
from modes.training.compose import Optimization
from tests.checkpoints import fabricated_fold
from utils.checkpoint import load_checkpoint
from utils.config import load_config
from utils.devices import Precision
from utils.trained_fold import Progress

SCORE = "validation/pcc_all"


class Training:
    """One weight that is set to the number of the epoch; scores as they are given."""

    def __init__(self, folder, scores, seconds, patience=100):
        config = load_config("her2st/dml", [f"TRAINING.epochs={len(scores)}", f"TRAINING.patience={patience}"])
        fold = fabricated_fold(weights={}, config=config, optimization=None)
        fold = replace(fold, split=replace(fold.split, selection="validation"))
        self.scores, self.config, self.folder = scores, config, folder
        self.model = nn.Linear(1, 1, bias=False)
        self.optimization = Optimization.of(self.model, config, Precision("float32", torch.device("cpu")))
        self.checkpoints = FoldCheckpoints(folder, fold, seconds)
        self.progress = self.checkpoints.restore(self.model, self.optimization)

    def run(self, until: int) -> Training:
        while self.progress.epoch < until and not self.progress.is_finished(self.config, SCORE):
            epoch = self.progress.epoch + 1
            self.model.weight.sum().backward()
            self.optimization.optimizer.step()
            self.optimization.scheduler.step()
            self.model.weight.data.fill_(epoch)
            is_better = self.progress.add({"epoch": epoch, SCORE: self.scores[epoch - 1]}, SCORE)
            self.checkpoints.save(self.model, self.optimization, self.progress, is_better)
        return self

    def saved(self, name: str) -> tuple[float, int, int, bool]:
        """The weight in a file, the epoch it is said to be of, the epochs done, and whether all are."""
        fold = load_checkpoint(self.folder / name)
        return float(fold.weights["weight"]), fold.epoch, fold.progress.epoch, fold.finished


def test_best_holds_the_best_epoch_and_last_the_last(tmp_path):
    training = Training(tmp_path, [0.1, 0.3, 0.2, 0.1], seconds=0.0)
    assert training.progress == Progress() and not list(tmp_path.iterdir())
    training.run(until=3)
    assert training.saved("best.pt") == (2.0, 2, 2, False), "not written again for an epoch that is no better"
    assert training.saved("last.pt") == (3.0, 3, 3, False)
    training.run(until=4)
    assert training.saved("best.pt") == (2.0, 2, 4, True) and training.saved("last.pt") == (4.0, 4, 4, True)
    best, last = (load_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert best.optimization is None and last.optimization is not None
    assert [record[SCORE] for record in last.progress.history] == [0.1, 0.3, 0.2, 0.1]
    assert (best.genes, best.split, best.config) == (last.genes, last.split, last.config)


def test_files_wait_for_their_time_but_not_at_the_end(tmp_path):
    training = Training(tmp_path, [0.1, 0.3, 0.2], seconds=600.0).run(until=2)
    assert not list(tmp_path.iterdir())
    training.run(until=3)
    assert training.saved("best.pt") == (2.0, 2, 3, True) and training.saved("last.pt") == (3.0, 3, 3, True)


def test_patience_ends_a_training_too(tmp_path):
    training = Training(tmp_path, [0.3, 0.1, 0.1, 0.9], seconds=600.0, patience=2).run(until=4)
    assert training.saved("best.pt") == (1.0, 1, 3, True) and training.progress.epoch == 3


def test_goes_on_with_weights_optimiser_and_progress(tmp_path, capsys):
    first = Training(tmp_path, [0.1, 0.3, 0.2, 0.1], seconds=0.0).run(until=3)
    capsys.readouterr()
    again = Training(tmp_path, [0.1, 0.3, 0.2, 0.1], seconds=600.0)
    assert "Fold 0 (A): goes on after epoch 3." in capsys.readouterr().out
    assert again.progress == first.progress and again.model.weight.item() == 3.0
    assert again.optimization.scheduler.last_epoch == 3
    (state,), (expected,) = (one.optimization.optimizer.state.values() for one in (again, first))
    assert state["step"] == 3 and all(torch.equal(state[name], expected[name]) for name in expected)
    again.run(until=4)
    assert again.saved("best.pt") == (2.0, 2, 4, True), "the best weights are those of the file"


def test_best_is_written_before_last(tmp_path):
    """A crash in between: last.pt never speaks of a best epoch that best.pt does not hold."""
    training = Training(tmp_path, [0.1, 0.3], seconds=0.0).run(until=1)
    training.checkpoints.last_path = tmp_path / "best.pt" / "last.pt"  # no folder
    with pytest.raises((OSError, ValueError)):
        training.run(until=2)
    assert training.saved("best.pt") == (2.0, 2, 2, True) and training.saved("last.pt") == (1.0, 1, 1, False)


def test_an_interruption_keeps_the_best_weights_and_says_where_it_goes_on(tmp_path, capsys):
    training = Training(tmp_path, [0.1, 0.3, 0.2, 0.1], seconds=600.0).run(until=3)
    training.model.weight.data.fill_(99.0)  # in the middle of epoch 4
    training.checkpoints.keep(training.progress)
    said = capsys.readouterr().out
    assert "Fold 0 (A): stopped, epochs done: 3; --resume starts this fold anew (--checkpoint_seconds: 600 s" in said
    assert training.saved("best.pt") == (2.0, 2, 2, False) and not (tmp_path / "last.pt").exists()


def test_an_interruption_leaves_last_as_it_is(tmp_path, capsys):
    training = Training(tmp_path, [0.1, 0.3, 0.2, 0.1], seconds=0.0).run(until=3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    training.model.weight.data.fill_(99.0)
    training.checkpoints.keep(training.progress)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "--resume goes on after epoch 3" in capsys.readouterr().out
