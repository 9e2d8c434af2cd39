"""The public download in its true format, through the real script; and the real download where it is at hand."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.tables.counts import gene_names, read_counts
from datasets.tables.expression import gene_sums, highest_mean_panel, panel_of_sums
from datasets.tables.slide_table import load_slide
from preprocess.prepare_her2st import main, prepare_her2st
from preprocess.raw.prepare import Options
from tests.command_line import call
from utils.files import load_names

HER2ST = SPECS["her2st"]
GENES = ["ACTB", "B2M", "GAPDH", "KRT19", "MT-CO1", "ZYX"]
SMALL = Options(num_genes=3)
SUMS = Path(__file__).resolve().parents[1] / "golden" / "panel_real.npz"  # recorded by this program alone


def write_slide(raw: Path, slide: str, *, seed: int = 0, image: bool = True, genes: list[str] = GENES) -> None:
    """One slide as in the download: 12 spots, one more in the table than has counts, a jpg of any name."""
    generator = np.random.default_rng([seed, *slide.encode()])
    cells = [(x, y) for y in range(7, 10) for x in range(4, 8)]
    spots = pd.DataFrame([*cells, (9, 9)], columns=["x", "y"])
    spots = spots.assign(new_x=spots["x"] + 0.02, new_y=spots["y"] - 0.03)
    spots = spots.assign(pixel_x=spots["new_x"] * 10, pixel_y=spots["new_y"] * 10, selected=1)
    counts = pd.DataFrame(
        generator.poisson(np.linspace(1, 12, len(genes)), size=(len(cells), len(genes))),
        index=[f"{x}x{y}" for x, y in cells],
        columns=genes,
    )
    for folder in ("ST-cnts", "ST-spotfiles"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    counts.iloc[::-1].to_csv(raw / "ST-cnts" / f"{slide}.tsv.gz", sep="\t")
    spots.sample(frac=1, random_state=1).to_csv(raw / "ST-spotfiles" / f"{slide}_selection.tsv", sep="\t", index=False)
    if image:
        folder = raw / "ST-imgs" / slide[0] / slide
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, size=(110, 120, 3), dtype=np.uint8)).save(
            folder / f"HE_BT_{seed}.jpg"
        )


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """The repository's form: everything in data/. Read only."""
    raw = tmp_path_factory.mktemp("download") / "raw"
    for slide in ("A1", "A2", "B1", "C2"):
        write_slide(raw / "data", slide, image=slide != "C2")
    labels = raw / "data" / "ST-pat" / "lbl"
    labels.mkdir(parents=True)
    (labels / "A1_labeled_coordinates.tsv").write_text("Row.names\tx\ty\tpixel_x\tpixel_y\tlabel\n")
    return raw


@pytest.fixture
def raw(download, tmp_path) -> Path:
    """A download of one's own."""
    return Path(shutil.copytree(download, tmp_path / "raw"))


def test_command_writes_the_documented_layout_and_reports(raw, tmp_path):
    left = call(main, "--source", raw, "--data_dir", tmp_path / "data", "--num_genes", 3)
    assert left.status == 0, left.said
    layout = Layout(tmp_path / "data", HER2ST)
    assert layout.slides_on_disk() == ["A1", "A2", "B1"]
    slide = load_slide(layout, "A1", load_names(layout.panel_path))
    assert slide.shape == (12, 3)
    assert slide.uns["dropped"] == {"spots_without_counts": ["9x9"], "counts_without_spot": []}
    assert load_slide(layout, "A1").var_names.tolist() == GENES, "every gene is kept"
    assert layout.image_path("A1").name == "HE_BT_0.jpg" and not layout.image_path("A1").is_symlink()
    assert (layout.labels_dir / "A1_labeled_coordinates.tsv").is_file()
    for sentence in (
        "32 of 36 expected slides are not in the source: A3, A4",
        "No image in the source for 1 of 4 slides: C2.",
        "Spots outside the expected 176 to 712: A1 (12), A2 (12), B1 (12), C2 (12).",
        "Dropped: 4 spots without counts, 0 counts without a listed spot.",
        "A1: without counts: 9x9",
        "4 slides of 3 patients, 48 spots; 3 slides have an image.",
    ):
        assert sentence in left.said


def test_counts_and_pixels_are_those_of_the_download(raw, tmp_path):
    prepare_her2st(raw, tmp_path / "data", SMALL, "B1")
    layout = Layout(tmp_path / "data", HER2ST)
    source = read_counts(raw / "data" / "ST-cnts" / "B1.tsv.gz")
    slide = load_slide(layout, "B1")
    np.testing.assert_array_equal(slide.X.toarray(), source[slide.obs_names].X.toarray())
    assert slide.obs_names.tolist()[:5] == ["4x7", "5x7", "6x7", "7x7", "4x8"]
    assert slide.obsm["spatial"][1].tolist() == pytest.approx([50.2, 69.7])
    original = raw / "data" / "ST-spotfiles" / "B1_selection.tsv"
    assert layout.spots_path("B1").read_bytes() == original.read_bytes()
    pandas_table = pd.read_parquet(layout.counts_path("B1"))
    assert pandas_table.loc["4x7"].to_dict() == source.to_df().loc["4x7"].to_dict()


def test_panel_and_how_it_was_made(raw, tmp_path):
    prepare_her2st(raw, tmp_path / "data", SMALL)
    layout = Layout(tmp_path / "data", HER2ST)
    slides = [read_counts(raw / "data" / "ST-cnts" / f"{name}.tsv.gz") for name in ("A1", "A2", "B1", "C2")]
    panel = load_names(layout.panel_path)
    assert panel == highest_mean_panel(slides, 3) == ["KRT19", "MT-CO1", "ZYX"]
    assert np.load(layout.panel_path, allow_pickle=False).dtype.kind == "U"
    record = json.loads(layout.panel_path.with_suffix(".json").read_text())
    assert record["method"] == "mean" and record["genes"] == panel and record["slides"] == ["A1", "A2", "B1", "C2"]


def test_a_second_run_keeps_everything(raw, tmp_path, capsys):
    prepare_her2st(raw / "data", tmp_path / "data", SMALL)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*") if p.is_file() and "ST-spot" not in str(p)}
    capsys.readouterr()
    prepare_her2st(raw, tmp_path / "data", SMALL)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    said = capsys.readouterr().out
    assert "genes_her2st.npy is kept: it holds this panel." in said and said.count("  kept") == 3
    assert not list((tmp_path / "data").rglob(".*")), "no temporary file is left"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ST-cnts/A1_sub.parquet", "holds other counts"),
        ("ST-spotfiles/A1_selection.tsv", "is there already and differs"),
        ("ST-imgs/A/A1/HE_BT_0.jpg", "is there already and differs"),
    ],
)
def test_files_that_differ_are_replaced_with_overwrite_only(raw, tmp_path, name, message):
    data = tmp_path / "data"
    prepare_her2st(raw, data, SMALL, "A1")
    write_slide(raw / "data", "A1", seed=0, genes=GENES[::-1])  # the same names of files, other content
    spots = raw / "data" / "ST-spotfiles" / "A1_selection.tsv"
    spots.write_text(spots.read_text() + "11\t9\t11\t9\t110\t90\t1\n")
    Image.new("RGB", (130, 110), "white").save(raw / "data" / "ST-imgs" / "A" / "A1" / "HE_BT_0.jpg")
    for other in ("ST-cnts/A1_sub.parquet", "ST-spotfiles/A1_selection.tsv", "ST-imgs/A/A1/HE_BT_0.jpg"):
        if other != name:
            (data / "her2st" / other).unlink()
    before = (data / "her2st" / name).read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        prepare_her2st(raw, data, SMALL, "A1")
    assert name in str(caught.value) and "Keep it elsewhere and repeat" in str(caught.value)
    assert (data / "her2st" / name).read_bytes() == before
    prepare_her2st(raw, data, Options(num_genes=3, overwrite=True), "A1")
    assert (data / "her2st" / name).read_bytes() != before


def test_a_panel_chosen_on_purpose_is_kept_and_said(raw, tmp_path, capsys):
    panel = Layout(tmp_path / "data", HER2ST).panel_path
    panel.parent.mkdir(parents=True)
    np.save(panel, np.array(["ACTB", "ZYX"], dtype=object), allow_pickle=True)  # as published
    prepare_her2st(raw, tmp_path / "data", SMALL, "A1")
    assert load_names(panel) == ["ACTB", "ZYX"]
    assert "is kept: it holds 2 genes, 2 of the 3 genes chosen now are not among them" in capsys.readouterr().out
    np.save(panel, np.array(["ACTB", "ABSENT"]))
    with pytest.raises(ValueError, match=r"Slide A1: .*genes asked for but not there: ABSENT"):
        prepare_her2st(raw, tmp_path / "data", SMALL, "A1")


def test_images_can_be_linked(raw, tmp_path):
    linked = Options(num_genes=3, link=True)
    for _ in range(2):
        prepare_her2st(raw, tmp_path / "data", linked, "A1")
    image = Layout(tmp_path / "data", HER2ST).image_path("A1")
    assert image.is_symlink() and image.resolve() == (raw / "data/ST-imgs/A/A1/HE_BT_0.jpg").resolve()


def test_another_image_in_the_place_is_an_error(raw, tmp_path):
    folder = tmp_path / "data" / "her2st" / "ST-imgs" / "A" / "A1"
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "old.png")
    with pytest.raises(ValueError, match=r"Slide A1 of her2st has 2 images .*HE_BT_0\.jpg, A/A1/old\.png"):
        prepare_her2st(raw, tmp_path / "data", SMALL, "A1")


def test_chosen_slides_and_strangers(raw, tmp_path, capsys):
    write_slide(raw / "data", "J1")
    done = prepare_her2st(raw, tmp_path / "data", SMALL, "B1, A1")
    assert [slide.name for slide in done] == ["A1", "B1"]
    assert "Left out, as they are no slides of her2st: J1." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--slides A1,Z9: Z9 is not in .*found A1, A2, B1, C2"):
        prepare_her2st(raw, tmp_path / "data", SMALL, "A1,Z9")


def test_bad_slides_are_told_together_and_good_ones_are_written(raw, tmp_path):
    counts = pd.read_csv(raw / "data/ST-cnts/A1.tsv.gz", sep="\t", index_col=0)
    counts.iloc[0, 0] = -3
    counts.to_csv(raw / "data/ST-cnts/A1.tsv.gz", sep="\t")
    spots = pd.read_csv(raw / "data/ST-spotfiles/B1_selection.tsv", sep="\t")
    spots.loc[spots["x"] == 5, "pixel_x"] = 4000
    spots.to_csv(raw / "data/ST-spotfiles/B1_selection.tsv", sep="\t", index=False)
    (raw / "data/ST-spotfiles/C2_selection.tsv").unlink()
    with pytest.raises(ValueError) as caught:
        prepare_her2st(raw, tmp_path / "data", SMALL)
    message = str(caught.value)
    assert "negative counts (-3 for gene ACTB)" in message and "Slide A1" in message
    assert "Slide B1: 3 of 12 spots lie outside" in message and "(120 x 110 pixels): 5x7 at (4000, 69)" in message
    assert "C2_selection.tsv does not exist" in message and "genes in common" not in message
    layout = Layout(tmp_path / "data", HER2ST)
    assert load_slide(layout, "A2").n_obs == 12 and not layout.panel_path.exists()


def test_sources_that_are_no_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--source .*nowhere is not a folder. Expected the HER2ST download"):
        prepare_her2st(tmp_path / "nowhere", tmp_path / "data", SMALL)
    with pytest.raises(FileNotFoundError, match="holds neither ST-cnts nor data/ST-cnts"):
        prepare_her2st(tmp_path, tmp_path / "data", SMALL)
    (tmp_path / "ST-cnts").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"her2st was found in .*ST-cnts\. Expected the HER2ST download: ST-cnts/"
    ):
        prepare_her2st(tmp_path, tmp_path / "data", SMALL)


def test_too_large_a_panel_is_refused(raw, tmp_path):
    with pytest.raises(ValueError, match=r"panel of 7 genes was asked for, but the slides have 6 genes in common"):
        prepare_her2st(raw, tmp_path / "data", Options(num_genes=7), "A1,A2")


def test_real_download(her2st_raw, tmp_path, capsys):
    """Two sections, one of them without its image, from the real files."""
    done = prepare_her2st(her2st_raw, tmp_path, Options(link=True), "C1,C2")
    assert [(slide.name, slide.spots, slide.image) for slide in done] == [("C1", 176, "missing"), ("C2", 187, "linked")]
    assert Layout(tmp_path, HER2ST).slides_on_disk() == ["C2"]
    assert "No image in the source for 1 of 2 slides: C1." in capsys.readouterr().out


def test_real_tables_with_exchanged_columns_are_noticed(her2st_raw, tmp_path, capsys):
    """Of two sections with some of their genes, the columns of one are exchanged; both get a picture."""
    raw = tmp_path / "raw"
    for folder in ("ST-cnts", "ST-spotfiles"):
        (raw / folder).mkdir(parents=True)
    (raw / "ST-imgs").symlink_to(her2st_raw / "ST-imgs")
    for slide in ("C2", "C3"):
        lines = gzip.decompress((her2st_raw / "ST-cnts" / f"{slide}.tsv.gz").read_bytes()).splitlines()
        some_genes = b"\n".join(b"\t".join(line.split(b"\t", 500)[:500]) for line in lines)
        (raw / "ST-cnts" / f"{slide}.tsv.gz").write_bytes(gzip.compress(some_genes, 1))
        table = pd.read_csv(her2st_raw / "ST-spotfiles" / f"{slide}_selection.tsv", sep="\t")
        if slide == "C2":
            table = table.rename(columns={"pixel_x": "pixel_y", "pixel_y": "pixel_x"})
        table["selected"] = (table.index >= 5).astype(int)
        table.to_csv(raw / "ST-spotfiles" / f"{slide}_selection.tsv", sep="\t", index=False)
    prepare_her2st(raw, tmp_path / "data", Options(num_genes=3, link=True))
    said = capsys.readouterr().out
    assert "C2: WARNING: spots and image may not belong together: " in said
    assert "Exchanging the pixel columns would fit better: 100 % of the spots on tissue" in said
    assert said.count("WARNING") == 1 and said.count("5 spots are marked selected = 0 and left out") == 2
    layout = Layout(tmp_path / "data", HER2ST)
    assert f"The picture: {layout.overlay_path('C2')}." in said
    for slide in ("C2", "C3"):
        with Image.open(layout.overlay_path(slide)) as image:
            assert max(image.size) == 1024


def test_real_panel_is_the_recorded_one(her2st_raw, golden):
    """The panel of all 36 sections: its total in every spot of C2 and the places of eight genes are recorded.

    Of 34 of them the names of the genes are read, and what they have of each in common is recorded: the sum of `gene_sums`.
    The panel needs the other two, a small one and the largest; what these have of its genes is recorded, too.
    """
    recorded, of_sums = golden("expression_real_C2"), np.load(SUMS)
    tables = {name: her2st_raw / "ST-cnts" / f"{name}.tsv.gz" for name in HER2ST.slides}
    slides = {name: read_counts(tables[name]) for name in ("C2", "F3")}
    sums = {name: gene_sums(slide) for name, slide in slides.items()}
    names = [gene_names(path) for slide, path in tables.items() if slide not in slides]
    rest = pd.Series(of_sums["rest"].astype(np.float64), index=sorted(set.intersection(*map(set, names))))
    panel = panel_of_sums([sums["C2"], rest, sums["F3"]], 250)
    assert [panel[column] for column in recorded["gene_columns"]] == recorded["genes"].tolist()
    spots = [f"{x}x{y}" for x, y in zip(recorded["x"], recorded["y"], strict=True)]
    totals = np.asarray(slides["C2"][spots, panel].X.sum(axis=1)).ravel()
    np.testing.assert_array_equal(totals, recorded["panel_total"])
    for name, of_slide in sums.items():
        np.testing.assert_allclose(of_slide[panel], of_sums[name], rtol=1e-6)
    assert highest_mean_panel(slides.values(), 250) == panel_of_sums(sums.values(), 250)
    without = [panel_of_sums(some, 250) for some in ([rest, sums["C2"]], [rest, sums["F3"]], sums.values())]
    assert panel not in without
