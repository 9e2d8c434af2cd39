"""The table of data sets, and `dataset.yaml` for one's own."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from datasets.known_sets import SPECS, get_spec
from datasets.spec import NOT_IN_FILE, DatasetSpec, read_spec, write_spec


def test_table_holds_the_published_slides():
    her2st, skinst, stnet = SPECS["her2st"], SPECS["skinst"], SPECS["stnet"]
    assert (len(her2st.slides), len(skinst.slides), len(stnet.slides)) == (36, 12, 68)
    assert Counter(map(her2st.patient_of, her2st.slides)) == {**dict.fromkeys("ABCD", 6), **dict.fromkeys("EFGH", 3)}
    assert Counter(map(skinst.patient_of, skinst.slides)) == dict.fromkeys(("P2", "P5", "P9", "P10"), 3)
    assert Counter(map(stnet.patient_of, stnet.slides)) == {p: 2 if p == "BC23901" else 3 for p in stnet.patients}
    assert (stnet.fold_scheme, stnet.num_folds, stnet.fold_seed) == ("kfold", 8, 2021)
    assert " ".join(stnet.patients).startswith("BC23209 BC23270 BC23803 BC24105 BC24220 BC23268")
    assert her2st.expected_spots == (176, 712)


def test_exchanged_pixels_belong_to_the_published_external_sets_only():
    published = {"10x_breast_ff1", "10x_breast_ff2", "10x_breast_ff3", "NCBI463", "NCBI464"}
    assert {name for name, spec in SPECS.items() if spec.exchanged_pixels} == published
    assert {name for name, spec in SPECS.items() if spec.sort_by == "xy"} == published
    assert {name for name, spec in SPECS.items() if spec.external} == published
    assert SPECS["NCBI463"].training_type == "skinst" and SPECS["10x_breast_ff2"].training_type == "her2st"


def test_patient_and_pixel_size_of_a_slide():
    spec = SPECS["her2st"]
    assert spec.patient_of("E3") == "E"
    assert (spec.microns_of("A1"), spec.microns_of("H3")) == (0.93, 0.68)
    assert SPECS["NCBI464"].microns_of("NCBI464") == 1.04
    scanned_twice = DatasetSpec(name="own", patient_pattern="^(.)", microns_per_pixel={"A": 0.5, "A2": 0.25})
    assert (scanned_twice.microns_of("A1"), scanned_twice.microns_of("A2")) == (0.5, 0.25)
    assert SPECS["skinst"].microns_of("P2_ST_rep1") is None


def test_a_slide_without_a_patient_names_slide_and_pattern():
    with pytest.raises(
        ValueError, match=r"Slide 'tumour' of her2st .*does not match '\^\(\[A-Z\]\)\\\\d\+\$'.*dataset.yaml"
    ):
        SPECS["her2st"].patient_of("tumour")
    with pytest.raises(ValueError, match="Slide 'J1' is of patient 'J', who is not one of her2st: A, B"):
        SPECS["her2st"].patient_of("J1")


def test_an_explicit_patient_goes_before_the_pattern():
    spec = DatasetSpec(name="own", patient_pattern=r"^(P\d+)_", patient_of_slide={"odd": "P1"})
    assert (spec.patient_of("odd"), spec.patient_of("P2_x")) == ("P1", "P2")
    with pytest.raises(ValueError, match=r"'other'.*and it is not in patient_of_slide"):
        spec.patient_of("other")


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown data set 'her2ts': known are her2st, skinst.*Did you mean 'her2st'"):
        get_spec("her2ts", tmp_path)
    with pytest.raises(
        ValueError, match=rf"there is no folder '{tmp_path}/own'\. .*For your own data write a dataset\.yaml"
    ):
        get_spec("own", tmp_path)
    lies_in = rf"external test set would lie in {re.escape(str(tmp_path / 'test' / 'own'))}; .*"
    with pytest.raises(
        ValueError, match=rf"{lies_in}prepare_visium\.py --name own --source OUTS .*--data_dir {tmp_path} "
    ):
        get_spec("own", tmp_path)
    with pytest.raises(ValueError, match="is not a plain name"):
        get_spec("../elsewhere", tmp_path)


def test_a_data_folder_that_is_not_there_is_named_before_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = rf"'none' \({tmp_path}/none; relative paths start at the current folder\)"
    said = rf"The data folder {where} does not exist\. .*--data_dir"
    with pytest.raises(FileNotFoundError, match=rf"{said}\.$"):
        get_spec("own", "none")
    with pytest.raises(
        FileNotFoundError, match=rf"{said}\. Or prepare it there: python preprocess/prepare_her2st\.py .*none$"
    ):
        get_spec("her2st", "none")
    with pytest.raises(FileNotFoundError, match=rf"The data folder '{tmp_path}/none' does not exist\."):
        get_spec("own", tmp_path / "none")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=rf"there is no folder 'data/own' \({tmp_path}/data/own; relative paths start"):
        get_spec("own", "data")
    (tmp_path / "data" / "own").mkdir()
    with pytest.raises(ValueError, match=r"and data/own/dataset\.yaml does not exist\."):
        get_spec("own", "data")


OWN = """
patients: [P1, P2, P3]
patient_pattern: '^(P[0-9]+)_'
patient_of_slide: {biopsy: P3}
image_pattern: 'scans/{slide}.svs'
expected_spots: [100, 5000]
fold_scheme: kfold
num_folds: 3
fold_seed: 0
microns_per_pixel: {P1: 0.5, P2: 0.5, P3: 0.25}
"""


def test_own_data_set_from_its_folder(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "dataset.yaml").write_text(OWN)
    spec = get_spec("own", tmp_path)
    assert spec.name == "own" and not spec.external
    assert spec.patients == ("P1", "P2", "P3") and spec.num_folds == 3 and spec.expected_spots == (100, 5000)
    assert spec.patient_of("biopsy") == "P3" and spec.microns_of("biopsy") == 0.25
    write_spec(tmp_path / "copy.yaml", spec)
    assert read_spec(tmp_path / "copy.yaml", name="own") == spec


def test_specs_of_the_table_survive_writing(tmp_path):
    for name, spec in SPECS.items():
        write_spec(tmp_path / f"{name}.yaml", spec)
        again = read_spec(tmp_path / f"{name}.yaml", name=name, external=spec.external)
        assert {**vars(again), **{field: getattr(spec, field) for field in NOT_IN_FILE}} == vars(spec)


def test_external_folders(tmp_path):
    (tmp_path / "test" / "clinic" / "ST-cnts").mkdir(parents=True)
    plain = get_spec("clinic", tmp_path)
    assert plain.external and not plain.exchanged_pixels and plain.sort_by == "yx"
    assert plain.patient_of("slide_7") == "slide_7"
    (tmp_path / "test" / "NCBI463").mkdir()
    (tmp_path / "test" / "NCBI463" / "dataset.yaml").write_text("microns_per_pixel: 1\n")
    prepared = get_spec("NCBI463", tmp_path)
    assert prepared.external and not prepared.exchanged_pixels, "what was prepared here follows our own convention"
    assert get_spec("NCBI464", tmp_path).exchanged_pixels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient_patern: '(A)'", r"unknown key 'patient_patern' \(did you mean 'patient_pattern'\?\)\.$"),
        ("a: 1\npatients: ['../x']", r"unknown key 'a' \(known are .*\); patients: .*at most 200 letters\.$"),
        ("name: other", "unknown key 'name'"),
        ("patients: A", "patients: expected a list of names, found 'A'"),
        ("patients: [A, A]", "patients: names are listed twice"),
        ("patients: ['../x']", "patients: name '../x' is not a plain name"),
        ("patient_pattern: '[A-Z]'", "patient_pattern: '.A-Z.' needs one group"),
        ("patient_pattern: '(A'", "no regular expression"),
        ("image_pattern: all.jpg", "image_pattern: 'all.jpg' needs {slide}"),
        ("image_pattern: '../../{slide}.jpg'", "leaves the folder ST-imgs"),
        ("patient_of_slide: [A1]", "patient_of_slide: expected 'slide: patient' lines"),
        ("expected_spots: 5", "expected_spots: expected .least, greatest., found 5"),
        ("fold_scheme: by_slide", "fold_scheme: expected one of leave_one_patient_out, kfold, found 'by_slide'"),
        ("num_folds: '3'", "num_folds: expected an integer, found '3'"),
        ("exchanged_pixels: 1", "exchanged_pixels: expected true or false, found 1"),
        ("sort_by: x", "sort_by: expected one of yx, xy"),
        ("microns_per_pixel: -1", "microns_per_pixel: expected micrometres per pixel, less than 100, found -1"),
        ("training_type: 3", "training_type: expected text, found 3"),
        ("- a\n- b", "should hold 'key: value' lines, found a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_entries_name_file_key_and_what_was_found(tmp_path, text, message):
    path = tmp_path / "dataset.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_spec(path, name="own")
    assert str(path) in str(caught.value)


def test_all_wrong_entries_are_told_at_once(tmp_path):
    path = tmp_path / "dataset.yaml"
    path.write_text("sort_by: x\nnum_folds: many\nslide: A1\n")
    with pytest.raises(ValueError, match=r"(?s)'slide'.*sort_by.*num_folds|'slide'.*num_folds.*sort_by"):
        read_spec(path, name="own")
