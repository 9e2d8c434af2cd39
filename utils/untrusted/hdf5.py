"""HDF5 files from elsewhere: their structure is walked through by a process that may die of it, and only then opened."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from utils.files import IF_DAMAGED, UnreadableFile, reading

_SCRIPT = Path(__file__).with_name("walk_hdf5.py")
_SECONDS = 6.0  # of the processor; on a busy machine, or a slow disk, a whole file takes longer than that
_WAITING = 20  # so many times longer at most


class _Walker:
    """The process that walks through files, started when it is first needed and again after it died or was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock, self._owner = threading.Lock(), os.getpid()

    def problem_of(self, path: Path) -> str | None:
        """What is wrong with the structure of a file, or None."""
        with self._lock:
            # A fork of this process must not talk to that of its parent.
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._process, self._owner = _started(), os.getpid()
            try:
                answer = _answer(self._process, path)
            except BaseException:  # of Ctrl-C, too: its answer must not be taken for that about the next file
                self._process.kill()
                raise
            if answer is not None:
                return json.loads(answer)
            self._process.kill()
            self._process.communicate()
            self._process = None
            return f"HDF5 crashes on it, or finds no end of it within {_SECONDS:.0f} seconds"


def _started() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    _answer(process, _SCRIPT, seconds=60)  # what Python takes to start is no fault of the first file
    return process


def _answer(process: subprocess.Popen[str], path: Path, seconds: float | None = None) -> str | None:
    """The line with which the process answers; None if it died or gave none in time."""
    assert process.stdin is not None and process.stdout is not None
    seconds = _SECONDS if seconds is None else seconds
    began, until = cpu_seconds(process.pid), time.monotonic() + _WAITING * seconds
    process.stdin.write(json.dumps(str(path.absolute())) + "\n")
    process.stdin.flush()
    left = seconds
    while left > 0 and time.monotonic() < until:
        if select.select([process.stdout], [], [], left)[0]:
            return process.stdout.readline() or None
        used = cpu_seconds(process.pid)
        left = 0.0 if began is None or used is None else max(seconds - (used - began), 0.0)
    return None


def cpu_seconds(pid: int) -> float | None:
    """Return the seconds of the processor that a process has used; None where the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


_WALKER = _Walker()


def probe_hdf5(path: str | Path, what: str, remedy: str = IF_DAMAGED) -> None:
    """Check the structure of an HDF5 file without risk to this process; costs some milliseconds a file.

    what, remedy: as in `reading`.
    Raises ValueError naming the file if HDF5 crashes on it or reads for ever, if it is shorter or longer than it says,
    holds links or numbers that lie in other files, or declares data that it does not hold.
    """
    problem = _WALKER.problem_of(Path(path))
    if problem is not None:
        raise UnreadableFile(f"{path} cannot be read as {what}: {problem}. {remedy}")


@contextmanager
def opened_hdf5(path: str | Path, what: str, remedy: str = IF_DAMAGED) -> Iterator[h5py.File]:
    """Open an HDF5 file from elsewhere for reading, once `probe_hdf5` has found its structure whole.

    Raises FileNotFoundError, or ValueError also for whatever h5py raises while the caller reads.
    """
    with reading(path, what, remedy):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; expected {what}.")
        probe_hdf5(path, what, remedy)
        with h5py.File(path, "r") as file:
            yield file
