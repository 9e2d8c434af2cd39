"""Readers of what a run leaves: records, scores, epochs, summary, predictions. The independent readers are json, csv, h5py."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from evaluation.fold_files import find_folds, read_fold
from evaluation.predictions import HELD_OUT_FILE, HeldOut, read_held_out, read_prediction
from evaluation.report.fold_figures import read_clusters
from evaluation.report.write import read_summary, write_summary
from evaluation.summary import summarise
from modes.training.resume import _started
from preprocess.simulate_demo import read_manifest
from tests.checkpoints import fabricated_fold
from tests.evaluation.conftest import GENES, make_slide, write_run, write_slide
from tests.soak.fuzz import Reader
from tests.soak.text_readers import cells
from utils.runs import note_versions, read_epochs, read_versions, write_json

_NAMES = ("slide", "patient", "scale", "truth", "gene")


def whole_run(folder: Path) -> Path:
    """A copy of a run that is made once for all readers, beside their folders."""
    made = folder.parent / "whole_run"
    if not made.exists():
        write_run(made, predictions=False)
        find_folds(made)
        write_summary(made, summarise(made))
    return Path(shutil.copytree(made, folder / "run"))


def run_file(folder: Path, *, name: str) -> Path:
    run = whole_run(folder)
    return run / name if name == "summary.json" else run / "fold_0" / name


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


def run_folder_file(folder: Path, *, name: str) -> Path:
    """A file beside the folds of a run."""
    path = whole_run(folder) / name
    if name == HELD_OUT_FILE:
        known = HeldOut("run", ["A", "B"], GENES, [0.5] * len(GENES), [math.nan] * len(GENES), 0.8, [], {"A": 0.7})
        write_json(path, asdict(known))
    if name == "versions.json":
        note_versions(folder / "run")
    return path


def held_out_by_json(path: Path) -> object:
    content = by_json(path)
    lists = {name: [math.nan if v is None else v for v in content[name]] for name in ("pcc", "pcc_std", "half_width")}
    names = {name: [str(entry) for entry in content.get(name, [])] for name in ("genes", "patients")}
    coverage = {name: math.nan if value is None else value for name, value in content["coverage"].items()}
    level = math.nan if content["level"] is None else content["level"]
    return {"run": str(content.get("run", "")), **names, **lists, "coverage": coverage, "level": level}


def _beside_folds(name: str, read: Callable[[Path], object], *oracles: Callable[[Path], object]) -> Reader:
    return Reader(name, partial(run_folder_file, name=name), read, oracles, True)


def clusters_of(path: Path) -> object:
    table = read_clusters(path)
    return {name: table[name].tolist() for name in table}


def clusters_by_csv(path: Path) -> object:
    header, *rows = cells(path, ",")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    numbers = {name: [int(cell) for cell in columns[name]] for name in ("image_cluster", "gene_cluster")}
    return {"slide": columns["slide"], "patient": columns["patient"], **numbers}


def starts_by_json(path: Path) -> object:
    content = by_json(path)
    return content if isinstance(content, list) else [content]


def split_file(folder: Path) -> Path:
    (folder / "fold_0").mkdir()
    written = {**asdict(fabricated_fold().split), "tokens": {"tokens_sha256": "0"}}
    write_json(folder / "fold_0" / "split.json", written)
    return folder / "fold_0" / "split.json"


def started_of(path: Path) -> object:
    found = _started(path.parent)
    return {**asdict(found.split), "tokens": found.tokens}


def started_by_json(path: Path) -> object:
    content = by_json(path)
    usual = {"features": {}, "notes": [], "panel": "", "digests": {}, "tokens": {}}
    return usual | {
        name: value for name, value in content.items() if name in (*asdict(fabricated_fold().split), "tokens")
    }


def manifest(folder: Path) -> Path:
    arguments = {"name": "demo", "patients": ["A", "B"], "grid": [12, 10], "external": True, "seed": 0}
    write_json(folder / "simulation.json", {"is_complete": True, "arguments": arguments, "programs": {}})
    return folder / "simulation.json"


READERS = [
    _of_run("split.json", partial(record_of, part="split"), by_json),
    _of_run("result.json", partial(record_of, part="result"), by_json),
    _of_run(
        "genes.txt", partial(record_of, part="genes"), lambda path: path.read_text().removesuffix("\n").split("\n")
    ),
    _of_run("metrics.jsonl", read_epochs, lines_by_json),
    _of_run("per_gene_slide.csv", scores_of, scores_by_csv),
    _of_run("summary.json", read_summary, by_json),
    Reader("split.json, resumed", split_file, started_of, (started_by_json,), True),
    Reader("clusters.csv", partial(run_file, name="clusters.csv"), clusters_of, (clusters_by_csv,), True),
    _beside_folds(HELD_OUT_FILE, lambda path: asdict(read_held_out(path.parent)), held_out_by_json),
    _beside_folds("versions.json", read_versions, starts_by_json),
    Reader("simulation.json", manifest, read_manifest, (by_json,), True),
    Reader("prediction .h5ad", prediction, prediction_of, (prediction_by_h5py,)),
]
