"""Writing several caches of one slide at once, each in a thread of its own, from one stream of results."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np

from datasets.features.cache import write_cache
from datasets.features.encoding import EncodedSpots
from datasets.features.identity import CacheIdentity
from utils.locks import Held, check_free, lock, sweep

_BLOCKS_AHEAD = 2  # of each cache that wait for the disk: they bound the memory when it is slower than the encoder
_POLL_SECONDS = 0.2


class CacheWriters:
    """Caches that appear together once `wait` has returned; if the `with` block is left by an exception, none does.

    A cache that is made without the others is made in other batches, and its numbers differ in the last bits. So none appears
    where a writer fails, and those that a killed process has not named any more, the next start for that slide does, unless
    somebody has swept the folder meanwhile (`unnamed.py`).
    The end of the block does not wait for the disk, so that the next slide can begin meanwhile. Their locks are held until
    then; ValueError where another process makes one of them.
    locks: of the caches, where they are held already (`locked`).
    paths, identities: per kind.  spot_ids (N,), centers (N, 2): the spots of the slide, in the order of the blocks.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        identities: Mapping[str, CacheIdentity],
        spot_ids: Sequence[str],
        centers: np.ndarray,
        locks: ExitStack | None = None,
    ):
        self._queues: dict[str, queue.Queue] = {kind: queue.Queue(maxsize=_BLOCKS_AHEAD) for kind in paths}
        self._work = {
            kind: partial(
                write_cache,
                path,
                identities[kind],
                spot_ids,
                centers,
                self._blocks_of(self._queues[kind]),
                self._wait_for_the_others,
            )
            for kind, path in paths.items()
        }
        self._not_whole, self._is_given_up, self._turn = len(paths), False, threading.Condition()
        self._is_aborted, self._may_begin = False, threading.Event()
        self._locks = locked(paths.values()) if locks is None else locks
        self._pool = ThreadPoolExecutor(len(paths), thread_name_prefix="cache-writer")
        self._written: dict[str, Future] = {}

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

    def _wait_for_the_others(self) -> None:
        """Until all caches are whole; from then on nothing keeps any of them from appearing."""
        with self._turn:
            self._not_whole -= 1
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._not_whole == 0 or self._is_given_up)
            if self._not_whole > 0:
                raise _Aborted

    def _give_up(self) -> None:
        with self._turn:
            self._is_given_up = True
            self._turn.notify_all()

    def __enter__(self) -> CacheWriters:
        try:
            for kind, work in self._work.items():
                self._written[kind] = self._pool.submit(self._begin, work)
            self._may_begin.set()
        except BaseException:  # of a signal: those that have begun would wait for blocks for ever
            self._abort()
            raise
        return self

    def _begin(self, work: Callable[[], object]) -> None:
        """Write, once all writers are known: a pool does not wait for a thread whose start a signal has interrupted."""
        self._may_begin.wait()
        if self._is_aborted:
            return
        try:
            work()
        except BaseException:
            self._give_up()
            raise

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
        with self._locks:
            self._pool.shutdown(wait=True)
            errors = filter(None, [written.exception() for written in self._written.values()])
            error = min(errors, key=lambda error: isinstance(error, _Aborted), default=None)
            if error is not None:
                raise error

    def _abort(self) -> None:
        self._is_aborted = True  # no effect on a writer that is done
        self._may_begin.set()
        self._give_up()
        with self._locks:
            self._pool.shutdown(wait=True)


def check_nobody_makes(caches: Collection[Path]) -> None:
    """Raise ValueError if another process makes one of the caches."""
    for path in caches:
        check_free(*_lock_of(path))


def sweep_folders(caches: Collection[Path]) -> None:
    """Remove what ended processes left half written in the folders of caches."""
    for folder in sorted({path.parent for path in caches}):
        sweep(folder)


def sweep_lock(cache: Path) -> None:
    """Remove the lock that a killed process has left of a cache that it had completed: nobody will take it over."""
    with suppress(Held):
        check_free(*_lock_of(cache))


def locked(caches: Iterable[Path]) -> ExitStack:
    """Take the locks of caches; what was left of them half written, by whatever process, is removed.

    Raises Held, a ValueError, where another process makes one of them.
    """
    with locked_as_they_are(caches := list(caches)) as locks:
        for path in caches:
            sweep(path.parent, path.stem, is_locked=True)
        return locks.pop_all()


def locked_as_they_are(caches: Iterable[Path]) -> ExitStack:
    """Take the locks of caches and remove nothing. Raises Held as `locked`."""
    with ExitStack() as locks:
        for path in caches:
            locks.enter_context(lock(*_lock_of(path)))
        return locks.pop_all()


def _lock_of(path: Path) -> tuple[Path, str, str]:
    """Where the lock of a cache lies, what another process does that holds it, and what to do then."""
    return (
        path.with_name(f".{path.stem}.lock"),
        f"{path} is being made",
        "Wait until it is there, then run the same command again: what is there is kept. Or name other --slides.",
    )


class _Aborted(Exception):
    """Inside a writer: the caller or another writer has failed, so the file is thrown away."""
