"""Whose slide it is: a name forgotten or misspelt in dataset.yaml may not move an animal across the split."""

from __future__ import annotations

import pytest

from datasets.layout import Layout
from datasets.spec import DatasetSpec, read_spec, write_spec
from modes.training.plan import plan_folds
from tests.command_line import call_extract, call_main
from utils.config import Config

ANIMALS = {"MOB1": "1", "MOB2": "1", "MOB3": "2", "MOB4": "2"}
OWN = "patient of its own"


@pytest.fixture
def layout_of(tmp_path):
    """layout_of(lines of dataset.yaml) -> four sections of two animals, as far as their names."""

    def make(lines: str) -> Layout:
        path = tmp_path / "mob" / "dataset.yaml"
        for folder, suffix in (("ST-cnts", ".tsv"), ("ST-spotfiles", "_selection.tsv"), ("ST-imgs", ".png")):
            (path.parent / folder).mkdir(parents=True, exist_ok=True)
            for slide in ANIMALS:
                (path.parent / folder / f"{slide}{suffix}").touch()
        path.write_text(lines)
        return Layout(tmp_path, read_spec(path, name="mob"))

    return make


def lines(animals: dict[str, str]) -> str:
    return "patient_of_slide:\n" + "".join(f"  {slide}: '{animal}'\n" for slide, animal in animals.items())


def test_every_section_with_its_animal(layout_of):
    layout = layout_of(lines(ANIMALS))
    assert layout.patients_on_disk() == ANIMALS
    folds, notices = plan_folds(Config(), layout.spec, layout.patients_on_disk())
    assert [fold.test_slides for fold in folds] == [["MOB1", "MOB2"], ["MOB3", "MOB4"]] and not notices


def test_a_forgotten_section(layout_of):
    del (animals := dict(ANIMALS))["MOB2"]
    with pytest.raises(ValueError, match=r"Slide 'MOB2' of mob .* not in patient_of_slide, .*no patient_pattern"):
        layout_of(lines(animals)).patients_on_disk()


@pytest.mark.parametrize("more", ["", "patient_pattern: '^(.+)$'\n"])
def test_a_misspelt_section(layout_of, more):
    animals = {slide.replace("MOB2", "M0B2"): animal for slide, animal in ANIMALS.items()}
    with pytest.raises(ValueError, match=r"dataset\.yaml: patient_of_slide names .*'M0B2' \(did you mean 'MOB2'\?\)"):
        layout_of(lines(animals) + more).patients_on_disk()


@pytest.mark.parametrize("other", ["Animal_1", "animal 1", "ANIMAL-1"])
def test_a_patient_in_two_spellings(layout_of, other):
    animals = ANIMALS | {"MOB1": "animal-1", "MOB2": other}
    with pytest.raises(ValueError, match=rf"dataset\.yaml: the patients .*'{other}'.* differ in their spelling alone"):
        layout_of(lines(animals)).patients_on_disk()


def test_a_written_pattern_explains_the_others(layout_of):
    layout = layout_of("patient_of_slide: {MOB2: MOB1}\npatient_pattern: '^(.+)$'\n")
    assert layout.patients_on_disk() == ANIMALS | {"MOB1": "MOB1", "MOB2": "MOB1", "MOB3": "MOB3", "MOB4": "MOB4"}


def test_sections_without_a_word_of_patients_are_said(layout_of):
    layout = layout_of("image_pattern: '{slide}.png'\n")
    _, notices = plan_folds(Config(), layout.spec, layout.patients_on_disk())
    assert any(OWN in notice for notice in notices), notices


def test_what_is_written_is_read_again(tmp_path):
    for pattern in (None, "^(.+)$"):
        spec = DatasetSpec(name="mob", patient_of_slide={"MOB1": "1"}, patient_pattern=pattern)
        write_spec(tmp_path / "dataset.yaml", spec)
        assert read_spec(tmp_path / "dataset.yaml", name="mob") == spec


@pytest.mark.parametrize(
    "name", [".", "..", "../escape", "/tmp/x", "a/b", "a\nb", "n" * 300, "", "seed_1/", "a/seed_x"]
)
@pytest.mark.parametrize("mode", ["train", "doctor"])
def test_names_of_runs_that_leave_their_folder(name, mode, tmp_path):
    left = call_main("--mode", mode, "--config_name", "her2st/dml", "--log_path", tmp_path, "--run_name", name)
    assert left.status == 2 and "--run_name" in left.said and "is not a plain name" in left.said, left.said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["external_test", "doctor"])
def test_a_name_of_a_test_set_longer_than_any_folder_s(mode, tiny_run, tmp_path):
    more = (
        ("--model_path", tiny_run.path)
        if mode == "external_test"
        else ("--config_name", "demo/dml", "--data_dir", tmp_path)
    )
    left = call_main("--mode", mode, "--test_name", "n" * 300, "--device", "cpu", *more)
    assert left.status == 2 and "is not a plain name" in left.said and "Traceback" not in left.said, left.said
    left = call_extract(
        "--mode", "external", "--extract_mode", "patch", "--test_name", "n" * 300, "--data_dir", tmp_path
    )
    assert left.status == 2 and "is not a plain name" in left.said, left.said


def test_no_folder_of_runs(tmp_path):
    for mode in ("train", "doctor"):
        left = call_main(
            "--mode", mode, "--config_name", "her2st/dml", "--data_dir", tmp_path, "--set", "GENERAL.log_path="
        )
        assert left.status == 2 and "log_path" in left.said, left.said
