"""Random rows of the token caches of many slides, read straight from the files into the buffer of a batch.

A token cache keeps the encoder's tokens of one spot in one view as one uncompressed chunk. The places of all chunks are
asked for once; after that a batch is a list of (file, offset) pairs, read in the order of the disk by a few threads with
preadv. HDF5 itself is not involved any more, and neither is its lock.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.features.cache import CacheIdentity, identity_of, opened

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
        identities, shapes, offsets = zip(*[_chunk_table(path) for path in self._paths])
        _check_alike(self._paths, identities, shapes)
        self.identity: CacheIdentity = identities[0]
        self.num_views, self.num_tokens, self.dim = shapes[0][1:]
        self.dtype = _TORCH_TYPES[self.identity.dtype]
        self._offsets = np.concatenate(offsets)  # (rows, views) bytes into the file
        self._file_of_row = np.repeat(np.arange(len(self._paths)), [len(table) for table in offsets])
        self.num_rows = len(self._offsets)
        self._chunk_bytes = self.num_tokens * self.dim * self.dtype.itemsize
        self.nbytes = self.num_rows * self.num_views * self._chunk_bytes
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]

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
            self._read_part(order, files, offsets, buffer)
        else:
            pool = self._threads()
            for done in [pool.submit(self._read_part, part, files, offsets, buffer) for part in parts]:
                done.result()
        return out

    def _new_buffer(self, count: int) -> Tensor:
        shape = (count, self.num_tokens, self.dim)
        if self._is_pinned:
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        # NumPy asks for huge pages, PyTorch does not: touching hundreds of MB for the first time is then far cheaper.
        return torch.from_numpy(np.empty(shape, dtype=self.identity.dtype))

    def close(self) -> None:
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

    def _read_part(self, part: np.ndarray, files: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> None:
        """Fill the rows `part` of the buffer; preadv lets other threads run while it waits."""
        for place in part:
            target, position, start = memoryview(buffer[place]).cast("B"), 0, int(offsets[place])
            while position < self._chunk_bytes:
                count = os.preadv(self._descriptors[files[place]], [target[position:]], start + position)
                if count == 0:
                    raise ValueError(
                        f"{self._paths[files[place]]} ends in the middle of its tokens; it was cut while in use. "
                        "Extract it again with --extract_mode token --overwrite."
                    )
                position += count


def _chunk_table(path: Path) -> tuple[CacheIdentity, tuple[int, ...], np.ndarray]:
    """What a token cache says about itself, the shape of its tokens, and where each (spot, view) lies in the file."""
    with opened(path) as file:
        identity = identity_of(file, path)
        if identity.kind != "token":
            raise ValueError(f"{path} is a cache of kind {identity.kind!r}; expected 'token'.")
        tokens = file["tokens"]
        table = np.full(tokens.shape[:2], -1, dtype=np.int64)

        def note(chunk) -> None:
            table[chunk.chunk_offset[:2]] = chunk.byte_offset

        if tokens.chunks == (1, 1, *tokens.shape[2:]) and tokens.compression is None:
            tokens.id.chunk_iter(note)
        if (table < 0).any():
            raise ValueError(
                f"{path}: {int((table < 0).sum())} of {table.size} token blocks are missing or not stored plainly, one "
                "per spot and view. Extract it again with --extract_mode token --overwrite."
            )
        return identity, tokens.shape, table


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
