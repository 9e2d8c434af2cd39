"""Programs run in processes that can be killed at a moment or at a file event, and the comparison of what they leave."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from tests.soak.fuzz import digest

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What tells when or on what a file was made, and nothing of the result.
_UNEQUAL = ("versions.json", "report.html", ".lock")


@dataclass(frozen=True)
class Job:
    """A command line. program: the module with `main(argv)`, as `main` or `preprocess.extract_features_uni`."""

    program: str
    arguments: tuple[str, ...]

    def with_flags(self, *flags: str) -> Job:
        return Job(self.program, (*self.arguments, *flags))


@dataclass(frozen=True)
class Ended:
    """How a job ended. status: exit status, negative for a signal. events: file events below the watched folder."""

    status: int
    output: str
    events: int
    seconds: float


def run_job(
    job: Job, folder: Path, *, kill_at: int | None = None, after: float | None = None, by: int = signal.SIGKILL
) -> Ended:
    """Run a job in a forked process and wait for it.

    folder: its files are watched. kill_at: the process sends itself the signal `by` before that file event (from 1) below
    `folder`. after: seconds after which it gets the signal from here.
    """
    started = time.monotonic()
    process = start_job(job, folder, kill_at=kill_at, by=by)
    if after is not None:
        timer = threading.Timer(after, lambda: process.send(by))
        timer.start()
    status = process.wait()
    if after is not None:
        timer.cancel()
    return Ended(status, process.output(), process.events(), time.monotonic() - started)


@dataclass
class Started:
    """A forked process with its log and its count of file events."""

    pid: int
    log: Path
    counter: Path
    status: int | None = None

    def send(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self) -> int:
        if self.status is None:
            _, found = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(found)
        return self.status

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def events(self) -> int:
        return self.counter.stat().st_size


def start_job(job: Job, folder: Path, *, kill_at: int | None = None, by: int = signal.SIGKILL) -> Started:
    """Fork a process that runs a job; its file events below `folder` are counted."""
    marks = folder.with_name(f"{folder.name}_jobs")
    marks.mkdir(exist_ok=True)
    stem = f"{time.monotonic_ns()}"
    started = Started(0, marks / f"{stem}.log", marks / f"{stem}.events")
    started.counter.touch()
    started.pid = os.fork()
    if started.pid == 0:
        _work(job, folder, started, kill_at, by)
    return started


def _work(job: Job, folder: Path, started: Started, kill_at: int | None, by: int) -> None:
    """What the forked process does; it never returns."""
    gc.freeze()  # what was there before the fork is not looked through, and so not copied, again and again
    log = os.open(started.log, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # pytest has its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counter = os.open(started.counter, os.O_WRONLY | os.O_APPEND)
    sys.addaudithook(_hook(folder, counter, kill_at, by))
    status = 70
    try:
        from utils.cli import run

        run(lambda: importlib.import_module(job.program).main(list(job.arguments)))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        status = 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _hook(folder: Path, counter: int, kill_at: int | None, by: int) -> Callable[[str, tuple], None]:
    numbers, below = itertools.count(1), f"{folder}{os.sep}"

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(below):
            return
        number = next(numbers)  # one step: no other thread comes in between
        os.write(counter, b".")
        if number == kill_at:
            os.kill(os.getpid(), by)

    return hook


def contents(folder: Path) -> dict[str, str]:
    """{relative path: digest} of every file below a folder, hidden ones too; what cannot be equal has an empty digest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        if "tfevents" in name:
            name = str(Path(name).parent / "tfevents")
        is_temporary = path.name.startswith(".")  # perhaps half written: its being there is what counts
        found[name] = "" if is_temporary or "tfevents" in name or name.endswith(_UNEQUAL) else _digest_of(path)
    return found


def _digest_of(path: Path) -> str:
    if path.suffix == ".pt":
        return digest(torch.load(path, weights_only=True))
    if path.suffix in (".h5", ".h5ad"):
        with h5py.File(path, "r") as file:
            return digest(_tree(file))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tree(group: h5py.Group) -> dict:
    tree: dict = {"attributes": {key: np.asarray(value) for key, value in group.attrs.items()}}
    for name, entry in group.items():
        tree[name] = _tree(entry) if isinstance(entry, h5py.Group) else np.asarray(entry[()])
    return tree


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """One sentence for each file that is missing, left over or different."""
    missing = [f"{name} is missing" for name in before if name not in after]
    left = [f"{name} is left over" for name in after if name not in before]
    return [*missing, *left, *(f"{name} differs" for name in before if name in after and before[name] != after[name])]


def kill_chain(
    start: Job, again: Job, folder: Path, expected: dict[str, str], kills: Sequence[dict], description: str
) -> list[str]:
    """Start a job, kill it, repeat it (`again`) with the next kill, at last to its end; what is left must be `expected`."""
    first = True
    for kill in kills:
        ended = run_job(start if first else again, folder, **kill)
        first = False
        if ended.status == 0:
            if "kill_at" in kill and len(kills) > 1:
                return [f"{description}: had ended before a kill"]
            break
        if ended.status not in (-signal.SIGKILL, -signal.SIGTERM, 130, 143):
            return [f"{description}: ended with {ended.status}: {ended.output[-400:]}"]
        hidden = [name for name in contents(folder) if Path(name).name.startswith(".") and name not in expected]
        left = [name for name in hidden if not name.endswith(".lock")]  # a lock is taken over
        if left and ended.status in (130, 143):
            return [f"{description}: {name} is left over after a signal" for name in left]
    ended = run_job(again, folder)
    if ended.status != 0:
        return [f"{description}: the repeated command ended with {ended.status}: {ended.output[-400:]}"]
    return [f"{description}: {line}" for line in differences(expected, contents(folder))]
