"""What is known of each data set before its files are read: slides, patients, folds, image names, pixel convention.

A new data set costs one `DatasetSpec` here or one `dataset.yaml` in its data folder; no other module asks for names.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from datasets.field_of_view import MOST_MICRONS
from datasets.folds import LEAVE_ONE_PATIENT_OUT, SCHEMES
from utils.files import reading, safe_name, write_text
from utils.text import brief, parse_yaml, some

SPEC_FILE = "dataset.yaml"
OWN_PATIENT = r"^(.+)$"
NOT_IN_FILE = ("name", "external", "prepared_by", "pitch_um", "source")


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    name:             its folder below data_dir and its `type` in the configuration.
    patients:         in the order that defines the folds; empty = those of the slides found, sorted.
    patient_pattern:  regular expression whose first group, in a slide's name, is the patient; None = every slide is a patient
                      of its own, unless patient_of_slide says whose some are: then it has to name all (but in an
                      external set, which is not split).
    patient_of_slide: explicit slide -> patient, for names that no pattern explains; goes before the pattern.
    image_pattern:    glob below ST-imgs with {slide} and {patient}; exactly one image may match.
    slides:           those expected; empty = whatever is on disk.
    expected_spots:   least and greatest number of spots of a slide, for the report of the preparing script.
    fold_scheme, num_folds, fold_seed: see `datasets.folds.make_folds`.
    exchanged_pixels: the two pixel columns of the spot table are exchanged, x of the array counts rows and y columns
                      (the published external sets only).
    sort_by:          order of the rows, "yx" or "xy", in terms of the columns of the spot table.
    microns_per_pixel: one number, or one per patient or slide, or None = unknown.
    pitch_um:         distance of neighboring spots on its square arrays; gives the size of a pixel where that is unknown.
    external:         an external test set, in data_dir/test/<name>.
    training_type:    the type whose models an external set is meant for.
    prepared_by:      the script, with its arguments, that writes the data folder; for messages.
    source:           the file that it was read from, for messages.
    """

    name: str
    patients: tuple[str, ...] = ()
    patient_pattern: str | None = None
    patient_of_slide: Mapping[str, str] = field(default_factory=dict)
    image_pattern: str = "{slide}.*"
    slides: tuple[str, ...] = ()
    expected_spots: tuple[int, int] | None = None
    fold_scheme: str = LEAVE_ONE_PATIENT_OUT
    num_folds: int | None = None
    fold_seed: int | None = None
    exchanged_pixels: bool = False
    sort_by: str = "yx"
    microns_per_pixel: float | Mapping[str, float] | None = None
    external: bool = False
    training_type: str | None = None
    prepared_by: str | None = None
    pitch_um: float | None = None
    source: Path | None = field(default=None, compare=False)

    def patient_of(self, slide: str) -> str:
        """Find the patient a slide is of. Raises ValueError naming slide, data set, pattern and file."""
        if slide in self.patient_of_slide:
            return self.patient_of_slide[slide]
        if self.patient_pattern is None and self.patient_of_slide and not self.external:
            raise ValueError(
                f"Slide {slide!r} of {self.name} has no known patient: it is not in patient_of_slide, "
                f"and {self.source or SPEC_FILE} has no patient_pattern. Write its line, or a pattern."
            )
        match = re.search(self.patient_pattern or OWN_PATIENT, slide)
        if match is None or not match.group(1):  # a group may be optional, or empty
            why = "its name does not match" if match is None else "its name leaves the group empty of"
            raise ValueError(
                f"Slide {slide!r} of {self.name} has no known patient: {why} {self.patient_pattern!r}"
                f"{' and it is not in patient_of_slide' if self.patient_of_slide else ''}. {self._advice()}"
            )
        if self.patients and match.group(1) not in self.patients:
            raise ValueError(
                f"Slide {slide!r} is of patient {match.group(1)!r}, who is not one of {self.name}: "
                f"{', '.join(self.patients)}. {self._advice()}"
            )
        return match.group(1)

    def microns_of(self, slide: str) -> float | None:
        """Size of a pixel of the full-resolution image in micrometres, or None if it is not known."""
        if isinstance(self.microns_per_pixel, Mapping):
            return self.microns_per_pixel.get(slide, self.microns_per_pixel.get(self.patient_of(slide)))
        return self.microns_per_pixel

    def check_slides(self, slides: Collection[str], source: Path) -> None:
        """Raise ValueError for names in patient_of_slide that no slide bears: whoever it was written for is not where it says;
        and for a patient in two spellings, who would be trained on and tested.

        slides: those that there are.  source: the file to correct.
        """
        strangers = [name for name in self.patient_of_slide if name not in slides and name not in self.slides]
        if strangers:
            named = [f"{name!r}{_nearest(name, slides)}" for name in strangers]
            raise ValueError(
                f"{source}: patient_of_slide names what is no slide of {self.name}: {some(named)}. Correct these "
                "names, or leave them out."
            )
        patients = {self.patient_of(slide) for slide in sorted(slides)}
        if not self.external and (twice := two_spellings(patients)):
            raise ValueError(
                f"{source}: the patients {' and '.join(map(repr, twice))} of {self.name} differ in their spelling alone, and a "
                "split by patient would train on the one and test on the other. Write them alike, or give them other names."
            )

    @property
    def is_patient_of_its_own(self) -> bool:
        """Whether every slide is taken as a patient, because nothing says whose they are."""
        return self.patient_pattern is None and not self.patient_of_slide

    def preparation(self, data_dir: str | Path) -> str:
        """Spell the command that prepares the set in `data_dir`, of a set that a script prepares."""
        return f"python preprocess/{self.prepared_by} --data_dir {data_dir}"

    def _advice(self) -> str:
        if self.source is not None:
            return f"Correct patient_pattern in {self.source}, or write the patient of the slide there, in patient_of_slide."
        return f"Move the slide out of the data folder, or describe your own data set in a {SPEC_FILE} beside ST-cnts."


def _nearest(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def two_spellings(patients: Collection[str]) -> list[str]:
    """Return the first names that differ only in large and small letters, blanks, hyphens or underscores; [] for none."""
    spelled: dict[str, list[str]] = {}
    for name in sorted(patients):
        spelled.setdefault(re.sub(r"[\s_-]+", "-", name.strip()).casefold(), []).append(name)
    return next((names for names in spelled.values() if len(names) > 1), [])


def read_spec(path: str | Path, *, name: str, external: bool = False) -> DatasetSpec:
    """Read a `dataset.yaml`: the fields of `DatasetSpec` except `NOT_IN_FILE`; the folder decides on these.

    Raises ValueError naming the file and every unknown key (with the nearest valid one) and wrong value.
    """
    path = Path(path)
    with reading(path, "the description of a data set (YAML)"):
        values = parse_yaml(path.read_text(encoding="utf-8"))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold 'key: value' lines, found a {type(values).__name__}.")
    known = [f.name for f in dataclasses.fields(DatasetSpec) if f.name not in NOT_IN_FILE]
    problems = []
    for key in [key for key in values if key not in known]:
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        problems.append(f"unknown key {brief(key)} ({hint})")
    checked = {}
    for key in [key for key in values if key in known]:
        try:
            checked[key] = CHECKS[key](values[key])
        except (TypeError, ValueError) as error:
            problems.append(f"{key}: {str(error).removesuffix('.')}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    return DatasetSpec(name=name, external=external, source=path, **checked)


def write_spec(path: str | Path, spec: DatasetSpec) -> None:
    """Write the fields that differ from the defaults as a `dataset.yaml`; `read_spec` gives the same spec again."""
    values = {}
    for f in dataclasses.fields(DatasetSpec):
        value = getattr(spec, f.name)
        default = {} if f.default is dataclasses.MISSING else f.default
        if f.name not in NOT_IN_FILE and value != default:
            is_mapping = isinstance(value, Mapping)
            values[f.name] = dict(value) if is_mapping else list(value) if isinstance(value, tuple) else value
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"expected text, found {brief(value)}")
    return value


def _pattern(value: object) -> str:
    try:
        groups = re.compile(_text(value)).groups
    except re.error as error:
        raise ValueError(f"{brief(value)} is no regular expression ({error})") from error
    if groups < 1:
        raise ValueError(f"{brief(value)} needs one group in parentheses, the patient")
    return _text(value)


def _image_pattern(value: object) -> str:
    text = _text(value)
    if text.startswith("/") or ".." in Path(text).parts:
        raise ValueError(f"{brief(text)} leaves the folder ST-imgs")
    if "{slide}" not in text:
        raise ValueError(f"{brief(text)} needs {{slide}}")
    if re.search("[{}]", re.sub(r"\{(slide|patient)\}", "", text)):
        raise ValueError(f"{brief(text)} may hold {{slide}} and {{patient}} and no other braces")
    return text


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise TypeError(f"expected a list of names, found {brief(value)}")
    names = tuple(safe_name(str(name), "name") for name in value)
    if len(set(names)) < len(names):
        raise ValueError(f"names are listed twice in {brief(value)}")
    return names


def _patient_map(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"expected 'slide: patient' lines, found {brief(value)}")
    return {safe_name(str(slide), "slide"): safe_name(str(patient), "patient") for slide, patient in value.items()}


def _spot_range(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not value[0] <= value[1]:
        raise TypeError(f"expected [least, greatest], found {brief(value)}")
    return _integer(value[0]), _integer(value[1])


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {brief(value)}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, found {brief(value)}")
    return value


def _microns(value: object) -> float | dict[str, float]:
    if isinstance(value, dict):
        return {str(patient): _one_size(number) for patient, number in value.items()}
    return _one_size(value)


def _one_size(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_MICRONS:
        raise ValueError(f"expected micrometres per pixel, less than {MOST_MICRONS}, found {brief(value)}")
    return float(value)


def _one_of(*choices: str):
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, found {brief(value)}")
        return str(value)

    return check


CHECKS = {
    "patients": _names,
    "patient_pattern": _pattern,
    "patient_of_slide": _patient_map,
    "image_pattern": _image_pattern,
    "slides": _names,
    "expected_spots": _spot_range,
    "fold_scheme": _one_of(*SCHEMES),
    "num_folds": _integer,
    "fold_seed": _integer,
    "exchanged_pixels": _flag,
    "sort_by": _one_of("yx", "xy"),
    "microns_per_pixel": _microns,
    "training_type": _text,
}
