"""From spots on an open slide to features, streaming: crop in threads, encode on the device, results in the order of spots.

Whoever calls brings the frozen encoder as a callable; nothing here knows which one it is. Memory is bounded by the batch
(and the decoded image, see datasets/images/slides.py), whatever the number of spots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from datasets.features.patch_encoder import BatchedPatchEncoder, pool_tokens
from datasets.images.geometry import all_views, neighbor_corners, neighbor_validity, patch_corner
from utils.devices import granted_cpus

KINDS = ("target", "neighbor", "token", "patch")
VIEW_COUNTS = (1, 2, 4, 8)  # the identity; with the horizontal flip; with both flips; with the quarter turn
_STAGING_BUFFERS = 3  # one in use by the device, one ready, one being filled


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
    def views_encoded(self) -> int:
        """How many views of a patch the encoder sees."""
        return self.views if "token" in self.kinds else 1

    @property
    def images_per_spot(self) -> int:
        """How many images the encoder sees for a spot, at most: the views of the patch, and the other tiles."""
        return self.views_encoded + (self.num_neighbors**2 - 1 if "neighbor" in self.kinds else 0)

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

    Invalid neighbor tiles are zero and not encoded. The next batch is cropped by `num_workers` threads, and on CUDA
    encoded, while the caller deals with the one before.
    Raises ValueError naming the image if it cannot be decoded, or if a feature is not finite.
    """
    centers = np.asarray(centers, dtype=np.int64)
    size = plan.covered_size
    with_neighbors = "neighbor" in plan.kinds
    tiles_a_side = plan.num_neighbors if with_neighbors else 1
    corners = neighbor_corners(centers, size, tiles_a_side)[:, 0] if with_neighbors else patch_corner(centers, size)
    is_valid = neighbor_validity(centers, slide.size, size, plan.num_neighbors) if with_neighbors else None
    regions = _staged_regions(
        slide,
        corners,
        covered=size * tiles_a_side,
        side=plan.patch_size * tiles_a_side,
        spots_at_once=max(1, encoder.batch_size // plan.images_per_spot),
        pin=encoder.device.type == "cuda",
        num_workers=num_workers,
    )
    before = None
    with closing(regions):
        for rows, region in regions:
            launched = _launch(rows, region, None if is_valid is None else is_valid[rows], encoder, plan)
            if before is not None:
                yield before.wait()
            before = launched
        if before is not None:
            yield before.wait()


def _staged_regions(
    slide: Regions,
    corners: np.ndarray,
    *,
    covered: int,
    side: int,
    spots_at_once: int,
    pin: bool,
    num_workers: int,
) -> Generator[tuple[slice, Tensor], None, None]:
    """Yield (rows, uint8 (b, side, side, 3)): the squares of `covered` px at `corners`, filled ahead by threads.

    A buffer is filled again two steps after it was given out; by then `encode_slide` has waited for its results.
    """
    starts = range(0, len(corners), spots_at_once)
    shape = (min(spots_at_once, len(corners)), side, side, 3)
    buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=pin) for _ in starts[:_STAGING_BUFFERS]]
    size = None if covered == side else (side, side)

    def fill(place: np.ndarray, corner: np.ndarray) -> None:
        place[:] = slide.read_region(int(corner[0]), int(corner[1]), covered, covered, size=size)

    with ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="cropper") as pool:

        def begin(start: int) -> tuple[slice, Tensor, list]:
            rows = slice(start, min(start + spots_at_once, len(corners)))
            buffer = buffers[start // spots_at_once % _STAGING_BUFFERS][: rows.stop - start]
            return rows, buffer, [pool.submit(fill, *pair) for pair in zip(buffer.numpy(), corners[rows])]

        to_begin = iter(starts)
        waiting = deque(begin(start) for start in islice(to_begin, _STAGING_BUFFERS - 1))
        try:
            while waiting:
                rows, buffer, crops = waiting.popleft()
                for crop in crops:
                    crop.result()
                yield rows, buffer
                waiting.extend(begin(start) for start in islice(to_begin, 1))
        finally:
            pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def _launch(
    rows: slice, region: Tensor, is_valid: np.ndarray | None, encoder: BatchedPatchEncoder, plan: EncodingPlan
) -> _Launched:
    """Start everything for the spots `rows`: copy, encode, copy back. Nothing here waits for a CUDA device."""
    middle = slice(plan.num_neighbors // 2 * plan.patch_size, (plan.num_neighbors // 2 + 1) * plan.patch_size)
    patches = region[:, middle, middle] if is_valid is not None else region
    results = {"patch": patches.clone()} if "patch" in plan.kinds else {}
    if not plan.needs_encoder:
        return _Launched(rows, results, None)
    on_device = region.to(encoder.device, non_blocking=True)
    patches = on_device[:, middle, middle] if is_valid is not None else on_device
    images = _views_of(patches, plan.views_encoded)
    tiles_encoded = None
    if is_valid is not None:
        tiles, tiles_encoded = _other_tiles(on_device, is_valid, plan)
        images = torch.cat([images, tiles])
    num_views = len(patches) * plan.views_encoded
    pooled, tokens = encoder.encode(images, num_views if "token" in plan.kinds else 0)
    target = pooled[: num_views : plan.views_encoded]  # view 0 of each patch
    computed = {}
    if "target" in plan.kinds:
        computed["target"] = target
    if tiles_encoded is not None:
        computed["neighbor"] = _neighbor_features(target, pooled[num_views:], tiles_encoded, plan)
    if tokens is not None:
        tokens = pool_tokens(tokens, encoder.prefix_tokens, plan.token_pool).to(plan.token_dtype)
        computed["token"] = tokens.reshape(len(patches), plan.views, *tokens.shape[1:])
    return _copy_back(rows, results, computed, encoder)


def _views_of(patches: Tensor, views: int) -> Tensor:
    """(b, P, P, 3) -> (b * views, P, P, 3), the views of a patch one after the other."""
    turned = all_views(patches.permute(0, 3, 1, 2), views)
    return turned.permute(0, 1, 3, 4, 2).flatten(0, 1)


def _other_tiles(region: Tensor, is_valid: np.ndarray, plan: EncodingPlan) -> tuple[Tensor, Tensor]:
    """The valid tiles without the middle one (m, P, P, 3), and their places in the (b * n*n) tiles of the regions."""
    n, size = plan.num_neighbors, plan.patch_size
    tiles = region.reshape(len(region), n, size, n, size, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, size, size, 3)
    is_wanted = is_valid.copy()
    is_wanted[:, n * n // 2] = False
    places = torch.from_numpy(np.flatnonzero(is_wanted)).to(region.device, non_blocking=True)
    return tiles[places], places


def _neighbor_features(target: Tensor, others: Tensor, places: Tensor, plan: EncodingPlan) -> Tensor:
    """(b, n*n, D): the patch's own feature in the middle, zero where a tile is not valid."""
    num_tiles = plan.num_neighbors**2
    features = target.new_zeros((len(target) * num_tiles, target.shape[1]))
    features[places] = others
    features = features.reshape(len(target), num_tiles, -1)
    features[:, num_tiles // 2] = target
    return features


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
