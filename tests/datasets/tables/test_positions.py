"""Every accepted file of positions gives (x, y); anything else says what is wrong and what was expected."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from datasets.tables.positions import read_positions
from datasets.tables.spot_table import read_spots

HEADER = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"
SPOTS = "AAA-1,1,0,2,100,700\nCCC-1,0,0,4,101,800\nGGG-1,1,1,3,186,750\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tissue_positions.csv", HEADER + SPOTS),
        ("tissue_positions_list.csv", SPOTS),
        ("windows.csv", "\ufeff" + (HEADER + SPOTS).replace("\n", "\r\n")),
        ("tabs.tsv", (HEADER + SPOTS).replace(",", "\t")),
    ],
)
def test_space_ranger_of_every_generation(tmp_path, name, text):
    """Rows come before columns in these files: x is the last column."""
    (tmp_path / name).write_bytes(text.encode())
    found = read_positions(tmp_path / name)
    assert found.ids == ["AAA-1", "CCC-1", "GGG-1"] and found.in_tissue.tolist() == [True, False, True]
    assert found.pixels.tolist() == [[700, 100], [800, 101], [750, 186]]
    assert found.grid.tolist() == [[2, 0], [4, 0], [3, 1]]
    kept = found.under_tissue()
    assert kept.ids == ["AAA-1", "GGG-1"] and kept.grid.tolist() == [[2, 0], [3, 1]] and kept.in_tissue.all()


def test_compressed(tmp_path):
    (tmp_path / "tissue_positions_list.csv.gz").write_bytes(gzip.compress(SPOTS.encode()))
    assert len(read_positions(tmp_path / "tissue_positions_list.csv.gz")) == 3
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(SPOTS.encode())[:-9])
    with pytest.raises(ValueError, match=r"cut.csv.gz cannot be read as a table of spot positions"):
        read_positions(tmp_path / "cut.csv.gz")


def test_spot_table_of_the_layout(tmp_path):
    (tmp_path / "s.tsv").write_text("x\ty\tnew_x\tpixel_x\tpixel_y\n7\t3\t7.1\t70.5\t30.2\n8\t3\t8.0\t80\t30\n")
    found = read_positions(tmp_path / "s.tsv")
    assert found.ids == ["7x3", "8x3"] and found.grid.tolist() == [[7, 3], [8, 3]]
    assert found.pixels.tolist() == [[70.5, 30.2], [80, 30]]
    exchanged = found.exchanged()
    assert exchanged.grid.tolist() == [[3, 7], [3, 8]] and exchanged.pixels.tolist() == [[30.2, 70.5], [30, 80]]
    assert exchanged.ids == found.ids


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_positions, "x,y,score\n1,2,3,\n4,5,6,\n"),
        (read_positions, HEADER.replace("\n", ",area\n") + SPOTS.replace("\n", ",5,\n")),
        (read_spots, "x\ty\tpixel_x\tpixel_y\tz\n1\t2\t10\t20\t1\t\n2\t2\t20\t20\t1\t \n"),
    ],
)
def test_rows_that_end_with_a_separator_move_no_column(tmp_path, read, text):
    """The first column would be taken for names, and each column for the one before it."""
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=r"s\.csv .*its rows end with '(,|\\t)' and its first line does not"):
        read(tmp_path / "s.csv")


def test_spots_of_a_table_that_are_not_selected_are_off_the_tissue(tmp_path):
    (tmp_path / "s.tsv").write_text("x\ty\tpixel_x\tpixel_y\tselected\n7\t3\t70\t30\t1\n8\t3\t80\t30\t0\n")
    found = read_positions(tmp_path / "s.tsv")
    assert found.in_tissue.tolist() == [True, False] and found.under_tissue().ids == ["7x3"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("x,y\n10,20\n30,40\n", ["10x20", "30x40"]),
        ("10,20\n30,40\n", ["10x20", "30x40"]),
        ("a\t10\t20\nb\t30\t40\n", ["a", "b"]),
        ("Y,Barcode,X\n20,a,10\n40,b,30\n", ["a", "b"]),
    ],
)
def test_lists_of_pixels(tmp_path, text, ids):
    (tmp_path / "s.csv").write_text(text)
    found = read_positions(tmp_path / "s.csv")
    assert found.ids == ids and found.grid is None and found.in_tissue.all()
    np.testing.assert_array_equal(found.pixels, [[10, 20], [30, 40]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"has the columns a, b. Expected comma or tab separated: Space Ranger"),
        (
            "barcode,in_tissue,array_row\nA,1,2\n",
            r"for Space Ranger array_col, pxl_row_in_fullres, pxl_col.* are missing",
        ),
        ("x,y\n1,\n2,b\n", r"y is missing or no number in spot 1, spot 2"),
        ("x,y\n", "no spots in it"),
        ("", "cannot be read as a table of spot positions"),
        ("barcode,x,y\na,1,2\na,3,4\n", "spots listed twice: a"),
        (HEADER + SPOTS.replace("CCC-1,0,0,4", "CCC-1,0,0,2"), r"grid positions listed twice: \(2, 0\)"),
        (
            "x,y,imagerow,imagecol\n1,2,300,400\n",
            r"x and y, which would be taken for pixels, but also imagecol and imagerow",
        ),
        (
            "barcode,x,y,pxl_row_in_fullres,pxl_col_in_fullres\na,1,2,300,400\n",
            "taken for pixels, but also pxl_col_in_fullres and pxl_row_in_fullres. If these are the pixels, call them x and y",
        ),
        ("x,y,pixel_x,pixel_y,selected\n1,2,3,4,perhaps\n", "selected should be 0 or 1, found perhaps"),
        (HEADER + SPOTS.replace("CCC-1,0", "CCC-1,yes"), "in_tissue should be 0 or 1, found .*yes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_positions(tmp_path / "s.csv")
    assert "s.csv" in str(error.value)


def test_missing_file_and_binary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv does not exist. Expected comma or tab"):
        read_positions(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="cannot be read as a table of spot positions"):
        read_positions(tmp_path / "b.csv")
