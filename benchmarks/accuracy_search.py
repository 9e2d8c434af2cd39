"""Choose learning rate and number of epochs of every trained method alike: on inner patients of the simulated demo.

    python benchmarks/accuracy_search.py

Every method is trained with every learning rate of the same grid for the same, long time (the baselines of one pooled
feature with and without weight decay); the score of each epoch on the
inner patient of each fold is there anyway (the clean protocol). The rate, decay and epoch with the greatest PCC(A), mean
over folds and over three neighboring epochs, is taken. No test patient is looked at. `accuracy.py` reads the result and
uses it for all data sets. Runs that are complete are kept and interrupted ones go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.accuracy import DATA_SETS, METHODS, SEARCH, prepare, train_method
from benchmarks.common import machine, software
from utils.cli import run, say
from utils.config import load_config
from utils.devices import device_from
from utils.runs import write_json

SEARCHED = ("linear_probe", "mlp", "bleep", "gene_dml", "triplex")  # ablations take what Gene-DML takes
RATES = ("3e-4", "1e-3", "3e-3")
# Only of the methods that read one pooled feature: nothing else in them keeps a fit to a few hundred spots small.
DECAYS = {name: ("0", "10") for name in ("linear_probe", "mlp", "bleep")}
EPOCHS = 30
NEIGHBORS = 3  # epochs whose scores are averaged, against the noise of a single one


def validation_curve(run_dir: Path) -> np.ndarray:
    """PCC(A) on the inner patients after each epoch, mean over the folds."""
    folds = sorted(run_dir.glob("fold_*/metrics.jsonl"))
    scores = [pd.read_json(path, lines=True)["validation/pcc_all"].to_numpy() for path in folds]
    return np.mean(scores, axis=0)


def best_epoch(curve: np.ndarray) -> tuple[int, float]:
    """The epoch (from 1) in the middle of the best neighboring ones, and their mean score."""
    defined = np.nan_to_num(np.asarray(curve), nan=-1.0)  # a model that predicts a constant has no PCC
    means = np.convolve(defined, np.full(NEIGHBORS, 1 / NEIGHBORS), mode="valid")
    return int(np.argmax(means)) + 1 + NEIGHBORS // 2, float(means.max())


def search_method(name: str, rates: Sequence[str], epochs: int, shared: Sequence[str]) -> dict[str, object]:
    """Train a method with every rate; returns the choice and all curves."""
    curves = {}
    for rate, decay in itertools.product(rates, DECAYS.get(name, ("0",))):
        settings = [f"TRAINING.learning_rate={rate}", f"TRAINING.epochs={epochs}", f"TRAINING.patience={epochs}"]
        settings += [f"TRAINING.weight_decay={decay}"]
        config_name = DATA_SETS["demo"].config
        config = load_config(config_name, [*shared, *METHODS[name][1], *settings])
        (run_dir,) = train_method(config, f"search_{name}_{rate}_{decay}", config_name, [0], None)
        curves[rate, decay] = validation_curve(run_dir)
        say(f"{name}, learning rate {rate}, decay {decay}: best epoch and score {best_epoch(curves[rate, decay])}")
    chosen = max(curves, key=lambda tried: best_epoch(curves[tried])[1])
    epoch, score = best_epoch(curves[chosen])
    found = {
        ", ".join(tried): [round(float(value), 6) for value in np.nan_to_num(curve, nan=-1.0)]
        for tried, curve in curves.items()
    }
    rate, decay = chosen
    return {
        "learning_rate": rate,
        "weight_decay": decay,
        "epochs": epoch,
        "validation_pcc": round(score, 4),
        "curves": found,
    }


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, default=Path("demo"), help="where data and runs go")
    parser.add_argument("--methods", default=",".join(SEARCHED))
    parser.add_argument("--rates", default=",".join(RATES))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="setting of every run")
    parser.add_argument("--out", type=Path, default=SEARCH, help="file of the result")
    arguments = parser.parse_args(argv)
    shared = [*prepare(DATA_SETS["demo"], arguments.work), *arguments.set]
    rates = arguments.rates.split(",")
    methods = {name: search_method(name, rates, arguments.epochs, shared) for name in arguments.methods.split(",")}
    about = {"machine": machine(device_from(None, None)), "versions": software()}
    write_json(arguments.out, {"command": "python benchmarks/accuracy_search.py", **about, "methods": methods})
    for name, found in methods.items():
        choice = f"learning rate {found['learning_rate']}, decay {found['weight_decay']}, {found['epochs']} epochs"
        say(f"{name}: {choice} ({found['validation_pcc']})")
    return arguments.out


if __name__ == "__main__":
    run(main)
