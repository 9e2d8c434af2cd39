"""Put model, data and frozen patch encoder together: what a run reads, how a batch passes the model, what optimises it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.batches import SpotBatch
from datasets.known_sets import get_spec
from datasets.layout import Layout
from models.contract import ExpressionModel, Prediction
from models.patch_encoders.build import PatchEncoder, build_patch_encoder, find_weights
from models.table import find_model
from modes.prediction.slide import Encode, model_inputs
from utils.commands import extraction_command
from utils.config import Config
from utils.devices import Precision
from utils.trained_fold import OptimizationState


def open_layout(config: Config, config_name: str, test_name: str | None = None) -> Layout:
    """Find the data folder that the configuration names; with `test_name` the external set below it.

    config_name: of its file, for the commands in messages.  Raises ValueError for a data set that is not known.
    """
    spec = get_spec(test_name or config.DATA.type, config.DATA.data_dir)
    return Layout(
        config.DATA.data_dir,
        spec,
        test_name=test_name,
        patch_size=config.DATA.patch_size,
        num_neighbors=config.DATA.num_neighbors,
        encoder=config.DATA.encoder,
        patch_um=config.DATA.patch_um,
        extraction=partial(extraction_command, config_name=config_name),
    )


def is_closed_form(config: Config) -> bool:
    """Tell whether the configured model is fitted once, without epochs. Raises ValueError for an unknown name."""
    return find_model(config.MODEL.name).loss is None


def groups_spots(config: Config) -> bool:
    """Tell whether the training groups the spots of each batch into LOSS.k clusters."""
    return find_model(config.MODEL.name).groups_spots and config.LOSS.group_weight != 0


def find_patch_encoder_weights(config: Config) -> Path:
    """Find the file of the patch encoder's weights; FileNotFoundError says how to get it. Reads nothing."""
    return find_weights(config.DATA.encoder, config.DATA.weights)


def make_patch_encoder(config: Config, device: torch.device) -> PatchEncoder:
    """Build the frozen patch encoder, on the device."""
    return build_patch_encoder(config.DATA.encoder, config.DATA.weights).to(device)


def make_encode(encoder: nn.Module | None) -> Encode:
    """Make the function batch -> target tokens (B, T, D): those of the cache, or of the frozen encoder on turned patches."""

    def encode(batch: SpotBatch) -> Tensor | None:
        if batch.target_tokens is not None or batch.patches is None:
            return batch.target_tokens
        assert encoder is not None, "patches without an encoder"
        with torch.no_grad():
            return encoder(batch.patches).tokens

    return encode


def forward(model: ExpressionModel, encode: Encode, batch: SpotBatch) -> Prediction:
    """Run the model on a training batch: its slides through the global encoder, then its spots."""
    global_tokens = None
    if model.needs.slides:
        assert batch.slide_features is not None and batch.grid_xy is not None, "training batches hold their slides"
        global_tokens = model.encode_slides(batch.slide_features, batch.grid_xy, list(batch.lengths), batch.slide_rows)
    return model(model_inputs(batch, encode(batch), global_tokens), batch.expression)


@dataclass
class Optimization:
    """Adam and its schedule, with everything of them that a checkpoint holds."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    precision: Precision

    @classmethod
    def of(cls, model: nn.Module, config: Config, precision: Precision) -> Optimization:
        """Start Adam and its schedule for the parameters of a model."""
        training = config.TRAINING
        # Fused: the same update in one pass over the weights.
        fused = precision.device.type in ("cpu", "cuda")
        optimizer: torch.optim.Optimizer
        if training.weight_decay:
            # Matrices alone: a bias that decays would pull the predictions away from the mean of the targets.
            parameters = list(model.parameters())
            decays = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay}
            stays = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
            optimizer = torch.optim.AdamW([decays, stays], lr=training.learning_rate, fused=fused)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=fused)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, training.lr_step_epochs, gamma=training.lr_decay)
        return cls(optimizer, scheduler, precision)

    def state(self) -> OptimizationState:
        """Give what a checkpoint holds, by reference."""
        return OptimizationState(
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.precision.scaler.state_dict(),
        )

    def load_state(self, state: OptimizationState) -> None:
        """Take over what a checkpoint held."""
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        if state.scaler and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state.scaler)
