"""The doctor on what killed processes have left: temporary files, hidden and perhaps large."""

from __future__ import annotations

from pathlib import Path

from datasets.layout import Layout
from modes.checks.findings import Findings
from modes.checks.machine import gigabytes
from utils.locks import left_over
from utils.text import some


def check_left_over(layout: Layout, run_dir: Path | None, findings: Findings) -> None:
    """Name the temporary files of ended processes below the data folder and, where one is given, the run folder."""
    folders = [layout.root, *(path for path in layout.root.iterdir() if path.is_dir())] if layout.root.is_dir() else []
    if run_dir is not None:
        folders += [run_dir, *(path for path in run_dir.rglob("*") if path.is_dir())]
    found = [path for folder in folders for path in left_over(folder, is_locked=True)]
    if found:
        size = gigabytes(sum(path.stat().st_size for path in found))
        findings.warning(
            "left over",
            f"{len(found)} temporary files of processes that have ended take {size}: {some(list(map(str, found)), 6)}. Whoever "
            "writes there next clears them away.",
        )
