"""What a fold trains on, chooses its epoch on and is tested on; which genes, and their targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datasets.folds import Fold
from datasets.spots import SlideRecord
from datasets.tables.expression import highest_mean_panel
from datasets.targets import absent_genes, store_targets
from evaluation.protocol import highly_predictive_list, highly_variable_list
from modes.training.compose import is_closed_form
from modes.training.run_data import Study, slides_of
from utils.cli import say
from utils.config import Config
from utils.files import load_names
from utils.text import some


@dataclass(frozen=True)
class Split:
    """Slides, genes and targets of a fold, and how its epoch is chosen."""

    fold: Fold
    train_slides: list[str]
    validation_slides: list[str]
    test_slides: list[str]
    selection: str  # validation | test | fixed | none (a closed form has no epochs)
    genes: list[str]
    targets: Tensor  # (R, G) smoothed, NaN where a row belongs to no slide of the fold
    training_mean: Tensor  # (2, G): of the smoothed and of the unsmoothed training targets
    gene_lists: dict[str, list[str]]
    features: dict[str, object]  # what the patches and their encoder were
    notes: list[str]  # for the summary

    def to_dict(self, protocol: str) -> dict:
        return {
            "fold": self.fold.index,
            "name": self.fold.name,
            "protocol": protocol,
            "test_patients": list(self.fold.test_patients),
            "train_patients": list(self.fold.train_patients),
            "validation_patients": list(self.fold.validation_patients),
            "test_slides": self.test_slides,
            "train_slides": self.train_slides,
            "validation_slides": self.validation_slides,
            "selection": self.selection,
            "features": self.features,
            "notes": self.notes,
        }


def prepare_split(study: Study, fold: Fold) -> Split:
    """Panel, targets and gene lists of a fold; in the clean protocol from the outer training patients alone.

    A closed form chooses no epoch, so its inner validation patient goes back to training.
    """
    config, layout = study.config, study.layout
    selection = choose_selection(config, fold)
    if selection == "none":
        fold = replace(fold, train_patients=(*fold.train_patients, *fold.validation_patients), validation_patients=())
    train, validation, test = (
        slides_of(layout, patients) for patients in (fold.train_patients, fold.validation_patients, fold.test_patients)
    )
    outer = study.store.named([*train, *validation])
    genes = choose_panel(study, outer)
    is_clean = config.EVALUATION.protocol == "clean"
    targets = store_targets(study.store, [*train, *validation], genes)
    tested = study.store.rows_of(test)
    targets[tested] = store_targets(study.store, test, genes, absent_is_zero=is_clean)[tested]
    unsmoothed = store_targets(study.store, [*train, *validation], genes, smoothing=False)
    rows = study.store.rows_of([*train, *validation])
    return Split(
        fold=fold,
        train_slides=train,
        validation_slides=validation,
        test_slides=test,
        selection=selection,
        genes=genes,
        targets=targets,
        training_mean=torch.stack([targets[rows].mean(dim=0), unsmoothed[rows].mean(dim=0)]),
        gene_lists=_gene_lists(study, outer, targets, genes),
        features=_features(study),
        notes=_absence_notes(study.store.named(test), genes),
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


def choose_panel(study: Study, outer: list[SlideRecord]) -> list[str]:
    """The gene panel: the file of the data folder (paper), or the highest means over the training patients (clean)."""
    if study.config.EVALUATION.protocol == "paper":
        return load_names(study.layout.panel_path)
    return highest_mean_panel([slide.table for slide in outer], study.config.DATA.num_genes)


def _absence_notes(tested: list[SlideRecord], genes: list[str]) -> list[str]:
    """A sentence for each test slide whose counts lack genes of the panel, which no test slide has a say in."""
    absent = {slide.name: absent_genes(slide.table, genes) for slide in tested}
    return [
        f"{len(names)} of the {len(genes)} panel genes are not in the counts of {slide} and count as not expressed there: "
        f"{some(names)}."
        for slide, names in absent.items()
        if names
    ]


def _features(study: Study) -> dict[str, object]:
    """What the model sees of a patch, for whoever compares runs."""
    encoder, data = study.store.encoder, study.config.DATA
    return {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "patch_size": data.patch_size,
        "num_neighbors": data.num_neighbors,
        "tokens": study.token_source,
    }


def _gene_lists(study: Study, outer: list[SlideRecord], targets: Tensor, genes: list[str]) -> dict[str, list[str]]:
    rows = study.store.rows_of([slide.name for slide in outer])
    expression = targets[rows].numpy()
    lists = {"highly_variable": highly_variable_list(expression, genes)}
    patients = [slide.patient for slide in outer for _ in range(slide.start, slide.stop)]
    slides = [slide.name for slide in outer for _ in range(slide.start, slide.stop)]
    if len(set(patients)) > 1:
        features = study.store.target_features[rows].float().numpy()
        lists["highly_predictive"] = highly_predictive_list(features, expression, patients, genes, slides=slides)
    return lists
