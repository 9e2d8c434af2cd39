"""What each field of a `dataset.yaml` may hold: one function a field, value in, checked value out or TypeError/ValueError."""

from __future__ import annotations

import re
from pathlib import Path

from datasets.folds import SCHEMES
from utils.files import safe_name


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"expected text, found {value!r}")
    return value


def _pattern(value: object) -> str:
    try:
        groups = re.compile(_text(value)).groups
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression ({error})") from error
    if groups < 1:
        raise ValueError(f"{value!r} needs one group in parentheses, the patient")
    return _text(value)


def _image_pattern(value: object) -> str:
    text = _text(value)
    if text.startswith("/") or ".." in Path(text).parts:
        raise ValueError(f"{text!r} leaves the folder ST-imgs")
    if "{slide}" not in text:
        raise ValueError(f"{text!r} needs {{slide}}")
    return text


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise TypeError(f"expected a list of names, found {value!r}")
    names = tuple(safe_name(str(name), "name") for name in value)
    if len(set(names)) < len(names):
        raise ValueError(f"names are listed twice in {value!r}")
    return names


def _patient_map(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"expected 'slide: patient' lines, found {value!r}")
    return {safe_name(str(slide), "slide"): safe_name(str(patient), "patient") for slide, patient in value.items()}


def _spot_range(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not value[0] <= value[1]:
        raise TypeError(f"expected [least, greatest], found {value!r}")
    return _integer(value[0]), _integer(value[1])


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {value!r}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, found {value!r}")
    return value


def _microns(value: object) -> float | dict[str, float]:
    if isinstance(value, dict):
        return {str(patient): _microns(number) for patient, number in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 100:
        raise ValueError(f"expected micrometres per pixel, found {value!r}")
    return float(value)


def _one_of(*choices: str):
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, found {value!r}")
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
