"""The download of ST-Net as it is: Ensembl ids, genes left out where they are zero, BT and BC without a rule."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.prepare_stnet import main, prepare_stnet
from preprocess.raw.gene_map import read_gene_map, symbols_of
from preprocess.raw.prepare import Options
from utils.files import load_names

STNET = SPECS["stnet"]
SMALL = Options(num_genes=2)
ACTB, ACTB_TOO, ERBB2, UNKNOWN = "ENSG00000075624", "ENSG00000280000", "ENSG00000141736", "ENSG00000999999"
MAP = {ACTB: "ACTB", ACTB_TOO: "ACTB", ERBB2: "ERBB2"}


def write_slide(raw: Path, slide: str, genes: list[str], *, spots_as: str = "BT", image_as: str = "BT") -> pd.DataFrame:
    """One section: counts of the whole array, pixel table of the spots on tissue. Returns the counts."""
    generator = np.random.default_rng(list(slide.encode()))
    array = [(x, y) for y in range(1, 7) for x in range(1, 7)]
    counts = pd.DataFrame(
        generator.poisson(4, size=(36, len(genes))) + 1, index=[f"{x}x{y}" for x, y in array], columns=genes
    )
    tissue = [(x, y) for x, y in array if x > 2 and y > 1]
    pixels = pd.DataFrame(
        {"X": [x * 30 + 0.4 for x, _ in tissue], "Y": [y * 30 + 0.6 for _, y in tissue]},
        index=[f"{x}x{y}" for x, y in tissue],
    )
    raw.mkdir(parents=True, exist_ok=True)
    counts.to_csv(raw / f"{slide}_stdata.tsv.gz", sep="\t")
    pixels.to_csv(raw / f"spots_{spots_as}{slide[2:]}.csv")
    Image.fromarray(generator.integers(0, 255, size=(200, 220, 3), dtype=np.uint8)).save(
        raw / f"HE_{image_as}{slide[2:]}.jpg"
    )
    return counts


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "raw"
    write_slide(folder, "BC23287_C1", [ACTB, ACTB_TOO, ERBB2])
    write_slide(folder, "BC23450_D2", [ERBB2, UNKNOWN, ACTB], spots_as="BC", image_as="BC")
    return folder


@pytest.fixture
def gene_map(tmp_path) -> Path:
    """features.tsv of Space Ranger: id, symbol, kind; no header."""
    path = tmp_path / "features.tsv.gz"
    path.write_bytes(gzip.compress("".join(f"{k}\t{v}\tGene Expression\n" for k, v in MAP.items()).encode()))
    return path


def test_sections_get_symbols_and_the_same_genes(raw, gene_map, tmp_path, capsys):
    done = prepare_stnet(raw, tmp_path / "data", SMALL, gene_map=gene_map)
    assert [(slide.name, slide.patient, slide.spots, slide.genes) for slide in done] == [
        ("BC23287_C1", "BC23287", 20, 3),
        ("BC23450_D2", "BC23450", 20, 3),
    ]
    layout = Layout(tmp_path / "data", STNET)
    first, second = load_slide(layout, "BC23287_C1"), load_slide(layout, "BC23450_D2")
    assert first.var_names.tolist() == second.var_names.tolist() == ["ACTB", UNKNOWN, "ERBB2"]
    source = pd.read_csv(raw / "BC23287_C1_stdata.tsv.gz", sep="\t", index_col=0).loc[first.obs_names]
    np.testing.assert_array_equal(first[:, "ACTB"].X.toarray().ravel(), source[ACTB] + source[ACTB_TOO])
    np.testing.assert_array_equal(first[:, "ERBB2"].X.toarray().ravel(), source[ERBB2])
    assert first[:, UNKNOWN].X.nnz == 0, "left out of the section means zero"
    assert first.obs_names[0] == "3x2" and first.obsm["spatial"][0].tolist() == [90.4, 60.6]
    assert load_names(layout.panel_path) == ["ACTB", "ERBB2"]
    assert [layout.image_path(s).name for s in ("BC23287_C1", "BC23450_D2")] == [
        "HE_BC23287_C1.jpg",
        "HE_BC23450_D2.jpg",
    ]
    said = capsys.readouterr().out
    assert f"1 of 3 genes stay under their Ensembl id: {UNKNOWN}." in said
    assert "66 of 68 expected slides are not in the source" in said
    assert "Dropped: 0 spots without counts, 32 counts without a listed spot." in said


def test_a_second_run_keeps_everything(raw, gene_map, tmp_path):
    prepare_stnet(raw, tmp_path / "data", SMALL, gene_map=gene_map)
    assert [s.image for s in prepare_stnet(raw, tmp_path / "data", SMALL, gene_map=gene_map)] == ["kept", "kept"]


def test_ensembl_ids_without_a_map_need_a_decision(raw, tmp_path):
    with pytest.raises(ValueError, match=r"4 of 4 genes have Ensembl ids \(ENSG.*Give --gene_map FILE.*--keep_ensembl"):
        prepare_stnet(raw, tmp_path / "data", SMALL)
    prepare_stnet(raw, tmp_path / "data", SMALL, keep_ensembl=True)
    assert load_slide(Layout(tmp_path / "data", STNET), "BC23287_C1").var_names.tolist() == sorted([*MAP, UNKNOWN])


def test_counts_that_have_symbols_need_no_map(tmp_path):
    raw = tmp_path / "raw"
    write_slide(raw, "BC23287_C1", ["ACTB", "ERBB2"])
    write_slide(raw, "BC23450_D2", [f"ERBB2_{ERBB2}.14", f"{ACTB}|ACTB"])
    done = prepare_stnet(raw, tmp_path / "data", SMALL)
    assert [slide.genes for slide in done] == [2, 2]
    assert load_slide(Layout(tmp_path / "data", STNET), "BC23450_D2").var_names.tolist() == ["ACTB", "ERBB2"]


def test_ids_of_spots_in_other_spellings(raw, gene_map, tmp_path):
    path = raw / "spots_BT23287_C1.csv"
    table = pd.read_csv(path, index_col=0)
    table.index = [
        f"X{float(x) + 0.02:.2f}x{float(y) - 0.04:.2f}" for x, y in (spot.split("x") for spot in table.index)
    ]
    table.rename(columns=str.lower).to_csv(path.with_suffix(".csv.gz"))
    path.unlink()
    slide = prepare_stnet(raw, tmp_path / "data", SMALL, "BC23287_C1", gene_map)[0]
    assert slide.spots == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.rename(columns={"X": "col"}),
            "expected an index of spot ids and the columns X and Y, found col, Y",
        ),
        (lambda t: t.rename(index={"3x2": "spot7"}), "spot ids should look like '10x13', found spot7"),
        (lambda t: t.rename(index={"3x2": "4x2"}), "spots listed twice: 4x2"),
        (lambda t: t.assign(X=np.nan), "pixel_x is missing or no number"),
        (lambda t: t.assign(X=t["X"] + 100), r"15 of 20 spots lie outside .*HE_BT23287_C1\.jpg \(220 x 200 pixels\)"),
    ],
)
def test_wrong_tables_of_pixels_are_named(raw, gene_map, tmp_path, change, message):
    path = raw / "spots_BT23287_C1.csv"
    change(pd.read_csv(path, index_col=0)).to_csv(path)
    with pytest.raises(ValueError, match=message) as caught:
        prepare_stnet(raw, tmp_path / "data", SMALL, gene_map=gene_map)
    assert "Slide BC23287_C1" in str(caught.value)


def test_sources_without_a_section(tmp_path):
    for slides in (None, "BC23287_C1"):
        with pytest.raises(FileNotFoundError) as caught:
            prepare_stnet(tmp_path, tmp_path / "data", Options(), slides)
        assert str(caught.value).startswith(
            f"No slide of stnet was found in {tmp_path}. Expected the files of Mendeley"
        )


@pytest.mark.parametrize(
    "text",
    [
        f"Gene stable ID,Gene type,Gene name\n{ACTB}.18,protein_coding,ACTB\n{ERBB2},protein_coding,ERBB2\n{UNKNOWN},x,\n",
        f"Gene stable ID,Gene stable ID version,HGNC symbol\n{ACTB},{ACTB}.18,ACTB\n{ERBB2},{ERBB2}.1,ERBB2\n",
        f"HGNC ID\tApproved symbol\tEnsembl gene ID\tNCBI Gene ID\n1\tACTB\t{ACTB}\t60\n2\tERBB2\t{ERBB2}\t2064\n",
        f"symbol\tgene_id\nACTB\t{ACTB}\nERBB2\t{ERBB2}\nNONE\t-\n",
        f"{ACTB}\tACTB\n{ERBB2}\tERBB2\n",
    ],
    ids=["biomart", "biomart with versions", "hgnc", "symbols first", "no header"],
)
def test_gene_maps_of_several_origins(tmp_path, text):
    path = tmp_path / "map.txt"
    path.write_text(text)
    assert read_gene_map(path) == {ACTB: "ACTB", ERBB2: "ERBB2"}


def test_tables_that_map_nothing_are_refused(tmp_path):
    path = tmp_path / "map.tsv"
    with pytest.raises(FileNotFoundError, match=r"--gene_map should be a table with both"):
        read_gene_map(path)
    path.write_text("ACTB\tactin\nERBB2\treceptor\n")
    with pytest.raises(ValueError, match="no column holds Ensembl ids; the first row is ACTB, actin"):
        read_gene_map(path)
    path.write_text(f"id\tlabel\tentrez\n{ACTB}\tACTB\t60\n")
    with pytest.raises(
        ValueError, match=r"none of its columns has a usual name .* id, label, entrez\. Call .* gene_name"
    ):
        read_gene_map(path)
    for ids in (f"{ACTB}\t60\n{ERBB2}\t2064\n", f"{ACTB}\t{ACTB}.18\n{ERBB2}\t{ERBB2}.1\n"):
        path.write_text(ids)
        with pytest.raises(ValueError, match=r"map\.tsv: what should be symbols are ids: (60|ENSG)"):
            read_gene_map(path)
    path.write_text(f"name\tid\nx\t{ACTB}\n")
    with pytest.raises(ValueError, match="no column of symbols follows the Ensembl ids"):
        read_gene_map(path)


def test_symbols_of_names():
    names = [ACTB, f"{ERBB2}.3", UNKNOWN, "MT-CO1", "HLA_DRA"]
    assert symbols_of(names, MAP) == ["ACTB", "ERBB2", UNKNOWN, "MT-CO1", "HLA_DRA"]


def test_command_line(raw, gene_map, tmp_path, monkeypatch):
    arguments = [
        "--source",
        str(raw),
        "--data_dir",
        str(tmp_path / "data"),
        "--num_genes",
        "2",
        "--gene_map",
        str(gene_map),
    ]
    monkeypatch.setattr(sys, "argv", ["prepare_stnet.py", *arguments, "--slides", "BC23450_D2"])
    main()
    assert Layout(tmp_path / "data", STNET).slides_on_disk() == ["BC23450_D2"]
