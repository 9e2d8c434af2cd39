"""Readers of what a run leaves: records, scores, epochs, summary, predictions. The independent readers are json, csv, h5py."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from evaluation.fold_files import find_folds, read_fold
from evaluation.predictions import read_prediction
from evaluation.report.write import read_summary, write_summary
from evaluation.summary import summarise
from tests.evaluation.conftest import make_slide, write_run, write_slide
from tests.soak.fuzz import Reader
from utils.runs import read_epochs

_NAMES = ("slide", "patient", "scale", "truth", "gene")


def run_file(folder: Path, *, name: str) -> Path:
    write_run(folder / "run", predictions=False)
    find_folds(folder / "run")
    write_summary(folder / "run", summarise(folder / "run"))
    return folder / "run" / name if name == "summary.json" else folder / "run" / "fold_0" / name


def record_of(path: Path, *, part: str) -> object:
    return getattr(read_fold(path.parent), part)


def scores_of(path: Path) -> object:
    table = read_fold(path.parent).per_gene_slide
    return {name: table[name].tolist() if name in _NAMES else _single(table[name]) for name in table}


def _single(values: Sequence[float]) -> np.ndarray:
    """Float32, of which the file holds ten digits: pandas reads the last bit of a double otherwise than Python."""
    return np.asarray(values, dtype=np.float64).astype(np.float32)


def scores_by_csv(path: Path) -> object:
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    columns = {name: [row[i] for row in rows if row] for i, name in enumerate(header)}
    empty = {"": "nan"}
    return {
        name: cells if name in _NAMES else _single([float(empty.get(cell, cell)) for cell in cells])
        for name, cells in columns.items()
    }


def by_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def lines_by_json(path: Path) -> object:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prediction(folder: Path) -> Path:
    generator = np.random.default_rng(4)
    write_slide(make_slide(generator, "A1", 0.5), folder / "A1.h5ad", generator)
    return folder / "A1.h5ad"


def prediction_of(path: Path) -> object:
    found = read_prediction(path)
    return {
        "spots": found.obs_names.tolist(),
        "genes": found.var_names.tolist(),
        "X": found.X,
        "layers": {name: found.layers[name] for name in found.layers},
        "spatial": found.obsm["spatial"],
        "unit": str(found.uns["unit"]),
    }


def prediction_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        spots, genes = (file[axis][file[axis].attrs["_index"]].asstr()[:].tolist() for axis in ("obs", "var"))
        layers = {name: values[:] for name, values in file["layers"].items()}
        unit = file["uns/unit"].asstr()[()]
        found = {"spots": spots, "genes": genes, "X": file["X"][:], "layers": layers, "unit": unit}
        return {**found, "spatial": file["obsm/spatial"][:]}


def _of_run(name: str, read: Callable[[Path], object], *oracles: Callable[[Path], object]) -> Reader:
    return Reader(name, partial(run_file, name=name), read, oracles, True)


READERS = [
    _of_run("split.json", partial(record_of, part="split"), by_json),
    _of_run("result.json", partial(record_of, part="result"), by_json),
    _of_run(
        "genes.txt", partial(record_of, part="genes"), lambda path: path.read_text().removesuffix("\n").split("\n")
    ),
    _of_run("metrics.jsonl", read_epochs, lines_by_json),
    _of_run("per_gene_slide.csv", scores_of, scores_by_csv),
    _of_run("summary.json", read_summary, by_json),
    Reader("prediction .h5ad", prediction, prediction_of, (prediction_by_h5py,)),
]
