"""The rooms of the house: who imports whom, and how long things may get."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
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
# What a sub-room may import of its own room, beside itself.
OF_THE_SAME_ROOM = {
    "datasets.features": {"datasets.images", "datasets.tables", "datasets.layout", "datasets.spots"},
    "datasets.images": set(),
    "datasets.tables": {"datasets.layout", "datasets.spec"},
    "evaluation.comparison": {"evaluation"},
    "evaluation.report": {"evaluation"},
    "models.baselines": {"models.contract", "models.encoders", "models.layers", "models.losses"},
    "models.layers": set(),
    "models.patch_encoders": set(),
    "modes.checks": {"modes.prediction", "modes.training"},
    "modes.parallel": {"modes.prediction"},
    "modes.prediction": set(),
    "modes.telling": set(),
    "modes.training": {"modes.prediction"},
    "preprocess.extraction": set(),
    "preprocess.raw": set(),
    "preprocess.raw.space_ranger": {"preprocess.raw"},
    "preprocess.simulation": set(),
    "utils.parallel": {"utils.cli", "utils.devices"},
    "utils.untrusted": {"utils.files"},
}
MODES = {"train", "test", "external_test", "predict", "compare", "import_reference", "doctor"}


def sources(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree(path)):
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
    assert wrong == []


def modules() -> dict[str, Path]:
    """Every module of the house by its name."""
    paths = [path for room in ROOMS for path in sources(room)]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def test_imports_between_sub_rooms_go_one_way():
    folders = {path.parent for path in modules().values() if path.parent.parent != ROOT and path.parent != ROOT}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(OF_THE_SAME_ROOM)
    wrong = []
    for sub_room, others in OF_THE_SAME_ROOM.items():
        room = sub_room.split(".")[0]
        for path in sources(sub_room.replace(".", "/")):
            for name in imported(path):
                allowed = any(name == to or name.startswith(f"{to}.") for to in (sub_room, *others))
                if name.split(".")[0] == room and name != room and not allowed:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_modes_shows_the_modes_and_none_imports_another():
    import main

    shown = {path.stem for path in (ROOT / "modes").glob("*.py")} - {"__init__"}
    assert shown == MODES == set(main.MODES)
    for name in shown:
        others = {f"modes.{other}" for other in shown - {name}}
        assert not others & imported(ROOT / "modes" / f"{name}.py"), f"modes/{name}.py imports another mode"


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_says_what_it_is_for(room):
    """The first line of a file is a sentence about it, and nothing is left to be done there."""
    for path in sources(room):
        said = ast.get_docstring(tree(path)) or ""
        assert len(said) > 20 and "TODO" not in said, path


def test_no_room_holds_more_than_twelve_files():
    rooms = {path.parent for path in modules().values()} - {ROOT}
    held = {str(room.relative_to(ROOT)): len(list(room.glob("[!_]*.py"))) for room in rooms}
    assert {room: count for room, count in held.items() if count > 12} == {}


def test_no_import_goes_round_in_a_circle():
    """At the level of modules, over the whole house; what is imported for its types alone does not run."""
    found = modules()
    names = {name: set(at_import(tree(path))) & set(found) - {name} for name, path in found.items()}
    order = graphlib.TopologicalSorter(names)
    order.prepare()  # CycleError names the modules of a circle


def at_import(node: ast.AST) -> Iterator[str]:
    """What is imported when a module is: not inside functions."""
    if isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield str(node.module)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif not isinstance(node, ast.FunctionDef | ast.Lambda) and not _is_for_types(node):
        for child in ast.iter_child_nodes(node):
            yield from at_import(child)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_prediction_loads_no_training():
    """What `--mode predict` imports of the house, and what that imports, and so on: packages count as modules."""
    found, ours, new = modules(), set(), {"modes.predict"}
    while new:
        ours |= new
        names = {name for module in new for name in at_import(tree(found[module]))}
        names = {part for name in names | new for part in accumulate(name.split("."), "{}.{}".format)}
        new = names & set(found) - ours
    assert "modes.prediction.slide" in ours and len(ours) <= 55, sorted(ours)
    unwanted = ("engine", "modes.training", "modes.checks", "evaluation.report", "models.losses", "models.baselines")
    assert [name for name in ours if name.startswith(unwanted)] == []


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
            for node in ast.walk(tree(path)):
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
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []
