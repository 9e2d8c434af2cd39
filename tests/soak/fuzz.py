"""Damaged files through every reader of the program, each read in a process that may die of it.

What may happen to a damaged file: one error of ours that names it; or it is read and gives the numbers of the true file.
Numbers that differ are only right where the file *is* another one: formats without a checksum (a table of text, a matrix
of another program) are read a second time by an independent reader (`Reader.oracles`: the bare library, no check of
ours), and must give what that one finds in the same bytes. A format of ours with a checksum has no such excuse.
Everything else is a finding: another exception, a message without the file, a crash, more than 10 s or 2 GB.

Only the process that reads touches the formats: it makes the true file, too.
"""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import random
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.soak.mutations import mutate
from utils.files import UnreadableFile, UnwritableFile
from utils.untrusted import hdf5

SECONDS, BYTES = 10, 2 * 2**30  # of the processor, so that a busy machine finds nothing of its own
PATIENCE = 2.0  # seconds, instead of 6, with what HDF5 never ends reading: of the damaged files every twentieth
LONGEST_MESSAGE = 2000
ACCEPTED, REFUSED = "read, the same numbers", "refused by an error of ours"
ANOTHER = "read, and legitimately another file"
FINDING = "finding"
_OURS = (ValueError, FileNotFoundError, UnreadableFile, UnwritableFile)


@dataclass(frozen=True)
class Reader:
    """One format and what reads it.

    make:    writes the true file, with what it needs beside it, into a folder; returns the file that is damaged.
    read:    the program's own reader, path -> arrays, numbers, strings in lists, tuples and dicts.
    oracles: path -> the same from independent readers, of which one must agree; none for a format with a checksum.
    is_text: lines and numbers are damaged, too.  is_gzip: what is inside is damaged as often as the file itself.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    oracles: tuple[Callable[[Path], object], ...] = ()
    is_text: bool = False
    is_gzip: bool = False


@dataclass
class Report:
    """Outcomes counted by reader, and everything that should not have happened."""

    counts: dict[str, Counter] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def files(self) -> int:
        return sum(sum(counter.values()) for counter in self.counts.values())


def digest(value: object) -> str:
    """A hash of nested arrays, numbers and strings: equal values, equal hash."""
    sums = hashlib.sha256()
    _add(value, sums)
    return sums.hexdigest()


def _add(value: object, sums: hashlib._Hash) -> None:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(str(key), sums)
            _add(value[key], sums)
    elif isinstance(value, list | tuple):
        sums.update(f"[{len(value)}".encode())
        for entry in value:
            _add(entry, sums)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        values = value.astype(np.float64)
        sums.update(str(values.shape).encode() + np.where(np.isnan(values), np.nan, values + 0.0).tobytes())
    elif isinstance(value, np.ndarray):
        _add([str(entry) for entry in value.ravel()], sums)
    elif isinstance(value, bool | int | float | np.number):
        sums.update(repr(float(value)).encode())
    else:
        sums.update(f"<{value}>".encode())


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Do what is asked for until the pipe closes; in a process of its own."""
    from tests.soak.readers import READERS

    hdf5._SECONDS = PATIENCE
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    used = _peak()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * BYTES, used + 2 * BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    by_name = {reader.name: reader for reader in READERS}
    pipe.send(("value", ""))
    while True:
        try:
            name, path, what = pipe.recv()
        except EOFError:
            return
        reader = by_name[name]
        if what == "make":
            pipe.send(("value", str(reader.make(path))))
            continue
        outcome = _attempt(reader.read if what == "read" else reader.oracles[what], path)
        if what == "read" and (more := _peak() - used) > BYTES:
            outcome = "finding", f"{more / 1e9:.1f} GB of memory"
        pipe.send(outcome)


def _peak() -> int:
    """The most bytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _attempt(read: Callable[[Path], object], path: Path) -> tuple[str, str]:
    """("value", digest) | ("ours", message) | ("finding", text)."""
    try:
        return "value", digest(read(path))
    except (ValueError, OSError) as error:
        message = str(error)
        if type(error) not in _OURS or getattr(error, "errno", None) is not None:
            return "finding", _told(error)
        if path.name not in message and str(path.parent) not in message:
            return "finding", f"a message that does not name the file: {message[:200]}"
        if len(message) > LONGEST_MESSAGE:
            return "finding", f"a message of {len(message)} characters: {message[:100]}"
        return "ours", message
    except BaseException as error:
        return "finding", _told(error)


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:160]}"


class Worker:
    """A process that reads; replaced when it dies or does not answer. start: of multiprocessing's methods."""

    def __init__(self, start: str) -> None:
        self._context = multiprocessing.get_context(start)
        if start == "forkserver":
            self._context.set_forkserver_preload(["tests.soak.readers"])
        self.slowest = 0.0  # seconds of the processor
        self._start()

    def _start(self) -> None:
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(other,), daemon=False)
        self._process.start()
        other.close()
        self._pipe.recv()

    def ask(self, reader: Reader, path: Path, what: str | int) -> tuple[str, str]:
        """what: "make" (path is the folder), "read", or the index of an oracle."""
        began, until = self._seconds(), time.monotonic() + 30 * SECONDS
        self._pipe.send((reader.name, path, what))
        try:
            while not self._pipe.poll(1):
                if self._seconds() - began > SECONDS or time.monotonic() > until:
                    raise TimeoutError
            found = self._pipe.recv()
            self.slowest = max(self.slowest, self._seconds() - began)
            if not found[1].endswith("GB of memory"):
                return found
        except TimeoutError:
            found = "finding", f"no answer after {SECONDS} s"
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            found = "finding", f"the process died (exit code {self._process.exitcode})"
        self.close()
        self._start()
        return found

    def _seconds(self) -> float:
        return hdf5.cpu_seconds(self._process.pid) or 0.0

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def fuzz(
    readers: Sequence[Reader],
    folder: Path,
    seed: int,
    files_each: int,
    say: Callable[[str], object] = str,
    start: str = "forkserver",
) -> Report:
    """Damage `files_each` copies of each reader's true file and read them.

    say: is told of each reader that is done.  start: "fork" where this process has the readers already.
    """
    report, worker = Report(), Worker(start)
    for reader in readers:
        started, known = time.monotonic(), len(report.findings)
        _fuzz_one(
            reader, folder / f"{re.sub(r'[^a-zA-Z0-9]+', '_', reader.name)}_{seed}", seed, files_each, report, worker
        )
        counter = report.counts[reader.name]
        say(f"{reader.name}: {dict(counter)}, {time.monotonic() - started:.0f} s")
        for finding in report.findings[known:]:
            say(f"* {finding}")
    worker.close()
    report.slowest = worker.slowest
    return report


def _fuzz_one(reader: Reader, place: Path, seed: int, files_each: int, report: Report, worker: Worker) -> None:
    place.mkdir(parents=True)
    path = Path(worker.ask(reader, place, "make")[1])
    true_content = path.read_bytes()
    kind, true_digest = worker.ask(reader, path, "read")
    assert kind == "value", f"{reader.name}: the true file is refused: {true_digest}"
    for i in range(len(reader.oracles)):
        found = worker.ask(reader, path, i)
        assert found[1] == true_digest, f"{reader.name}: independent reader {i} differs on the true file: {found}"
    counter = report.counts.setdefault(reader.name, Counter())
    draw = random.Random(f"{seed} {reader.name}")
    for i in range(files_each):
        inside = reader.is_gzip and draw.random() < 0.5
        content = gzip.decompress(true_content) if inside else true_content
        done, damaged = mutate(content, draw, reader.is_text and (inside or not reader.is_gzip))
        path.write_bytes(gzip.compress(damaged, mtime=0) if inside else damaged)
        outcome = _judge(worker, reader, path, true_digest)
        is_known = outcome in (ACCEPTED, REFUSED, ANOTHER)
        counter[outcome if is_known else FINDING] += 1
        if not is_known:
            report.findings.append(f"{reader.name}, file {i} of seed {seed} ({done[:80]}): {outcome}")
    path.write_bytes(true_content)


def _judge(worker: Worker, reader: Reader, path: Path, true_digest: str) -> str:
    kind, answer = worker.ask(reader, path, "read")
    if kind == "ours":
        return REFUSED
    if kind == "finding":
        return answer
    if answer == true_digest:
        return ACCEPTED
    if not reader.oracles:
        return "read with other numbers, although the format has a checksum"
    independent = [worker.ask(reader, path, i) for i in range(len(reader.oracles))]
    if any(found == ("value", answer) for found in independent):
        return ANOTHER
    return f"read with other numbers than the file holds ({'; '.join(found[1][:120] for found in independent)})"
