"""Trained folds applied together to one slide, its spots streaming through all of them."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.batches import SpotBatch
from evaluation.external import (
    MEAN,
)
from models.contract import ExpressionModel, Needs
from modes.prediction.checkpoint import restored_config, restored_model
from modes.training.compose import model_inputs, needs_of, scale_predictions
from utils.checkpoint import fold_checkpoints, load_checkpoint, result_folder
from utils.config import Config
from utils.precision import Precision
from utils.trained_fold import TrainedFold

# Spots that pass the models at a time: their tokens and the activations of the fusion take about 4 MB a spot.
CHUNK_SIZE = 256


@dataclass
class Member:
    """One trained fold without its weights, and while it predicts its model."""

    path: Path
    fold: TrainedFold
    config: Config
    device: torch.device
    precision: Precision
    _model: ExpressionModel | None = None

    @property
    def name(self) -> str:
        return f"fold_{self.fold.split.fold}"

    @property
    def run_name(self) -> str:
        """Name of the run folder, or of the folder that a checkpoint outside any run lies in."""
        folder = self.path.resolve().parent
        return folder.parent.name if folder.name.startswith("fold_") else folder.name

    @property
    def genes(self) -> list[str]:
        return self.fold.genes

    @property
    def needs(self) -> Needs:
        return needs_of(self.config)

    def load(self) -> ExpressionModel:
        """The model with its weights on the device, read from the checkpoint unless it is held."""
        if self._model is None:
            fold = load_checkpoint(self.path, memory_map=True)
            self._model = restored_model(fold, self.path, self.device).eval()
        return self._model

    def release(self) -> None:
        """Let the model go; the next `load` reads it again."""
        self._model = None


def load_members(checkpoints: Sequence[Path], overrides: Sequence[str], device: torch.device) -> list[Member]:
    """The folds of checkpoints (`utils.checkpoint.chosen_checkpoints`), no model of them loaded yet.

    Raises ValueError if they cannot work on the same features.
    """
    members = []
    for checkpoint in checkpoints:
        fold = load_checkpoint(checkpoint, memory_map=True).without_weights()
        config = restored_config(fold, checkpoint, overrides)
        members.append(Member(checkpoint, fold, config, device, Precision(config.TRAINING.precision, device)))
    _check_alike(members)
    return members


def _check_alike(members: Sequence[Member]) -> None:
    def what_it_reads(member: Member) -> dict[str, object]:
        encoder, data = member.fold.encoder, member.config.DATA
        return {
            "encoder": (encoder.name, encoder.sha256, encoder.token_pool),
            "patch size": data.patch_size,
            "number of neighbors": data.num_neighbors,
            "data set": data.type,
        }

    first = what_it_reads(members[0])
    for member in members[1:]:
        differences = [
            f"{name} {value} instead of {first[name]}"
            for name, value in what_it_reads(member).items()
            if value != first[name]
        ]
        if differences:
            raise ValueError(
                f"{member.path} and {members[0].path} cannot be averaged: {'; '.join(differences)}. Give one of them with "
                "--model_path."
            )


def run_folder(members: Sequence[Member], model_path: str | Path, fold: int | None) -> Path:
    """Where results go: the run folder where all of its folds are meant, a fold's own folder where one was asked for."""
    of_all = fold is None and Path(model_path).is_dir() and fold_checkpoints(model_path)
    return Path(model_path) if of_all else result_folder(members[0].path)


def shared_genes(members: Sequence[Member]) -> list[str]:
    """Genes that every fold predicts, in the order of the first (the clean protocol gives each fold its own panel)."""
    shared = set.intersection(*(set(member.genes) for member in members))
    genes = [gene for gene in members[0].genes if gene in shared]
    if not genes:
        raise ValueError(
            f"The panels of {len(members)} folds share no gene, so their predictions have no mean. Choose one with --fold."
        )
    return genes


def columns_of(member: Member, genes: Sequence[str]) -> np.ndarray:
    """(G,) places of the genes in the fold's panel."""
    place = {gene: index for index, gene in enumerate(member.genes)}
    return np.array([place[gene] for gene in genes], dtype=np.int64)


@torch.inference_mode()
def stream_predictions(
    members: Sequence[Member], features: Tensor, grid_xy: Tensor, batches: Iterable[SpotBatch]
) -> Iterator[tuple[slice, list[dict[str, np.ndarray]]]]:
    """Yield (rows, [{scale: (b, panel) float32} of each fold]) for the batches, which hold consecutive spots.

    features (N, D), grid_xy (N, 2): all spots of the slide, for the global encoders. The features of a batch are made
    once and pass every fold; what is held is one batch, the folds' models, and one global token a spot and fold.
    """
    models = [member.load() for member in members]
    global_tokens = [_global_tokens(member, features, grid_xy) for member in members]
    for batch in batches:
        rows = slice(int(batch.rows[0]), int(batch.rows[-1]) + 1)
        assert rows.stop - rows.start == len(batch), "spots of a batch are consecutive"
        found = []
        for member, model, tokens in zip(members, models, global_tokens):
            inputs = model_inputs(batch, lambda batch: batch.target_tokens, None if tokens is None else tokens[rows])
            with member.precision.autocast():
                prediction = model(inputs)
            found.append({scale: values.numpy() for scale, values in scale_predictions(prediction).items()})
        yield rows, found


def _global_tokens(member: Member, features: Tensor, grid_xy: Tensor) -> Tensor | None:
    if not member.needs.slides:
        return None
    with member.precision.autocast():
        return member.load().encode_slides(features, grid_xy, [len(features)], None)


def put_rows(whole: dict[str, np.ndarray], rows: slice, values: dict[str, np.ndarray], num_spots: int) -> None:
    """Put the predictions (b, G) of consecutive spots into those of the whole slide (num_spots, G), made on first use."""
    for scale, part in values.items():
        if scale not in whole:
            whole[scale] = np.full((num_spots, part.shape[1]), np.nan, dtype=np.float32)
        whole[scale][rows] = part


def mean_prediction(predictions: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over the folds of each scale, (b, G) float32."""
    return {scale: np.mean([prediction[scale] for prediction in predictions], axis=0) for scale in predictions[0]}


def field_of_view_of(members: Sequence[Member]) -> float | None:
    """Mean width of a training patch in micrometres; None where no fold knows it."""
    known = [size for member in members if (size := member.fold.field_of_view_um) is not None]
    return float(np.mean(known)) if known else None


def peak_memory() -> dict[str, float]:
    """Greatest memory of this process so far, in GB: of the host and, if there is one, of the CUDA device."""
    peak = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}  # KiB on Linux
    if torch.cuda.is_available():
        peak["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return peak


def describe_peak(peak: dict[str, float]) -> str:
    device = f", {peak['device_gb']:.2f} GB of the device" if "device_gb" in peak else ""
    return f"Peak memory: {peak['host_gb']:.2f} GB of the host{device}."


def provenance_of(members: Sequence[Member], notes: Sequence[str]) -> dict[str, object]:
    """Which models made a prediction. notes: on folds that were left out, or taken although they are not finished."""
    made = members[0].fold.encoder
    return {
        **({"folds": " ".join(notes)} if notes else {}),
        "checkpoints": [f"{member.path.parent.name}/{member.path.name}" for member in members],
        "epochs": [int(member.fold.epoch) for member in members],
        "prediction": MEAN if len(members) > 1 else members[0].name,
        "training_type": members[0].config.DATA.type,
        "protocol": members[0].fold.split.protocol,
        "encoder": made.name,
        "encoder_sha256": made.sha256,
        "patch_size": members[0].config.DATA.patch_size,
        "smoothing": "mean over the 3x3 array neighborhood",
        "log_base": 10,
    }
