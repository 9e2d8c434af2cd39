"""Every method and ablation in one harness, on the same features, over three seeds: the accuracy table of the README.

    python benchmarks/accuracy_demo.py --data_dir demo/data --log_path demo/accuracy

Runs that are complete are kept and interrupted ones go on, so the same command continues a table. Methods: `--methods`
(default all), seeds: `--seeds 0,1,2`. With another configuration (`--config_name her2st/dml --set ...`) it makes the same
table of other data, for instance of real HER2ST sections.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that this runs as a script

from evaluation.comparison import write_comparison
from evaluation.statistics import compare_methods, seed_runs
from modes.train import TrainOptions, train_seeds
from utils.cli import device_from, run, say
from utils.config import config_label, load_config

# Gene-DML first: every difference in the table is to it.
METHODS = {
    "gene_dml": [],
    "mean": ["MODEL.name=mean"],
    "ridge": ["MODEL.name=ridge"],
    "ridge_neighbor": ["MODEL.name=ridge_neighbor"],
    "knn": ["MODEL.name=knn"],
    "mlp": ["MODEL.name=mlp"],
    "triplex": ["MODEL.name=triplex"],
    "no_group_loss": ["LOSS.group_weight=0"],
    "no_alignment": ["LOSS.group_weight=0", "LOSS.instance_weight=0"],
    "no_instance_loss": ["LOSS.instance_weight=0"],
    "no_neighbor": ["MODEL.use_neighbor=false"],
    "no_global": ["MODEL.use_global=false"],
    "normalize_fused": ["LOSS.normalize_fused=true"],
    "spectral": ["LOSS.use_kmeans=false"],
    "slides_per_batch_2": ["TRAINING.slides_per_batch=2"],
}
DETERMINISTIC = ("mean", "ridge", "ridge_neighbor", "knn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_name", default="demo/dml")
    parser.add_argument("--data_dir", default="demo/data")
    parser.add_argument("--log_path", default="demo/accuracy")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value")
    parser.add_argument("--device")
    parser.add_argument("--out", default="benchmarks/results/accuracy_demo")
    arguments = parser.parse_args()
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"--methods: {', '.join(unknown)} unknown; known: {', '.join(METHODS)}.")
    label, device = config_label(arguments.config_name), device_from(None, arguments.device)
    base = ["LOSS.use_kmeans=true", f"DATA.data_dir={arguments.data_dir}", f"GENERAL.log_path={arguments.log_path}"]
    complete = {}
    for method in methods:
        say(f"== {method}")
        config = load_config(arguments.config_name, [*base, *arguments.set, *METHODS[method]])
        # A method without random numbers gives the same result for every seed but for the inner patient it ignores.
        own_seeds = seeds[:1] if method in DETERMINISTIC else seeds
        options = TrainOptions(label, method, device, None, True, 60.0, with_report=False)
        train_seeds(config, options, own_seeds)
        complete[method] = seed_runs(Path(arguments.log_path) / label / method)
        if len(complete) > 1:
            table = compare_methods(complete, metrics=("pcc_all", "pcc_h", "pcc_highly_variable", "mse", "rvd"))
            paths = write_comparison(table, arguments.out)
    say(paths[0].read_text() if len(complete) > 1 else "One method alone makes no comparison.")


if __name__ == "__main__":
    run(main)
