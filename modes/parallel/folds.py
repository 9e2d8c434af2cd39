"""Who trains which fold: one process all of them, or several processes each what is free, by the locks in the run folder.

The processes need not know of each other: those of torchrun, jobs of a cluster, and what somebody starts by hand an hour
later all find in the run folder what is done and what is in work. The lock of a process that has died is free.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from modes.prediction.summary import finish_run
from utils.checkpoint import is_complete
from utils.cli import say
from utils.locks import Held, check_free, lock
from utils.parallel.team import Team
from utils.trained_fold import SplitRecord

Found = TypeVar("Found")


@contextmanager
def claimed_folds(
    run_dir: Path, folds: Sequence[SplitRecord], team: Team, *, one_by_one: bool
) -> Iterator[Iterable[SplitRecord]]:
    """Keep other processes from what is trained in the block; gives the folds to train.

    one_by_one: others work in the same run; each fold is claimed when its turn comes, and left out if it is in work.
    Otherwise all folds that are not complete are claimed at once, and ValueError names the process that is at one of them.
    """
    if one_by_one:
        with closing(_free_ones(run_dir, folds)) as free:
            yield free
        return
    with ExitStack() as locks:
        for fold in folds:
            if team.is_first and not is_complete(run_dir / fold.folder):
                locks.enter_context(lock(*_lock_of(run_dir, fold)))
        yield folds


@contextmanager
def held_folds(folders: Iterable[Path]) -> Iterator[None]:
    """Keep other processes from folds that are scored again in the block; ValueError names one that is at one of them."""
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(lock(*_lock_at(folder, str(folder))))
        yield


def check_nobody_works_on(run_dir: Path, folds: Sequence[SplitRecord]) -> None:
    """Raise ValueError as `claimed_folds`, before anything is read for these folds."""
    for fold in folds:
        check_free(*_lock_of(run_dir, fold))


def in_turn(run_dir: Path, team: Team, work: Callable[[], Found]) -> Found:
    """Do what concerns the whole run: by the first process of a team, and not while another does so in the same run."""

    def locked() -> Found:
        with lock(run_dir / ".run.lock", f"{run_dir} is being written to", "Repeat the command later.", waits=True):
            return work()

    return team.by_first(locked)


def finish(run_dir: Path, folds: Sequence[SplitRecord], with_report: bool) -> str:
    """Write summary and report if all of these folds are complete, else leave it to who is still at one; gives what to say."""
    waits_for = [fold.title for fold in folds if not is_complete(run_dir / fold.folder)]
    if waits_for:
        return f"Still in work: {', '.join(waits_for)}. The process that ends last writes the summary."
    return finish_run(run_dir, with_report)


def _free_ones(run_dir: Path, folds: Sequence[SplitRecord]) -> Generator[SplitRecord]:
    for fold in folds:
        try:
            with lock(*_lock_of(run_dir, fold)):
                yield fold
        except Held:
            say(f"{fold.title}: another process is at it.")


def _lock_of(run_dir: Path, fold: SplitRecord) -> tuple[Path, str, str]:
    """Where the lock of a fold lies, what another process does that holds it, and what to do then."""
    return _lock_at(run_dir / fold.folder, f"{fold.title} of {run_dir}")


def _lock_at(folder: Path, title: str) -> tuple[Path, str, str]:
    return (
        folder.with_name(f".{folder.name}.lock"),
        f"{title} is being trained or tested",
        "Wait until it has ended, then repeat the command (a training: with --resume); or take other folds.",
    )
