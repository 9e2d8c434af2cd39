"""What chooses the epoch of a fold, and whom it trains on therefore."""

from __future__ import annotations

import pytest

from datasets.known_sets import get_spec
from modes.training.plan import lacks_validation, plan_folds
from utils.config import load_config

SLIDES = {"A1": "A", "B1": "B", "B2": "B", "C1": "C"}


def planned(tmp_path, *overrides: str, slides=SLIDES):
    config = load_config("her2st/dml", overrides)
    folds, _ = plan_folds(config, get_spec("her2st", tmp_path), slides)
    return config, folds


@pytest.mark.parametrize(
    ("overrides", "selection", "score_name"),
    [
        ((), "validation", "validation/pcc_all"),
        (("EVALUATION.protocol=paper",), "test", "test/pcc_all"),
        (("EVALUATION.fixed_epochs=3",), "fixed", None),
        (("EVALUATION.protocol=paper", "EVALUATION.fixed_epochs=3"), "fixed", None),
        (("MODEL.name=ridge",), "none", None),
        (("MODEL.name=mean", "EVALUATION.protocol=paper"), "none", None),
        (("MODEL.name=mlp",), "validation", "validation/pcc_all"),
    ],
)
def test_what_chooses_the_epoch(tmp_path, overrides, selection, score_name):
    """A patient is held out where he chooses, and only there."""
    config, folds = planned(tmp_path, *overrides)
    assert [split.name for split in folds] == ["A", "B", "C"]
    for split in folds:
        assert (split.selection, split.score_name) == (selection, score_name)
        assert split.protocol == config.EVALUATION.protocol and not lacks_validation(config, split)
        assert len(split.validation_patients) == (selection == "validation")
        assert sorted([*split.fitted_patients, *split.test_patients]) == ["A", "B", "C"]
        assert sorted([*split.fitted_slides, *split.test_slides]) == sorted(SLIDES)
    assert folds[1].test_slides == ["B1", "B2"] and sorted(folds[1].fitted_slides) == ["A1", "C1"]


def test_with_one_training_patient_none_is_held_out(tmp_path):
    two = {"A1": "A", "B1": "B"}
    config, folds = planned(tmp_path, slides=two)
    assert [(split.selection, split.train_slides, split.validation_slides) for split in folds] == [
        ("fixed", ["B1"], []),
        ("fixed", ["A1"], []),
    ]
    assert all(lacks_validation(config, split) for split in folds)
    for change in ("EVALUATION.fixed_epochs=3", "EVALUATION.protocol=paper", "MODEL.name=ridge"):
        config, folds = planned(tmp_path, change, slides=two)
        assert not any(lacks_validation(config, split) for split in folds), "nobody has to be held out"
