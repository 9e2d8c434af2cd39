"""Damaged files through every reader of the program, each read in a process that may die of it.

What may happen to a damaged file: one error of ours that names it; or it is read and gives the numbers of the true file.
Numbers that differ are only right where the file *is* another one: formats without a checksum (a table of text, a matrix
of another program) are read a second time by an independent reader (`Reader.oracle`: the bare library, no check of
ours), and must give what that one finds in the same bytes. A format of ours with a checksum has no such excuse.
Everything else is a finding: another exception, a message without the file, a crash, more than 10 s or 2 GB.
"""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import random
import resource
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.soak.mutations import mutate

SECONDS, BYTES = 10, 2 * 2**30
LONGEST_MESSAGE = 2000
ACCEPTED, REFUSED = "read, the same numbers", "refused by an error of ours"
ANOTHER = "read, and legitimately another file"


@dataclass(frozen=True)
class Reader:
    """One format and what reads it.

    make:   writes the true file, with what it needs beside it, into a folder; returns the file that is damaged.
    read:   the program's own reader, path -> arrays, numbers, strings in lists, tuples and dicts.
    oracle: path -> the same from an independent reader; None for a format with a checksum.
    is_text: lines and numbers are damaged, too.  is_gzip: what is inside is damaged as often as the file itself.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    oracle: Callable[[Path], object] | None = None
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


def serve(pipe: multiprocessing.connection.Connection, readers: Sequence[Reader]) -> None:
    """Read what is asked for until the pipe closes; in a process of its own."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * BYTES, used + 2 * BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    by_name = {reader.name: reader for reader in readers}
    while True:
        try:
            name, path, with_oracle = pipe.recv()
        except EOFError:
            return
        reader = by_name[name]
        pipe.send(_attempt(reader.oracle if with_oracle else reader.read, Path(path), Path(path).parent))


def _attempt(read: Callable[[Path], object], path: Path, folder: Path) -> tuple[str, str]:
    """("value", digest) | ("ours", message) | ("finding", text)."""
    try:
        return "value", digest(read(path))
    except (ValueError, OSError) as error:
        message = str(error)
        if type(error).__module__ not in ("builtins", "utils.files") or getattr(error, "errno", None) is not None:
            return "finding", _told(error)
        if path.name not in message and folder.name not in message:
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
    """A process that reads; replaced when it dies or does not answer."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers, self._context = readers, multiprocessing.get_context("fork")
        self._start()

    def _start(self) -> None:
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(other, self._readers), daemon=True)
        self._process.start()
        other.close()

    def ask(self, reader: Reader, path: Path, with_oracle: bool = False) -> tuple[str, str]:
        self._pipe.send((reader.name, str(path), with_oracle))
        try:
            if self._pipe.poll(SECONDS):
                return self._pipe.recv()
            found = "finding", f"no answer after {SECONDS} s"
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            found = "finding", f"the process died (exit code {self._process.exitcode})"
        self.close()
        self._start()
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def fuzz(readers: Sequence[Reader], folder: Path, seed: int, files_each: int) -> Report:
    """Damage `files_each` copies of each reader's true file and read them."""
    report, worker = Report(), Worker(readers)
    for reader in readers:
        place = folder / f"{reader.name}_{seed}"
        place.mkdir(parents=True)
        path = reader.make(place)
        true_content = path.read_bytes()
        kind, true_digest = worker.ask(reader, path)
        assert kind == "value", f"{reader.name}: the true file is refused: {true_digest}"
        if reader.oracle is not None:
            assert worker.ask(reader, path, True)[1] == true_digest, f"{reader.name}: the independent reader differs"
        counter = report.counts.setdefault(reader.name, Counter())
        draw = random.Random(f"{seed} {reader.name}")
        for i in range(files_each):
            inside = reader.is_gzip and draw.random() < 0.5
            content = gzip.decompress(true_content) if inside else true_content
            done, damaged = mutate(content, draw, reader.is_text and (inside or not reader.is_gzip))
            path.write_bytes(gzip.compress(damaged, mtime=0) if inside else damaged)
            outcome = _judge(worker, reader, path, true_digest)
            counter[outcome.partition(":")[0] if outcome in (ACCEPTED, REFUSED, ANOTHER) else "FINDING"] += 1
            if outcome not in (ACCEPTED, REFUSED, ANOTHER):
                report.findings.append(f"{reader.name}, file {i} of seed {seed} ({done[:80]}): {outcome}")
        path.write_bytes(true_content)
    worker.close()
    return report


def _judge(worker: Worker, reader: Reader, path: Path, true_digest: str) -> str:
    kind, answer = worker.ask(reader, path)
    if kind == "ours":
        return REFUSED
    if kind == "finding":
        return answer
    if answer == true_digest:
        return ACCEPTED
    if reader.oracle is None:
        return "read with other numbers, although the format has a checksum"
    kind, independent = worker.ask(reader, path, True)
    return (
        ANOTHER
        if kind == "value" and independent == answer
        else f"read with other numbers than the file holds ({independent[:120]})"
    )
