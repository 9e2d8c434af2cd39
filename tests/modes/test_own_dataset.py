"""docs/your_data.md followed step by step: its files are made and its commands run as they stand on the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image

import main
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.expression import grid_adjacency
from datasets.tables.slide_table import load_slide
from models.patch_encoders.table import PATCH_ENCODERS
from preprocess import extract_features_uni, prepare_anndata, prepare_visium, select_genes
from tests.command_line import Left, call
from tests.shortcuts import keep_spots
from tests.space_ranger import write_outs
from utils.files import load_names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_data.md"
RECIPE = PAGE.parents[1] / "config" / "small.yaml"
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
    if line.startswith(("mkdir ", "cp ")):
        subprocess.run(shlex.split(line), check=True)
        if line.startswith("cp "):
            change_as_the_page_says(Path(shlex.split(line)[-1]))
        return Left(0, "")
    python, script, *arguments = shlex.split(line)
    assert python == "python" and script in PROGRAMS, f"the page shows a command that is not tested: {line}"
    return call(PROGRAMS[script], *arguments)


def change_as_the_page_says(config: Path) -> None:
    """The three lines that are about the data; these slides are tiny, and the encoder that the recipe names is the test's."""
    text = config.read_text()
    for line, own in (
        ("type: mine", "type: mine"),
        ("patch_size: 224", "patch_size: 64"),
        ("num_genes: 250", "num_genes: 20"),
    ):
        assert line in text and f"`{line.partition(':')[0]}" in PAGE.read_text()
        text = text.replace(line, own)
    config.write_text(text)


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
        spots = pd.read_csv(source.spots_path(there), sep="\t").loc[:9, ["x", "y", "pixel_x", "pixel_y"]]
        spots.to_csv(root / "ST-spotfiles" / f"{slide}_selection.tsv", sep="\t", index=False)
        with Image.open(source.image_path(there)) as image:
            image.save(root / "ST-imgs" / f"{slide}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.config.CONFIG_DIR", tmp_path / "config")
    (tmp_path / "config").mkdir()
    shutil.copy(RECIPE, tmp_path / "config")
    for path, content in files_of_page().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    return tmp_path


def test_the_page_names_its_file_and_the_layout_that_the_program_reads():
    assert list(files_of_page()) == ["data/mine/dataset.yaml"]
    layout = Layout("data", get_spec("demo"))
    text = PAGE.read_text()
    for place in (layout.counts_dir, layout.spots_path("P1_s1"), layout.images_dir):
        assert str(place.relative_to(layout.root)) in text


def test_the_page_step_by_step(folder):
    doctor = "python main.py --mode doctor --config_name mine/dml"
    commands = commands_of_page()
    assert doctor in commands and len(commands) == 7
    for line in commands:
        if "extract_features" in line:
            too_early = run_line(doctor)
            assert too_early.status == 2 and "have no target features" in too_early.said, "step 5 before step 4"
        left = run_line(line)
        assert left.status == 0, f"{line}\n{left.said}"
    run = folder / "logs" / "mine" / "dml" / "exp_0"
    assert {path.name for path in run.iterdir()} >= {"fold_0", "summary.md", "report.html"}
    assert sorted(path.stem for path in (run / "fold_0" / "predictions").glob("*.h5ad")) == ["P1_s1"]
    assert len(load_names(folder / "data" / "mine" / "genes_mine.npy")) == 20
    run_external_set_of_page(folder)


def run_external_set_of_page(folder: Path) -> None:
    """The set of docs/external.md that is neither Visium nor published, through to its scores, for the run of `mine`."""
    shutil.copytree(folder / "data" / "mine", folder / "data" / "test" / "my_set", ignore=features)
    keep_spots(folder / "data" / "test" / "my_set", 5)
    (description,) = blocks("predict.md", "yaml")
    (folder / "data/test/my_set/dataset.yaml").write_text(description.replace("her2st", "mine"))
    lines = [line for block in blocks("predict.md", "bash") for line in block.splitlines() if "my_set" in line]
    assert len(lines) == 3
    for line in lines:
        left = run_line(line.replace("her2st", "mine") + " --no_report" * ("external_test" in line))
        assert left.status == 0, f"{line}\n{left.said}"
    summary = json.loads((folder / "logs/mine/dml/exp_0/external/my_set/summary.json").read_text())
    assert sorted(summary["slides"]) == sorted(SLIDES.values())


features = shutil.ignore_patterns("*features*")


# -- the other ways of the page, and what is said about data elsewhere --------------------------------------------------


def blocks(page: str, kind: str) -> list[str]:
    text = (PAGE.parent / page).read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def command_with(page: str, words: str) -> list[str]:
    """The words of the first command of a page that holds these."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return shlex.split(next(line for line in lines if words in line))[2:]


def test_the_sheet_of_the_page_becomes_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # every path of the page is relative to it
    (sheet,) = blocks("your_data.md", "csv")
    (tmp_path / "samples.csv").write_text(sheet)
    picture = np.random.default_rng(5).integers(0, 255, (300, 340, 3), dtype=np.uint8)
    for number, line in enumerate(sheet.splitlines()[1:]):
        _, _, outs, image = line.split(",")
        written = write_outs(Path(outs), picture, ["TP53", "ERBB2"], seed=number)
        Path(image).parent.mkdir(exist_ok=True)
        written.image.rename(image)
    left = call(prepare_visium.main, *command_with("your_data.md", "--samples"))
    assert left.status == 0, left.said
    spec = get_spec("mine", "data")
    assert [spec.patient_of(slide) for slide in spec.slides] == ["P1", "P1", "P2", "P3"]
    assert Path("data/mine/mine.yaml").is_file() and "config data/mine/mine.yaml" in left.said


def test_the_annotated_file_of_the_page_becomes_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    slides = []
    for number, name in enumerate(("a", "b")):
        Image.new("RGB", (300, 300), "pink").save(f"scans/{name}.tif")
        column, row = (axis.ravel() for axis in np.mgrid[0:4, 0:4])
        obs = pd.DataFrame({"slide": name, "patient": f"P{number}", "array_row": row, "array_col": column})
        obs.index = [f"{name}{i}" for i in range(16)]
        pixels = np.stack([30.0 + 60 * column, 30.0 + 60 * row], axis=1)
        genes = pd.DataFrame(index=["TP53", "ERBB2"])
        slides.append(AnnData(np.ones((16, 2), np.float32), obs=obs, var=genes, obsm={"spatial": pixels}))
    anndata.concat(slides).write_h5ad("slides.h5ad")
    left = call(prepare_anndata.main, *command_with("your_data.md", "--patient_column"))
    assert left.status == 0, left.said
    assert dict(get_spec("ours", "data").patient_of_slide) == {"a": "P0", "b": "P1"}


def test_an_external_set_that_is_neither_is_read_as_the_page_says(folder):
    (folder / "data" / "test").mkdir()
    shutil.copytree(PAGE.parents[1] / "config" / "her2st", folder / "config" / "her2st")
    shutil.copytree(folder / "data" / "mine", folder / "data" / "test" / "my_set")
    (description,) = blocks("predict.md", "yaml")
    (folder / "data" / "test" / "my_set" / "dataset.yaml").write_text(description)
    given = extract_features_uni.COMMAND_LINE.parse(command_with("predict.md", "target --test_name my_set"))
    config, spec = extract_features_uni.resolve(given)  # no --config: dataset.yaml says for whose models it is
    layout = Layout("data", spec)
    assert spec.external and config.DATA.type == spec.training_type == "her2st"
    assert layout.slides_on_disk() == sorted(SLIDES.values())
    assert spec.exchanged_pixels is False and load_slide(layout, "P1_s1").n_obs > 0


def test_listed_slides_and_spots_beside_the_tissue(folder):
    listing = next(block for block in blocks("your_data.md", "yaml") if block.startswith("slides:"))
    (folder / "data" / "mine" / "dataset.yaml").write_text(listing)
    layout = Layout("data", get_spec("mine", "data"))
    assert layout.slides_on_disk() == list(layout.spec.slides) and layout.spec.patients == ("P3", "P1", "P2")
    path = layout.spots_path("P1_s1")
    table = pd.read_csv(path, sep="\t").assign(selected=1)
    table.loc[0, "selected"] = 0
    table.to_csv(path, sep="\t", index=False)
    slide = load_slide(layout, "P1_s1")
    assert len(slide.uns["not_selected"]) == 1 and slide.n_obs == len(table) - 1
    layout.spots_path("P2_s1").unlink()
    assert layout.slides_on_disk() == ["P1_s1", "P3_s1"] and "P2_s1" in str(layout.left_out_note())
    shutil.copy(layout.counts_path("P1_s1"), layout.counts_dir / "P9_s1.tsv")
    with pytest.raises(ValueError, match="holds slides that mine does not have: P9_s1"):
        layout.slides_on_disk()


def test_neighbors_on_the_arrays_of_the_page():
    """The table of arrays: how many neighbors a spot in the middle has."""
    column, row = (axis.ravel() for axis in np.mgrid[0:9, 0:9])
    is_checked = (column + row) % 2 == 0
    arrays = {
        "square": np.stack([column, row], axis=1),
        "hexagonal": np.stack([2 * column + row % 2, row], axis=1),
        "checkerboard": np.stack([column, row], axis=1)[is_checked],
        "turned": np.stack([(column + row) / 2, (row - column) / 2], axis=1)[is_checked].astype(int),
    }
    found = {name: int(grid_adjacency(grid).sum(axis=1).max()) - 1 for name, grid in arrays.items()}
    assert found == {"square": 8, "hexagonal": 4, "checkerboard": 4, "turned": 8}
    rows = re.findall(r"^\| (square|hexagonal|checkerboard)[^|]*\|[^|]*\| (\d)", PAGE.read_text(), flags=re.MULTILINE)
    assert {name: int(number) for name, number in rows} == {name: found[name] for name, _ in rows} and len(rows) == 3


def test_tokens_of_a_patch_are_as_many_as_the_page_says():
    text = " ".join(PAGE.read_text().split())
    stride = PATCH_ENCODERS["uni"].stride
    for size, tokens in re.findall(r"(?:= |, )(\d+)(?: tokens)? at (\d+) px", text):
        assert int(size) == (int(tokens) // stride) ** 2
    assert "196 tokens at 224 px, 49 at 112 px, 784 at 448 px" in text
    for name in ("uni2-h", "virchow2"):
        assert PATCH_ENCODERS[name].stride == 14
