"""Frozen patch encoders: uint8 patches in, tokens and one pooled feature out.

`build_patch_encoder(name)` is the entry: it finds the weight file, verifies every key and shape, and returns a
`PatchEncoder`. The table of encoders is in table.py, weight files are dealt with in weights.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.patch_encoders.spec import PatchEncoderSpec, TimmModel, Tokens, create_encoder, encode, remove_unused_layers
from models.patch_encoders.table import MODEL_SIZES, PATCH_ENCODERS, patch_encoder_spec
from models.patch_encoders.weights import (
    WEIGHT_FOLDERS,
    environment_variable,
    find_weights,
    fold_batch_norms,
    how_to_get,
    load_patch_encoder,
    state_sha256,
)
from utils.files import sha256

__all__ = [
    "MODEL_SIZES",
    "PATCH_ENCODERS",
    "PatchEncoder",
    "PatchEncoderSpec",
    "Tokens",
    "build_patch_encoder",
    "environment_variable",
    "find_weights",
    "how_to_get",
    "patch_encoder_spec",
    "random_patch_encoder",
]

RANDOM_SEED = 2021
RESIZED_SHORT_SIDE = 256  # px, before the centre crop of encoders that resize their input


class PatchEncoder(nn.Module):
    """A frozen patch encoder with its own normalisation.

    name, dim, pooled_dim: of its row in the table
    weights_sha256:        hash of the weight file; "random-<seed>-<hash>" for random weights, so that caches
                           record what they were
    weights_path:          the weight file, None for random weights

    It stays in evaluation mode and is never part of a trained model: held as a submodule there, train() of the
    outer module would switch on dropout and batch statistics here, and every checkpoint would contain it.
    forward asserts this rather than forcing the mode, so that such a mistake is seen at once.
    Precision is the caller's choice: run it under torch.autocast, or convert it with .to(dtype).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: PatchEncoderSpec, encoder: TimmModel, *, weights_sha256: str, weights_path: Path | None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.name = spec.name
        self.dim = spec.dim
        self.pooled_dim = spec.pooled_dim
        self.weights_sha256 = weights_sha256
        self.weights_path = weights_path
        # Measured on a CPU with efficientnet-lite0 at 224 px: 49 ms per patch instead of 82 ms.
        self.encoder = encoder.to(memory_format=torch.channels_last) if spec.is_convolutional else encoder
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def num_tokens(self, image_size: int | tuple[int, int]) -> int:
        """T for images of image_size x image_size px, or (height, width)."""
        return self.spec.num_tokens(image_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tokens:
        """Encode patches.

        images:  (B, 3, H, W) uint8, RGB, on any device; normalised on the device of the encoder.
        returns: Tokens of (B, T, dim) and (B, pooled_dim), T = num_tokens((H, W)). No gradient.
        ValueError: not uint8, not three channels, or a size that the encoder does not take.
        """
        assert not self.training, "a frozen encoder was set to train(): do not register it inside a trained module"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Encoder '{self.name}' takes uint8 images of shape (B, 3, H, W) with values 0 to 255, "
                f"found {images.dtype} of shape {tuple(images.shape)}."
            )
        self.spec.check_size(*images.shape[-2:])
        values = self.normalise(images)
        device = values.device.type
        # Where it pays, and the features stay the same but for rounding.
        is_folded = device == "cpu" and values.dtype == torch.float32 and not torch.is_autocast_enabled(device)
        encoder = folded_encoder(self.spec, self.encoder) if is_folded else self.encoder
        return encode(self.spec, encoder, values)

    def normalise(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std in float32 on the device of the encoder, then in the precision of its weights."""
        values = images.to(self.mean.device, non_blocking=True).to(torch.float32)
        if self.spec.input_rule == "resized":
            values = _resize_and_crop(values, self.spec.native_size)
        values = values.div_(255).sub_(self.mean).div_(self.std).to(next(self.encoder.parameters()).dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.spec.is_convolutional else values


_FOLDED: WeakKeyDictionary[TimmModel, TimmModel] = WeakKeyDictionary()


def folded_encoder(spec: PatchEncoderSpec, encoder: TimmModel) -> TimmModel:
    """Give the encoder as it runs on a CPU in float32, made at the first call (`fold_batch_norms`)."""
    if not spec.is_convolutional:
        return encoder
    if encoder not in _FOLDED:
        _FOLDED[encoder] = fold_batch_norms(spec, encoder).to(memory_format=torch.channels_last)
    return _FOLDED[encoder]


def _resize_and_crop(values: Tensor, crop: tuple[int, int]) -> Tensor:
    """Short side to 256 px, bicubic, rounded to grey values as image libraries do; then the centre crop."""
    height, width = values.shape[-2:]
    short = min(height, width)
    size = (int(RESIZED_SHORT_SIDE * height / short), int(RESIZED_SHORT_SIDE * width / short))
    resized = F.interpolate(values, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2)
    return resized[..., top : top + crop[0], left : left + crop[1]].round().clamp(0, 255)


def build_patch_encoder(
    name: str,
    weights: str | Path | None = None,
    *,
    allow_download: bool = False,
    random_weights: bool = False,
    search: Sequence[Path] = WEIGHT_FOLDERS,
) -> PatchEncoder:
    """Build the frozen encoder `name`, verified, on the CPU.

    weights:        the weight file (.safetensors, .bin, .pth, .pt); without it see `find_weights` for the order
    allow_download: ask the hub when the file is nowhere else
    random_weights: no file, reproducible random values; for tests and for baselines that say so
    ValueError: unknown name, a file that does not fit, contradicting arguments. FileNotFoundError: no file.
    """
    spec = patch_encoder_spec(name)
    if random_weights:
        if weights is not None or allow_download:
            raise ValueError(
                f"Encoder '{spec.name}': random weights were asked for together with "
                f"{'the weight file ' + str(weights) if weights is not None else 'a download'}. Choose one of them."
            )
        return random_patch_encoder(spec)
    path = find_weights(name, weights, allow_download=allow_download, search=search)
    encoder = remove_unused_layers(spec, load_patch_encoder(spec, path))
    return PatchEncoder(spec, encoder, weights_sha256=sha256(path), weights_path=path)


def random_patch_encoder(spec: PatchEncoderSpec, seed: int = RANDOM_SEED) -> PatchEncoder:
    """Build an encoder with the random initial weights of timm; the random state of the caller is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = create_encoder(spec)
    identity = f"random-{seed}-{state_sha256(encoder.state_dict())}"
    return PatchEncoder(spec, remove_unused_layers(spec, encoder), weights_sha256=identity, weights_path=None)
