"""The figures of many folds at once: drawing is Python on one core, so the folds are shared among processes.

    python -m evaluation.report.drawing LOGS/fold_0 LOGS/fold_1 --count 2 --genes GENE

What a process cannot draw is left to whoever needs the figures next, who draws it again and meets the error itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.fold_figures import figures_of, figures_on_disk

ROOT = Path(__file__).resolve().parents[2]
LEAST_FOLDS = 3  # with fewer, starting a process takes as long as drawing


def draw_side_by_side(
    fold_dirs: Sequence[Path], *, genes: Sequence[str] = (), count: int = 2, most_processes: int | None = None
) -> int:
    """Draw the figures that are missing or out of date, as `figures_of` would; returns the number of processes used.

    genes, count: as in `write_figures`. most_processes: default: the cores of this process.
    """
    todo = [folder.resolve() for folder in fold_dirs if figures_on_disk(folder, genes=genes, count=count) is None]
    number = min(most_processes or _cores(), len(todo))
    if number < 2 or len(todo) < LEAST_FOLDS:
        return 0
    wishes = ["--count", str(count), *(f"--genes={gene}" for gene in genes)]
    command = [sys.executable, "-m", "evaluation.report.drawing", *wishes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for i in range(number):
            share = [*command, "--", *map(str, todo[i::number])]
            processes.append(
                subprocess.Popen(share, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
        for process in processes:
            process.wait()
    finally:
        for process in processes:  # after an interruption nobody draws on
            process.kill()
            process.wait()
    return number


def _cores() -> int:
    """Cores that this process may use; all of the machine where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="+", type=Path, help="folders of folds")
    parser.add_argument("--count", type=int, default=2, help="as many of the best and of the worst genes")
    parser.add_argument("--genes", action="append", default=[], help="a chosen gene; may be given several times")
    arguments = parser.parse_args(argv)
    for folder in arguments.folds:
        figures_of(folder, genes=arguments.genes, count=arguments.count)


if __name__ == "__main__":
    main()
