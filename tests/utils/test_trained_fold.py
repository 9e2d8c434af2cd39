"""A trained fold: which epoch is the best, when a training has ended, and files of earlier versions."""

from __future__ import annotations

import math
from dataclasses import asdict

from utils.config import load_config
from utils.trained_fold import Progress

SCORE = "validation/pcc_all"


def scored(scores, start=None, epochs=None, patience=100):
    """Go through a list of scores as a training does; returns the state and which epochs were the best so far."""
    config = load_config("her2st/dml", [f"TRAINING.epochs={epochs or len(scores)}", f"TRAINING.patience={patience}"])
    state, saved = start or Progress(), []
    while not state.is_finished(config, SCORE):
        is_better = state.add({"epoch": state.epoch + 1, SCORE: scores[state.epoch]}, SCORE)
        saved.append((state.epoch, is_better))
    return state, saved


def test_best_epoch_is_the_first_of_the_greatest_scores():
    state, saved = scored([0.1, 0.3, 0.2, 0.3])
    assert (state.best_epoch, state.best_score, state.epoch) == (2, 0.3, 4)
    assert saved == [(1, True), (2, True), (3, False), (4, False)]
    assert [record["epoch"] for record in state.history] == [1, 2, 3, 4]


def test_patience_stops_and_stays_stopped():
    state, _ = scored([0.3, 0.1, 0.1, 0.1, 0.9], patience=3)
    assert state.epoch == 4
    assert scored([0.3, 0.1, 0.1, 0.1, 0.9], start=state, patience=3)[1] == []


def test_undefined_scores_never_win():
    state, saved = scored([math.nan, math.nan, 0.1, math.nan])
    assert state.best_epoch == 3 and saved[0] == (1, True)


def test_without_a_score_the_last_epoch_is_the_best_and_patience_is_ignored():
    config = load_config("her2st/dml", ["TRAINING.epochs=5", "TRAINING.patience=1"])
    state, saved = Progress(), []
    while not state.is_finished(config, None):
        saved.append(state.add({"epoch": state.epoch + 1}, None))
    assert state.best_epoch == 5 and saved == [True] * 5


def test_a_continued_training_goes_on_where_it_was():
    scores = [0.1, 0.2, 0.15, 0.3]
    whole, _ = scored(scores)
    part, _ = scored(scores, epochs=2)
    again, _ = scored(scores, start=Progress(**asdict(part)))
    assert again == whole
