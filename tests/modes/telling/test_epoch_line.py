"""The line of an epoch: its terms, whose score it shows, and how long the fold may still take."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from modes.telling.epoch_line import EpochLine, word_on_test_scores
from utils.config import Config
from utils.trained_fold import Progress, SplitRecord

SPLIT = SplitRecord(
    fold=0, name="A", protocol="clean", test_patients=["A"], train_patients=["B"], validation_patients=["C"],
    test_slides=["A1"], train_slides=["B1"], validation_slides=["C1"], selection="validation",
)  # fmt: skip
RECORD = {
    "epoch": 1,
    "train/total": 4.2137,
    "train/prediction": 0.0814,
    "train/instance": 3.1,
    "learning_rate": 1e-4,
    "test/pcc_all": 0.9,
    "test/mse": 0.9,
}
VALIDATION = {"validation/pcc_all": -0.312, "validation/mse": 0.0741}


def line_of(record: dict[str, float], config: Config | None = None, split: SplitRecord = SPLIT) -> str:
    progress = Progress()
    progress.add(record, split.score_name)
    return EpochLine(config or Config(), split).of(progress)


def test_names_terms_score_and_time():
    expected = (
        r"Fold 0 \(A\) epoch 1/200  loss 4\.21 \(prediction \.081, instance 3\.1\)  "
        r"validation PCC -\.312 MSE \.074  0\.0 s, at most 1 s left"
    )
    assert re.fullmatch(expected, line_of(RECORD | VALIDATION))


def test_a_fixed_number_of_epochs_takes_about_so_long_and_shows_the_test_patients():
    config = replace(Config(), EVALUATION=replace(Config().EVALUATION, fixed_epochs=3))
    line = line_of(RECORD, config, replace(SPLIT, selection="fixed"))
    assert "epoch 1/3 " in line and "  test PCC .900 MSE .900  " in line and line.endswith("about 1 s left")


@pytest.mark.parametrize(
    ("splits", "is_said"),
    [
        ([replace(SPLIT, selection="fixed")], True),
        ([SPLIT, replace(SPLIT, selection="fixed", validation_slides=[])], True),
        ([SPLIT], False),
        ([replace(SPLIT, selection="test")], False),  # there they choose
        ([replace(SPLIT, selection="none")], False),  # without epochs
        ([replace(SPLIT, selection="fixed", test_slides=[])], False),  # the model on all patients
    ],
)
def test_test_scores_that_are_only_shown_are_called_so(splits, is_said):
    expected = (
        "Test scores in the lines below are only shown: the number of epochs is fixed, nothing is chosen by them, and the "
        "last epoch counts."
    )
    assert word_on_test_scores(splits) == (expected if is_said else "")


def test_the_last_epoch_has_nothing_left():
    config = replace(Config(), TRAINING=replace(Config().TRAINING, epochs=1))
    assert line_of(RECORD | VALIDATION, config).endswith("0.0 s")


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "PCC undefined"), (1.0, "PCC 1 "), (0.0, "PCC .000"), (-0.5, "PCC -.500")]
)
def test_scores_are_short(value, text):
    assert text in line_of(RECORD | VALIDATION | {"validation/pcc_all": value})
