"""A trained fold on its test slides: predictions and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.spots import SlideRecord
from datasets.targets import slide_targets
from evaluation.fold_files import write_fold
from evaluation.protocol import score_fold
from models.contract import ExpressionModel
from modes.prediction.model import restored_model
from modes.prediction.slide import Scales, predict_slide, slide_result
from modes.prediction.write import write_slide
from modes.training.run_data import RunData
from utils.checkpoint import load_checkpoint
from utils.cli import progress
from utils.text import UNIT
from utils.trained_fold import TrainedFold


def score_checkpoint(run_data: RunData, checkpoint: Path, folder: Path, targets: Tensor) -> dict[str, Any]:
    """Evaluate a checkpoint on the test slides of its fold and write everything into `folder`; returns the summary.

    targets (R, G): the smoothed targets of the test slides at their rows of the store, for the genes of the checkpoint.
    result.json is written last: its presence means that the fold is complete.
    Raises ValueError for features of another patch encoder than those of the training.
    """
    fold = load_checkpoint(checkpoint)
    check_same_patch_encoder(fold, run_data, checkpoint)
    predict = partial(predict_record, run_data, restored_model(fold, checkpoint, run_data.device))
    return score_slides(run_data, fold, predict, folder, targets, provenance_of(fold, checkpoint))


def predict_record(run_data: RunData, model: ExpressionModel, record: SlideRecord) -> Scales:
    """Predict a slide of the store by one model: {scale: (N, G) float32}."""
    (prediction,) = predict_slide(
        [model],
        run_data.maker.slide(record),
        run_data.precision,
        chunk_size=run_data.config.EVALUATION.chunk_size,
        encode=run_data.encode,
    )
    return prediction


def score_slides(
    run_data: RunData,
    fold: TrainedFold,
    predict: Callable[[SlideRecord], Scales],
    folder: Path,
    targets: Tensor,
    provenance: Mapping[str, object],
) -> dict[str, Any]:
    """Score what `predict` gives for the test slides of a fold and write it into `folder`; see `score_checkpoint`.

    provenance: which models predict, for the prediction files.
    """
    is_clean = fold.split.protocol == "clean"
    results = []
    records = run_data.store.named(fold.split.test_slides)
    for record in progress(records, description="test slides", unit="slide", leave=False):
        unsmoothed = slide_targets(record.table, fold.genes, smoothing=False, absent_is_zero=is_clean)
        smoothed = targets[record.start : record.stop].numpy()
        results.append(slide_result(record, fold.genes, predict(record), smoothed, unsmoothed))
        path = folder / "predictions" / f"{record.name}.h5ad"
        write_slide(path, record, results[-1], patch_size=run_data.layout.patch_size, provenance=provenance)
    smoothed_mean, unsmoothed_mean = fold.training_mean.numpy()
    scores = score_fold(
        results,
        training_mean=smoothed_mean,
        training_mean_unsmoothed=unsmoothed_mean,
        gene_lists=fold.gene_lists,
        protocol=fold.split.protocol,
    )
    write_fold(scores, folder, extra={"epoch": fold.epoch or None, "unit": UNIT})
    return scores.summary


def check_same_patch_encoder(fold: TrainedFold, run_data: RunData, checkpoint: Path) -> None:
    """Refuse, by ValueError, features of another patch encoder and tokens pooled otherwise than those of the training."""
    made, found, pool = fold.encoder, run_data.store.encoder, fold.encoder.token_pool
    if pool != run_data.token_pool:
        raise ValueError(
            f"{checkpoint} was trained on tokens pooled by {pool}, those at hand are pooled by {run_data.token_pool} "
            f"({run_data.token_source['source']}). Make token caches of the training's kind: keep those that are there "
            f"elsewhere, extract with --token_pool {pool}, and leave DATA.tokens=online out."
        )
    if made.name != found.name or not made.has_weights(found.sha256):
        raise ValueError(
            f"{checkpoint} was trained on features of {made.name} (weights {made.sha256[:12]}...), the features in "
            f"{run_data.layout.root} are of {found.name} ({found.sha256[:12]}...). Keep those there "
            "elsewhere, and extract those of the checkpoint's encoder with its weights: "
            + run_data.layout.repair("all", None, made.name)
        )


def provenance_of(fold: TrainedFold, checkpoint: Path) -> dict[str, object]:
    """Say which checkpoint made a prediction, and in what unit."""
    return {
        "checkpoint": checkpoint.name,
        "encoder": fold.encoder.name,
        "encoder_sha256": fold.encoder.sha256,
        "fold": fold.split.fold,
        "protocol": fold.split.protocol,
        "epoch": fold.epoch,
        "smoothing": "mean over the 3x3 array neighborhood",
        "log_base": 10,
    }
