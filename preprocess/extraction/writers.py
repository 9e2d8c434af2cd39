"""Writing several caches of one slide at once, each in a thread of its own, from one stream of results."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datasets.features.cache import write_cache
from datasets.features.encoding import EncodedSpots
from datasets.features.identity import CacheIdentity

_BLOCKS_AHEAD = 2  # of each cache that wait for the disk: they bound the memory when it is slower than the encoder
_POLL_SECONDS = 0.2


class CacheWriters:
    """Caches that appear once `wait` has returned; if the `with` block is left by an exception, none does.

    The end of the block does not wait for the disk, so that the next slide can begin meanwhile.
    paths, identities: per kind.  spot_ids (N,), centers (N, 2): the spots of the slide, in the order of the blocks.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        identities: Mapping[str, CacheIdentity],
        spot_ids: Sequence[str],
        centers: np.ndarray,
    ):
        self._queues: dict[str, queue.Queue] = {kind: queue.Queue(maxsize=_BLOCKS_AHEAD) for kind in paths}
        self._is_aborted = False
        self._pool = ThreadPoolExecutor(len(paths), thread_name_prefix="cache-writer")
        self._written: dict[str, Future] = {
            kind: self._pool.submit(
                write_cache, path, identities[kind], spot_ids, centers, self._blocks_of(self._queues[kind])
            )
            for kind, path in paths.items()
        }

    def put(self, spots: EncodedSpots) -> None:
        """Hand one batch to all writers; waits while a writer is behind, and raises what a writer has raised."""
        for kind, blocks in self._queues.items():
            self._put(kind, blocks, getattr(spots, kind))

    def _put(self, kind: str, blocks: queue.Queue, block: np.ndarray | None) -> None:
        while True:
            if self._written[kind].done():
                self._written[kind].result()
            try:
                return blocks.put(block, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def _blocks_of(self, blocks: queue.Queue) -> Iterator[np.ndarray]:
        """The blocks of one cache until None; raises once the `with` block has failed, which discards the file."""
        while True:
            try:
                block = blocks.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                block = ()
            if self._is_aborted:
                raise _Aborted
            if block is None:
                return
            if len(block):
                yield block

    def __enter__(self) -> CacheWriters:
        return self

    def __exit__(self, kind_of_error, *_) -> None:
        if kind_of_error is not None:
            return self._abort()
        try:
            for kind, blocks in self._queues.items():
                self._put(kind, blocks, None)
        except BaseException:
            self._abort()
            raise

    def wait(self) -> None:
        """Wait until the files are there, after the `with` block; raises what a writer has raised.

        All writers have their blocks by then, so that also an interruption leaves whole files.
        """
        self._pool.shutdown(wait=True)
        for written in self._written.values():
            written.result()

    def _abort(self) -> None:
        self._is_aborted = True  # no effect on a writer that is done
        self._pool.shutdown(wait=True)


class _Aborted(Exception):
    """Inside a writer: the caller has failed, so the file is thrown away."""
