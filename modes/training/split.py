"""What a fold learns: its genes, their targets, and what is fixed of them before the first epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.spots import SlideRecord
from datasets.targets import absent_genes, store_targets
from evaluation.gene_lists import HeldOutPatient, highly_predictive_list, highly_variable_list
from models.baselines import closed_form
from modes.training.plan import lacks_validation
from modes.training.run_data import RunData, choose_panel
from utils.cli import say
from utils.config import Config
from utils.text import some
from utils.trained_fold import SplitRecord

# Of the reference model, as multiples of the mean variance (sum of squares) of its principal components.
REFERENCE_PENALTIES = tuple(10.0**power for power in range(-4, 5))
SPOTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Split:
    """The plan of a fold with its genes and targets."""

    record: SplitRecord
    genes: list[str]
    targets: Tensor  # (R, G) smoothed, NaN where a row belongs to no slide of the fold
    training_mean: Tensor  # (2, G): of the smoothed and of the unsmoothed training targets
    gene_lists: dict[str, list[str]]


def prepare_split(run_data: RunData, record: SplitRecord) -> Split:
    """Prepare panel, targets and gene lists of a planned fold; in the clean protocol from the outer training patients alone."""
    config = run_data.config
    if lacks_validation(config, record):
        say(
            f"{record.title}: with one training patient none can be held out to choose the epoch, so all "
            f"{config.TRAINING.epochs} epochs are trained (a number fixed beforehand)."
        )
    outer = run_data.store.named(record.fitted_slides)
    genes = choose_panel(config, run_data.layout, outer)
    is_clean = config.EVALUATION.protocol == "clean"
    targets = store_targets(run_data.store, record.fitted_slides, genes)
    tested = run_data.store.rows_of(record.test_slides)
    targets[tested] = store_targets(run_data.store, record.test_slides, genes, absent_is_zero=is_clean)[tested]
    unsmoothed = store_targets(run_data.store, record.fitted_slides, genes, smoothing=False)
    rows = run_data.store.rows_of(record.fitted_slides)
    used = [*record.fitted_slides, *record.test_slides]
    digests = {slide: run_data.digests[slide] for slide in used}
    notes = _absence_notes(run_data.store.named(record.test_slides), genes)
    return Split(
        record=replace(
            record, features=_features(run_data), notes=notes, digests=digests, panel=origin_of_panel(config)
        ),
        genes=genes,
        targets=targets,
        training_mean=torch.stack([targets[rows].mean(dim=0), unsmoothed[rows].mean(dim=0)]),
        gene_lists=_gene_lists(run_data, outer, targets, genes),
    )


def origin_of_panel(config: Config) -> str:
    """Say in a word where `modes.training.run_data.choose_panel` takes the genes from."""
    if config.DATA.genes is not None:
        return "given"
    return "file" if config.EVALUATION.protocol == "paper" else "training patients"


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
        "patch_um": data.patch_um,
        "num_neighbors": data.num_neighbors,
        "tokens": run_data.token_source,
    }


def _gene_lists(run_data: RunData, outer: list[SlideRecord], targets: Tensor, genes: list[str]) -> dict[str, list[str]]:
    rows = run_data.store.rows_of([slide.name for slide in outer])
    lists = {"highly_variable": highly_variable_list(targets[rows].numpy(), genes)}
    if len({slide.patient for slide in outer}) > 1:
        patients = [slide.patient for slide in outer for _ in range(slide.start, slide.stop)]
        slides = [slide.name for slide in outer for _ in range(slide.start, slide.stop)]
        held_out = reference_predictions(run_data.store.target_features, targets, patients, slides, rows)
        lists["highly_predictive"] = highly_predictive_list(held_out, genes)
    return lists


def reference_predictions(
    features: Tensor,
    expression: Tensor,
    patients: Sequence[str],
    slides: Sequence[str],
    rows: Tensor | None = None,
    *,
    components: int = 256,
) -> Iterator[HeldOutPatient]:
    """Predict each training patient from the others, slide by slide, by the reference model of the highly predictive list.

    The reference is a ridge regression with intercept on the first `components` principal components of the target
    feature, under each of REFERENCE_PENALTIES.
    features (R, D), expression (R, G), of which `rows` (N,) are the spots of the training patients (None: all); patients,
    slides: N names. Beside these, memory holds some thousand spots at a time, and a slide.
    Raises ValueError when the features of the other patients are all the same.
    """
    spots = _Spots(features, expression, torch.arange(len(features)) if rows is None else rows)
    total = spots.moments(torch.arange(len(patients)))
    names = np.asarray(slides)
    for held_out in closed_form.inner_folds(patients).held_out:
        ridge = closed_form.Ridge.of(total.without(spots.moments(held_out)), components)
        if len(ridge.components.squares) == 0:
            raise ValueError("the target features are the same for every training spot; extract the features again.")
        alphas = closed_form.alpha_grid(ridge.components, REFERENCE_PENALTIES)
        for slide in sorted(set(names[held_out].tolist())):
            places = held_out[torch.from_numpy(names[held_out] == slide)]
            centred, measured = spots.at(places)
            scores = ridge.components.scores(centred)
            predicted = torch.stack([ridge.deviation(scores, alpha) + ridge.mean for alpha in alphas])
            patient = patients[int(places[0])]
            yield HeldOutPatient(patient, [slide] * len(places), measured.numpy(), predicted.numpy())


@dataclass(frozen=True)
class _Spots:
    """The training spots of the reference model, of which only some are held in float64 at a time."""

    features: Tensor
    expression: Tensor
    rows: Tensor

    @cached_property
    def mean(self) -> Tensor:
        sums = [self.features[rows].double().sum(dim=0) for rows in self.rows.split(SPOTS_AT_ONCE)]
        return torch.stack(sums).sum(dim=0) / len(self.rows)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Features, centred to keep the sums of squares free of cancellation, and expression of the spots at `places`."""
        rows = self.rows[places]
        return self.features[rows].double() - self.mean, self.expression[rows].double()

    def moments(self, places: Tensor) -> closed_form.Moments:
        parts = [closed_form.moments(*self.at(some)) for some in places.split(SPOTS_AT_ONCE)]
        return reduce(closed_form.Moments.joined, parts)
