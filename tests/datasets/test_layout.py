"""Where everything lies, and what a folder lacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from datasets.known_sets import SPECS
from datasets.layout import COUNT_SUFFIXES, Layout
from datasets.spec import DatasetSpec
from utils.commands import extraction_command

OWN = DatasetSpec(name="own", patient_pattern=r"^([A-Z])\d$", image_pattern="{patient}/{slide}/*")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def complete(layout: Layout, slide: str) -> None:
    touch(layout.new_counts_path(slide))
    touch(layout.spots_path(slide))
    touch(layout.images_dir / layout.spec.patient_of(slide) / slide / "scan.jpg")


def test_paths_are_the_documented_ones(tmp_path):
    layout = Layout(tmp_path, SPECS["her2st"])
    relative = {
        layout.new_counts_path("A1"): "her2st/ST-cnts/A1_sub.parquet",
        layout.spots_path("A1"): "her2st/ST-spotfiles/A1_selection.tsv",
        layout.panel_path: "her2st/genes_her2st.npy",
        layout.cache_path("target", "A1"): "her2st/gt_features_224/A1.h5",
        layout.cache_path("neighbor", "A1"): "her2st/n_features_5_224/A1.h5",
        layout.cache_path("token", "A1"): "her2st/token_features_224/A1.h5",
        layout.cache_path("patch", "A1"): "her2st/patches_224/A1.h5",
    }
    assert {str(path.relative_to(tmp_path)): name for path, name in relative.items()} == {
        n: n for n in relative.values()
    }
    other = Layout(tmp_path, SPECS["her2st"], encoder="timm:vit_tiny/16")
    assert other.cache_path("neighbor", "A1").parent.name == "n_features_timm_vit_tiny_16_5_224"
    assert [path.parent.name for path in other.cache_paths("target", "A1")] == [
        "gt_features_timm_vit_tiny_16_224", "gt_features_224",
    ]  # fmt: skip
    assert other.cache_path("patch", "A1").parent.name == "patches_224", "no encoder has made them"
    external = Layout(tmp_path, SPECS["NCBI463"], patch_size=64, num_neighbors=3)
    assert external.root == tmp_path / "test" / "NCBI463"
    assert external.panel_path.name == "genes_NCBI463.npy" and external.panel_index_path.name == "ind_match.npy"
    assert external.cache_path("neighbor", "s").parent.name == "n_features_3_64"
    assert Layout(tmp_path, OWN, "clinic").root == tmp_path / "test" / "clinic"


@pytest.mark.parametrize("suffix", COUNT_SUFFIXES)
def test_counts_in_every_spelling(tmp_path, suffix):
    layout = Layout(tmp_path, OWN)
    path = touch(layout.counts_dir / f"A1{suffix}")
    touch(layout.counts_dir / ".A1.tsv")
    assert layout.counts_path("A1") == path
    assert layout.slides_with_counts() == ["A1"]


@pytest.mark.parametrize("pair", [(".tsv", ".csv"), (".tsv.gz", ".h5ad"), (".parquet", ".tsv"), (".tsv.gz", ".tsv")])
def test_two_tables_of_counts_of_a_slide_are_refused(tmp_path, pair):
    layout = Layout(tmp_path, OWN)
    complete(layout, "C1")
    for slide in ("A1", "B1"):
        complete(layout, slide)
        layout.new_counts_path(slide).unlink()
        for suffix in pair:
            touch(layout.counts_dir / f"{slide}{suffix}")
    names = ", ".join(f"A1{suffix}" for suffix in COUNT_SUFFIXES if suffix in pair)
    for ask in (lambda: layout.counts_path("A1"), layout.slides_on_disk):
        with pytest.raises(
            ValueError, match=rf"A1 of own has 2 tables of counts where one .*: {names}\. .*for each of A1, B1"
        ):
            ask()


def test_what_a_script_has_written_goes_before_what_it_was_made_from(tmp_path):
    layout = Layout(tmp_path, OWN)
    for slide in ("A1", "B1"):
        complete(layout, slide)
    assert layout.unread_counts_note() is None
    for suffix in (".tsv.gz", ".csv"):
        touch(layout.counts_dir / f"A1{suffix}")
    assert layout.counts_path("A1").name == "A1_sub.parquet" and layout.slides_on_disk() == ["A1", "B1"]
    note = str(layout.unread_counts_note())
    assert "1 of 2 slides" in note and "Of A1 A1_sub.parquet is read, not A1.tsv.gz, A1.csv." in note


def test_missing_counts_name_every_spelling_and_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of A1_sub\.parquet, .*A1\.tsv\.gz, .*A1\.h5ad") as caught:
        Layout(tmp_path, SPECS["her2st"]).counts_path("A1")
    command = f"Prepare it: python preprocess/prepare_her2st.py --source RAW --data_dir {tmp_path}"
    assert command in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=rf"The folder of own, '{tmp_path}/own', does not exist\. See docs/your_data"
    ):
        Layout(tmp_path, OWN).slides_on_disk()
    (tmp_path / "own").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ST-cnts does not exist\. See docs/your_data\.md for the folders"):
        Layout(tmp_path, OWN).slides_on_disk()


def test_the_one_image_of_a_slide(tmp_path):
    layout = Layout(tmp_path, OWN)
    with pytest.raises(FileNotFoundError, match=r"Slide A1 of own has no image: nothing matches .*ST-imgs/A/A1/\*"):
        layout.image_path("A1")
    scan = touch(layout.images_dir / "A" / "A1" / "scan.JPG")
    touch(layout.images_dir / "A" / "A1" / "notes.txt")
    touch(layout.images_dir / "A" / "A1" / ".hidden.jpg")
    assert layout.image_path("A1") == scan
    touch(layout.images_dir / "A" / "A1" / "small.png")
    with pytest.raises(
        ValueError, match=r"2 images where one was expected: A/A1/scan\.JPG, A/A1/small\.png.*full-resolution"
    ):
        layout.image_path("A1")


@pytest.mark.parametrize("slide", ["S[1]", "S?", "S*", "[S]1"])
def test_a_name_is_taken_as_it_is_and_finds_no_file_of_another_slide(tmp_path, slide):
    """Names that a shell or a glob would read as patterns, of S1 for all of them."""
    layout = Layout(tmp_path, DatasetSpec(name="own", patient_of_slide={slide: "P*", "S1": "PX"}))
    touch(layout.images_dir / "S1.jpg")
    touch(layout.cache_path("target", "S1"))
    touch(layout.root / "patches_9" / "S1.h5")
    with pytest.raises(FileNotFoundError, match="has no image"):
        layout.image_path(slide)
    assert layout.caches_of_all_encoders("target", slide) == [] and layout.patches_note(slide) == ""
    own = touch(layout.images_dir / f"{slide}.jpg")
    cache = touch(layout.cache_path("target", slide))
    touch(layout.root / "patches_8" / f"{slide}.h5")
    assert layout.image_path(slide) == own and layout.caches_of_all_encoders("target", slide) == [cache]
    assert "patches_8" in layout.patches_note(slide) and "patches_9" not in layout.patches_note(slide)


@pytest.mark.parametrize(
    ("name", "slide", "image"),
    [
        ("her2st", "B4", "B/B4/BT10737_D2_HE.jpg"),
        ("skinst", "P2_ST_rep1", "GSM4284316_P2_ST_rep1.jpg"),
        ("stnet", "BC23287_C1", "HE_BC23287_C1.tif"),
        ("NCBI463", "NCBI463", "NCBI463.tif"),
        ("10x_breast_ff1", "10x_breast_ff1", "any/10x_breast_ff1.tif"),
        ("demo", "A1", "A/A1/A1.jpg"),
    ],
)
def test_published_image_names_are_found(tmp_path, name, slide, image):
    layout = Layout(tmp_path, SPECS[name])
    path = touch(layout.images_dir / image)
    assert layout.image_path(slide) == path


def test_published_features_in_both_spellings(tmp_path):
    layout = Layout(tmp_path, OWN)
    assert layout.published_path("target", "A1") is None
    small = touch(layout.root / "n_features_uni_small_5_224" / "A1.pt")
    assert layout.published_path("neighbor", "A1") == small
    plain = touch(layout.root / "n_features_5_224" / "A1.pt")
    assert layout.published_path("neighbor", "A1") == plain
    assert layout.published_path("token", "A1") is None


def test_slides_that_lack_something_are_left_out_and_told(tmp_path):
    layout = Layout(tmp_path, OWN)
    for slide in ("B1", "A2", "A1", "C1"):
        complete(layout, slide)
    layout.spots_path("A2").unlink()
    (layout.images_dir / "B" / "B1" / "scan.jpg").unlink()
    assert layout.slides_on_disk() == ["A1", "C1"]
    lacking = layout.incomplete_slides()
    assert list(lacking) == ["A2", "B1"]
    assert lacking["A2"] == [f"no spot table {layout.spots_path('A2')}"]
    assert lacking["B1"][0].startswith(f"no image {layout.images_dir}/B/B1/* and no features in")


@pytest.mark.parametrize("features", ["gt_features_224/B1.h5", "gt_features_uni_small_224/B1.pt", "patches_224/B1.h5"])
def test_features_stand_in_for_an_image(tmp_path, features):
    layout = Layout(tmp_path, OWN)
    complete(layout, "A1")
    complete(layout, "B1")
    (layout.images_dir / "B" / "B1" / "scan.jpg").unlink()
    assert layout.slides_on_disk() == ["A1"]
    touch(layout.root / features)
    assert layout.slides_on_disk() == ["A1", "B1"]


def test_expected_slides_that_are_not_there_are_told(tmp_path):
    layout = Layout(tmp_path, SPECS["her2st"])
    complete(layout, "B4")
    assert layout.slides_on_disk() == ["B4"]
    lacking = layout.incomplete_slides()
    assert len(lacking) == 35 and len(lacking["A1"]) == 3


def test_no_complete_slide_and_strangers_are_errors(tmp_path):
    layout = Layout(tmp_path, SPECS["her2st"])
    touch(layout.new_counts_path("A1"))
    with pytest.raises(FileNotFoundError, match=r"No complete slide of her2st .*1 have counts.*A1: no spot table"):
        layout.slides_on_disk()
    touch(layout.new_counts_path("J1"))
    with pytest.raises(ValueError, match=r"slides that her2st does not have: J1\. Move them away"):
        layout.slides_on_disk()


@pytest.mark.parametrize("name", ["../A1", "a/b", "", ".hidden", "a\\b"])
def test_names_do_not_leave_the_data_folder(tmp_path, name):
    layout = Layout(tmp_path, DatasetSpec(name="own"))
    for path_of in (layout.counts_path, layout.spots_path, layout.image_path, lambda s: layout.cache_path("target", s)):
        with pytest.raises(ValueError, match="is not a plain name"):
            path_of(name)
    with pytest.raises(ValueError, match="is not a plain name"):
        Layout(tmp_path, OWN, name or "..")


def test_a_repair_command_makes_the_cache_where_it_was_looked_for(tmp_path):
    def opened(name="her2st/dml", test_name=None, spec=SPECS["her2st"], **sizes):
        return Layout(tmp_path, spec, test_name, extraction=partial(extraction_command, config_name=name), **sizes)

    found = opened(patch_size=112, num_neighbors=3).repair("target", "A1", "resnet50")
    assert found == (
        "python preprocess/extract_features_uni.py --config her2st/dml --mode internal --extract_mode target "
        f"--data_dir {tmp_path} --encoder resnet50 --set DATA.patch_size=112 --num_n 3 --slides A1"
    )
    usual = opened().repair("token", None, "uni")
    assert "--set" not in usual and "--num_n" not in usual
    small = opened("demo/dml", patch_size=64).repair("token", None, "uni")
    assert "--set" not in small, "the configuration says it"
    external = {"test_name": "own", "spec": DatasetSpec(name="own"), "patch_size": 112}
    found = opened(**external).repair("target", None, "uni")
    assert "--config her2st/dml --mode external --test_name own" in found and "--set DATA.patch_size=112" in found
    elsewhere = opened("mine/dml", **external).repair("target", None, "uni")
    assert "--config" not in elsewhere and "--mode external --test_name own" in elsewhere
