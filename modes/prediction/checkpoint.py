"""A trained fold on its test slides: predictions, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.spots import SlideRecord
from datasets.targets import slide_targets
from evaluation.fold_files import write_fold
from evaluation.predictions import write_prediction
from evaluation.protocol import score_fold
from evaluation.slide_scores import SlideResult
from models.contract import ExpressionModel
from modes.training.compose import make_model, make_predict
from modes.training.run_data import RunData
from utils.checkpoint import load_checkpoint, load_weights
from utils.cli import progress
from utils.config import Config, differences, with_overrides
from utils.text import UNIT
from utils.trained_fold import TrainedFold

THUMBNAIL_PX = 2000


def score_checkpoint(run_data: RunData, checkpoint: Path, folder: Path) -> dict:
    """Evaluate a checkpoint on the test slides of its fold and write everything into `folder`; returns the summary.

    result.json is written last: its presence means that the fold is complete.
    """
    fold = load_checkpoint(checkpoint)
    check_same_patch_encoder(fold, run_data, checkpoint)
    records = run_data.store.named(fold.split.test_slides)
    predict = restored_predict(run_data, fold, checkpoint)
    shown = progress(records, description="test slides", unit="slide", leave=False)
    predictions = [predict(run_data.maker.slide(record)) for record in shown]
    is_clean = fold.split.protocol == "clean"
    results = [
        slide_result(record, fold.genes, prediction, absent_is_zero=is_clean)
        for record, prediction in zip(records, predictions)
    ]
    provenance = provenance_of(fold, checkpoint)
    for record, result in zip(records, results):
        write_slide(run_data.layout, record, result, folder / "predictions" / f"{record.name}.h5ad", provenance)
    smoothed, unsmoothed = fold.training_mean.numpy()
    scores = score_fold(
        results,
        training_mean=smoothed,
        training_mean_unsmoothed=unsmoothed,
        gene_lists=fold.gene_lists,
        protocol=fold.split.protocol,
    )
    write_fold(scores, folder, extra={"epoch": fold.epoch or None, "unit": UNIT})
    return scores.summary


def restored_predict(run_data: RunData, fold: TrainedFold, checkpoint: Path):
    """`predict(slide)` with the weights of a checkpoint."""
    model = restored_model(fold, checkpoint, run_data.device)
    return make_predict(model, run_data.config, run_data.encode, run_data.precision)


def restored_model(fold: TrainedFold, checkpoint: Path, device: torch.device) -> ExpressionModel:
    """The model of a checkpoint with its weights."""
    model = make_model(
        fold.config,
        feature_dim=fold.encoder.dim,
        token_dim=fold.encoder.token_dim,
        num_genes=len(fold.genes),
    ).to(device)
    load_weights(model, fold.weights, checkpoint)
    return model


def check_same_patch_encoder(fold: TrainedFold, run_data: RunData, checkpoint: Path) -> None:
    """A checkpoint refuses features of another encoder, and tokens that are pooled otherwise than those of its training."""
    made, found, pool = fold.encoder, run_data.store.encoder, fold.encoder.token_pool
    if pool != run_data.token_pool:
        raise ValueError(
            f"{checkpoint} was trained on tokens pooled by {pool}, those at hand are pooled by {run_data.token_pool} "
            f"({run_data.token_source['source']}). Make token caches of the training's kind: extract again with --token_pool "
            f"{pool} --overwrite, and leave DATA.tokens=online out."
        )
    if made.name != found.name or not made.has_weights(found.sha256):
        raise ValueError(
            f"{checkpoint} was trained on features of {made.name} (weights {made.sha256[:12]}...), the features in "
            f"{run_data.layout.root} are of {found.name} ({found.sha256[:12]}...). Extract those of the checkpoint's encoder, "
            f"with its weights: {run_data.layout.repair('all', None, made.name, overwrite=True)}"
        )


def slide_result(
    record: SlideRecord, genes: list[str], prediction: dict[str, Tensor], *, absent_is_zero: bool
) -> SlideResult:
    """The predictions of a slide beside what was measured. absent_is_zero: as for `slide_targets`."""
    return SlideResult(
        slide=record.name,
        patient=record.patient,
        spot_ids=list(record.table.obs_names),
        grid_xy=record.table.obsm["grid"],
        genes=genes,
        measured=slide_targets(record.table, genes, absent_is_zero=absent_is_zero),
        measured_unsmoothed=slide_targets(record.table, genes, smoothing=False, absent_is_zero=absent_is_zero),
        predictions={scale: values.numpy() for scale, values in prediction.items()},
    )


def write_slide(
    layout: Layout, record: SlideRecord, result: SlideResult, path: Path, provenance: dict[str, object]
) -> None:
    """The prediction `.h5ad` of one measured slide, with a down-scaled image where the image is at hand."""
    image, scale = thumbnail(record)
    write_prediction(
        path,
        slide=record.name,
        spot_ids=result.spot_ids,
        genes=result.genes,
        predictions=result.predictions,
        spatial_px=record.table.obsm["spatial"],
        grid_xy=record.table.obsm["grid"],
        measured=result.measured,
        measured_unsmoothed=result.measured_unsmoothed,
        image=image,
        image_scale=scale,
        spot_diameter_px=spot_diameter(record.table.obsm["spatial"], layout.patch_size),
        unit=UNIT,
        provenance=provenance,
    )


def provenance_of(fold: TrainedFold, checkpoint: Path) -> dict[str, object]:
    """Which checkpoint made a prediction, and in what unit."""
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


def thumbnail(record: SlideRecord) -> tuple[np.ndarray | None, float]:
    """Scale the slide's image down: (image, its pixels per full-resolution pixel); (None, 1) where there is none.

    Raises ValueError where the image cannot be decoded.
    """
    if record.image is None:
        return None, 1.0
    with open_slide(record.image) as slide:
        return slide.thumbnail(THUMBNAIL_PX)


def spot_diameter(spatial_px: np.ndarray, patch_size: int) -> float:
    """Half the usual distance to the nearest spot, in full-resolution px: the ST arrays' 100 um spots on a 200 um pitch."""
    if len(spatial_px) < 2:
        return float(patch_size)
    from scipy.spatial import KDTree

    nearest = KDTree(spatial_px).query(spatial_px, k=2)[0][:, 1]
    return float(np.median(nearest)) / 2


# What a test may set differently from the training; everything else is part of the trained model.
FREE_KEYS = (
    "GENERAL.log_path",
    "GENERAL.exp_id",
    "DATA.data_dir",
    "DATA.weights",
    "DATA.tokens",
    "DATA.residence",
    "DATA.num_workers",
    "TRAINING.precision",
    "EVALUATION.chunk_size",
)


def restored_config(fold: TrainedFold, checkpoint: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a checkpoint with what this machine does differently (paths, memory, precision)."""
    config = with_overrides(fold.config, overrides)
    changed = [line for line in differences(fold.config, config) if line.split(":")[0] not in FREE_KEYS]
    if changed:
        listed = "\n  ".join(changed)
        raise ValueError(
            f"{checkpoint} was trained with other settings, which cannot be changed afterwards:\n  {listed}\n"
            f"Free are: {', '.join(FREE_KEYS)}."
        )
    return config
