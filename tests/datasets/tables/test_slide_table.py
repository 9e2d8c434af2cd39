"""Counts and spots joined: the recorded section, the order of rows, the exchanged convention, and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec
from datasets.tables.expression import expression_targets, log10p1, normalise, smooth
from datasets.tables.slide_table import load_slide
from datasets.tables.spot_table import check_inside, read_spots

OWN = DatasetSpec(name="own", patient_pattern=r"^([A-Z])\d$")
SPOTS = pd.DataFrame(
    {
        "x": [2, 1, 3, 1],
        "y": [1, 2, 1, 1],
        "pixel_x": [20.9, 10.2, 30.0, 10.7],
        "pixel_y": [11.0, 21.5, 11.9, 10.1],
    }
)
COUNTS = pd.DataFrame({"GENE1": [1, 2, 3, 4], "GENE2": [5, 6, 7, 8]}, index=["1x1", "2x1", "3x1", "1x2"])


def written(
    folder: Path, spots: pd.DataFrame = SPOTS, counts: pd.DataFrame = COUNTS, spec: DatasetSpec = OWN
) -> Layout:
    layout = Layout(folder, spec)
    layout.counts_dir.mkdir(parents=True, exist_ok=True)
    layout.spots_dir.mkdir(parents=True, exist_ok=True)
    counts.to_csv(layout.counts_dir / "A1.tsv", sep="\t")
    spots.to_csv(layout.spots_path("A1"), sep="\t", index=False)
    return layout


def test_recorded_section_is_joined_sorted_and_smoothed(tmp_path, golden):
    recorded = golden("section")
    spots = pd.DataFrame({name: recorded[f"spot_{name}"] for name in ("x", "y", "pixel_x", "pixel_y")})
    genes = [f"GENE{i}" for i in range(recorded["counts"].shape[1])]
    layout = written(tmp_path, spots, pd.DataFrame(recorded["counts"], index=recorded["count_ids"], columns=genes))
    slide = load_slide(layout, "A1")
    np.testing.assert_array_equal(slide.obsm["grid"][:, ::-1], recorded["out_position_yx"])
    np.testing.assert_array_equal(slide.obsm["center"], recorded["out_center_xy"])
    targets = expression_targets(slide.X, slide.obsm["grid"])
    np.testing.assert_allclose(targets, recorded["out_exp"], rtol=2e-6, atol=1e-7)
    assert slide.uns["dropped"]["counts_without_spot"] == ["99x99"]
    assert len(slide.uns["dropped"]["spots_without_counts"]) == len(spots) - len(recorded["out_exp"])
    height, width = recorded["image"].shape[:2]
    check_inside(slide, (width, height))


def test_rows_carry_their_own_values_in_the_order_of_the_grid(tmp_path):
    slide = load_slide(written(tmp_path), "A1")
    assert slide.obs_names.tolist() == ["1x1", "2x1", "3x1", "1x2"]
    assert slide.to_df().loc["2x1"].tolist() == [2, 6]
    assert slide.obsm["spatial"].tolist() == [[10.7, 10.1], [20.9, 11.0], [30.0, 11.9], [10.2, 21.5]]
    assert slide.obsm["center"].tolist() == [[10, 10], [20, 11], [30, 11], [10, 21]]
    assert slide.obsm["grid"].tolist() == [[1, 1], [2, 1], [3, 1], [1, 2]]
    assert (slide.obsm["center"].dtype, slide.obsm["grid"].dtype, slide.X.dtype) == (np.int64, np.int64, np.int32)
    assert (slide.uns["slide"], slide.uns["patient"]) == ("A1", "A")
    assert slide.uns["dropped"] == {"spots_without_counts": [], "counts_without_spot": []}


def test_the_order_of_the_files_does_not_matter(tmp_path):
    first = load_slide(written(tmp_path), "A1")
    again = load_slide(written(tmp_path, SPOTS.iloc[::-1], COUNTS.iloc[[2, 0, 3, 1]]), "A1")
    assert again.obs_names.tolist() == first.obs_names.tolist()
    np.testing.assert_array_equal(again.X.toarray(), first.X.toarray())
    np.testing.assert_array_equal(again.obsm["spatial"], first.obsm["spatial"])


def test_chosen_genes_come_in_the_order_of_the_panel(tmp_path):
    layout = written(tmp_path)
    assert load_slide(layout, "A1", ["GENE2", "GENE1"]).to_df().loc["3x1"].tolist() == [7, 3]
    with pytest.raises(ValueError, match=r"Slide A1: .*A1\.tsv: genes asked for but not there: ABSENT"):
        load_slide(layout, "A1", ["GENE2", "ABSENT"])


def test_exchanged_convention_turns_pixels_and_grid_together(tmp_path):
    """Centre = floor(pixel_y, pixel_x), sorted by (x, y), grid position (row, column) = (x, y)."""
    spec = replace(OWN, exchanged_pixels=True, sort_by="xy")
    slide = load_slide(written(tmp_path, spec=spec), "A1")
    assert slide.obs_names.tolist() == ["1x1", "1x2", "2x1", "3x1"]
    assert slide.obsm["center"].tolist() == [[10, 10], [21, 10], [11, 20], [11, 30]]
    assert slide.obsm["grid"][:, ::-1].tolist() == [[1, 1], [1, 2], [2, 1], [3, 1]]
    assert slide.to_df().loc["1x2"].tolist() == [4, 8]
    # the table turned over describes the same slide in the internal convention
    turned = SPOTS.rename(columns={"x": "y", "y": "x", "pixel_x": "pixel_y", "pixel_y": "pixel_x"})
    counts = COUNTS.rename(index=lambda spot: "x".join(reversed(spot.split("x"))))
    same = load_slide(written(tmp_path / "turned", turned, counts), "A1")
    for key in ("center", "grid", "spatial"):
        np.testing.assert_array_equal(same.obsm[key], slide.obsm[key])
    np.testing.assert_array_equal(same.X.toarray(), slide.X.toarray())


def test_ids_of_fractional_positions_are_rounded(tmp_path):
    spots = SPOTS.assign(x=SPOTS["x"] + 0.04, y=SPOTS["y"] - 0.49)
    assert load_slide(written(tmp_path, spots), "A1").n_obs == 4


def test_spots_and_counts_without_a_partner_are_dropped_and_kept_in_the_report(tmp_path):
    spots = pd.concat([SPOTS, pd.DataFrame({"x": [9], "y": [8], "pixel_x": [1.0], "pixel_y": [1.0]})])
    counts = pd.concat([COUNTS, COUNTS.iloc[:1].rename(index={"1x1": "5x6"})])
    slide = load_slide(written(tmp_path, spots, counts), "A1")
    assert slide.n_obs == 4
    assert slide.uns["dropped"] == {"spots_without_counts": ["9x8"], "counts_without_spot": ["5x6"]}


@pytest.mark.parametrize(
    ("spots", "message"),
    [
        (SPOTS.drop(columns=["pixel_y", "x"]), r"column\(s\) x, pixel_y missing; found y, pixel_x"),
        (pd.concat([SPOTS, SPOTS.iloc[:2]]), "spots listed twice: 2x1, 1x2"),
        (SPOTS.assign(x=[1.0, 1.2, 0.9, 3.0]), "spots listed twice: 1x1"),
        (SPOTS.assign(pixel_x=[1, 2, np.nan, 4]), r"pixel_x is missing or no number in row 4 \(3x1\)"),
        (SPOTS.assign(pixel_y=[1, "left", 3, 4]), r"pixel_y is missing or no number in row 3 \(1x2\)"),
        (SPOTS.assign(y=[1, np.inf, 3, 4]), "y is missing or no number in row 3"),
        (SPOTS.iloc[:0], "no spots in it"),
    ],
)
def test_wrong_spot_tables_name_slide_file_and_rows(tmp_path, spots, message):
    layout = written(tmp_path, spots)
    with pytest.raises(ValueError, match=message) as caught:
        load_slide(layout, "A1")
    assert str(caught.value).startswith("Slide A1: ") and str(layout.spots_path("A1")) in str(caught.value)


def test_problems_of_both_files_are_told_at_once(tmp_path):
    layout = written(tmp_path, pd.concat([SPOTS, SPOTS.iloc[:1]]), COUNTS.assign(GENE1=[-1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"(?s)negative counts \(-1 for gene GENE1\) in spots 1x1.*listed twice: 2x1"):
        load_slide(layout, "A1")


def test_files_of_different_slides_have_no_spot_in_common(tmp_path):
    layout = written(tmp_path, counts=COUNTS.rename(index=lambda spot: f"7{spot}"))
    with pytest.raises(ValueError, match=r"no spot in common: counts are of 71x1, .*spots are 2x1.*different slides"):
        load_slide(layout, "A1")


def test_missing_and_unreadable_files(tmp_path):
    layout = written(tmp_path)
    layout.spots_path("A1").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"A1_selection\.tsv cannot be read as a tab separated table"):
        read_spots(layout.spots_path("A1"))
    layout.spots_path("A1").write_text("")
    with pytest.raises(ValueError, match="cannot be read as a tab separated table"):
        read_spots(layout.spots_path("A1"))
    layout.spots_path("A1").unlink()
    with pytest.raises(FileNotFoundError, match=r"A1_selection\.tsv does not exist\. It should list the spots"):
        load_slide(layout, "A1")


def test_spots_outside_the_image(tmp_path):
    slide = load_slide(written(tmp_path), "A1")
    check_inside(slide, (31, 22))
    with pytest.raises(
        ValueError, match=r"Slide A1: 1 of 4 spots lie outside scan\.jpg \(31 x 21 pixels\): 1x2 at \(10, 21\)"
    ):
        check_inside(slide, (31, 21), "scan.jpg")
    with pytest.raises(ValueError, match=r"1 of 4 spots .*3x1 at \(30, 11\).*exchanged all of them would be inside"):
        check_inside(slide, (22, 31))
    with pytest.raises(ValueError, match=r"3 of 4 spots .*not the full-resolution one"):
        check_inside(slide, (15, 11))
    slide.obsm["center"][0, 0] = -1
    with pytest.raises(ValueError, match=r"1x1 at \(-1, 10\)"):
        check_inside(slide, (31, 22))


def test_real_slide_gives_the_recorded_values(her2st_raw, tmp_path, golden):
    """HER2ST C2: grid, pixels, and the targets of eight genes, whose panel total is recorded beside them."""
    (tmp_path / "her2st").symlink_to(her2st_raw)
    recorded = golden("expression_real_C2")
    slide = load_slide(Layout(tmp_path, SPECS["her2st"]), "C2", recorded["genes"].tolist())
    np.testing.assert_array_equal(slide.obsm["grid"], np.stack([recorded["x"], recorded["y"]], axis=1))
    pixels = np.stack([recorded["pixel_x"], recorded["pixel_y"]], axis=1)
    np.testing.assert_allclose(slide.obsm["spatial"], pixels, rtol=1e-6)
    counts = slide.X.toarray()
    np.testing.assert_array_equal(counts, recorded["counts"])
    rest = recorded["panel_total"] - counts.sum(axis=1)
    logarithms = log10p1(normalise(np.column_stack([counts, rest])))
    np.testing.assert_allclose(logarithms[:, :-1], recorded["lognorm"], rtol=1e-6, atol=1e-7)
    smoothed = smooth(logarithms, slide.obsm["grid"])
    np.testing.assert_allclose(smoothed[:, :-1], recorded["smoothed"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flags", [[1, 0, 1, 1], ["TRUE", "FALSE", "TRUE", "TRUE"], [1.0, 0.0, 1.0, 1.0]])
def test_spots_that_are_not_selected_are_left_out_and_listed(tmp_path, flags):
    """The second row is 1x2; spots without counts are not listed twice."""
    spots = pd.concat([SPOTS.assign(selected=flags), pd.DataFrame([{**SPOTS.iloc[0], "x": 9, "selected": 0}])])
    slide = load_slide(written(tmp_path, spots), "A1")
    assert slide.obs_names.tolist() == ["1x1", "2x1", "3x1"] and slide.uns["not_selected"] == ["1x2"]
    assert slide.uns["dropped"] == {"spots_without_counts": [], "counts_without_spot": []}
    assert load_slide(written(tmp_path, SPOTS), "A1").uns["not_selected"] == []


def test_what_is_wrong_with_the_selection_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"A1_selection\.tsv.* selected is 0 for all 4 spots with counts"):
        load_slide(written(tmp_path, SPOTS.assign(selected=0)), "A1")
    with pytest.raises(
        ValueError, match=r"A1_selection\.tsv: selected should be 1 or, .*, 0; found 2, maybe\. Correct"
    ):
        load_slide(written(tmp_path, SPOTS.assign(selected=[1, 2, "maybe", 0])), "A1")
