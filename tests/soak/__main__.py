"""python -m tests.soak --seed 0 --files 25000: everything that takes long, with a Markdown table of what happened.

Exit status 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tensors are small, and forked processes must not inherit threads

from tests.soak.fuzz import ACCEPTED, ANOTHER, FINDING, REFUSED, fuzz
from tests.soak.trials import NAMES, disk, kills, races

PARTS = ("fuzz", "kills", "disk", "races")


def run_fuzz(folder: Path, seed: int, files: int) -> list[str]:
    from tests.soak.readers import READERS

    report = fuzz(READERS, folder, seed, -(-files // len(READERS)), say)
    columns = (REFUSED, ACCEPTED, ANOTHER, FINDING)
    say(f"\n| format | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    total = [sum(counter[name] for counter in report.counts.values()) for name in columns]
    for name, numbers in [*((n, [c[k] for k in columns]) for n, c in report.counts.items()), ("all", total)]:
        say(f"| {name} | {' | '.join(map(str, numbers))} |")
    say(f"\nslowest file: {report.slowest:.1f} s of the processor")
    return report.findings


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--files", type=int, default=25000, help="damaged files in all")
    arguments.add_argument("--kills", type=int, default=20, help="chains of kills at random moments, for each program")
    arguments.add_argument("--events", type=int, default=0, help="file events at which each program is killed (0: all)")
    arguments.add_argument("--in_a_row", action="store_true", help="instead two kills of each program, a third on each")
    arguments.add_argument(
        "--programs", default=",".join(NAMES), help=f"those that are killed, some of {','.join(NAMES)}"
    )
    arguments.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    given = arguments.parse_args()
    chosen = given.parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        arguments.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    works: dict[str, Callable[[Path], list[str]]] = {
        "fuzz": lambda folder: run_fuzz(folder, given.seed, given.files),
        "kills": lambda folder: kills(
            folder, given.seed, given.kills, given.events, say, given.programs.split(","), in_a_row=given.in_a_row
        ),
        "disk": lambda folder: disk(folder, say),
        "races": lambda folder: races(folder, say),
    }
    findings: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak_") as place:
        for part in (part for part in PARTS if part in chosen):
            say(f"## {part}, seed {given.seed}\n")
            folder, started = Path(place) / part, time.monotonic()
            folder.mkdir()
            found = works[part](folder)
            say(f"\n{part}: {len(found)} findings, {time.monotonic() - started:.0f} s\n")
            findings += found
    for finding in findings:
        say(f"* {finding}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
