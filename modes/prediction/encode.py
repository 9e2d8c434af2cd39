"""Chunks of spots of one slide, encoded on the fly or read from caches, as batches for the models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from datasets.batches import SpotBatch
from datasets.features.encoding import EncodedSpots, EncodingPlan, encode_slide
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.images.geometry import neighbor_validity
from datasets.images.slides import Slide
from models.patch_encoders.build import PatchEncoder, build_patch_encoder
from modes.prediction.ensemble import Member
from utils.cli import progress, say
from utils.config import Config
from utils.devices import to_device

Part = tuple[slice, Tensor | None, np.ndarray | None]  # rows, target tokens (b, T, D), neighbor features (b, M, D)


def open_patch_encoder(member: Member, device: torch.device) -> BatchedPatchEncoder:
    """The frozen encoder that a fold was trained with; ValueError if the weights found are others."""
    config, made = member.config, member.fold.encoder
    patch_encoder = build_patch_encoder(config.DATA.encoder, config.DATA.weights)
    if not made.has_weights(patch_encoder.weights_sha256):
        raise ValueError(
            f"{member.path} was trained on features of {made.name} with the weights {made.sha256[:12]}..., those found "
            f"({patch_encoder.weights_path}) are {patch_encoder.weights_sha256[:12]}.... "
            "Give the file of the training with --weights."
        )
    if made.sha256 == "unknown":
        say(
            f"Which weights of {made.name} the run was trained with is not known; "
            f"those of {patch_encoder.weights_path} are used."
        )
    return on_device(patch_encoder, device)


def on_device(patch_encoder: PatchEncoder, device: torch.device) -> BatchedPatchEncoder:
    return BatchedPatchEncoder(
        patch_encoder.to(device),
        device,
        prefix_tokens=patch_encoder.spec.prefix_tokens,
    )


def plan_for(member: Member, kinds: tuple[str, ...], source_size: int | None = None) -> EncodingPlan:
    """What the encoder has to give for a fold: features as it was trained on, unturned."""
    data = member.config.DATA
    return EncodingPlan(
        kinds=kinds,
        patch_size=data.patch_size,
        source_size=source_size,
        num_neighbors=data.num_neighbors,
        views=1,
        token_pool=member.fold.encoder.token_pool,
        token_dtype=torch.float32,
    )


def pooled_features(
    slide: Slide, centers: np.ndarray, encoder: BatchedPatchEncoder, plan: EncodingPlan, num_workers: int
) -> Tensor:
    """(N, D) float32 target features of all spots: what the global encoder sees of a slide."""
    parts = list(_encoded(slide, centers, encoder, plan, num_workers, "target features"))
    return torch.from_numpy(np.concatenate([part.target for part in parts if part.target is not None]))


def encoded_parts(
    slide: Slide,
    centers: np.ndarray,
    encoder: BatchedPatchEncoder,
    plan: EncodingPlan,
    num_workers: int,
    chunk_size: int,
) -> Iterator[Part]:
    """Tokens and neighbor features of `chunk_size` consecutive spots at a time, encoded as they are asked for."""
    held: list[EncodedSpots] = []
    count = 0
    for part in _encoded(slide, centers, encoder, plan, num_workers, "prediction"):
        held.append(part)
        count += part.rows.stop - part.rows.start
        if count >= chunk_size:
            yield _joined(held)
            held, count = [], 0
    if held:
        yield _joined(held)


def _encoded(
    slide: Slide,
    centers: np.ndarray,
    encoder: BatchedPatchEncoder,
    plan: EncodingPlan,
    num_workers: int,
    description: str,
) -> Iterator[EncodedSpots]:
    with progress(total=len(centers), description=description, unit="spot", leave=False) as bar:
        for part in encode_slide(slide, centers, encoder, plan, num_workers=num_workers):
            yield part
            bar.update(part.rows.stop - part.rows.start)


def _joined(parts: list[EncodedSpots]) -> Part:
    rows = slice(parts[0].rows.start, parts[-1].rows.stop)
    tokens = [part.token[:, 0] for part in parts if part.token is not None]
    neighbors = [part.neighbor for part in parts if part.neighbor is not None]
    return (
        rows,
        torch.from_numpy(np.concatenate(tokens)) if tokens else None,
        np.concatenate(neighbors) if neighbors else None,
    )


def spot_batches(
    parts: Iterable[Part], features: Tensor, neighbor_is_valid: np.ndarray, device: torch.device
) -> Iterator[SpotBatch]:
    """Batches on the device. features (N, D) and neighbor_is_valid (N, M) are of all spots of the slide."""
    is_valid = torch.from_numpy(neighbor_is_valid)
    for rows, tokens, neighbors in parts:
        yield SpotBatch(
            rows=torch.arange(rows.start, rows.stop),
            target_tokens=None if tokens is None else to_device(tokens, device).float(),
            patches=None,
            target_features=features[rows].to(device),
            neighbor_features=None if neighbors is None else to_device(torch.from_numpy(neighbors), device).float(),
            neighbor_is_valid=is_valid[rows].to(device),
            expression=None,
        )


def validity(centers: np.ndarray, image_size: tuple[int, int], covered_px: int, config: Config) -> np.ndarray:
    """(N, M) bool: neighbor tiles of `covered_px` level-0 px that lie inside the image."""
    return neighbor_validity(centers, image_size, covered_px, config.DATA.num_neighbors)
