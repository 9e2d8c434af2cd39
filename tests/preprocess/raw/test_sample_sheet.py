"""A sheet of samples that cannot be used: what is wrong, in which row, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from preprocess.raw.sample_sheet import SheetRow, read_sample_sheet

pytestmark = pytest.mark.usefixtures("folder")
HEADER = "sample,patient,outs,image\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / name / "outs").mkdir(parents=True)
        (tmp_path / name / "image.tif").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *, for_training: bool = True) -> list[SheetRow]:
    path = Path("samples.csv")
    path.write_text(text)
    return read_sample_sheet(path, for_training=for_training)


GOOD = "S1,P1,a/outs,a/image.tif\nS2,P2,b/outs,b/image.tif\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_sheet_as_programs_for_tables_save_it(separator):
    rows = read(f"\ufeff{HEADER}{GOOD},,,\n".replace(",", separator).replace("\n", "\r\n"))
    assert rows[1] == SheetRow("S2", "P2", Path("b/outs"), Path("b/image.tif")) and len(rows) == 2


def test_other_columns_and_their_order_do_not_matter():
    rows = read("Image, Age,sample,outs,PATIENT\na/image.tif,50, S1 ,a/outs,P1\nb/image.tif,,S2,b/outs,P2\n")
    assert [(row.sample, row.patient) for row in rows] == [("S1", "P1"), ("S2", "P2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample,outs,image\nS1,a/outs,a/image.tif\n", r"column\(s\) patient missing; found sample, outs, image"),
        (HEADER, "lists no section"),
        ("", "cannot be read as a sheet of samples"),
        (HEADER + GOOD + "S1,P3,c/outs,c/image.tif\n", "rows 2, 4: the same sample S1. Every section has a name of its own"),
        (HEADER + GOOD + "S3,P3,a/../a/outs,c/image.tif\n", r"rows 2, 4: the same outs /.*/a/outs\. .*correct one"),
        (HEADER + GOOD + "S3,P3,c/outs,b/image.tif\n", r"rows 3, 4: the same image /.*/b/image\.tif\. .*Space Ranger"),
        (HEADER + GOOD + "S3,,c/outs,c/image.tif\n", r"row 4 \(S3\): patient empty. Fill the row, or leave it out"),
        (HEADER + GOOD + "S3,P3,c/outs\n", r"row 4 \(S3\): image empty"),
        (HEADER + GOOD + "../S3,P3,c/outs,c/image.tif\n", r"row 4: Sample '\.\./S3' is not a plain name.*Choose another name"),
        (HEADER + GOOD + "S3,P3,d/outs,c/image.tif\n", r"row 4 \(S3\): outs d/outs is no folder. .*current folder .*it"),
        (HEADER + GOOD + "S3,P3,c/outs,/none.tif\n", r"row 4 \(S3\): image /none.tif is no file. Correct the path"),
        (HEADER + GOOD.replace("P2", "P1"), "all 2 sections are of patient P1.*add sections of another patient.*--test"),
        (HEADER + GOOD.replace("P2", "p1"), r"spelling alone: P1 in row 2, p1 in row 3\. Write them alike"),
        (HEADER + "S1,P1,a/outs,a/image.tif,1\nS2,P2,b/outs,b/image.tif,\n", "more cells than the header names"),
        (HEADER + "S1,P1,a/outs,a/image.tif,\nS2,P2,b/outs,b/image.tif,\n", "its rows end with ','"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_row_and_remedy(text, message):
    with pytest.raises(ValueError, match=rf"(?s)samples\.csv.*{message}"):
        read(text)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        read(HEADER + "S1,P1,x,a/image.tif\nS1,P2,b/outs,a/image.tif\n")
    assert str(caught.value).count("\n") == 3


def test_a_path_relative_to_the_sheet_is_told_how_to_be_written(folder):
    (folder / "a" / "samples.csv").write_text(f"{HEADER}S1,P1,outs,image.tif\n")
    with pytest.raises(ValueError, match=r"outs outs is no folder. .* not to the sheet: write a/outs"):
        read_sample_sheet("a/samples.csv", for_training=False)


def test_one_patient_is_enough_for_an_external_set():
    assert len(read(HEADER + GOOD.replace("P2", "P1"), for_training=False)) == 2


def test_a_missing_sheet_says_what_it_should_be():
    with pytest.raises(FileNotFoundError, match="sample,patient,outs,image, one row a section"):
        read_sample_sheet("none.csv", for_training=True)
