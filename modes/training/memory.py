"""The memory that a training will take, from sizes alone: for the doctor, and for what stays free on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from datasets.features.cache import opened
from datasets.features.places import find_cache
from datasets.layout import Layout
from models.patch_encoders.build import PatchEncoderSpec
from modes.prediction.model import has_pooled_target, make_model, needs_of
from modes.training.compose import find_patch_encoder_weights
from utils.config import Config

FLOAT = 4  # bytes
# What a layer keeps for the backward pass, in widths of its token (inputs and outputs of its norms, q, k, v, attention,
# dropout) and in widths of its hidden layer (before and after GELU, dropout). A test compares with what autograd keeps.
KEPT_WIDTHS, KEPT_HIDDEN = 10, 3
BACKWARD_SHARE = 1.3  # of what is kept: with the temporaries of the backward pass
BATCHES_ON_DEVICE = 5  # one in the step, two made ahead, one being made, one not yet freed


@dataclass(frozen=True)
class Demand:
    """Bytes that a run will hold, roughly."""

    features: int
    patches: int  # where the encoder runs
    encoder: int
    model: int  # weights, gradients, Adam's two moments, and the best weights so far
    batch: int  # activations of a training step
    inputs: int = 0  # of one batch: tokens, neighbors, patches
    neighbors: int = 0  # of the features, those that are read from their files where they do not fit

    @property
    def on_device(self) -> int:
        """What must find room on a GPU whatever else is held there: encoder, model, step, and batches under way."""
        return round(self.encoder + self.model + BACKWARD_SHARE * self.batch + BATCHES_ON_DEVICE * self.inputs)

    def on_host(self, device: torch.device) -> int:
        """What the host must hold beside the neighbor features, which stay in their files where they find no room."""
        return self.features - self.neighbors + self.patches + (0 if device.type == "cuda" else self.on_device)

    @property
    def total(self) -> int:
        """All of it, where one memory holds everything."""
        return self.features + self.patches + self.encoder + self.model + self.batch


def demand(
    config: Config,
    spec: PatchEncoderSpec,
    spots: int,
    slide_sizes: Sequence[int],
    online: bool,
    half: bool,
    num_tokens: int | None = None,
) -> Demand:
    """Estimate what the run will hold, from sizes alone: the model is built without memory.

    half: activations in 16 bits.  slide_sizes: number of spots of each slide.  num_tokens: of a target patch (default:
    all that the encoder gives).
    """
    needs, data, tiles = needs_of(config), config.DATA, config.DATA.num_neighbors**2
    if is_pooled := has_pooled_target(config):
        spec, num_tokens = replace(spec, dim=spec.pooled_dim), 1
    with torch.device("meta"):
        model = make_model(config, feature_dim=spec.pooled_dim, token_dim=spec.dim, num_genes=data.num_genes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = inputs = 0
    if needs.tokens or is_pooled:
        tokens = num_tokens or spec.num_tokens(data.patch_size)
        batch = activations(config, spec, tokens, slide_sizes) * (FLOAT // 2 if half else FLOAT)
        of_spot = data.patch_size**2 * 3 if online else tokens * spec.dim * FLOAT // 2
        of_spot += tiles * spec.pooled_dim * FLOAT * needs.neighbors
        inputs = min(config.TRAINING.batch_size, spots) * of_spot
    return Demand(
        features=spots * spec.pooled_dim * (1 + tiles * needs.neighbors) * FLOAT,
        neighbors=spots * spec.pooled_dim * tiles * needs.neighbors * FLOAT,
        patches=spots * data.patch_size**2 * 3 if online else 0,
        encoder=_encoder_bytes(config) if online else 0,
        model=parameters * FLOAT * 5,
        batch=batch,
        inputs=inputs,
    )


def tokens_of_spot(layout: Layout, slides: Sequence[str], spec: PatchEncoderSpec) -> int:
    """Tokens of a target patch: as the token cache holds them, or of the encoder where there is none."""
    for path in (find_cache(layout, "token", slide) for slide in slides):
        if path.is_file():
            with opened(path) as cache:
                return int(cache.numbers.shape[-2])
    return spec.num_tokens(layout.patch_size)


def activations(config: Config, spec: PatchEncoderSpec, num_tokens: int, slide_sizes: Sequence[int]) -> int:
    """Numbers kept for the backward pass of one batch: fusion, neighbor encoder, and the slides that the batch touches."""
    model, size = config.MODEL, min(config.TRAINING.batch_size, sum(slide_sizes))
    tiles, width = config.DATA.num_neighbors**2 * model.use_neighbor, model.projection_dim
    fused_tokens = num_tokens + tiles + model.use_global
    fusion = fused_tokens * (KEPT_WIDTHS * width + 2 * KEPT_HIDDEN * model.fusion_mlp_dim) + num_tokens * spec.dim
    neighbor = tiles * model.neighbor_depth * (KEPT_WIDTHS + KEPT_HIDDEN * model.neighbor_mlp_ratio) * spec.pooled_dim
    slides = sorted(slide_sizes, reverse=True)[: config.TRAINING.slides_per_batch or size]
    context = sum(slides) * model.global_depth * (KEPT_WIDTHS + KEPT_HIDDEN * model.global_mlp_ratio) * spec.pooled_dim
    return round(size * (fusion + neighbor) + context * model.use_global)


def _encoder_bytes(config: Config) -> int:
    """Size of the weight file; 0 where there is none, which is a finding of its own."""
    try:
        return find_patch_encoder_weights(config).stat().st_size
    except FileNotFoundError:
        return 0
