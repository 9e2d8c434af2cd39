"""Every method and ablation in one harness, on the same features, over three seeds: the accuracy table of the README.

    python benchmarks/accuracy_demo.py --set EVALUATION.fixed_epochs=16
    python benchmarks/accuracy_demo.py --config_name her2st/dml --data_dir data --log_path logs/accuracy --out accuracy

The second line makes the same table of other data, for instance of real HER2ST sections. Runs that are complete are kept
and interrupted ones go on, so the same command continues a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import shlex
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.common import RESULTS, machine, software
from evaluation.comparison.runs import compare_methods
from evaluation.comparison.write import write_comparison
from evaluation.report.tables import NOT_DEFINED, Table, label, number
from modes.train import TrainOptions, train_seeds
from modes.training.compose import is_closed_form
from utils.cli import run, say
from utils.config import Config, config_label, load_config
from utils.devices import device_from
from utils.files import write_text
from utils.runs import write_json

# name: (what it is, settings). The first is the one that all others are compared with.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gene_dml": ("Gene-DML", ()),
    "mean": ("mean of the training spots", ("MODEL.name=mean",)),
    "ridge": ("ridge on the patch", ("MODEL.name=ridge",)),
    "ridge_neighbor": ("ridge on patch and neighbor mean", ("MODEL.name=ridge_neighbor",)),
    "knn": ("retrieval (knn)", ("MODEL.name=knn",)),
    "mlp": ("perceptron on the patch", ("MODEL.name=mlp",)),
    "bleep": ("BLEEP on the patch", ("MODEL.name=bleep",)),
    "triplex": ("TRIPLEX-style", ("MODEL.name=triplex",)),
    "no_group_loss": ("without the group loss", ("LOSS.group_weight=0",)),
    "no_instance_loss": ("without the instance loss", ("LOSS.instance_weight=0",)),
    "no_alignment": ("without both", ("LOSS.group_weight=0", "LOSS.instance_weight=0")),
    "no_neighbor": ("without the neighbor scale", ("MODEL.use_neighbor=false",)),
    "no_global": ("without the global scale", ("MODEL.use_global=false",)),
    "normalize_fused": ("fused vector normalised", ("LOSS.normalize_fused=true",)),
    "spectral": ("spectral instead of k-means", ("LOSS.use_kmeans=false",)),
    "slides_per_batch_2": ("batches from two slides", ("TRAINING.slides_per_batch=2",)),
}
METRICS = ("pcc_all", "pcc_h", "pcc_highly_variable", "mse", "rvd")


def train_method(config: Config, name: str, config_name: str, seeds: Sequence[int], device: str | None) -> list[Path]:
    """Train a method once per seed, or go on with it; returns the run folders. A closed form is the same for all seeds."""
    own_seeds = seeds[:1] if is_closed_form(config) else seeds
    options = TrainOptions(
        config_name=config_label(config_name),
        run_name=name,
        device=device_from(None, device),
        folds=None,
        resume=True,
        checkpoint_seconds=60.0,
        with_report=False,
        config_file=config_name,
    )
    train_seeds(config, options, own_seeds)
    return [Path(config.GENERAL.log_path) / options.config_name / name / f"seed_{seed}" for seed in own_seeds]


def accuracy_table(compared: pd.DataFrame) -> Table:
    """One row a method: PCC(A) with interval and paired test against the first method, and the other scores.

    compared: of `evaluation.comparison.runs.compare_methods`.
    """
    by_metric = {metric: rows.set_index("method") for metric, rows in compared.groupby("metric", sort=False)}
    pcc, first = by_metric["pcc_all"], compared["method"].iloc[0]
    others = [metric for metric in by_metric if metric != "pcc_all"]
    columns = ("method", "PCC(A)", "95 %", "std (seeds)", f"to {METHODS[first][0]}", "95 %", "p", *map(label, others))
    rows = []
    for name, row in pcc.iterrows():
        rows.append(
            (
                METHODS[name][0],
                number(row["mean"], 3),
                _span(row["low"], row["high"], ".3f"),
                f"{number(row['seed_std'], 3)} ({row['num_seeds']})",
                _signed(row["difference"]),
                _span(row["difference_low"], row["difference_high"], "+.3f"),
                number(row["wilcoxon_p"], 3),
                *(number(by_metric[metric].loc[name, "mean"], 4 if metric == "mse" else 3) for metric in others),
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
    caption = (
        f"`{about['command']}`: {about['protocol']} protocol, {about['choice_of_epoch']}; mean over {patients} patients "
        f"(each the mean of the seeds {about['seeds']}), bootstrap interval over patients, difference and two-sided "
        "Wilcoxon test paired over patients."
    )
    return write_text(out / "accuracy.md", f"{accuracy_table(compared).to_markdown()}\n\n{caption}\n")


def main(argv: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config_name", default="demo/dml")
    parser.add_argument("--data_dir", default="demo/data", help="with features extracted (--extract_mode all)")
    parser.add_argument("--log_path", default="demo/accuracy", help="where the runs go")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="setting of every run")
    parser.add_argument("--device", help="any PyTorch device (default: CUDA if there is one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy_demo", help="folder of the tables")
    arguments = parser.parse_args(argv)
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"--methods: {', '.join(unknown)} unknown; known: {', '.join(METHODS)}.")
    if len(methods) < 2:
        raise ValueError("--methods: one method alone makes no comparison; name two at least, the reference first.")
    shared = ["LOSS.use_kmeans=true", f"DATA.data_dir={arguments.data_dir}", f"GENERAL.log_path={arguments.log_path}"]
    configs = {
        name: load_config(arguments.config_name, [*shared, *arguments.set, *METHODS[name][1]]) for name in methods
    }
    given = argv if argv is not None else sys.argv[1:]
    evaluation = configs[methods[0]].EVALUATION
    about = {
        "command": shlex.join(["python", "benchmarks/accuracy_demo.py", *given]),
        "protocol": evaluation.protocol,
        "choice_of_epoch": f"{evaluation.fixed_epochs} epochs fixed beforehand" if evaluation.fixed_epochs else
                           "epochs chosen " + ("on the test fold" if evaluation.protocol == "paper" else
                                               "on an inner held-out patient"),
        "seeds": ", ".join(map(str, seeds)),
        "machine": machine(device_from(None, arguments.device)),
        "versions": software(),
    }  # fmt: skip
    complete: dict[str, list[Path]] = {}
    for name in methods:
        say(f"== {METHODS[name][0]}")
        complete[name] = train_method(configs[name], name, arguments.config_name, seeds, arguments.device)
        if len(complete) > 1:  # after every method, so that an interruption leaves a table
            path = write_accuracy(arguments.out, compare_methods(complete, metrics=METRICS), about)
    say(path.read_text(encoding="utf-8"))
    return path


if __name__ == "__main__":
    run(main)
