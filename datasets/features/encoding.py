"""From spots on an open slide to features, streaming: crop in threads, encode on the device, results in the order of spots.

Whoever calls brings the frozen encoder as a callable; nothing here knows which one it is. Memory is bounded by the batch
(and the decoded image, see datasets/images/slides.py), whatever the number of spots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from datasets.features.patch_encoder import BatchedPatchEncoder, pool_tokens
from datasets.images.geometry import dihedral_views
from datasets.images.tiles import Band, Schedule, Step, index_tiles
from utils.devices import granted_cpus

KINDS = ("target", "neighbor", "token", "patch")
VIEW_COUNTS = (1, 2, 4, 8)  # the identity; with the horizontal flip; with both flips; with the quarter turn
_STAGING_BUFFERS = 3  # one in use by the device, one ready, one being filled
_WAITING_PIXELS = 1 << 26  # of patches whose tokens may wait for their spots: 1.1 GB of UNI's in float32


class Regions(Protocol):
    """What is encoded: an open slide, or the patches of one."""

    size: tuple[int, int]

    def read_region(
        self, x: int, y: int, width: int, height: int, size: tuple[int, int] | None = None
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class EncodingPlan:
    """What to compute for each spot.

    kinds: of "target" (pooled feature of the patch), "neighbor" (of the n x n tiles), "token" (all tokens of the patch in
        the first `views` dihedral views), "patch" (the pixels).
    patch_size: px a side that the encoder sees.  source_size: level-0 px that a patch covers, scaled to patch_size; None
        means the same, no scaling.  num_neighbors: tiles a side.
    token_pool: mean-pool the grid of patch tokens by this factor; class and register tokens (`prefix_tokens`) stay.
    token_dtype: of the tokens returned.
    """

    kinds: tuple[str, ...]
    patch_size: int = 224
    source_size: int | None = None
    num_neighbors: int = 5
    views: int = 8
    token_pool: int = 1
    token_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"Features are of the kinds {', '.join(KINDS)}; found {', '.join(self.kinds) or 'none'}.")
        if self.views not in VIEW_COUNTS:
            raise ValueError(f"The number of views should be one of {VIEW_COUNTS}, found {self.views}.")

    @property
    def covered_size(self) -> int:
        """Level-0 px that a patch covers."""
        return self.source_size or self.patch_size

    @property
    def needs_encoder(self) -> bool:
        """Whether anything beside the pixels is asked for."""
        return self.kinds != ("patch",)


@dataclass(frozen=True)
class EncodedSpots:
    """Consecutive spots `rows` of the slide; None for kinds that were not asked for.

    target (b, D), neighbor (b, n*n, D) float32; token (b, views, T, D); patch (b, P, P, 3) uint8.
    """

    rows: slice
    target: np.ndarray | None = None
    neighbor: np.ndarray | None = None
    token: np.ndarray | None = None
    patch: np.ndarray | None = None


@dataclass
class _Launched:
    """Results on their way from the device; `wait` gives them."""

    rows: slice
    results: dict[str, Tensor]
    is_finite: Tensor | None
    done: torch.cuda.Event | None = None
    precision: str = ""

    def wait(self) -> EncodedSpots:
        if self.done is not None:
            self.done.synchronize()
        if self.is_finite is not None and not bool(self.is_finite):
            raise ValueError(
                f"The encoder gave numbers that are not finite (or too large for their type) for spots {self.rows.start} "
                f"to {self.rows.stop - 1} with precision {self.precision}. Use --precision float32 (and --dtype float32)."
            )
        return EncodedSpots(self.rows, **{kind: tensor.numpy() for kind, tensor in self.results.items()})


def encode_slide(
    slide: Regions, centers: np.ndarray, encoder: BatchedPatchEncoder, plan: EncodingPlan, *, num_workers: int = 4
) -> Iterator[EncodedSpots]:
    """Yield the features of the spots at `centers` (N, 2) level-0 px (x, y), batch by batch, in their order.

    A tile that several spots look at is encoded once (`datasets.images.tiles`). Invalid neighbor tiles are zero and not
    encoded. The next batch is cropped by `num_workers` threads, and on CUDA encoded, while the caller deals with the one
    before.
    Raises ValueError naming the image if it cannot be decoded, or if a feature is not finite.
    """
    centers = np.asarray(centers, dtype=np.int64)
    schedule = Schedule(
        index_tiles(centers, slide.size, plan.covered_size, plan.num_neighbors if "neighbor" in plan.kinds else 1),
        views=plan.views if "token" in plan.kinds else 0,
        with_pixels="patch" in plan.kinds,
        batch_size=encoder.batch_size,
        longest_wait=_WAITING_PIXELS // plan.patch_size**2,
    )
    encoding = _Encoding(schedule, encoder, plan)
    tiles = _staged_tiles(
        slide,
        schedule,
        covered=plan.covered_size,
        side=plan.patch_size,
        pin=encoder.device.type == "cuda",
        num_workers=max(1, num_workers),
    )
    before = None
    with closing(tiles):
        for step, pixels in tiles:
            launched = encoding.launch(step, pixels)
            if before is not None:
                yield before.wait()
            before = launched
        if before is not None:
            yield before.wait()


def _staged_tiles(
    slide: Regions, schedule: Schedule, *, covered: int, side: int, pin: bool, num_workers: int
) -> Generator[tuple[Step, Tensor], None, None]:
    """Yield the steps, each with the pixels of its tiles, uint8 (R, side, side, 3), filled ahead by threads.

    A buffer is filled again two steps after it was given out; by then `encode_slide` has waited for its results.
    covered: level-0 px of a tile.
    """
    shape = (schedule.most_read, side, side, 3)
    buffers = [
        torch.empty(shape, dtype=torch.uint8, pin_memory=pin) for _ in range(min(_STAGING_BUFFERS, len(schedule)))
    ]
    size = None if covered == side else (side, side)

    def fill(places: np.ndarray, corners: np.ndarray) -> None:
        for place, (x, y) in zip(places, corners.tolist()):
            place[:] = slide.read_region(x, y, covered, covered, size=size)

    with ThreadPoolExecutor(num_workers, thread_name_prefix="cropper") as pool:

        def begin(number: int) -> tuple[Step, Tensor, list[Future]]:
            step = schedule.step(number)
            buffer, corners = buffers[number % _STAGING_BUFFERS][: len(step.read)], schedule.tiles.corners(step.read)
            a_task = -(-len(corners) // num_workers) or 1
            parts = [slice(start, start + a_task) for start in range(0, len(corners), a_task)]
            return step, buffer, [pool.submit(fill, buffer.numpy()[part], corners[part]) for part in parts]

        to_begin = iter(range(len(schedule)))
        waiting = deque(begin(number) for number in islice(to_begin, _STAGING_BUFFERS - 1))
        try:
            while waiting:
                step, buffer, crops = waiting.popleft()
                for crop in crops:
                    crop.result()
                yield step, buffer
                waiting.extend(begin(number) for number in islice(to_begin, 1))
        finally:
            pool.shutdown(cancel_futures=True)


class _Encoding:
    """What one pass over a slide holds on the device: pooled features of tiles, and tokens that wait for their spots."""

    def __init__(self, schedule: Schedule, encoder: BatchedPatchEncoder, plan: EncodingPlan):
        self._schedule, self._encoder, self._plan = schedule, encoder, plan
        self._band = Band()
        self._waiting: dict[int, Tensor] = {}  # tokens (T, D) of a tile in view 0

    @torch.inference_mode()
    def launch(self, step: Step, pixels: Tensor) -> _Launched:
        """Start everything for the spots of a step: copy, encode, copy back. Nothing here waits for a CUDA device."""
        rows, plan, tiles = step.rows, self._plan, self._schedule.tiles
        results = {"patch": pixels[torch.from_numpy(step.own)]} if "patch" in plan.kinds else {}
        if not plan.needs_encoder:
            return _Launched(rows, results, None)
        tokens = self._encode(step, pixels.to(self._encoder.device, non_blocking=True)) if len(step.source) else None
        computed = {}
        if "target" in plan.kinds:
            computed["target"] = self._band.take(tiles.own[rows])
        if "neighbor" in plan.kinds:
            computed["neighbor"] = self._band.take(tiles.of_spot[rows])
        if "token" in plan.kinds:
            computed["token"] = self._tokens_of_spots(step, tokens)
        self._band.drop(int(tiles.oldest[rows.stop]) if rows.stop < len(tiles.oldest) else len(tiles.keys))
        return _copy_back(rows, results, computed, self._encoder)

    def _encode(self, step: Step, pixels: Tensor) -> Tensor | None:
        """Encode the images of a step; returns the tokens of those that are further views, None where no tokens are wanted."""
        images = pixels[_on(step.source, pixels.device)]
        if step.view.any():
            turned = dihedral_views(images.permute(0, 3, 1, 2), _on(step.view, pixels.device))
            images = turned.permute(0, 2, 3, 1)
        pooled, tokens = self._encoder.encode(images, step.num_with_tokens)
        self._band.add(pooled[_on(step.pooled_of_new, pooled.device)])
        if tokens is None:
            return None
        tokens = pool_tokens(tokens, self._encoder.prefix_tokens, self._plan.token_pool).to(self._plan.token_dtype)
        held, turned = tokens.split([len(step.held), len(step.turned[0])])
        # Cloned, or else they would keep the further views in memory while they wait.
        self._waiting |= zip(step.held.tolist(), held.clone() if len(turned) else held)
        return turned

    def _tokens_of_spots(self, step: Step, turned: Tensor | None) -> Tensor:
        """(b, views, T, D): what waited for the spots of a step and the further views; what no spot needs later goes."""
        spots = np.arange(step.rows.start, step.rows.stop)
        waited = ~self._schedule.is_again[step.rows]
        own = self._schedule.tiles.own[step.rows]
        unturned = [self._waiting[tile] for tile in own[waited].tolist()]
        like = unturned[0] if turned is None or not len(turned) else turned[0]
        tokens = like.new_empty((len(spots), self._plan.views, *like.shape))
        if unturned:
            tokens[_on(np.flatnonzero(waited), like.device), 0] = torch.stack(unturned)
        if turned is not None and len(turned):
            tokens[_on(step.turned[0], like.device), _on(step.turned[1], like.device)] = turned
        for tile in own[waited & (self._schedule.last[own] == spots)].tolist():
            del self._waiting[tile]
        return tokens


def _on(indices: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(indices).to(device, non_blocking=True)


def _copy_back(
    rows: slice, results: dict[str, Tensor], computed: dict[str, Tensor], encoder: BatchedPatchEncoder
) -> _Launched:
    """Queue the copies to the host behind the computation, so that the next batch may start before they are read."""
    is_finite = torch.stack([torch.isfinite(tensor).all() for tensor in computed.values()]).all()
    if encoder.device.type != "cuda":
        results |= {kind: tensor.cpu() for kind, tensor in computed.items()}
        return _Launched(rows, results, is_finite.cpu(), precision=encoder.precision)
    copies = {kind: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for kind, t in computed.items()}
    for kind, tensor in computed.items():
        copies[kind].copy_(tensor, non_blocking=True)
    flag = torch.empty((), dtype=torch.bool, pin_memory=True)
    flag.copy_(is_finite, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(encoder.device))
    return _Launched(rows, results | copies, flag, done, encoder.precision)


def default_workers() -> int:
    """Threads that crop patches, unless told otherwise."""
    return min(8, granted_cpus())
