"""docs/your_data.md followed step by step: its files are made and its commands run as they stand on the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import main
from datasets.known_sets import get_spec
from datasets.layout import Layout
from preprocess import extract_features_uni, select_genes
from tests.command_line import Left, call
from utils.files import load_names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_data.md"
PROGRAMS = {
    "main.py": main.main,
    "preprocess/extract_features_uni.py": extract_features_uni.main,
    "preprocess/select_genes.py": select_genes.main,
}
SLIDES = {"A1": "P1_s1", "B1": "P2_s1", "C1": "P3_s1"}


def files_of_page() -> dict[str, str]:
    """path -> content of every file that the page shows: a line with the path in backticks, then a yaml block."""
    found = re.findall(r"^`([^`\n]+)`:\n\n```yaml\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def commands_of_page() -> list[str]:
    """Every line of every sh block, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run_line(line: str) -> Left:
    python, script, *arguments = shlex.split(line)
    assert python == "python" and script in PROGRAMS, f"the page shows a command that is not tested: {line}"
    return call(PROGRAMS[script], *arguments)


@pytest.fixture
def folder(tiny_data, tmp_path, monkeypatch) -> Path:
    """Slides in the folders of step 1, one in each form of counts; everything else comes from the page."""
    source = Layout(tiny_data, get_spec("demo", tiny_data))
    root = tmp_path / "data" / "mine"
    for name in ("ST-cnts", "ST-spotfiles", "ST-imgs"):
        (root / name).mkdir(parents=True)
    for number, (there, slide) in enumerate(SLIDES.items()):
        counts = pd.read_parquet(source.counts_path(there))
        counts.to_csv(root / "ST-cnts" / f"{slide}{('.tsv', '.tsv.gz', '.csv')[number]}", sep=",\t"[number < 2])
        spots = pd.read_csv(source.spots_path(there), sep="\t").loc[:15, ["x", "y", "pixel_x", "pixel_y"]]
        spots.to_csv(root / "ST-spotfiles" / f"{slide}_selection.tsv", sep="\t", index=False)
        with Image.open(source.image_path(there)) as image:
            image.save(root / "ST-imgs" / f"{slide}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.config.CONFIG_DIR", tmp_path / "config")
    for path, content in files_of_page().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    return tmp_path


def test_the_page_names_its_two_files_and_the_layout_that_the_program_reads():
    assert list(files_of_page()) == ["data/mine/dataset.yaml", "config/mine/dml.yaml"]
    layout = Layout("data", get_spec("demo"))
    text = PAGE.read_text()
    for place in (layout.counts_dir, layout.spots_path("P1_s1"), layout.images_dir):
        assert str(place.relative_to(layout.root)) in text


def test_the_page_step_by_step(folder):
    doctor = "python main.py --mode doctor --config_name mine/dml"
    too_early = run_line(doctor)
    assert too_early.status == 2 and "have no target features" in too_early.said, "step 5 before step 4"
    commands = commands_of_page()
    assert doctor in commands and len(commands) == 5
    for line in commands:
        left = run_line(line)
        assert left.status == 0, f"{line}\n{left.said}"
    run = folder / "logs" / "mine" / "dml" / "exp_0"
    assert {path.name for path in run.iterdir()} >= {"fold_0", "summary.md", "report.html"}
    assert sorted(path.stem for path in (run / "fold_0" / "predictions").glob("*.h5ad")) == ["P1_s1"]
    assert len(load_names(folder / "data" / "mine" / "genes_mine.npy")) == 20
