"""Every distinct tile once: which tiles the spots of a slide look at, in what order, and how long each is held.

Spots that lie whole patches apart look at the same tiles. Tiles are numbered in the order in which the spots first need
them; what is held at any time is a run of these numbers, which is a few rows of tiles where spots come row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasets.images.geometry import neighbor_corners, neighbor_validity

_ROW = 1 << 32  # of a tile's key: farther than any image is wide


@dataclass(frozen=True)
class TileIndex:
    """The M distinct tiles of N spots, numbered as they are first needed.

    of_spot (N, n*n) int32: the tiles of each spot row by row, -1 where a tile does not count.  own (N,): its patch.
    known (N,): how many tiles this spot and those before it need.  oldest (N,): the lowest tile that this spot or a later
    one needs.
    """

    keys: np.ndarray  # (M,) int64: y * _ROW + x of the top left corners
    of_spot: np.ndarray
    known: np.ndarray
    oldest: np.ndarray

    @property
    def own(self) -> np.ndarray:
        return self.of_spot[:, self.of_spot.shape[1] // 2]

    def corners(self, tiles: np.ndarray) -> np.ndarray:
        """(R, 2) top left corners (x, y) of tiles (R,), level-0 px."""
        x = (self.keys[tiles] + _ROW // 2) % _ROW - _ROW // 2
        return np.stack([x, (self.keys[tiles] - x) // _ROW], axis=1)


def index_tiles(centers: np.ndarray, image_size: tuple[int, int], size: int, num_neighbors: int) -> TileIndex:
    """Find the distinct tiles of `size` level-0 px around centers (N, 2); num_neighbors: tiles a side, 1 for the patches."""
    corners = neighbor_corners(centers, size, num_neighbors)
    keys = corners[..., 1] * _ROW + corners[..., 0]
    is_valid = neighbor_validity(centers, image_size, size, num_neighbors)
    distinct, first, number = np.unique(keys[is_valid], return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order))
    of_spot = np.full(keys.shape, -1, dtype=np.int32)
    of_spot[is_valid] = place[number]
    lowest = np.where(is_valid, of_spot, len(distinct)).min(axis=1)
    return TileIndex(
        keys=distinct[order],
        of_spot=of_spot,
        known=np.maximum.accumulate(of_spot.max(axis=1)) + 1,
        oldest=np.minimum.accumulate(lowest[::-1])[::-1],
    )


@dataclass(frozen=True)
class Step:
    """What is done for the consecutive spots `rows`: tiles are read, images of them encoded.

    read (R,): tiles; those met for the first time come first, in order.  source (I,): place in `read` of each image, and
    view (I,).  num_with_tokens: so many images from the front give tokens.
    pooled_of_new: places among the images of the new tiles.  held: new tiles whose tokens wait for their spots; they are
    the first images.  The next images are further views of the patches: of spot turned[0] of the rows in view turned[1].
    own: places in `read` of the patches of spots whose pixels are read, -1 of others.
    """

    rows: slice
    read: np.ndarray
    source: np.ndarray
    view: np.ndarray
    num_with_tokens: int
    pooled_of_new: np.ndarray
    held: np.ndarray
    turned: tuple[np.ndarray, np.ndarray]
    own: np.ndarray


class Schedule:
    """The spots of a slide cut into steps of at most `batch_size` images, or of one spot.

    views: of each patch that give tokens, 0 for none.  with_pixels: the patches themselves are asked for.
    longest_wait: for so many spots the tokens of a tile met as a neighbor are held until its own spot comes; one that
    comes later is encoded again, so that memory is bounded in whatever order spots come.
    """

    def __init__(self, tiles: TileIndex, *, views: int, with_pixels: bool, batch_size: int, longest_wait: int):
        spots, own = np.arange(len(tiles.own)), tiles.own
        self.tiles, self.views = tiles, views
        met = np.searchsorted(tiles.known, own, side="right")  # the spot that first needs the patch
        self.last = np.full(len(tiles.keys), -1)  # the last spot of which a tile is the patch
        self.last[own] = spots
        self.is_again = (self.last[own] - met > longest_wait) & (views > 0)
        self._is_held = np.zeros(len(tiles.keys), dtype=bool)
        self._is_held[own[~self.is_again]] = views > 0
        self._reads_own = self.is_again | (views > 1) | with_pixels
        new = np.diff(tiles.known, prepend=0)
        images = new + max(views - 1, 0) + self.is_again
        self._starts = _cut(np.maximum(images, 1), batch_size)
        reads = new + (self._reads_own & (met < spots))
        self.most_read = int(np.add.reduceat(reads, self._starts[:-1]).max()) if len(spots) else 0

    def __len__(self) -> int:
        return len(self._starts) - 1

    def step(self, number: int) -> Step:
        """Give one of the steps, which are in the order of the spots."""
        rows = slice(int(self._starts[number]), int(self._starts[number + 1]))
        first = int(self.tiles.known[rows.start - 1]) if rows.start else 0
        new, own = np.arange(first, self.tiles.known[rows.stop - 1]), self.tiles.own[rows]
        is_before = own < first
        before = np.unique(own[self._reads_own[rows] & is_before])
        places = np.where(is_before, len(new) + np.searchsorted(before, own), own - first)
        is_held = self._is_held[new]
        wanted = np.ones((len(own), self.views), dtype=bool)
        wanted[:, :1] = self.is_again[rows, None]
        spot, view = np.nonzero(wanted)
        held, others = np.flatnonzero(is_held), np.flatnonzero(~is_held)
        with_tokens = len(held) + len(spot)
        pooled_of_new = np.empty(len(new), dtype=np.int64)
        pooled_of_new[held] = np.arange(len(held))
        pooled_of_new[others] = with_tokens + np.arange(len(others))
        return Step(
            rows=rows,
            read=np.concatenate([new, before]),
            source=np.concatenate([held, places[spot], others]),
            view=np.concatenate([np.zeros_like(held), view, np.zeros_like(others)]),
            num_with_tokens=with_tokens,
            pooled_of_new=pooled_of_new,
            held=new[held],
            turned=(spot, view),
            own=np.where(self._reads_own[rows] | ~is_before, places, -1),
        )


def _cut(images: np.ndarray, batch_size: int) -> np.ndarray:
    """(S + 1,) where steps begin, and the end: as many spots as give at most `batch_size` images, but at least one."""
    total = np.concatenate([[0], np.cumsum(images)])
    starts = [0]
    while starts[-1] < len(images):
        within = int(np.searchsorted(total, total[starts[-1]] + batch_size, side="right")) - 1
        starts.append(max(within, starts[-1] + 1))
    return np.array(starts)


class Band:
    """Rows (D,) with numbers one after the other, of which those no longer needed are given up at the low end."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._low = self._first = self._stop = 0  # number of the first place; numbers held

    def add(self, rows: Tensor) -> None:
        """Put rows (m, D) behind those that are there."""
        if self._rows is None:
            self._rows = rows.new_empty((max(1024, 2 * len(rows)), *rows.shape[1:]))
        if self._stop - self._low + len(rows) > len(self._rows):
            held = self._rows[self._first - self._low : self._stop - self._low]
            grown = rows.new_empty((max(len(self._rows), 2 * (len(held) + len(rows))), *rows.shape[1:]))
            grown[: len(held)] = held
            self._rows, self._low = grown, self._first
        self._rows[self._stop - self._low :][: len(rows)] = rows
        self._stop += len(rows)

    def take(self, numbers: np.ndarray) -> Tensor:
        """Copy the rows of `numbers` (...) to (..., D), zeros for those below 0."""
        assert self._rows is not None
        device = self._rows.device
        places = torch.from_numpy(np.maximum(numbers - self._low, 0)).to(device, torch.int64, non_blocking=True)
        rows = self._rows[places]
        if (is_none := numbers < 0).any():
            rows[torch.from_numpy(is_none).to(device, non_blocking=True)] = 0
        return rows

    def drop(self, below: int) -> None:
        """Give up the rows whose numbers are lower."""
        self._first = max(self._first, min(below, self._stop))
