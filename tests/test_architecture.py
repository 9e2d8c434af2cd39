"""The rooms of the house: who imports whom, and how long things may get."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("utils", "models", "datasets", "evaluation", "engine", "preprocess", "modes", "main")
MAY_IMPORT = {
    "utils": {"utils"},
    "models": {"models", "utils.config", "utils.devices", "utils.files", "utils.text", "utils.untrusted"},
    "datasets": {"datasets", "utils"},
    "evaluation": {"evaluation", "utils"},
    "engine": {"utils"},
    "preprocess": {"preprocess", "datasets", "utils", "models.patch_encoders"},
    "modes": {"modes", "models", "datasets", "evaluation", "engine", "utils"},
    "main": {"modes", "models.table", "utils"},
}


def sources(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    assert sources(room), f"room {room} is empty"
    wrong = []
    for path in sources(room):
        for name in imported(path):
            ours = name.split(".")[0] in ROOMS
            if ours and not any(name == to or name.startswith(f"{to}.") for to in MAY_IMPORT[room]):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    wrong = [line for line in wrong if not line.endswith("imports models")] if room == "preprocess" else wrong
    assert wrong == []


def test_nothing_needs_the_package_hidden_by_our_datasets_folder():
    for room in ROOMS:
        for path in sources(room):
            assert not re.search(r"^\s*(from|import) (datasets\.load|evaluate\b|transformers)", path.read_text(), re.M)


def test_functions_and_files_stay_readable():
    """90 % of functions under 40 lines, none over 80; files around 250 lines, none over 400."""
    lengths, too_long = [], []
    for room in ROOMS:
        for path in sources(room):
            text = path.read_text()
            if len(text.splitlines()) > 400:
                too_long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    length = node.end_lineno - node.lineno + 1
                    lengths.append(length)
                    if length > 80:
                        too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert too_long == []
    assert sorted(lengths)[int(0.9 * len(lengths))] < 40


def test_no_prints_outside_the_command_line():
    allowed = {ROOT / "utils" / "cli.py"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for path in sources(room)
        if path not in allowed and room != "preprocess"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []
