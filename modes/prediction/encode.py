"""A slide for the models: its spots in chunks, encoded on the fly or read from caches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from datasets.batches import SlideBatch, SpotBatch
from datasets.features.encoding import EncodedSpots, EncodingPlan, encode_slide
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.images.slides import Slide
from models.patch_encoders.build import build_patch_encoder
from modes.prediction.ensemble import Member
from utils.cli import progress, say
from utils.devices import to_device

_HELD_BYTES = 500_000_000  # of tokens and neighbor features that one pass over a slide may keep


@dataclass(frozen=True)
class Chunk:
    """What consecutive spots `rows` of a slide are predicted from beside their pooled features; None where not read.

    tokens (b, T, D) of the target patches, neighbors (b, M, D) float32.
    """

    rows: slice
    tokens: Tensor | None = None
    neighbors: Tensor | None = None


def open_patch_encoder(member: Member, device: torch.device) -> BatchedPatchEncoder:
    """Open the frozen encoder that a fold was trained with. Raises ValueError if the weights found are others."""
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
    return BatchedPatchEncoder(patch_encoder.to(device), device, prefix_tokens=patch_encoder.spec.prefix_tokens)


def plan_for(member: Member, kinds: tuple[str, ...], source_size: int | None = None) -> EncodingPlan:
    """Plan what the encoder has to give for a fold: features as it was trained on, unturned.

    source_size: level-0 px that a patch covers, see `EncodingPlan`.
    """
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


@dataclass(frozen=True)
class EncodedSlide:
    """The N spots of a slide as one pass of the encoder gives them. features (N, D) float32: pooled, of every spot.

    held: tokens and neighbor features of the first spots, as far as there is room; `rest` encodes those of the others.
    """

    features: Tensor
    held: list[EncodedSpots]
    rest: Callable[[], Iterator[EncodedSpots]]

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Give tokens and neighbor features of about `size` spots at a time, encoded as they are asked for."""
        return joined_chunks(chain(self.held, self.rest()), size)


def encode_whole(
    slide: Slide, centers: np.ndarray, encoder: BatchedPatchEncoder, plan: EncodingPlan, num_workers: int
) -> EncodedSlide:
    """Encode what the global encoder sees of a slide: the pooled features of all spots at `centers` (N, 2) level-0 px.

    plan: of the pooled features ("target") and of what else the models read. That can be gigabytes, and is needed only when
    the pooled features of the whole slide are there: what comes first is held, the rest encoded when it is asked for.
    """
    held: list[EncodedSpots] = []
    others = tuple(kind for kind in plan.kinds if kind != "target")
    room = _HELD_BYTES
    with closing(_encoded(slide, centers, encoder, plan, num_workers, "encoding")) as parts:
        for part in parts:
            held.append(part)
            room -= sum(getattr(part, kind).nbytes for kind in others)
            if room < 0:
                break
    known = held[-1].rows.stop
    features = [part.target for part in held]
    if known < len(centers):
        only_target = replace(plan, kinds=("target",))
        encoded = _encoded(slide, centers[known:], encoder, only_target, num_workers, "target features")
        features += [part.target for part in encoded]

    def rest() -> Iterator[EncodedSpots]:
        if others and known < len(centers):
            for part in _encoded(
                slide, centers[known:], encoder, replace(plan, kinds=others), num_workers, "prediction"
            ):
                yield replace(part, rows=slice(part.rows.start + known, part.rows.stop + known))

    return EncodedSlide(
        torch.from_numpy(np.concatenate([part for part in features if part is not None])),
        [replace(part, target=None) for part in held],
        rest,
    )


def encoded_chunks(
    slide: Slide,
    centers: np.ndarray,
    encoder: BatchedPatchEncoder,
    plan: EncodingPlan,
    num_workers: int,
    chunk_size: int,
) -> Iterator[Chunk]:
    """Encode tokens and neighbor features of about `chunk_size` spots at a time, as they are asked for."""
    return joined_chunks(_encoded(slide, centers, encoder, plan, num_workers, "prediction"), chunk_size)


def joined_chunks(parts: Iterable[EncodedSpots], chunk_size: int) -> Iterator[Chunk]:
    """Join parts of a slide to chunks of about `chunk_size` spots."""
    held: list[EncodedSpots] = []
    for part in parts:
        held.append(part)
        if part.rows.stop - held[0].rows.start >= chunk_size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def bare_chunks(num_spots: int, size: int) -> Iterator[Chunk]:
    """Cut the spots into chunks for models that read the pooled feature alone, and for whoever reads caches."""
    for start in range(0, num_spots, size):
        yield Chunk(slice(start, min(start + size, num_spots)))


def _encoded(
    slide: Slide,
    centers: np.ndarray,
    encoder: BatchedPatchEncoder,
    plan: EncodingPlan,
    num_workers: int,
    description: str,
) -> Generator[EncodedSpots, None, None]:
    with progress(total=len(centers), description=description, unit="spot", leave=False) as bar:
        for part in encode_slide(slide, centers, encoder, plan, num_workers=num_workers):
            yield part
            bar.update(part.rows.stop - part.rows.start)


def _joined(parts: list[EncodedSpots]) -> Chunk:
    tokens = [part.token[:, 0] for part in parts if part.token is not None]
    neighbors = [part.neighbor for part in parts if part.neighbor is not None]
    return Chunk(
        slice(parts[0].rows.start, parts[-1].rows.stop),
        torch.from_numpy(np.concatenate(tokens)) if tokens else None,
        torch.from_numpy(np.concatenate(neighbors)) if neighbors else None,
    )


def whole_slide(
    features: Tensor,
    grid_xy: np.ndarray,
    neighbor_is_valid: np.ndarray,
    chunks: Callable[[int], Iterable[Chunk]],
    device: torch.device,
) -> SlideBatch:
    """Put a slide of N spots together for `predict_slide`.

    features (N, D) float32, grid_xy (N, 2), neighbor_is_valid (N, M) bool.  chunks: of at most so many spots (or about as
    many), all of them in order.
    """

    def batches(size: int) -> Iterator[SpotBatch]:
        is_valid = torch.from_numpy(neighbor_is_valid)
        for chunk in chunks(size):
            rows, send = chunk.rows, partial(to_device, device=device)
            yield SpotBatch(
                rows=torch.arange(rows.start, rows.stop),
                target_tokens=None if chunk.tokens is None else send(chunk.tokens).float(),
                patches=None,
                target_features=features[rows].to(device),
                neighbor_features=None if chunk.neighbors is None else send(chunk.neighbors).float(),
                neighbor_is_valid=is_valid[rows].to(device),
                expression=None,
            )

    return SlideBatch(features.to(device), torch.from_numpy(grid_xy), batches)
