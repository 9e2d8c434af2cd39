"""Which patients train, validate and test: pure functions of lists.

The unit is the patient, never the slide: another section of the same patient in training inflates every score.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEAVE_ONE_PATIENT_OUT, KFOLD = "leave_one_patient_out", "kfold"
SCHEMES = (LEAVE_ONE_PATIENT_OUT, KFOLD)


@dataclass(frozen=True)
class Fold:
    """One split. `index` counts in the full list of patients and stays the same when patients are not on disk."""

    index: int
    name: str
    test_patients: tuple[str, ...]
    train_patients: tuple[str, ...]
    validation_patients: tuple[str, ...] = ()


def make_folds(
    patients: Sequence[str], scheme: str, num_folds: int | None = None, seed: int | None = None
) -> list[Fold]:
    """Make all folds of the full, ordered list of patients.

    scheme:    "leave_one_patient_out" (as many folds as patients) or "kfold": scikit-learn's
               KFold(num_folds, shuffle=True, random_state=seed) over the list as given, so its order matters.
    num_folds, seed: for "kfold" only.
    Raises ValueError for an unknown scheme, duplicated patients, or fewer patients than folds (or than two).
    """
    patients = list(patients)
    repeated = sorted({patient for patient in patients if patients.count(patient) > 1})
    if repeated:
        raise ValueError(f"Patients listed more than once: {', '.join(repeated)}. List each patient once.")
    if len(patients) < 2:
        raise ValueError(
            f"Found {len(patients)} patient(s) ({', '.join(patients) or 'none'}); cross-validation leaves whole patients "
            "out and needs at least 2. Add slides of another patient."
        )
    if scheme == LEAVE_ONE_PATIENT_OUT:
        tests: list[tuple[str, ...]] = [(patient,) for patient in patients]
    elif scheme == KFOLD:
        tests = _kfold_tests(patients, num_folds, seed)
    else:
        raise ValueError(f"Unknown fold scheme {scheme!r}; choose one of {', '.join(SCHEMES)}.")
    return [
        Fold(
            index=index,
            name=test[0] if len(test) == 1 else f"fold{index}",
            test_patients=test,
            train_patients=tuple(patient for patient in patients if patient not in test),
        )
        for index, test in enumerate(tests)
    ]


def _kfold_tests(patients: list[str], num_folds: int | None, seed: int | None) -> list[tuple[str, ...]]:
    if num_folds is None or seed is None:
        raise ValueError(f"The scheme {KFOLD!r} needs num_folds and fold_seed; found {num_folds} and {seed}.")
    if not 2 <= num_folds <= len(patients):
        raise ValueError(f"num_folds is {num_folds}; with {len(patients)} patients it must be 2 to {len(patients)}.")
    from sklearn.model_selection import KFold  # takes seconds, and few sets are split so

    splitter = KFold(n_splits=num_folds, shuffle=True, random_state=seed)
    return [tuple(patients[i] for i in test) for _, test in splitter.split(patients)]


def available_folds(folds: Sequence[Fold], patients_on_disk: Collection[str]) -> tuple[list[Fold], list[str]]:
    """Choose the folds that can be run with the patients that have slides.

    folds:            of the full list of patients (`make_folds`).
    patients_on_disk: patients with at least one usable slide.
    returns: the folds with at least one test patient on disk, their patients restricted to those on disk, and one
             sentence for each thing left out.
    Raises ValueError when no fold remains or a patient on disk is in no fold.
    """
    present = set(patients_on_disk)
    known = {patient for fold in folds for patient in fold.test_patients}
    if present - known:
        raise ValueError(
            f"Patients {_join(sorted(present - known))} have slides but belong to no fold; known are "
            f"{_join(sorted(known))}. Keep their slides elsewhere, or list them in the dataset.yaml of the data folder."
        )
    if len(present) < 2:
        raise ValueError(
            f"Slides of {len(present)} patient(s) were found ({_join(sorted(present)) or 'none'}), which is too few for "
            "any fold: one patient is held out for the test and at least one more must train. Add slides of "
            f"{_join(sorted(known - present)) or 'another patient'}."
        )
    kept, notices = [], []
    for fold in folds:
        test = _present(fold.test_patients, present)
        train = _present(fold.train_patients, present)
        absent = [patient for patient in fold.test_patients if patient not in present]
        if not test:
            notices.append(f"Fold {fold.index} is skipped: no slide of its test patient(s) {_join(absent)} was found.")
        elif not train:
            notices.append(f"Fold {fold.index} is skipped: every patient on disk is one of its test patients.")
        else:
            if absent:
                notices.append(f"Fold {fold.index} is tested without {_join(absent)}: no slide was found.")
            kept.append(replace(fold, test_patients=test, train_patients=train))
    if not kept:
        raise ValueError(f"No fold can be run with patients {_join(sorted(present))}: {' '.join(notices)}")
    missing = [patient for patient in folds[0].test_patients + folds[0].train_patients if patient not in present]
    if missing:
        notices.append(f"Training goes without {_join(sorted(missing))}: no slide was found.")
    return kept, notices


def with_validation(fold: Fold, seed: int) -> Fold:
    """Hold one inner training patient of a fold out, on whom the epoch is chosen (clean protocol).

    The choice depends on (seed, fold.index) and the training patients only. A fold with fewer than two training patients
    is returned unchanged.
    """
    if len(fold.train_patients) < 2:
        return fold
    generator = np.random.default_rng([seed, fold.index])
    held_out = sorted(fold.train_patients)[int(generator.integers(len(fold.train_patients)))]
    return replace(
        fold,
        train_patients=tuple(patient for patient in fold.train_patients if patient != held_out),
        validation_patients=(held_out,),
    )


def _present(patients: Sequence[str], present: set[str]) -> tuple[str, ...]:
    return tuple(patient for patient in patients if patient in present)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)
