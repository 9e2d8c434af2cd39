"""Every method and ablation on the same features, three seeds, from raw data: the accuracy tables of the README and docs.

    python benchmarks/accuracy.py --data demo
    python benchmarks/accuracy.py --data mob --raw FOLDER        (or GENE_DML_MOB)
    python benchmarks/accuracy.py --data her2st --raw FOLDER     (or GENE_DML_HER2ST)

Fixed before any of it was run, for all data sets alike:
* clean protocol: panel, gene lists and everything that is tuned come from training patients; folds leave one patient out;
* learning rate and number of epochs of every trained method: from `accuracy_search.py`, which looks at inner patients of
  the simulated demo alone; an ablation takes those of Gene-DML. Closed forms tune themselves on inner patients;
* batch 32, k 8, the model sizes of the demo, start at the training mean; seeds 0, 1, 2; features of one frozen patch
  encoder for all;
* PCC of a gene within a slide, mean over the slides of a patient, mean over patients; with fewer than four patients their
  values stand alone, without interval and test;
* an ensemble is the mean of the predictions of its members, with equal weights.

Runs that are complete are kept and interrupted ones go on, so the same command continues a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.common import RESULTS, machine, software
from evaluation.comparison.runs import compare_methods
from evaluation.comparison.write import patients_shown, write_comparison
from evaluation.report.tables import NOT_DEFINED, Table, label, number
from modes.prediction.ensemble import ensemble_folder
from modes.test import test
from modes.train import TrainOptions, train_seeds
from modes.training.compose import is_closed_form
from preprocess.extract_features_uni import main as extract_features
from preprocess.simulate_demo import simulate
from utils.cli import run, say
from utils.config import Config, config_label, load_config
from utils.devices import device_from
from utils.files import require_file, write_text
from utils.runs import write_json

SEARCH = RESULTS / "accuracy" / "search.json"

# name: (what it is, settings). The first is the one that all others are compared with.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gene_dml": ("Gene-DML", ()),
    "mean": ("mean of the training spots", ("MODEL.name=mean",)),
    "ridge": ("ridge on the patch", ("MODEL.name=ridge",)),
    "ridge_neighbor": ("ridge on patch and neighbor mean", ("MODEL.name=ridge_neighbor",)),
    "knn": ("retrieval (knn)", ("MODEL.name=knn",)),
    "linear_probe": ("linear probe on the patch", ("MODEL.name=linear_probe",)),
    "mlp": ("perceptron on the patch", ("MODEL.name=mlp",)),
    "bleep": ("BLEEP on the patch", ("MODEL.name=bleep",)),
    "triplex": ("TRIPLEX-style", ("MODEL.name=triplex",)),
    "pooled": ("pooled features instead of tokens", ("DATA.tokens=pooled",)),
    "no_group_loss": ("without the group loss", ("LOSS.group_weight=0",)),
    "no_instance_loss": ("without the instance loss", ("LOSS.instance_weight=0",)),
    "no_alignment": ("without both", ("LOSS.group_weight=0", "LOSS.instance_weight=0")),
    "no_neighbor": ("without the neighbor scale", ("MODEL.use_neighbor=false",)),
    "no_global": ("without the global scale", ("MODEL.use_global=false",)),
}
# name: (what it is, methods whose predictions are averaged, each seed of the first with the same or only one of the others)
ENSEMBLES = {"gene_dml_and_ridge": ("Gene-DML and ridge on both, averaged", ("gene_dml", "ridge_neighbor"))}
TITLES = {name: title for table in (METHODS, ENSEMBLES) for name, (title, _) in table.items()}
METRICS = ("pcc_all", "pcc_h", "pcc_highly_variable", "mse", "mse_centered", "rvd")


@dataclass(frozen=True)
class DataSet:
    """A data set that the table can be made of.

    config: of training and extraction, with `settings` on top. variable: of the environment, the folder of the raw files.
    lay_out: (raw folder, data folder) puts the raw files where a data set lies. views: in the token cache.
    """

    name: str
    config: str
    lay_out: Callable[[Path, Path], None]
    settings: tuple[str, ...] = ()
    variable: str | None = None
    views: int = 8


def _simulate(_raw: Path, data_dir: Path) -> None:
    simulate(data_dir)


def _link(source: Path, target: Path) -> None:
    require_file(source, "It belongs to the raw data of this table.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(source.resolve())


def _lay_out_mob(raw: Path, data_dir: Path) -> None:
    """Four sections of mouse olfactory bulb of two animals."""
    folder = data_dir / "mob"
    for slide in ("MOB1", "MOB2", "MOB3", "MOB4"):
        _link(raw / f"{slide}_counts.tsv.gz", folder / "ST-cnts" / f"{slide}.tsv.gz")
        _link(raw / f"{slide}_spots.tsv", folder / "ST-spotfiles" / f"{slide}_selection.tsv")
        _link(raw / f"{slide}.jpg", folder / "ST-imgs" / f"{slide}.jpg")
    animals = "patient_of_slide: {MOB1: animal1, MOB2: animal1, MOB3: animal2, MOB4: animal2}"
    write_text(folder / "dataset.yaml", f"{animals}\nimage_pattern: '{{slide}}.jpg'\n")


def _lay_out_her2st(raw: Path, data_dir: Path) -> None:
    """The sections whose images are small enough for a laptop: one of patient B, three of C."""
    for slide in ("B4", "C2", "C3", "C4"):
        folder = Path("her2st")
        parts = [f"ST-cnts/{slide}.tsv.gz", f"ST-spotfiles/{slide}_selection.tsv"]
        images = sorted((raw / "ST-imgs" / slide[0] / slide).glob("*.jpg"))[:1]
        parts += [str(path.relative_to(raw)) for path in images] or [f"ST-imgs/{slide[0]}/{slide}"]
        for part in parts:
            _link(raw / part, data_dir / folder / part)


_REAL = ("DATA.num_genes=250",)
DATA_SETS = {
    data.name: data
    for data in (
        DataSet("demo", "demo/dml", _simulate),
        # 32 px are the distance of two spots there.
        DataSet("mob", "demo/dml", _lay_out_mob, ("DATA.type=mob", "DATA.patch_size=32", *_REAL), "GENE_DML_MOB"),
        # 112 px at 0.69 um: about the diameter of a spot.
        DataSet(
            "her2st",
            "demo/dml",
            _lay_out_her2st,
            ("DATA.type=her2st", "DATA.patch_size=112", *_REAL),
            "GENE_DML_HER2ST",
        ),
    )
}


def prepare(data: DataSet, work: Path, raw: Path | None = None, encoder: str | None = None) -> list[str]:
    """Lay the raw files out below `work`, and extract what is missing; returns the settings that all methods share.

    Raises ValueError where the folder of the raw files is not named.
    """
    named = raw or (os.environ.get(data.variable) if data.variable else None)
    if data.variable and not named:
        raise ValueError(f"--data {data.name} needs its raw files: give their folder (--raw), or set {data.variable}.")
    data.lay_out(Path(named or "."), work / "data")
    settings = [
        *data.settings,
        *([f"DATA.encoder={encoder}"] if encoder else []),
        f"DATA.data_dir={work / 'data'}",
    ]
    extract_features(
        ["--config", data.config, "--mode", "internal", "--extract_mode", "all", "--views", str(data.views)]
        + [part for setting in settings for part in ("--set", setting)]
    )
    return [*settings, "LOSS.use_kmeans=true", f"GENERAL.log_path={work / 'accuracy' / (encoder or 'default')}"]


def searched(name: str, found: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Settings of a trained method as `accuracy_search.py` chose them; an ablation takes those of Gene-DML."""
    choice = found.get(name, found["gene_dml"])
    return [
        f"TRAINING.learning_rate={choice['learning_rate']}",
        f"TRAINING.weight_decay={choice['weight_decay']}",
        f"EVALUATION.fixed_epochs={choice['epochs']}",
    ]


def train_method(
    config: Config,
    name: str,
    config_name: str,
    seeds: Sequence[int],
    device: str | None,
    folds: Sequence[int] | None = None,
) -> list[Path]:
    """Train a method once per seed, or go on with it; returns the run folders. A closed form is the same for all seeds."""
    own_seeds = seeds[:1] if is_closed_form(config) else seeds
    options = TrainOptions(
        config_name=config_label(config_name),
        run_name=name,
        device=device_from(None, device),
        folds=folds,
        resume=True,
        checkpoint_seconds=60.0,
        with_report=False,
        config_file=config_name,
    )
    train_seeds(config, options, own_seeds)
    return [Path(config.GENERAL.log_path) / options.config_name / name / f"seed_{seed}" for seed in own_seeds]


def test_ensemble(members: Sequence[Sequence[Path]], device: str | None) -> list[Path]:
    """Test the mean of several methods, once for each seed of the first; returns the folders of the results."""
    found = []
    for index, first in enumerate(members[0]):
        runs = [first, *(seeds[min(index, len(seeds) - 1)] for seeds in members[1:])]
        test(runs, None, [], device_from(None, device), with_report=False)
        found.append(ensemble_folder(runs))
    return found


def accuracy_table(compared: pd.DataFrame) -> Table:
    """One row a method: PCC(A) with interval and paired test against the first method, and the other scores.

    compared: of `evaluation.comparison.runs.compare_methods`. With fewer than four patients their values stand in the place
    of interval and test.
    """
    by_metric = {metric: rows.set_index("method") for metric, rows in compared.groupby("metric", sort=False)}
    pcc, first = by_metric["pcc_all"], compared["method"].iloc[0]
    patients = patients_shown(pcc)
    others = [metric for metric in by_metric if metric != "pcc_all"]
    judged = ("std (seeds)", f"to {TITLES[first]}")
    columns = (
        "method",
        "PCC(A)",
        *(patients or ["95 %"]),
        *judged,
        *([] if patients else ["95 %", "p"]),
        *map(label, others),
    )
    rows = []
    for name, row in pcc.iterrows():
        values = [number(row["by_patient"].get(patient, np.nan), 3) for patient in patients]
        tested = [_span(row["difference_low"], row["difference_high"], "+.3f"), number(row["wilcoxon_p"], 3)]
        rows.append(
            (
                TITLES[name],
                number(row["mean"], 3),
                *(values or [_span(row["low"], row["high"], ".3f")]),
                f"{number(row['seed_std'], 3)} ({row['num_seeds']})",
                _signed(row["difference"]),
                *([] if patients else tested),
                *(number(by_metric[metric].loc[name, "mean"], 4 if "mse" in metric else 3) for metric in others),
            )
        )
    return Table(columns, tuple(rows))


def _span(low: float, high: float, form: str) -> str:
    return f"{low:{form}} to {high:{form}}" if np.isfinite([low, high]).all() else NOT_DEFINED


def _signed(value: float) -> str:
    return f"{value:+.3f}" if np.isfinite(value) else NOT_DEFINED


def write_accuracy(out: Path, compared: pd.DataFrame, about: Mapping[str, object]) -> Path:
    """Write comparison.md, .csv, .html, the short accuracy.md and accuracy.json; returns accuracy.md."""
    write_comparison(compared, out)
    write_json(out / "accuracy.json", {**about, "rows": compared.to_dict("records"), "notes": compared.attrs["notes"]})
    patients = int(compared["num_patients"].max())
    judged = (
        "values of the patients beside their mean; too few for an interval or a test"
        if patients_shown(compared)
        else "bootstrap interval over patients, difference and two-sided Wilcoxon test paired over patients"
    )
    caption = (
        f"`{about['command']}`: clean protocol, rates and epochs fixed beforehand; mean over {patients} patients (each the "
        f"mean of the seeds {about['seeds']}); {judged}."
    )
    return write_text(out / "accuracy.md", f"{accuracy_table(compared).to_markdown()}\n\n{caption}\n")


def main(argv: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="demo", choices=tuple(DATA_SETS))
    parser.add_argument("--raw", type=Path, help="folder of the raw files (default: the variable of the data set)")
    parser.add_argument("--encoder", help="frozen patch encoder (default: efficientnet-lite0)")
    parser.add_argument(
        "--work", type=Path, help="where data and runs go (default: accuracy/<data>; of the demo: demo)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="setting of every run")
    parser.add_argument("--search", type=Path, default=SEARCH, help="result of accuracy_search.py")
    parser.add_argument("--device", help="any PyTorch device (default: CUDA if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: benchmarks/results/accuracy/<data>)")
    arguments = parser.parse_args(argv)
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"--methods: {', '.join(unknown)} unknown; known: {', '.join(METHODS)}.")
    if len(methods) < 2:
        raise ValueError("--methods: one method alone makes no comparison; name two at least, the reference first.")
    data = DATA_SETS[arguments.data]
    work = arguments.work or (Path("demo") if data.name == "demo" else Path("accuracy") / data.name)
    variant = data.name if arguments.encoder is None else f"{data.name}_{arguments.encoder}"
    out = arguments.out or RESULTS / "accuracy" / variant
    require_file(arguments.search, "Make it first: python benchmarks/accuracy_search.py")
    found = json.loads(arguments.search.read_text(encoding="utf-8"))["methods"]
    shared = prepare(data, work, arguments.raw, arguments.encoder)
    configs = {
        name: load_config(data.config, [*shared, *searched(name, found), *METHODS[name][1], *arguments.set])
        for name in methods
    }
    about = {
        "command": shlex.join(
            ["python", "benchmarks/accuracy.py", *shown_flags(sys.argv[1:] if argv is None else argv)]
        ),
        "settings": {name: searched(name, found) for name in methods if not is_closed_form(configs[name])},
        "seeds": ", ".join(map(str, seeds)),
        "machine": machine(device_from(None, arguments.device)),
        "versions": software(),
    }
    complete: dict[str, list[Path]] = {}
    for name in methods:
        say(f"== {METHODS[name][0]}")
        complete[name] = train_method(configs[name], name, data.config, seeds, arguments.device)
        if len(complete) > 1:  # after every method, so that an interruption leaves a table
            path = write_accuracy(out, compare_methods(complete, metrics=METRICS), about)
    for name, (title, parts) in ENSEMBLES.items():
        if set(parts) <= set(complete):
            say(f"== {title}")
            complete[name] = test_ensemble([complete[part] for part in parts], arguments.device)
            path = write_accuracy(out, compare_methods(complete, metrics=METRICS), about)
    say(path.read_text(encoding="utf-8"))
    return path


def shown_flags(given: Sequence[str]) -> list[str]:
    """The flags that say what was measured; where the files lay does not."""
    pairs = zip(given[::2], given[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in ("--raw", "--work", "--out", "--search") for part in pair]


if __name__ == "__main__":
    run(main)
