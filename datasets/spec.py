"""What is known of each data set before its files are read: slides, patients, folds, image names, pixel convention.

A new data set costs one `DatasetSpec` here or one `dataset.yaml` in its data folder; no other module asks for names.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from datasets.folds import KFOLD, LEAVE_ONE_PATIENT_OUT
from datasets.spec_checks import CHECKS
from utils.files import safe_name, write_text

SPEC_FILE = "dataset.yaml"
NOT_IN_FILE = ("name", "external", "prepared_by", "pitch_um")


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    name:             its folder below data_dir and its `type` in the configuration.
    patients:         in the order that defines the folds; empty = those of the slides found, sorted.
    patient_pattern:  regular expression whose first group, in a slide's name, is the patient.
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
    """

    name: str
    patients: tuple[str, ...] = ()
    patient_pattern: str = r"^(.+)$"
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

    def patient_of(self, slide: str) -> str:
        """The patient a slide is of. Raises ValueError naming slide, data set and pattern."""
        if slide in self.patient_of_slide:
            return self.patient_of_slide[slide]
        match = re.search(self.patient_pattern, slide)
        if match is None:
            raise ValueError(
                f"Slide {slide!r} of {self.name} has no known patient: its name does not match {self.patient_pattern!r}"
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

    def _advice(self) -> str:
        return f"Move the slide out of the data folder, or describe your own data set in a {SPEC_FILE} beside ST-cnts."


_C1_C2_D1, _C2_D1, _D2_E1_E2 = ("C1", "C2", "D1"), ("C2", "D1"), ("D2", "E1", "E2")
# The order of the patients defines the folds.
_STNET_SECTIONS = {
    "BC23209": _C1_C2_D1,
    "BC23270": _D2_E1_E2,
    "BC23803": _D2_E1_E2,
    "BC24105": _C1_C2_D1,
    "BC24220": _D2_E1_E2,
    "BC23268": _C1_C2_D1,
    "BC23269": _C1_C2_D1,
    "BC23272": _D2_E1_E2,
    "BC23277": _D2_E1_E2,
    "BC23287": _C1_C2_D1,
    "BC23288": _D2_E1_E2,
    "BC23377": _C1_C2_D1,
    "BC23450": _D2_E1_E2,
    "BC23506": _C1_C2_D1,
    "BC23508": _D2_E1_E2,
    "BC23567": _D2_E1_E2,
    "BC23810": _D2_E1_E2,
    "BC23895": _C1_C2_D1,
    "BC23901": _C2_D1,
    "BC23903": _C1_C2_D1,
    "BC23944": _D2_E1_E2,
    "BC24044": _D2_E1_E2,
    "BC24223": _D2_E1_E2,
}

_ALL_SPECS = (
    DatasetSpec(
        name="her2st",
        patients=tuple("ABCDEFGH"),
        patient_pattern=r"^([A-Z])\d+$",
        image_pattern="{patient}/{slide}/*",
        slides=tuple(f"{p}{i + 1}" for p in "ABCDEFGH" for i in range(6 if p in "ABCD" else 3)),
        expected_spots=(176, 712),
        prepared_by="prepare_her2st.py --source RAW",
        microns_per_pixel={"A": 0.93, **dict.fromkeys("BCDEFGH", 0.68)},
    ),
    DatasetSpec(
        name="skinst",
        patients=("P2", "P5", "P9", "P10"),
        patient_pattern=r"^(P\d+)_ST_rep\d+$",
        image_pattern="*{slide}.*",
        slides=tuple(f"{patient}_ST_rep{i}" for patient in ("P2", "P5", "P9", "P10") for i in (1, 2, 3)),
        expected_spots=(462, 1182),
        prepared_by="prepare_skinst.py --source RAW",
        pitch_um=200.0,
    ),
    DatasetSpec(
        name="stnet",
        patients=tuple(_STNET_SECTIONS),
        patient_pattern=r"^(BC\d+)_[A-Z]\d$",
        image_pattern="*{slide}.*",
        slides=tuple(f"{p}_{section}" for p, sections in _STNET_SECTIONS.items() for section in sections),
        expected_spots=(256, 713),
        fold_scheme=KFOLD,
        num_folds=8,
        fold_seed=2021,
        prepared_by="prepare_stnet.py --source RAW --gene_map features.tsv.gz",
        pitch_um=200.0,
    ),
    DatasetSpec(
        name="demo",
        patient_pattern=r"^([A-Z]+)\d+$",
        image_pattern="{patient}/{slide}/*",
        prepared_by="simulate_demo.py",
    ),
    *(
        DatasetSpec(
            name=name,
            image_pattern="**/*{slide}.*",
            exchanged_pixels=True,
            sort_by="xy",
            microns_per_pixel=microns,
            external=True,
            training_type=training_type,
            prepared_by=f"prepare_visium.py --source OUTS --image FULLRES --name {name}",
        )
        for name, training_type, microns in (
            ("10x_breast_ff1", "her2st", 0.366),
            ("10x_breast_ff2", "her2st", 0.366),
            ("10x_breast_ff3", "her2st", 0.366),
            ("NCBI463", "skinst", 1.04),
            ("NCBI464", "skinst", 1.04),
        )
    ),
)
SPECS: dict[str, DatasetSpec] = {spec.name: spec for spec in _ALL_SPECS}


def get_spec(name: str, data_dir: str | Path | None = None) -> DatasetSpec:
    """The spec of a data set or external test set.

    A `dataset.yaml` in <data_dir>/<name>/ or <data_dir>/test/<name>/ goes first: whoever prepared the folder described
    it, and a set prepared here follows the internal convention also under a published name. Then the table `SPECS`. An
    external folder without either is read with the internal convention, every slide as its own patient.
    Raises ValueError with the known names otherwise.
    """
    name = safe_name(name, "Data set")
    if data_dir is not None:
        for folder, external in ((Path(data_dir) / name, False), (Path(data_dir) / "test" / name, True)):
            if (folder / SPEC_FILE).is_file():
                return read_spec(folder / SPEC_FILE, name=name, external=external)
    if name in SPECS:
        return SPECS[name]
    if data_dir is not None and (Path(data_dir) / "test" / name / "ST-cnts").is_dir():
        return DatasetSpec(name=name, image_pattern="**/{slide}.*", external=True)
    folder = Path("data" if data_dir is None else data_dir)
    where = f" and {folder / name / SPEC_FILE} does not exist" if data_dir is not None else ""
    close = difflib.get_close_matches(name, SPECS, n=1)
    raise ValueError(
        f"Unknown data set {name!r}: known are {', '.join(SPECS)}{where}."
        + (f" Did you mean {close[0]!r}?" if close else "")
        + f" For your own data write a {SPEC_FILE} into its folder, for example:\n"
        "patient_pattern: '^(P[0-9]+)_'\nimage_pattern: '{slide}.jpg'\n"
        f"An external test set would lie in {folder / 'test' / name}; of Visium it is made by: "
        f"python preprocess/prepare_visium.py --name {name} --source OUTS --image FULLRES --data_dir {folder} "
        "--model_path RUN"
    )


def read_spec(path: str | Path, *, name: str, external: bool = False) -> DatasetSpec:
    """Read a `dataset.yaml`: the fields of `DatasetSpec` except `NOT_IN_FILE`; the folder decides on these.

    Raises ValueError naming the file and every unknown key (with the nearest valid one) and wrong value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold 'key: value' lines, found a {type(values).__name__}.")
    known = [f.name for f in dataclasses.fields(DatasetSpec) if f.name not in NOT_IN_FILE]
    problems = []
    for key in [key for key in values if key not in known]:
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        problems.append(f"unknown key {key!r}; {hint}")
    checked = {}
    for key in [key for key in values if key in known]:
        try:
            checked[key] = CHECKS[key](values[key])
        except (TypeError, ValueError) as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    return DatasetSpec(name=name, external=external, **checked)


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
