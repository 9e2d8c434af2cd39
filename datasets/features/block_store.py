"""Random rows of the caches of many slides, read straight from the files into the buffer of a batch.

A token cache keeps the encoder's tokens of one spot in one view as one block, a cache of neighbor features the tiles of one
spot. The places of all blocks are asked for once; after that a batch is a list of (file, offset) pairs, read in the order of
the disk by a few threads with preadv. HDF5 itself is not involved any more, and neither is its lock. A block is compared with
its checksum when it is first read.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64

from datasets.features.cache import keeping, opened
from datasets.features.identity import CacheIdentity
from datasets.features.sealed import checksums_of, is_finite

_TORCH_TYPES = {"float16": torch.float16, "float32": torch.float32}
# Fields of the identity in which the caches must agree, by kind; neighbor features are verified with the target features.
_SAME_IN_ALL = {
    "token": ("kind", "encoder", "encoder_sha256", "patch_size", "views", "dtype", "token_pool", "precision"),
    "neighbor": ("kind", "dtype"),
}
_PIECE = 1 << 26  # bytes checked at a time
_OTHER_FILES = 256  # that a process may have open beside the caches


class BlockStore:
    """Tokens ("token") or neighbor features of all spots of the slides whose caches are `paths`, in that order.

    A block (T, D) is what a spot has in one view; neighbor features (M, D) have one view.
    num_files, num_rows, num_views, num_tokens (T, or M tiles), dim (D), dtype (torch), nbytes (on disk), identity (of the
    first cache).
    Raises ValueError that lists every cache that differs from the first or is damaged.
    """

    def __init__(self, paths: Sequence[str | Path], kind: str, *, num_threads: int = 4, is_pinned: bool = False):
        """is_pinned: give blocks in page-locked memory, for a CUDA device to copy from."""
        assert paths, "BlockStore needs at least one cache"
        self._paths, self._kind = [Path(path) for path in paths], kind
        self._num_threads, self._is_pinned = max(1, num_threads), is_pinned
        self._descriptors: list[int] = []
        self._pool: ThreadPoolExecutor | None = None
        blocks = [_blocks_of(path, kind) for path in self._paths]
        _check_alike(self._paths, blocks)
        self.identity: CacheIdentity = blocks[0].identity
        self.num_views, self.num_tokens, self.dim = blocks[0].shape[1:]
        self.dtype = _TORCH_TYPES[self.identity.dtype]
        self._offsets = np.concatenate([slide.places for slide in blocks])  # (rows, views) bytes into the file
        self._file_of_row = np.repeat(np.arange(len(self._paths)), [len(slide.places) for slide in blocks])
        self._checksums = [slide.checksums for slide in blocks]
        self._first_row = np.cumsum([0, *(len(slide.places) for slide in blocks)])
        self._is_verified = np.zeros(self._offsets.shape, dtype=bool)
        self.num_files, self.num_rows = len(self._paths), len(self._offsets)
        self._chunk_bytes = self.num_tokens * self.dim * self.dtype.itemsize
        self.nbytes = self.num_rows * self.num_views * self._chunk_bytes
        _allow_open_files(len(self._paths))
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]

    def digest(self, file: int) -> str | None:
        """Digest the checksums of one cache, none of its numbers is read; None for a cache that bears none."""
        checksums = self._checksums[file]
        return None if checksums is None else xxh3_64(np.ascontiguousarray(checksums).view(np.uint8).data).hexdigest()

    def read(self, rows: Tensor | np.ndarray, views: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """(B, T, D): for each b the block of spot rows[b] in dihedral view views[b], in that order.

        out: a contiguous CPU tensor (B, T, D) to fill; made anew when None.
        """
        rows, views = np.asarray(rows, dtype=np.int64), np.asarray(views, dtype=np.int64)
        self._check_request(rows, views)
        if out is None:
            out = self._new_buffer(len(rows))
        assert out.is_contiguous() and out.shape == (len(rows), self.num_tokens, self.dim) and out.dtype == self.dtype
        buffer = out.numpy().reshape(len(rows), self.num_tokens * self.dim)
        files, offsets = self._file_of_row[rows], self._offsets[rows, views]
        order = np.lexsort((offsets, files))  # the order of the disk
        parts = [part for part in np.array_split(order, self._num_threads) if len(part)]
        if len(parts) < 2:
            self._read_part(order, rows, views, buffer)
        else:
            pool = self._threads()
            for done in [pool.submit(self._read_part, part, rows, views, buffer) for part in parts]:
                done.result()
        return out

    def check(self, file: int, step: int = 1) -> None:
        """Read every `step`-th spot of one cache in all its views, a few MB at a time; what was read before is not again.

        Raises ValueError for a block that is not what was written, or holds a number that is not finite.
        """
        rows = np.arange(self._first_row[file], self._first_row[file + 1], step)
        rows, views = rows[~self._is_verified[rows].all(axis=1)], np.arange(self.num_views)
        at_once = max(1, _PIECE // (self.num_views * self._chunk_bytes))
        buffer = self._new_buffer(min(at_once, len(rows)) * self.num_views)
        try:
            for first in range(0, len(rows), at_once):
                part = rows[first : first + at_once]
                self.read(part.repeat(len(views)), np.tile(views, len(part)), buffer[: len(part) * len(views)])
        finally:
            self._end_threads()  # a process that is forked before the first step would wait for them for ever

    def _new_buffer(self, count: int) -> Tensor:
        shape = (count, self.num_tokens, self.dim)
        if self._is_pinned:
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        # NumPy asks for huge pages, PyTorch does not: touching hundreds of MB for the first time is then far cheaper.
        return torch.from_numpy(np.empty(shape, dtype=self.identity.dtype))

    def close(self) -> None:
        """Let files and threads go."""
        self._end_threads()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _end_threads(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="block-reader")
        return self._pool

    def _check_request(self, rows: np.ndarray, views: np.ndarray) -> None:
        if rows.shape != views.shape or rows.ndim != 1:
            raise ValueError(f"One view is needed for each row; got {rows.shape} rows and {views.shape} views.")
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise ValueError(f"Rows {rows.min()} to {rows.max()} were asked for, the caches hold {self.num_rows}.")
        if len(views) and not (views.min() >= 0 and views.max() < self.num_views):
            raise ValueError(
                f"View {views.max()} was asked for, the token caches hold {self.num_views} of the 8. Train without "
                "augmentation, or keep them elsewhere and extract with --views 8."
            )

    def _read_part(self, part: np.ndarray, rows: np.ndarray, views: np.ndarray, buffer: np.ndarray) -> None:
        """Fill the rows `part` of the buffer; preadv lets other threads run while it waits."""
        for place in part:
            row, view = rows[place], views[place]
            file, start = self._file_of_row[row], int(self._offsets[row, view])
            target, position = memoryview(buffer[place]).cast("B"), 0
            while position < self._chunk_bytes:
                count = os.preadv(self._descriptors[file], [target[position:]], start + position)
                if count == 0:
                    path = self._paths[file]
                    raise ValueError(
                        f"{path} ends in the middle of its numbers; it was cut while in use. {_again(path, self._kind)}"
                    )
                position += count
            if not self._is_verified[row, view]:  # once is enough: the file is held open
                self._verify(file, row, view, buffer[place])

    def _verify(self, file: int, row: int, view: int, block: np.ndarray) -> None:
        """Compare a block with its checksum, if it has one; its numbers must be finite in any case."""
        checksums, place = self._checksums[file], row - self._first_row[file]
        is_written = checksums is None or checksums_of(block[None], 1)[0] == checksums[place, view]
        if not (is_written and is_finite(block)):
            with opened(self._paths[file]) as cache:
                spot = cache.spot_ids[place]
            what = "not finite" if is_written else "not what was written (checksum)"
            numbers = f"tokens of spot {spot} in view {view}" if self._kind == "token" else f"features of spot {spot}"
            path = self._paths[file]
            raise ValueError(f"{path} is damaged: the {numbers} are {what}. {_again(path, self._kind)}")
        self._is_verified[row, view] = True


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a slide: shape (N, V, T, D), and of each (spot, view) the place in the file and the checksum, if any."""

    identity: CacheIdentity
    shape: tuple[int, ...]
    places: np.ndarray
    checksums: np.ndarray | None


def _blocks_of(path: Path, kind: str) -> _Blocks:
    with opened(path) as cache:
        if cache.identity.kind != kind:
            raise ValueError(f"{path} is a cache of kind {cache.identity.kind!r}; expected {kind!r}.")
        numbers, checksums = cache.numbers, cache.checksums
        *of_spot, tokens, dim = numbers.shape  # (N, V) or (N,)
        shape = (of_spot[0], math.prod(of_spot[1:]), tokens, dim)
        if numbers.chunks is None:
            places = np.arange(math.prod(shape[:2]), dtype=np.int64) * (tokens * dim * numbers.dtype.itemsize)
            places = numbers.id.get_offset() + places.reshape(shape[:2])
        else:
            places = _chunk_table(path, numbers, kind).reshape(shape[:2])
        return _Blocks(cache.identity, shape, places, None if checksums is None else checksums.reshape(shape[:2]))


def _chunk_table(path: Path, numbers: h5py.Dataset, kind: str) -> np.ndarray:
    """Where each block lies in a cache of an earlier version, which has a chunk for each."""
    *of_spot, tokens, dim = numbers.shape
    table = np.full(of_spot, -1, dtype=np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        table[chunk.chunk_offset[: len(of_spot)]] = chunk.byte_offset

    if numbers.chunks == (*(1 for _ in of_spot), tokens, dim) and numbers.compression is None:
        numbers.id.chunk_iter(note)
    if (table < 0).any():
        raise ValueError(
            f"{path}: {int((table < 0).sum())} of {table.size} {kind} blocks are missing or not stored plainly, one "
            f"per spot{' and view' * (kind == 'token')}. {_again(path, kind)}"
        )
    return table


def _check_alike(paths: Sequence[Path], slides: Sequence[_Blocks]) -> None:
    problems, others, first = [], [], slides[0]
    kind = first.identity.kind
    for path, slide in zip(paths[1:], slides[1:], strict=True):
        differences = [
            f"{name.replace('_', ' ')} {getattr(slide.identity, name)} instead of {getattr(first.identity, name)}"
            for name in _SAME_IN_ALL[kind]
            if getattr(slide.identity, name) != getattr(first.identity, name)
        ]
        if not differences and slide.shape[1:] != first.shape[1:]:
            differences = [f"{kind}s of shape {slide.shape[1:]} instead of {first.shape[1:]}"]
        if differences:
            problems.append(f"- {path}: {', '.join(differences)}")
            others.append(path.stem)
    if problems:
        alike = "--encoder, --views, --dtype, --token_pool, --precision" if kind == "token" else "settings"
        raise ValueError(
            f"The {kind} caches do not belong together; compared with {paths[0]}:\n" + "\n".join(problems) + "\n"
            f"Keep those listed elsewhere and extract their slides with the same {alike}: --extract_mode {kind} --slides "
            f"{','.join(others)}"
        )


def _again(path: Path, kind: str) -> str:
    program = "python preprocess/extract_features_uni.py"
    return keeping(f"{program} --extract_mode {kind} --slides {path.stem} (with its other flags)")


def _allow_open_files(count: int) -> None:
    """Let this process open so many more files, where only its own limit is lower, and not that of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and needed > soft:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
