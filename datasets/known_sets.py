"""The data sets that need no dataset.yaml: of the paper, the demo, external ones; and how a name finds its description."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets.folds import KFOLD
from datasets.spec import SPEC_FILE, DatasetSpec, read_spec
from utils.files import safe_name
from utils.text import located

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
    """Find the spec of a data set or external test set.

    A `dataset.yaml` in <data_dir>/<name>/ or <data_dir>/test/<name>/ goes first: whoever prepared the folder described
    it, and a set prepared here follows the internal convention also under a published name. Then the table `SPECS`. An
    external folder without either is read with the internal convention, every slide as its own patient.
    Raises FileNotFoundError where there is no folder `data_dir`, ValueError with the known names for any other name.
    """
    name = safe_name(name, "Data set")
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            how = f" Or prepare it there: {SPECS[name].preparation(data_dir)}" if name in SPECS else ""
            raise FileNotFoundError(
                f"The data folder {located(data_dir)} does not exist. Name the folder of the data sets with --data_dir.{how}"
            )
        for folder, external in ((Path(data_dir) / name, False), (Path(data_dir) / "test" / name, True)):
            if (folder / SPEC_FILE).is_file():
                return read_spec(folder / SPEC_FILE, name=name, external=external)
    if name in SPECS:
        return SPECS[name]
    if data_dir is not None and (Path(data_dir) / "test" / name / "ST-cnts").is_dir():
        return DatasetSpec(name=name, image_pattern="**/{slide}.*", external=True)
    folder = Path("data" if data_dir is None else data_dir)
    is_there = (folder / name).is_dir()
    lacking = (
        f"{folder / name / SPEC_FILE} does not exist" if is_there else f"there is no folder {located(folder / name)}"
    )
    where = f" and {lacking}" if data_dir is not None else ""
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


# Sections of the same four tumours were published with both studies (docs/data.md).
SAME_TISSUE = {
    ("her2st", "stnet"): {"E": "BC23567", "F": "BC23810", "G": "BC23903", "H": "BC24044"},
}


def leaking_slides(training_type: str, training_patients: Iterable[str], slides: Mapping[str, str]) -> dict[str, str]:
    """Find slides whose tissue the training has seen.

    training_type, training_patients: what a model was trained on (validation patients included).
    slides: name -> patient of the external slides, whatever their folder is called: a public patient's identifier in
        either of the two (the BC number; for her2st the letter in a slide name such as E2) is recognised.
    returns: slide -> sentence that says why.
    """
    trained = set(training_patients)
    found = {}
    for (first, second), pairs in SAME_TISSUE.items():
        for here, there, partner in ((first, second, pairs), (second, first, {v: k for k, v in pairs.items()})):
            if training_type != here:
                continue
            for slide, patient in slides.items():
                for mine in sorted(trained & set(partner)):
                    if _is_of(partner[mine], slide, patient):
                        found[slide] = (
                            f"{slide} is tissue of {there} {partner[mine]}, which is {here} {mine}: a training patient"
                        )
    return found


def _is_of(identifier: str, slide: str, patient: str) -> bool:
    """Whether a slide is of a public patient: by its patient, or by a name such as BC23567_D2 or E2."""
    if patient == identifier:
        return True
    pattern = (
        rf"(?<![A-Za-z0-9]){re.escape(identifier)}(?![A-Za-z0-9])" if len(identifier) > 1 else rf"^{identifier}[1-6]$"
    )
    return re.search(pattern, slide) is not None
