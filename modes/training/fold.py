"""What a fold begins with: its folder, its model, what its checkpoints say; and the fit of a model without epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from datasets.field_of_view import field_of_view
from datasets.novelty import sample_training_spots
from models.baselines.fitted_model import ClosedForm
from models.contract import ExpressionModel, ModelInputs
from modes.prediction.model import make_model
from modes.prediction.slide import model_inputs
from modes.training.checkpoints import FoldCheckpoints
from modes.training.compose import is_closed_form
from modes.training.run_data import RunData
from modes.training.split import Split
from utils.files import write_text
from utils.locks import sweep
from utils.runs import generator_for, seed_everything, write_epochs, write_json
from utils.trained_fold import PatchEncoderRecord, Progress, TrainedFold, TrainingSample


def start_folder(folder: Path, run_data: RunData, split: Split, notices: Sequence[str]) -> None:
    """Write the split and the panel before the first epoch, so that they stand beside whatever comes; the fold is locked.

    notices: sentences about what was left out, for the summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # scores of an earlier epoch
    # What a kill in the middle of a save has left.
    for place in (folder, folder / "figures", folder / "predictions"):
        sweep(place, is_locked=True)
    more = {"model": run_data.config.MODEL.name, "tokens": run_data.token_source, "run_notes": list(notices)}
    write_json(folder / "split.json", {**split.record.to_dict(), **more})
    write_text(folder / "genes.txt", "\n".join(split.genes) + "\n")


def untrained_fold(run_data: RunData, split: Split) -> TrainedFold:
    """Describe the fold as its checkpoints will; weights and progress are still to come."""
    slides = run_data.store.named(split.record.train_slides)
    pixels = {slide.name: slide.table.obsm["spatial"] for slide in slides}
    covered = {slide.name: slide.covered_px for slide in slides}
    return TrainedFold(
        weights={},
        epoch=0,
        progress=Progress(),
        config=run_data.config,
        config_name=run_data.config_name,
        genes=split.genes,
        encoder=PatchEncoderRecord(
            **asdict(run_data.store.encoder),
            dim=run_data.store.target_features.shape[1],
            token_dim=run_data.token_dim,
            token_pool=run_data.token_pool,
        ),
        split=split.record,
        training_mean=split.training_mean,
        gene_lists=split.gene_lists,
        field_of_view_um=field_of_view(run_data.layout, pixels, covered),
        sample=_sample(run_data, split),
    )


def _sample(run_data: RunData, split: Split) -> TrainingSample:
    """Training spots against which a prediction says how unusual a new spot is."""
    store, record = run_data.store, split.record
    slides = [slide for slide in store.named(record.train_slides) for _ in range(slide.start, slide.stop)]
    return sample_training_spots(
        store.target_features,
        patients=[slide.patient for slide in slides],
        slides=[slide.name for slide in slides],
        generator=generator_for(run_data.config.GENERAL.seed, record.fold, "training sample"),
        of_training=store.rows_of(record.train_slides),
    )


def new_model(run_data: RunData, split: Split) -> ExpressionModel:
    """Build the model on the device: initial weights drawn from (seed, fold), inputs standardised by the training spots."""
    seed_everything(run_data.config.GENERAL.seed, split.record.fold, "weights")
    model = make_model(
        run_data.config,
        feature_dim=run_data.store.target_features.shape[1],
        token_dim=run_data.token_dim,
        num_genes=len(split.genes),
    )
    slides, rows = run_data.store.named(split.record.train_slides), run_data.store.rows_of(split.record.train_slides)
    model.standardise_inputs(run_data.store.target_features[slide.start : slide.stop] for slide in slides)
    if run_data.config.TRAINING.start_at_mean and not is_closed_form(run_data.config):
        model.start_at_mean(split.targets[rows].mean(dim=0))
    return model.to(run_data.device)


def remember_training_spots(model: ExpressionModel, run_data: RunData, split: Split, expression: Tensor) -> None:
    """Hand the training spots to a model that predicts by looking them up, as its present weights see them.

    expression: (R, G) targets on the device, as for the batches.
    """
    rows = run_data.store.rows_of(split.record.train_slides)
    batch = run_data.maker.spots(rows, torch.zeros_like(rows), expression, with_slides=False)
    assert batch.expression is not None
    model.eval().remember(model_inputs(batch, run_data.encode(batch), None), batch.expression)


def fit_closed_form(run_data: RunData, split: Split, folder: Path) -> None:
    """Fit a baseline without a loop: once, on the outer training spots, tuned on inner patients by itself."""
    model, store = new_model(run_data, split), run_data.store
    slides = store.named(split.record.fitted_slides)
    slide_of_spot = [slide for slide in slides for _ in range(slide.start, slide.stop)]
    assert isinstance(model, ClosedForm)
    inputs = (
        ModelInputs(
            target_features=store.target_features[slide.rows],
            neighbor_features=store.neighbors_of(slide.rows),
            neighbor_is_valid=store.neighbor_is_valid[slide.rows],
        )
        for slide in slides
    )
    report = model.fit(
        inputs,
        split.targets[store.rows_of(split.record.fitted_slides)],
        patients=[slide.patient for slide in slide_of_spot],
        slides=[slide.name for slide in slide_of_spot],
    )
    write_json(folder / "fit.json", report)
    write_epochs(folder / "metrics.jsonl", [])
    FoldCheckpoints(folder, untrained_fold(run_data, split), 0.0).write_best(
        model.state_dict(), Progress(), finished=True
    )
