"""What a fold trains on, chooses its epoch on and is tested on; which genes, and their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from datasets.folds import Fold
from datasets.spots import SlideRecord
from datasets.tables.expression import highest_mean_panel
from datasets.targets import absent_genes, store_targets
from evaluation.protocol import highly_predictive_list, highly_variable_list
from modes.training.compose import is_closed_form
from modes.training.run_data import RunData, slides_of
from utils.cli import say
from utils.config import Config
from utils.files import load_names
from utils.text import some
from utils.trained_fold import SplitRecord


@dataclass(frozen=True)
class Split:
    """Slides, genes and targets of a fold, and how its epoch is chosen."""

    record: SplitRecord
    genes: list[str]
    targets: Tensor  # (R, G) smoothed, NaN where a row belongs to no slide of the fold
    training_mean: Tensor  # (2, G): of the smoothed and of the unsmoothed training targets
    gene_lists: dict[str, list[str]]


def prepare_split(run_data: RunData, fold: Fold) -> Split:
    """Panel, targets and gene lists of a fold; in the clean protocol from the outer training patients alone.

    A closed form chooses no epoch, so its inner validation patient goes back to training.
    """
    config = run_data.config
    selection = choose_selection(config, fold)
    if selection == "none":
        fold = replace(fold, train_patients=(*fold.train_patients, *fold.validation_patients), validation_patients=())
    record = record_of(fold, run_data.store.patients, config.EVALUATION.protocol, selection)
    outer = run_data.store.named(record.fitted_slides)
    genes = choose_panel(run_data, outer)
    is_clean = config.EVALUATION.protocol == "clean"
    targets = store_targets(run_data.store, record.fitted_slides, genes)
    tested = run_data.store.rows_of(record.test_slides)
    targets[tested] = store_targets(run_data.store, record.test_slides, genes, absent_is_zero=is_clean)[tested]
    unsmoothed = store_targets(run_data.store, record.fitted_slides, genes, smoothing=False)
    rows = run_data.store.rows_of(record.fitted_slides)
    notes = _absence_notes(run_data.store.named(record.test_slides), genes)
    return Split(
        record=replace(record, features=_features(run_data), notes=notes),
        genes=genes,
        targets=targets,
        training_mean=torch.stack([targets[rows].mean(dim=0), unsmoothed[rows].mean(dim=0)]),
        gene_lists=_gene_lists(run_data, outer, targets, genes),
    )


def record_of(fold: Fold, patient_of_slide: Mapping[str, str], protocol: str, selection: str) -> SplitRecord:
    """The patients of a fold with the slides they have on disk."""
    return SplitRecord(
        fold=fold.index,
        name=fold.name,
        protocol=protocol,
        test_patients=list(fold.test_patients),
        train_patients=list(fold.train_patients),
        validation_patients=list(fold.validation_patients),
        test_slides=slides_of(patient_of_slide, fold.test_patients),
        train_slides=slides_of(patient_of_slide, fold.train_patients),
        validation_slides=slides_of(patient_of_slide, fold.validation_patients),
        selection=selection,
    )


def choose_selection(config: Config, fold: Fold) -> str:
    """What chooses the epoch: the inner validation patient, the test fold (paper), or a number set beforehand.

    "none" for a model that is fitted in closed form.
    """
    if is_closed_form(config):
        return "none"
    if config.EVALUATION.fixed_epochs is not None:
        return "fixed"
    if config.EVALUATION.protocol == "paper":
        return "test"
    if fold.validation_patients:
        return "validation"
    say(
        f"Fold {fold.index} ({fold.name}): with one training patient none can be held out to choose the epoch, so all "
        f"{config.TRAINING.epochs} epochs are trained (a number fixed beforehand)."
    )
    return "fixed"


def choose_panel(run_data: RunData, outer: list[SlideRecord]) -> list[str]:
    """The gene panel: the file of the data folder (paper), or the highest means over the training patients (clean)."""
    if run_data.config.EVALUATION.protocol == "paper":
        return load_names(run_data.layout.panel_path)
    return highest_mean_panel([slide.table for slide in outer], run_data.config.DATA.num_genes)


def _absence_notes(tested: list[SlideRecord], genes: list[str]) -> list[str]:
    """A sentence for each test slide whose counts lack genes of the panel, which no test slide has a say in."""
    absent = {slide.name: absent_genes(slide.table, genes) for slide in tested}
    return [
        f"{len(names)} of the {len(genes)} panel genes are not in the counts of {slide} and count as not expressed there: "
        f"{some(names)}."
        for slide, names in absent.items()
        if names
    ]


def _features(run_data: RunData) -> dict[str, Any]:
    """What the model sees of a patch, for whoever compares runs."""
    encoder, data = run_data.store.encoder, run_data.config.DATA
    return {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "patch_size": data.patch_size,
        "num_neighbors": data.num_neighbors,
        "tokens": run_data.token_source,
    }


def _gene_lists(run_data: RunData, outer: list[SlideRecord], targets: Tensor, genes: list[str]) -> dict[str, list[str]]:
    rows = run_data.store.rows_of([slide.name for slide in outer])
    expression = targets[rows].numpy()
    lists = {"highly_variable": highly_variable_list(expression, genes)}
    patients = [slide.patient for slide in outer for _ in range(slide.start, slide.stop)]
    slides = [slide.name for slide in outer for _ in range(slide.start, slide.stop)]
    if len(set(patients)) > 1:
        features = run_data.store.target_features[rows].float().numpy()
        lists["highly_predictive"] = highly_predictive_list(features, expression, patients, genes, slides=slides)
    return lists
