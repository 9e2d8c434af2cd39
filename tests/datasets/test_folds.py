"""Splits by patient: the published folds, patients that are not on disk, the inner validation patient."""

from __future__ import annotations

import pytest

from datasets.folds import Fold, available_folds, make_folds, with_validation
from datasets.known_sets import SPECS

STNET = SPECS["stnet"]
PINNED_FIRST = ("BC23277", "BC23287", "BC23508")
PINNED_LAST = ("BC23944", "BC24044")


def stnet_folds() -> list[Fold]:
    return make_folds(list(STNET.patients), STNET.fold_scheme, STNET.num_folds, STNET.fold_seed)


def test_leave_one_patient_out_follows_the_order_of_the_list():
    folds = make_folds(["B", "A", "C"], "leave_one_patient_out")
    assert [fold.test_patients for fold in folds] == [("B",), ("A",), ("C",)]
    assert [fold.index for fold in folds] == [0, 1, 2]
    assert folds[1] == Fold(index=1, name="A", test_patients=("A",), train_patients=("B", "C"))


def test_every_patient_is_tested_once_and_never_trains_the_fold_that_tests_it():
    for folds, patients in (
        (stnet_folds(), STNET.patients),
        (make_folds(list("ABCDEFGH"), "leave_one_patient_out"), "ABCDEFGH"),
    ):
        assert sorted(patient for fold in folds for patient in fold.test_patients) == sorted(patients)
        for fold in folds:
            assert not set(fold.test_patients) & set(fold.train_patients)
            assert set(fold.test_patients) | set(fold.train_patients) == set(patients)


def test_stnet_folds_are_those_of_the_published_split():
    """KFold(8, shuffle=True, random_state=2021) over the ordered list: pinned, so that a change of order is noticed."""
    from sklearn.model_selection import KFold

    folds = stnet_folds()
    expected = KFold(n_splits=8, shuffle=True, random_state=2021).split(STNET.patients)
    assert [fold.test_patients for fold in folds] == [tuple(STNET.patients[i] for i in test) for _, test in expected]
    assert [len(fold.test_patients) for fold in folds] == [3, 3, 3, 3, 3, 3, 3, 2]
    assert folds[0].test_patients == PINNED_FIRST and folds[7].test_patients == PINNED_LAST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["A"], "leave_one_patient_out"), r"Found 1 patient\(s\) \(A\).*at least 2"),
        (([], "leave_one_patient_out"), r"Found 0 patient\(s\) \(none\)"),
        ((["A", "B", "A"], "leave_one_patient_out"), "more than once: A"),
        ((["A", "B"], "by_slide"), "Unknown fold scheme 'by_slide'.*leave_one_patient_out, kfold"),
        ((["A", "B"], "kfold"), "needs num_folds and fold_seed; found None and None"),
        ((["A", "B"], "kfold", 3, 0), "num_folds is 3; with 2 patients it must be 2 to 2"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_folds(*arguments)


def test_a_fold_without_its_test_patient_is_skipped_and_said():
    folds, notices = available_folds(make_folds(list("ABCD"), "leave_one_patient_out"), {"B", "D"})
    assert [(fold.index, fold.test_patients, fold.train_patients) for fold in folds] == [
        (1, ("B",), ("D",)),
        (3, ("D",), ("B",)),
    ]
    assert notices == [
        "Fold 0 is skipped: no slide of its test patient(s) A was found.",
        "Fold 2 is skipped: no slide of its test patient(s) C was found.",
        "Training goes without A, C: no slide was found.",
    ]


def test_all_patients_on_disk_leave_the_folds_as_they_are():
    assert available_folds(stnet_folds(), STNET.patients) == (stnet_folds(), [])


def test_folds_keep_their_index_and_their_other_patients():
    full = stnet_folds()
    gone = full[2].test_patients[0]
    folds, notices = available_folds(full, set(STNET.patients) - {gone})
    assert [fold.index for fold in folds] == list(range(8))
    assert folds[2].test_patients == full[2].test_patients[1:]
    assert all(gone not in fold.train_patients for fold in folds)
    assert notices[0] == f"Fold 2 is tested without {gone}: no slide was found."


def test_patients_of_one_test_fold_only_cannot_train_it():
    full = stnet_folds()
    with pytest.raises(ValueError, match=r"No fold can be run.*every patient on disk is one of its test patients"):
        available_folds(full, full[0].test_patients)


@pytest.mark.parametrize("present", [[], ["C"]])
def test_too_few_patients_for_any_fold(present):
    with pytest.raises(
        ValueError, match=rf"Slides of {len(present)} patient\(s\).*too few for any fold.*Add slides of A"
    ):
        available_folds(make_folds(list("ABCD"), "leave_one_patient_out"), present)


def test_a_patient_of_no_fold_is_an_error():
    with pytest.raises(ValueError, match="Patients Z have slides but belong to no fold; known are A, B"):
        available_folds(make_folds(["A", "B"], "leave_one_patient_out"), ["A", "B", "Z"])


def test_validation_patient_is_one_of_the_training_patients_and_is_reproducible():
    folds = make_folds(list("ABCDEFGH"), "leave_one_patient_out")
    inner = [with_validation(fold, seed=2021) for fold in folds]
    assert inner == [with_validation(fold, seed=2021) for fold in folds]
    for fold, split in zip(folds, inner, strict=True):
        (held_out,) = split.validation_patients
        assert held_out in fold.train_patients
        assert set(split.train_patients) == set(fold.train_patients) - {held_out}
        assert split.test_patients == fold.test_patients
    assert len({split.validation_patients for split in inner}) > 1, "the choice depends on the fold"
    assert inner != [with_validation(fold, seed=7) for fold in folds], "and on the seed"


def test_a_single_training_patient_is_not_held_out():
    fold = make_folds(["A", "B"], "leave_one_patient_out")[0]
    assert with_validation(fold, seed=0) == fold
