"""The notebook runs from its first cell to its last, on the tiny run in place of the demo."""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

from tests.modes.conftest import TinyRun

ROOT = Path(__file__).resolve().parents[2]


def test_the_walkthrough_runs(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "notebooks" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "notebooks")
    matplotlib.use("Agg")
    out = tmp_path / "walkthrough.h5ad"
    given = {"DATA_DIR": tiny_run.data_dir, "RUN": tiny_run.path, "OUT": out}
    paths = "SLIDE = 'A1'\n" + "".join(f"{name} = Path({str(path)!r})\n" for name, path in given.items())
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)  # of scanpy and squidpy
        for cell in notebook["cells"]:
            assert not cell.get("outputs"), "the notebook is kept without outputs"
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                exec(paths if "parameters" in cell["metadata"].get("tags", []) else source, names)
    assert plt.get_fignums()
    plt.close("all")
    moran = names["predicted"].uns["moranI"]
    assert len(moran) and moran["I"].max() <= 1
    assert out.with_name("walkthrough_explorer.html").is_file()


def test_what_may_be_imported_is_there() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").split("## As a library")[1]
    listed = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", page, flags=re.MULTILINE)
    assert len(listed) >= 6
    for module, names in listed:
        for name in re.findall(r"`(\w+)`", names):
            assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
