"""What is installed: bounds and lock say the same, and a Python that is too old is refused in a sentence."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith(("#", "-"))]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_lock_holds_every_requirement_within_its_bounds(name: str) -> None:
    locked = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines_of("requirements.lock")}
    for requirement in map(Requirement, lines_of(name)):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the Makefile in a folder of its own that holds nothing but the requirements."""
    for name in ("requirements.txt", "requirements.lock", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    command = ["make", "-f", str(ROOT / "Makefile"), "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    code = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[2])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c \'{code}\' "$@"\n')
    old.chmod(0o755)
    done = make(tmp_path, "setup", f"BASE_PYTHON={old}")
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == [
        f"Gene-DML needs Python 3.11 or newer, and {old} is 3.9: name another, as in make setup BASE_PYTHON=python3.11"
    ]


def test_another_build_of_torch_comes_before_the_rest(tmp_path: Path) -> None:
    plain, other = (make(tmp_path, "-n", "setup", *words).stdout for words in ((), ("TORCH_INDEX=URL",)))
    assert "--index-url" not in plain
    first, rest = (line for line in other.splitlines() if " pip install " in line)
    assert re.search(r"-c requirements\.lock --no-deps --index-url URL torch torchvision$", first)
    assert rest.endswith("-c requirements.lock -r requirements.txt")


def test_the_image_copies_files_that_are_there() -> None:
    copied = re.findall(r"^COPY (.*) \./?$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert len(copied) == 2
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_the_site_is_built_without_a_warning_and_loads_nothing(tmp_path: Path) -> None:
    """Strict: a link that leads nowhere, a page without a place in the menu or a name that does not exist is an error."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(config)
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | {"index.html", "reference.html"} <= set(
        pages
    )
    for name, text in pages.items():
        assert not re.findall(
            r"<(?:script|img)[^>]* src=\"?https?:|<link[^>]* rel=\"?stylesheet\"?[^>]*https?:", text
        ), name
    assert "load_checkpoint" in pages["reference.html"]
