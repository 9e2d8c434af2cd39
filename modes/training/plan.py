"""Which folds can be run, whom each trains on and is tested on, and what chooses its epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets.folds import Fold, available_folds, make_folds, with_validation
from datasets.layout import Layout
from datasets.spec import SPEC_FILE, DatasetSpec
from datasets.tables.gene_list import given_genes, note_on_given_genes
from modes.training.compose import is_closed_form
from utils.cli import say
from utils.config import Config
from utils.trained_fold import ALL_PATIENTS, SplitRecord


def find_folds(
    config: Config,
    layout: Layout,
    patient_of_slide: Mapping[str, str],
    wanted: Sequence[int] | None,
    *,
    all_patients: bool = False,
) -> tuple[list[SplitRecord], list[str]]:
    """Find the folds that are wanted, None for all that can be run with the slides on disk.

    patient_of_slide: `Layout.patients_on_disk`.  all_patients: the one fold on every patient in their place.
    Returns them and one sentence for each thing that is left out, which is also said; ValueError when a wanted fold
    cannot be run.
    """
    folds, notices = [plan_all_patients(config, patient_of_slide)], list[str]()
    if not all_patients:
        folds, notices = plan_folds(config, layout.spec, patient_of_slide)
    left_out = layout.left_out_note()
    notices += [left_out] if left_out else []
    if config.DATA.genes is not None:
        notices.append(note_on_given_genes(given_genes(config.DATA.genes), config.DATA.genes))
    for notice in notices:
        say(notice)
    if wanted is None:
        return folds, notices
    possible = {split.fold: split for split in folds}
    missing = [index for index in wanted if index not in possible]
    if missing:
        raise ValueError(
            f"fold {', '.join(map(str, missing))} cannot be run; with the slides in {layout.root} these can: "
            f"{', '.join(f'{split.fold} ({split.name})' for split in folds)}."
        )
    return [possible[index] for index in sorted(set(wanted))], notices


def plan_folds(
    config: Config, spec: DatasetSpec, patient_of_slide: Mapping[str, str]
) -> tuple[list[SplitRecord], list[str]]:
    """Plan every fold that the slides allow; returns them and one sentence for each thing that is left out.

    Raises ValueError as `datasets.folds.available_folds`.
    """
    on_disk = sorted(set(patient_of_slide.values()))
    folds = make_folds(list(spec.patients) or on_disk, spec.fold_scheme, spec.num_folds, spec.fold_seed)
    available, notices = available_folds(folds, on_disk)
    if spec.is_patient_of_its_own:
        notices.append(
            f"Nothing says whose slides those of {spec.name} are: each is taken as a patient of its own. Where two are of one "
            f"patient, write patient_pattern or patient_of_slide into {SPEC_FILE}."
        )
    return [_plan(config, fold, patient_of_slide) for fold in available], notices


def plan_all_patients(config: Config, patient_of_slide: Mapping[str, str]) -> SplitRecord:
    """Plan the one fold that trains on every patient on disk and tests on none."""
    return SplitRecord(
        fold=ALL_PATIENTS,
        name="all patients",
        protocol=config.EVALUATION.protocol,
        test_patients=[],
        train_patients=sorted(set(patient_of_slide.values())),
        validation_patients=[],
        test_slides=[],
        train_slides=list(patient_of_slide),
        validation_slides=[],
        selection="none" if is_closed_form(config) else "fixed",
    )


def _plan(config: Config, fold: Fold, patient_of_slide: Mapping[str, str]) -> SplitRecord:
    """Decide what chooses the epoch of a fold, and hold out the inner validation patient where that does.

    A model that is fitted in closed form has no epochs ("none"). Others train the number that was fixed beforehand, or
    the best one on the test fold (paper), or the best one on a held-out patient (clean); with one training patient none
    can be held out, and all epochs are trained.
    """
    evaluation, held_out = config.EVALUATION, with_validation(fold, config.GENERAL.seed)
    if is_closed_form(config):
        selection = "none"
    elif evaluation.fixed_epochs is not None:
        selection = "fixed"
    elif evaluation.protocol == "paper":
        selection = "test"
    elif held_out.validation_patients:
        fold, selection = held_out, "validation"
    else:
        selection = "fixed"
    return SplitRecord(
        fold=fold.index,
        name=fold.name,
        protocol=evaluation.protocol,
        test_patients=list(fold.test_patients),
        train_patients=list(fold.train_patients),
        validation_patients=list(fold.validation_patients),
        test_slides=_slides_of(patient_of_slide, fold.test_patients),
        train_slides=_slides_of(patient_of_slide, fold.train_patients),
        validation_slides=_slides_of(patient_of_slide, fold.validation_patients),
        selection=selection,
    )


def lacks_validation(config: Config, split: SplitRecord) -> bool:
    """Tell whether a held-out patient should choose the epoch of a fold, and there is none to hold out."""
    return split.selection == "fixed" and config.EVALUATION.fixed_epochs is None


def _slides_of(patient_of_slide: Mapping[str, str], patients: Sequence[str]) -> list[str]:
    """The slides of the patients, in the order given (sorted, as they are on disk)."""
    return [slide for slide, patient in patient_of_slide.items() if patient in patients]
