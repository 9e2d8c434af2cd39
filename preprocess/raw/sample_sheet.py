"""The sheet of a data set of one's own: one row a section, with its patient and where its files are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from datasets.spec import two_spellings
from utils.files import reading, require_file, safe_name
from utils.text import some
from utils.untrusted.text import cells_of, text_of

COLUMNS = ("sample", "patient", "outs", "image")
FORM = f"a table with the columns {','.join(COLUMNS)}, one row a section, saved as CSV"


@dataclass(frozen=True)
class SheetRow:
    """One section. outs: Space Ranger's folder.  image: the full-resolution image."""

    sample: str
    patient: str
    outs: Path
    image: Path


def read_sample_sheet(path: str | Path, *, for_training: bool) -> list[SheetRow]:
    """Read and check a sheet, separated by commas, semicolons or tabs. Paths are relative to the current folder.

    for_training: whether patients are held out, which takes two of them.
    Raises FileNotFoundError, or one ValueError with everything that is wrong, each with its row and remedy.
    """
    path = require_file(path, f"--samples should be {FORM}.")
    with reading(path, "a sheet of samples", remedy=f"Expected {FORM}."):
        text = text_of(path)
        first = text.partition("\n")[0]
        table = cells_of(text, max(",;\t", key=first.count))
    table.columns = [str(name).strip().lower() for name in table.columns]
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(
            f"{path}: column(s) {', '.join(missing)} missing; found {some(list(table.columns), 8)}. Expected {FORM}."
        )
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{path}: rows have more cells than the header names. Quote cells that hold a separator.")
    cells = table[list(COLUMNS)].apply(lambda column: column.str.strip())
    cells = cells[(cells != "").any(axis=1)]
    if cells.empty:
        raise ValueError(f"{path} lists no section. Expected {FORM}.")
    numbers = [int(row) + 2 for row in cells.index]  # as a program for tables counts them
    rows = [
        SheetRow(row["sample"], row["patient"], Path(row["outs"]), Path(row["image"])) for _, row in cells.iterrows()
    ]
    problems = _of_rows(rows, numbers, path) + _repeated(rows, numbers)
    patients = sorted({row.patient for row in rows})
    if for_training and (twice := two_spellings(patients)):
        where = [f"{row.patient} in row {number}" for number, row in zip(numbers, rows) if row.patient in twice]
        problems.append(f"patients that differ in their spelling alone: {some(where)}. Write them alike")
    if for_training and len(patients) < 2 and not problems:
        problems.append(
            f"all {len(rows)} sections are of patient {patients[0]}. Training leaves whole patients out: add sections of "
            "another patient (of three, one can choose the number of epochs), or make an external set with --test"
        )
    if problems:
        raise ValueError("\n  ".join([f"{path} cannot be used:", *problems]))
    return rows


def _of_rows(rows: Sequence[SheetRow], numbers: Sequence[int], sheet: Path) -> list[str]:
    """What is wrong with single rows."""
    problems = []
    for number, row in zip(numbers, rows, strict=True):
        empty = [name for name in COLUMNS if str(getattr(row, name)) in ("", ".")]
        if empty:
            problems.append(
                f"row {number} ({row.sample or 'no sample'}): {', '.join(empty)} empty. Fill the row, or leave it out"
            )
            continue
        for what, name in (("sample", row.sample), ("patient", row.patient)):
            try:
                safe_name(name, what.capitalize())
            except ValueError as error:
                problems.append(f"row {number}: {str(error).rstrip('.')}. Choose another name")
        for what, place, is_there in (("outs", row.outs, row.outs.is_dir()), ("image", row.image, row.image.is_file())):
            if not is_there:
                kind = "folder" if what == "outs" else "file"
                problems.append(f"row {number} ({row.sample}): {what} {place} is no {kind}. {_remedy(place, sheet)}")
    return problems


def _remedy(place: Path, sheet: Path) -> str:
    """What to do about a path that leads nowhere."""
    if place.is_absolute():
        return "Correct the path"
    beside = sheet.parent / place
    if beside.exists():
        return f"Paths are relative to the current folder ({Path.cwd()}), not to the sheet: write {beside}"
    return f"Paths are relative to the current folder ({Path.cwd()}): correct it, or write it from / on"


def _repeated(rows: Sequence[SheetRow], numbers: Sequence[int]) -> list[str]:
    """Samples that are there twice, and folders or images that two rows share."""
    problems = []
    for what, remedy in (
        ("sample", "Every section has a name of its own"),
        ("outs", "Every section has a folder of its own: correct one of the rows"),
        (
            "image",
            "Every section has an image of its own, the one that Space Ranger was given: correct one of the rows",
        ),
    ):
        found: dict[object, list[int]] = {}
        for number, row in zip(numbers, rows, strict=True):
            value = getattr(row, what)
            if str(value) not in ("", "."):
                found.setdefault(value.resolve() if isinstance(value, Path) else value, []).append(number)
        problems += [
            f"rows {', '.join(map(str, where))}: the same {what} {value}. {remedy}"
            for value, where in found.items()
            if len(where) > 1
        ]
    return problems
