"""docs/first_run.md followed word by word on the public sections that it is about, with one epoch in the place of 28."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "first_run.md").read_text()


def section(heading: str) -> str:
    return re.search(rf"^## {heading}.*?(?=^## )", PAGE, flags=re.MULTILINE | re.DOTALL)[0]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_recipe_of_the_page_is_that_of_the_file():
    recipe = yaml.safe_load((ROOT / "config" / "small.yaml").read_text())
    table = dict(re.findall(r"^\| `([A-Z]+\.\w+)` \| `?([^|`]+?)`? \|", section("The recipe"), flags=re.MULTILINE))
    for key in ("DATA.encoder", "TRAINING.batch_size", "LOSS.k", "TRAINING.learning_rate", "TRAINING.start_at_mean"):
        part, name = key.split(".")
        assert str(yaml.safe_load(table[key].replace("3e-4", "3.0e-4"))) == str(recipe[part][name]), key
    assert f"`TRAINING.epochs: {recipe['TRAINING']['epochs']}`" in PAGE


def test_the_page_word_by_word_on_the_olfactory_bulb(mob_raw, tmp_path):
    for name in ("main.py", "preprocess", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    lay_out, train = blocks(section("From ST"), "bash")
    (spec,) = blocks(section("From ST"), "yaml")
    run(lay_out.replace("RAW/", f"{mob_raw}/"), tmp_path)
    (tmp_path / "data" / "mob" / "dataset.yaml").write_text(spec)
    config = tmp_path / "data" / "mob" / "mob.yaml"
    text = config.read_text().replace("type: mine", "type: mob").replace("patch_size: 224", "patch_size: 32")
    config.chmod(0o644)
    config.write_text(text)
    run(train.replace("--fixed_epochs 28", "--fixed_epochs 1 --no_report"), tmp_path)
    summary = json.loads((tmp_path / "logs" / "mob" / "exp_0" / "summary.json").read_text())
    assert "ridge on the same features (ridge_neighbor), PCC(A)" in summary["verdict"][0]
    assert "2 patients stand behind this" in " ".join(summary["verdict"])


def run(commands: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
