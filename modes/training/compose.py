"""Model, loss, data and frozen encoder put together: the closures that the engine calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.batches import SlideBatch, SpotBatch
from datasets.known_sets import get_spec
from datasets.layout import Layout
from engine import Precision, Step
from models import build_loss, build_model
from models.baselines.build import CLOSED_FORMS, build_baseline_loss
from models.patch_encoders.build import build_patch_encoder, find_weights
from utils.config import Config

SCALES = {"fused": "fused", "target": "target", "neighbor": "neighbor", "global": "global_"}
WEIGHT_FOLDERS = (Path(__file__).resolve().parents[2] / "weights", Path("weights"))
Encode = Callable[[SpotBatch], Tensor | None]


def open_layout(config: Config, test_name: str | None = None) -> Layout:
    """The data folder that the configuration names; with `test_name` the external set below it."""
    spec = get_spec(test_name or config.DATA.type, config.DATA.data_dir)
    return Layout(
        config.DATA.data_dir,
        spec,
        test_name=test_name,
        patch_size=config.DATA.patch_size,
        num_neighbors=config.DATA.num_neighbors,
    )


@dataclass(frozen=True)
class Needs:
    """Which inputs a model reads, so that nothing else is loaded."""

    tokens: bool
    neighbors: bool
    slides: bool


def needs_of(config: Config) -> Needs:
    """The inputs of the configured model."""
    reads_scales = config.MODEL.name in ("gene_dml", "triplex")
    return Needs(
        tokens=reads_scales,
        neighbors=config.MODEL.use_neighbor and (reads_scales or config.MODEL.name == "ridge_neighbor"),
        slides=config.MODEL.use_global and reads_scales,
    )


def is_closed_form(config: Config) -> bool:
    """Whether the configured model is fitted once, without epochs."""
    return config.MODEL.name in CLOSED_FORMS


def find_patch_encoder_weights(config: Config) -> Path:
    """The file of the encoder's weights; FileNotFoundError says how to get it. Reads nothing."""
    return find_weights(config.DATA.encoder, config.DATA.weights, search=WEIGHT_FOLDERS)


def make_patch_encoder(config: Config, device: torch.device) -> nn.Module:
    """The frozen patch encoder, on the device."""
    return build_patch_encoder(config.DATA.encoder, config.DATA.weights, search=WEIGHT_FOLDERS).to(device)


def make_encode(encoder: nn.Module | None) -> Encode:
    """batch -> target tokens (B, T, D): those of the cache, or the frozen encoder on the batch's turned patches."""

    def encode(batch: SpotBatch) -> Tensor | None:
        if batch.target_tokens is not None or batch.patches is None:
            return batch.target_tokens
        assert encoder is not None, "patches without an encoder"
        with torch.no_grad():
            return encoder(batch.patches).tokens

    return encode


def make_model(config: Config, *, feature_dim: int, token_dim: int, num_genes: int) -> nn.Module:
    """The model of the configuration for features of `feature_dim` and target tokens of `token_dim`."""
    return build_model(
        config.MODEL,
        feature_dim=token_dim,
        pooled_dim=feature_dim,
        num_genes=num_genes,
        num_neighbors=config.DATA.num_neighbors,
    )


def make_step(model: nn.Module, config: Config, encode: Encode) -> Step:
    """The training step: batch -> named loss terms."""
    needs = needs_of(config)
    if config.MODEL.name == "gene_dml":
        loss = build_loss(config.LOSS)
    else:
        loss = build_baseline_loss(config.MODEL.name)

    def step(batch: SpotBatch) -> dict[str, Tensor]:
        return loss(_forward(model, needs, encode, batch), batch.expression)

    return step


def make_predict(
    model: nn.Module, config: Config, encode: Encode, precision: Precision
) -> Callable[[SlideBatch], dict[str, Tensor]]:
    """slide -> {scale: (N, G) float32 on the CPU}: the global encoder over the whole slide, the rest in chunks."""
    needs = needs_of(config)

    def predict(slide: SlideBatch) -> dict[str, Tensor]:
        model.eval()
        with torch.inference_mode(), precision.autocast():
            global_tokens = None
            if needs.slides:
                global_tokens = model.encode_slides(slide.slide_features, slide.grid_xy, [len(slide)], None)
            parts, start = [], 0
            for batch in slide.chunks(config.EVALUATION.chunk_size):
                chunk = None if global_tokens is None else global_tokens[start : start + len(batch)]
                parts.append(scale_predictions(model(**model_inputs(batch, encode), global_tokens=chunk)))
                start += len(batch)
        return {scale: torch.cat([part[scale] for part in parts]) for scale in parts[0]}

    return predict


def batch_clusters(model: nn.Module, config: Config, encode: Encode, batch: SpotBatch) -> tuple[Tensor, Tensor]:
    """(B,) clusters of a batch by its fused and by its gene vectors, as the instance-group loss forms them."""
    prediction = _forward(model, needs_of(config), encode, batch)
    loss = build_loss(config.LOSS)
    embeddings = prediction.embeddings
    return loss.cluster(embeddings.fused_cluster).labels.cpu(), loss.cluster(embeddings.gene_cluster).labels.cpu()


def _forward(model: nn.Module, needs: Needs, encode: Encode, batch: SpotBatch):
    """The model on a training batch: its slides through the global encoder, then its spots."""
    global_tokens = None
    if needs.slides:
        global_tokens = model.encode_slides(batch.slide_features, batch.grid_xy, batch.lengths, batch.slide_rows)
    return model(**model_inputs(batch, encode), global_tokens=global_tokens, expression=batch.expression)


def model_inputs(batch: SpotBatch, encode: Encode) -> dict[str, Tensor | None]:
    """What every model is called with, beside the global tokens."""
    return {
        "target_tokens": encode(batch),
        "target_features": batch.target_features,
        "neighbor_features": batch.neighbor_features,
        "neighbor_is_valid": batch.neighbor_is_valid,
    }


def scale_predictions(prediction: object) -> dict[str, Tensor]:
    """{scale: (B, G) float32 on the CPU} of the scales that the model has."""
    found = {scale: getattr(prediction, name) for scale, name in SCALES.items()}
    return {scale: value.float().cpu() for scale, value in found.items() if value is not None}


@dataclass
class Optimization:
    """Adam and its schedule, with everything of them that a checkpoint holds."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    precision: Precision

    @classmethod
    def of(cls, model: nn.Module, config: Config, precision: Precision) -> Optimization:
        training = config.TRAINING
        # Fused: the same update in one pass over the weights.
        fused = precision.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=fused)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, training.lr_step_epochs, gamma=training.lr_decay)
        return cls(optimizer, scheduler, precision)

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state["scaler"])
