"""The files of GSE144240 as they are in GEO: accession numbers, the whole array in the counts, everything compressed."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.prepare_skinst import main, prepare_skinst
from preprocess.raw.prepare import Options
from utils.files import load_names

SKINST = SPECS["skinst"]
SMALL = Options(num_genes=2)
GENES = ["KRT14", "KRT5", "S100A8"]


def write_slide(folder: Path, slide: str, number: int, *, compressed: bool = True, image: bool = True) -> None:
    generator = np.random.default_rng(number)
    array = [(x, y) for y in range(1, 8) for x in range(1, 9)]
    tissue = [(x, y) for x, y in array if 2 <= x <= 6 and 3 <= y <= 6]
    counts = pd.DataFrame(
        generator.poisson([9, 5, 1], size=(len(array), 3)), index=[f"{x}x{y}" for x, y in array], columns=GENES
    )
    spots = pd.DataFrame(tissue, columns=["x", "y"])
    spots = spots.assign(new_x=spots["x"] - 0.04, new_y=spots["y"] + 0.01)
    spots = spots.assign(pixel_x=spots["new_x"] * 20, pixel_y=spots["new_y"] * 20, selected=1)
    picture = io.BytesIO()
    Image.fromarray(generator.integers(0, 255, size=(180, 200, 3), dtype=np.uint8)).save(picture, "JPEG")
    contents = {
        f"GSM42843{number}_{slide}_stdata.tsv": counts.to_csv(sep="\t").encode(),
        f"GSM42843{number}_spot_data-selection-{slide}.tsv": spots.to_csv(sep="\t", index=False).encode(),
        f"GSM42843{number}_{slide}.jpg": picture.getvalue(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if image or not name.endswith(".jpg"):
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.fixture
def raw(tmp_path) -> Path:
    """P2 compressed as in GEO, P10 unpacked in a folder of its own, one slide without its image."""
    folder = tmp_path / "raw"
    write_slide(folder, "P2_ST_rep1", 16)
    write_slide(folder, "P2_ST_rep2", 17, image=False)
    write_slide(folder / "unpacked", "P10_ST_rep3", 27, compressed=False)
    return folder


def test_every_form_of_the_series_becomes_the_documented_layout(raw, tmp_path, capsys):
    done = prepare_skinst(raw, tmp_path / "data", SMALL)
    assert [(slide.name, slide.patient, slide.spots, slide.image) for slide in done] == [
        ("P10_ST_rep3", "P10", 20, "copied"),
        ("P2_ST_rep1", "P2", 20, "copied"),
        ("P2_ST_rep2", "P2", 20, "missing"),
    ]
    layout = Layout(tmp_path / "data", SKINST)
    assert layout.slides_on_disk() == ["P10_ST_rep3", "P2_ST_rep1"]
    assert load_names(layout.panel_path) == ["KRT14", "KRT5"]
    assert json.loads(layout.panel_path.with_suffix(".json").read_text())["slides"] == [slide.name for slide in done]
    slide = load_slide(layout, "P2_ST_rep1")
    assert slide.obs_names[0] == "2x3" and slide.obsm["spatial"][0].tolist() == pytest.approx([39.2, 60.2])
    counts = pd.read_csv(raw / "GSM4284316_P2_ST_rep1_stdata.tsv.gz", sep="\t", index_col=0)
    np.testing.assert_array_equal(slide.X.toarray(), counts.loc[slide.obs_names, GENES])
    assert Image.open(layout.image_path("P2_ST_rep1")).size == (200, 180)
    said = capsys.readouterr().out
    assert "9 of 12 expected slides are not in the source: P2_ST_rep3, P5_ST_rep1" in said
    assert "Dropped: 0 spots without counts, 108 counts without a listed spot." in said
    assert "Spots outside the expected 462 to 1182: P10_ST_rep3 (20)" in said
    assert "No image in the source for 1 of 3 slides: P2_ST_rep2." in said


def test_a_second_run_keeps_what_was_unpacked(raw, tmp_path):
    prepare_skinst(raw, tmp_path / "data", SMALL)
    again = prepare_skinst(raw, tmp_path / "data", SMALL)
    assert [slide.image for slide in again] == ["kept", "kept", "missing"]


def test_the_unpacked_twin_of_a_file_is_taken(raw, tmp_path):
    packed = raw / "GSM4284316_P2_ST_rep1.jpg.gz"
    (raw / "GSM4284316_P2_ST_rep1.jpg").write_bytes(gzip.decompress(packed.read_bytes()))
    linked = prepare_skinst(raw, tmp_path / "data", Options(num_genes=2, link=True), "P2_ST_rep1")
    assert linked[0].image == "linked"
    image = Layout(tmp_path / "data", SKINST).image_path("P2_ST_rep1")
    assert image.resolve() == (raw / "GSM4284316_P2_ST_rep1.jpg").resolve()


def test_the_selection_goes_before_the_whole_array(raw, tmp_path):
    selection = raw / "GSM4284316_spot_data-selection-P2_ST_rep1.tsv.gz"
    everything = raw / "GSM4284316_spot_data-all-P2_ST_rep1.tsv.gz"
    everything.write_bytes(selection.read_bytes())
    assert prepare_skinst(raw, tmp_path / "data", SMALL, "P2_ST_rep1")[0].spots == 20
    selection.unlink()
    assert prepare_skinst(raw, tmp_path / "data2", SMALL, "P2_ST_rep1")[0].spots == 20


def test_missing_doubled_and_broken_files_are_told_together(raw, tmp_path):
    (raw / "GSM4284316_spot_data-selection-P2_ST_rep1.tsv.gz").unlink()
    counts = raw / "GSM4284317_P2_ST_rep2_stdata.tsv.gz"
    (raw / "other_P2_ST_rep2_stdata.tsv.gz").write_bytes(counts.read_bytes())
    image = raw / "unpacked" / "GSM4284327_P10_ST_rep3.jpg"
    image.write_bytes(gzip.compress(image.read_bytes())[:60])
    image.rename(image.with_name("GSM4284327_P10_ST_rep3.jpg.gz"))
    with pytest.raises(ValueError) as caught:
        prepare_skinst(raw, tmp_path / "data", SMALL)
    message = str(caught.value)
    assert r"Slide P2_ST_rep1, spots on tissue (*spot*P2_ST_rep1.tsv): not found in the source." in message
    assert "Slide P2_ST_rep2, counts (*P2_ST_rep2_stdata.tsv): 2 files where one was expected" in message
    assert "P10_ST_rep3.jpg.gz cannot be read as an image" in message


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (["ENSG1", "ENSG2", "ENSG3"], r"No gene is on all 3 slides: P2_ST_rep1 \(ENSG1, .*none of the 3 genes that P10"),
        ([f"ENSG0000018684{i}" for i in range(3)],
         r"The genes of P2_ST_rep1 have Ensembl ids \(ENSG00000186840\), those of P10_ST_rep3, P2_ST_rep2 have symbols "
         r"\(KRT14\).*one kind of names in their tables of counts, by a table with both"),
    ],
)  # fmt: skip
def test_genes_that_no_other_slide_has_are_told_with_the_slide(raw, tmp_path, genes, message):
    path = raw / "GSM4284316_P2_ST_rep1_stdata.tsv.gz"
    pd.read_csv(path, sep="\t", index_col=0).set_axis(genes, axis=1).to_csv(path, sep="\t")
    with pytest.raises(ValueError, match=message) as said:
        prepare_skinst(raw, tmp_path / "data", SMALL)
    assert "--gene_map" not in str(said.value), "it has no such flag"


def test_command_line(raw, tmp_path, monkeypatch):
    arguments = [
        "--source",
        str(raw),
        "--data_dir",
        str(tmp_path / "data"),
        "--num_genes",
        "3",
        "--slides",
        "P2_ST_rep1",
    ]
    monkeypatch.setattr(sys, "argv", ["prepare_skinst.py", *arguments])
    main()
    assert load_names(Layout(tmp_path / "data", SKINST).panel_path) == sorted(GENES)
    with pytest.raises(
        FileNotFoundError, match=r"No slide of skinst was found in .*\. Expected the files of GSE144240"
    ):
        prepare_skinst(tmp_path / "data", tmp_path / "other", SMALL)
