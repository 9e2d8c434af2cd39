"""Random rows of the token caches of many slides, read straight from the files into the buffer of a batch.

A token cache keeps the encoder's tokens of one spot in one view as one block. The places of all blocks are asked for once;
after that a batch is a list of (file, offset) pairs, read in the order of the disk by a few threads with preadv. HDF5 itself
is not involved any more, and neither is its lock. A block is compared with its checksum when it is first read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64

from datasets.features.cache import opened
from datasets.features.identity import CacheIdentity
from datasets.features.sealed import checksums_of, is_finite

_EXTRACT = "Extract it again with --extract_mode token --overwrite."
_TORCH_TYPES = {"float16": torch.float16, "float32": torch.float32}
_SAME_IN_ALL = ("kind", "encoder", "encoder_sha256", "patch_size", "views", "dtype", "token_pool", "precision")


class TokenStore:
    """The tokens of all spots of the slides whose caches are `paths`; row r counts through them in that order.

    num_rows, num_views, num_tokens (T), dim (D), dtype (torch), nbytes (on disk), identity (of the first cache).
    Raises ValueError that lists every cache that differs from the first or is damaged.
    """

    def __init__(self, paths: Sequence[str | Path], *, num_threads: int = 4, is_pinned: bool = False):
        """is_pinned: give tokens in page-locked memory, for a CUDA device to copy from."""
        assert paths, "TokenStore needs at least one cache"
        self._paths = [Path(path) for path in paths]
        self._num_threads, self._is_pinned = max(1, num_threads), is_pinned
        self._descriptors: list[int] = []
        self._pool: ThreadPoolExecutor | None = None
        blocks = [_blocks_of(path) for path in self._paths]
        _check_alike(self._paths, [slide.identity for slide in blocks], [slide.shape for slide in blocks])
        self.identity: CacheIdentity = blocks[0].identity
        self.num_views, self.num_tokens, self.dim = blocks[0].shape[1:]
        self.dtype = _TORCH_TYPES[self.identity.dtype]
        self._offsets = np.concatenate([slide.places for slide in blocks])  # (rows, views) bytes into the file
        self._file_of_row = np.repeat(np.arange(len(self._paths)), [len(slide.places) for slide in blocks])
        self._checksums = [slide.checksums for slide in blocks]
        self._first_row = np.cumsum([0, *(len(slide.places) for slide in blocks)])
        self._is_verified = np.zeros(self._offsets.shape, dtype=bool)
        self.num_rows = len(self._offsets)
        self._chunk_bytes = self.num_tokens * self.dim * self.dtype.itemsize
        self.nbytes = self.num_rows * self.num_views * self._chunk_bytes
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]

    def digest(self, file: int) -> str | None:
        """Digest the checksums of the tokens of one cache, no token is read; None for a cache that bears none."""
        checksums = self._checksums[file]
        return None if checksums is None else xxh3_64(np.ascontiguousarray(checksums).view(np.uint8).data).hexdigest()

    def read(self, rows: Tensor | np.ndarray, views: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """(B, T, D): for each b the tokens of spot rows[b] in dihedral view views[b], in that order.

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

    def _new_buffer(self, count: int) -> Tensor:
        shape = (count, self.num_tokens, self.dim)
        if self._is_pinned:
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        # NumPy asks for huge pages, PyTorch does not: touching hundreds of MB for the first time is then far cheaper.
        return torch.from_numpy(np.empty(shape, dtype=self.identity.dtype))

    def close(self) -> None:
        """Let files and threads go."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="token-reader")
        return self._pool

    def _check_request(self, rows: np.ndarray, views: np.ndarray) -> None:
        if rows.shape != views.shape or rows.ndim != 1:
            raise ValueError(f"One view is needed for each row; got {rows.shape} rows and {views.shape} views.")
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise ValueError(f"Rows {rows.min()} to {rows.max()} were asked for, the caches hold {self.num_rows}.")
        if len(views) and not (views.min() >= 0 and views.max() < self.num_views):
            raise ValueError(
                f"View {views.max()} was asked for, the token caches hold {self.num_views} of the 8. Train without "
                "augmentation, or extract with --views 8."
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
                    raise ValueError(
                        f"{self._paths[file]} ends in the middle of its tokens; it was cut while in use. {_EXTRACT}"
                    )
                position += count
            if not self._is_verified[row, view]:  # once is enough: the file is held open
                self._verify(file, row, view, buffer[place])

    def _verify(self, file: int, row: int, view: int, block: np.ndarray) -> None:
        """Compare a block with its checksum; without one, its numbers must be finite."""
        checksums, place = self._checksums[file], row - self._first_row[file]
        is_right = is_finite(block) if checksums is None else checksums_of(block[None], 1)[0] == checksums[place, view]
        if not is_right:
            with opened(self._paths[file]) as cache:
                spot = cache.spot_ids[place]
            what = "not finite" if checksums is None else "not what was written (checksum)"
            raise ValueError(
                f"{self._paths[file]} is damaged: the tokens of spot {spot} in view {view} are {what}. {_EXTRACT}"
            )
        self._is_verified[row, view] = True


@dataclass(frozen=True)
class _Blocks:
    """The tokens of a slide: shape (N, V, T, D), and of each (spot, view) the place in the file and the checksum, if any."""

    identity: CacheIdentity
    shape: tuple[int, ...]
    places: np.ndarray
    checksums: np.ndarray | None


def _blocks_of(path: Path) -> _Blocks:
    with opened(path) as cache:
        if cache.identity.kind != "token":
            raise ValueError(f"{path} is a cache of kind {cache.identity.kind!r}; expected 'token'.")
        tokens = cache.numbers
        if tokens.chunks is None:
            block_bytes = math.prod(tokens.shape[2:]) * tokens.dtype.itemsize
            numbers = np.arange(math.prod(tokens.shape[:2]), dtype=np.int64).reshape(tokens.shape[:2])
            places = tokens.id.get_offset() + block_bytes * numbers
        else:
            places = _chunk_table(path, tokens)
        return _Blocks(cache.identity, tokens.shape, places, cache.checksums)


def _chunk_table(path: Path, tokens: h5py.Dataset) -> np.ndarray:
    """Where each (spot, view) lies in a cache of an earlier version, which has a chunk for each."""
    table = np.full(tokens.shape[:2], -1, dtype=np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        table[chunk.chunk_offset[:2]] = chunk.byte_offset

    if tokens.chunks == (1, 1, *tokens.shape[2:]) and tokens.compression is None:
        tokens.id.chunk_iter(note)
    if (table < 0).any():
        raise ValueError(
            f"{path}: {int((table < 0).sum())} of {table.size} token blocks are missing or not stored plainly, one "
            f"per spot and view. {_EXTRACT}"
        )
    return table


def _check_alike(paths: Sequence[Path], identities: Sequence[CacheIdentity], shapes: Sequence[tuple[int, ...]]) -> None:
    problems = []
    for path, identity, shape in zip(paths[1:], identities[1:], shapes[1:]):
        differences = [
            f"{name.replace('_', ' ')} {getattr(identity, name)} instead of {getattr(identities[0], name)}"
            for name in _SAME_IN_ALL
            if getattr(identity, name) != getattr(identities[0], name)
        ]
        if not differences and shape[1:] != shapes[0][1:]:
            differences = [f"tokens of shape {shape[1:]} instead of {shapes[0][1:]}"]
        if differences:
            problems.append(f"- {path}: {', '.join(differences)}")
    if problems:
        raise ValueError(
            f"The token caches do not belong together; compared with {paths[0]}:\n" + "\n".join(problems) + "\n"
            "Extract them alike: --extract_mode token --overwrite with the same --encoder, --views, --dtype, --token_pool."
        )
