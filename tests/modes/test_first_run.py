"""docs/first_run.md followed word by word on the public sections that it is about: one epoch for 28, a tenth of the genes."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import yaml

import main
from preprocess import extract_features_uni
from tests.command_line import call

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"main.py": main.main, "preprocess/extract_features_uni.py": extract_features_uni.main}
GENES = 1500
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


def test_the_page_word_by_word_on_the_olfactory_bulb(mob_raw, tmp_path, monkeypatch):
    (tmp_path / "config").symlink_to(ROOT / "config")
    lay_out, train, compare = blocks(section("From ST"), "bash")
    (spec,) = blocks(section("From ST"), "yaml")
    raw = tmp_path / "mob_raw"
    raw.mkdir()
    for number in range(1, 5):  # as they are called where they are public; some genes, and some rows of spots on tissue
        (raw / f"MOB{number}.jpg").symlink_to(mob_raw / f"MOB{number}.jpg")
        with gzip.open(mob_raw / f"MOB{number}_counts.tsv.gz", "rt") as counts:
            kept = ["\t".join(line.rstrip("\n").split("\t", GENES + 1)[: GENES + 1]) + "\n" for line in counts]
        (raw / f"MOB{number}.tsv").write_text("".join(kept))
        spots = pd.read_csv(mob_raw / f"MOB{number}_spots.tsv", sep="\t")
        spots = spots[(spots["selected"] == 1) & (spots["y"] % 32 < 2)]
        spots.to_csv(raw / f"alignment_table_MOB{number}.tsv", sep="\t", index=False)
    assert lay_out.count("curl") == 1
    subprocess.run(["bash", "-e", "-c", f"curl() {{ :; }}\n{lay_out}"], cwd=tmp_path, check=True)
    (tmp_path / "data" / "mob" / "dataset.yaml").write_text(spec)
    config = tmp_path / "data" / "mob" / "mob.yaml"
    text = config.read_text().replace("type: mine", "type: mob").replace("patch_size: 224", "patch_size: 32")
    config.chmod(0o644)
    config.write_text(text)
    monkeypatch.chdir(tmp_path)
    (predict,) = blocks(section("From an image"), "bash")
    shown = train.replace("--mode train", "--mode train --no_report").replace("epochs 28", "epochs 1") + compare
    shown += predict.replace("--pitch_px 32", "--pitch_px 320")
    for line in shown.splitlines():
        _, script, *words = shlex.split(line)
        left = call(PROGRAMS[script], *words)
        assert left.status == 0, f"{line}\n{left.said}"
    summary = json.loads((tmp_path / "logs" / "mob" / "exp_0" / "summary.json").read_text())
    assert "ridge on the same features (ridge_neighbor: patch and neighbor mean), PCC(A)" in summary["verdict"][0]
    assert re.search(r"on the counts of single spots PCC\(A\) is 0\.\d+, that of ridge 0\.\d+\.", summary["verdict"][1])
    assert "2 patients stand behind this" in " ".join(summary["verdict"])
    assert (tmp_path / "predicted" / "mob1_explorer.html").is_file()
