"""Neighbor features that are not held in memory: rows of their files, as a batch asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.features.block_store import BlockStore
from datasets.features.published import map_published
from utils.devices import available_memory
from utils.parallel.team import place_of_this_process
from utils.untrusted.tensors import check_tensors

PUBLISHED = ".pt"  # ending of published files, which are no caches
USED_SHARE = 0.9  # of the memory that is free beside the reserve: the system needs some for the files it reads


@dataclass(frozen=True)
class Residence:
    """Where neighbor features are held.

    choice: DATA.residence. reserve: bytes of host memory that are needed for everything else. num_threads: that read from
    the files. is_pinned: into page-locked memory, for a CUDA device to copy from.
    """

    choice: str = "host"
    reserve: int = 0
    num_threads: int = 1
    is_pinned: bool = False

    def holds(self, nbytes: int, tell: Callable[[str], None] | None = None) -> bool:
        """Decide whether so many bytes are held in memory. tell: takes a sentence about it, where size decides (auto).

        The memory of a machine is shared by the processes that torchrun started on it.
        """
        if self.choice != "auto":
            return self.choice != "disk"
        free = max(0, available_memory() // place_of_this_process().local_size - self.reserve)
        is_held = nbytes <= USED_SHARE * free
        if tell is not None:
            where = "in memory" if is_held else "stay in their files and are read by row"
            tell(f"neighbor features: {nbytes / 1e9:.2f} GB {where} ({free / 1e9:.1f} GB free beside the training).")
        return is_held


IN_MEMORY, ON_DISK = Residence("host"), Residence("disk")


@dataclass(frozen=True)
class Published:
    """Published features of a slide: features (N, M, D), mapped from the file `path`."""

    path: Path
    features: Tensor


class NeighborFiles:
    """Neighbor features (R, M, D) of all spots of several slides; row r counts through them in their order.

    shape, dtype, nbytes: those of the tensor that would hold them. Raises ValueError for files that do not belong together.
    """

    def __init__(self, slides: Sequence[tuple[Path, int]], residence: Residence):
        """slides: the file of each, a cache or a published `.pt`, and its number of spots."""
        counts = [count for _, count in slides]
        self._starts = np.cumsum([0, *counts])
        caches = [path for path, _ in slides if path.suffix != PUBLISHED]
        self._store = self._open(caches, residence)
        self._published = {
            slide: Published(path, map_published(path, count))
            for slide, (path, count) in enumerate(slides)
            if path.suffix == PUBLISHED
        }
        is_cache = np.array([slide not in self._published for slide in range(len(slides))])
        self._start_in_store = np.cumsum([0, *np.where(is_cache, counts, 0)])
        self.dtype = self._store.dtype if self._store and is_cache[0] else torch.float32
        shapes = {tuple(one.features.shape[1:]): one.path for one in self._published.values()}
        if self._store:
            shapes[self._store.num_tokens, self._store.dim] = caches[0]
        if len(shapes) > 1:
            listed = "; ".join(f"{path}: {shape}" for shape, path in shapes.items())
            raise ValueError(
                f"The neighbor features of these slides differ in tiles or width: {listed}. Extract them alike."
            )
        self.shape = (int(self._starts[-1]), *next(iter(shapes)))
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def check(self) -> NeighborFiles:
        """Compare published files with their checksums, which they have for all of a file; caches have one for each spot.

        Raises ValueError naming the file.
        """
        for published in self._published.values():
            check_tensors(published.path, {})
        return self

    def read(self, rows: Tensor) -> Tensor:
        """(B, M, D): the features of the spots `rows` (B,), in that order, in host memory.

        Raises ValueError naming the file and the spot whose numbers are not those that were written, or not finite.
        """
        if self._store and not self._published:
            return self._store.read(rows, torch.zeros_like(rows))
        wanted = rows.numpy()
        slide = np.searchsorted(self._starts, wanted, side="right") - 1
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        in_caches = ~np.isin(slide, list(self._published))
        if self._store and in_caches.any():
            shift = self._start_in_store[slide] - self._starts[slide]
            of_store = torch.from_numpy((wanted + shift)[in_caches])
            found[torch.from_numpy(in_caches)] = self._store.read(of_store, torch.zeros_like(of_store)).to(self.dtype)
        for number, published in self._published.items():
            places = torch.from_numpy(np.flatnonzero(slide == number))
            of_slide = torch.from_numpy(wanted)[places] - int(self._starts[number])
            found[places] = _finite_rows(published, of_slide).to(self.dtype)
        return found

    @staticmethod
    def _open(caches: Sequence[Path], residence: Residence) -> BlockStore | None:
        if not caches:
            return None
        return BlockStore(caches, "neighbor", num_threads=residence.num_threads or 1, is_pinned=residence.is_pinned)


def _finite_rows(published: Published, rows: Tensor) -> Tensor:
    features = published.features[rows].float()
    if not (is_finite := torch.isfinite(features.flatten(1)).all(dim=1)).all():
        row = int(rows[~is_finite][0])
        raise ValueError(f"{published.path}: the features of its row {row} are not finite. Download it again.")
    return features
