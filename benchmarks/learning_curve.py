"""How much data Gene-DML needs: scores of four fixed simulated patients against the number of training patients.

    python benchmarks/learning_curve.py

Sets of 2, 4, 8 and 16 training patients (two slides each), each one contained in the next; the same four patients test.
Learning rates and epochs are those that `accuracy_search.py` chose for four training patients; seeds 0, 1, 2. Intervals:
bootstrap over the test patients, whose values are means over seeds. Runs that are complete are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json
import shlex
import string

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from benchmarks.accuracy import DATA_SETS, METHODS, SEARCH, searched, shown_flags, train_method
from benchmarks.common import RESULTS, machine, software
from evaluation import aggregation
from evaluation.intervals import bootstrap_interval
from evaluation.report.style import MUTED, PALETTE, new_figure, plain_axes, save_figure, title
from evaluation.report.tables import Table, number
from preprocess.extract_features_uni import main as extract_features
from preprocess.simulate_demo import simulate
from utils.cli import run, say
from utils.config import load_config
from utils.devices import device_from
from utils.files import require_file, write_text
from utils.runs import write_json

COMPARED = ("gene_dml", "no_alignment", "triplex", "ridge_neighbor")
COUNTS = (2, 4, 8, 16)
TRAIN, TEST = string.ascii_uppercase[: max(COUNTS)], "QRST"  # the patients that test are the same for any --counts
TESTED = "tested"  # all test patients under one name, so that one fold tests them
MICRONS_PER_PIXEL = 1.6  # of the simulation


def link_set(source: Path, data_dir: Path, train: str, test: str) -> None:
    """Make a data folder `demo` of some patients (letters) of a simulation: links, the test patients under one name."""
    folder = data_dir / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"{patient}{slide}": patient for patient in train for slide in (1, 2)}
    wanted |= {f"{patient}{slide}": TESTED for patient in test for slide in (1, 2)}
    for path in sorted(source.rglob("*")):
        is_of_slide = any(path.name.startswith((f"{slide}.", f"{slide}_")) for slide in wanted)
        target = folder / path.relative_to(source)
        if path.is_file() and is_of_slide and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    content = {"patient_of_slide": wanted, "image_pattern": "*/{slide}/*", "microns_per_pixel": MICRONS_PER_PIXEL}
    write_text(folder / "dataset.yaml", yaml.safe_dump(content))


def scores_of(runs: list[Path]) -> pd.DataFrame:
    """PCC(A) and MSE of each test patient, mean over its slides and over the seeds: columns patient, pcc_all, mse."""
    found = []
    for run_dir in runs:
        (fold,) = run_dir.glob("fold_*")
        rows = aggregation.select(pd.read_csv(fold / "per_gene_slide.csv"))
        slides = rows.groupby("slide")[["pearson", "mse"]].mean().reset_index()
        slides["patient"] = slides["slide"].str[0]
        found.append(slides.groupby("patient")[["pearson", "mse"]].mean())
    return (sum(found) / len(found)).rename(columns={"pearson": "pcc_all"}).reset_index()


def curve_figure(rows: pd.DataFrame) -> Figure:
    """PCC(A) and MSE against the number of training patients, one line a method, with intervals."""
    figure = new_figure(8.0, 3.2)
    for axes, metric in zip(figure.subplots(1, 2), ("pcc_all", "mse")):
        plain_axes(axes, grid="y")
        title(axes, {"pcc_all": "PCC(A)", "mse": "MSE, lower is better"}[metric])
        for index, (method, of_method) in enumerate(rows[rows["metric"] == metric].groupby("method", sort=False)):
            color = PALETTE[index % len(PALETTE)]
            axes.plot(
                of_method["patients"], of_method["mean"], marker="o", ms=4, color=color, label=METHODS[str(method)][0]
            )
            axes.fill_between(of_method["patients"], of_method["low"], of_method["high"], color=color, alpha=0.12, lw=0)
        counts = sorted(rows["patients"].unique())
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("training patients", color=MUTED)
        if metric == "pcc_all":
            axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, default=Path("accuracy") / "learning_curve", help="where data and runs go")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="training patients")
    parser.add_argument("--methods", default=",".join(COMPARED))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="setting of every run")
    parser.add_argument("--search", type=Path, default=SEARCH, help="result of accuracy_search.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy" / "learning_curve")
    arguments = parser.parse_args(argv)
    counts, seeds = ([int(part) for part in text.split(",")] for text in (arguments.counts, arguments.seeds))
    if not set(counts) <= set(range(1, len(TRAIN) + 1)):
        raise ValueError(f"--counts {arguments.counts}: numbers of training patients, from 1 to {len(TRAIN)}.")
    require_file(arguments.search, "Make it first: python benchmarks/accuracy_search.py")
    found = json.loads(arguments.search.read_text(encoding="utf-8"))["methods"]
    config_name, everything = DATA_SETS["demo"].config, arguments.work / "all"
    simulate(everything, patients=tuple(TRAIN[: max(counts)] + TEST), external=False)
    extract_features(
        ["--config", config_name, "--mode", "internal", "--extract_mode", "all", "--data_dir", str(everything)]
    )
    rows = []
    for count in counts:
        folder = arguments.work / f"patients_{count}"
        link_set(everything / "demo", folder / "data", TRAIN[:count], TEST)
        for name in arguments.methods.split(","):
            settings = [
                f"DATA.data_dir={folder / 'data'}",
                f"GENERAL.log_path={folder / 'logs'}",
                "LOSS.use_kmeans=true",
            ]
            settings += [*searched(name, found), *METHODS[name][1], *arguments.set]
            say(f"== {count} patients, {METHODS[name][0]}")
            # TESTED is the last patient in the order of names: lower-case letters follow capitals.
            runs = train_method(load_config(config_name, settings), name, config_name, seeds, None, folds=[count])
            scores = scores_of(runs)
            for metric in ("pcc_all", "mse"):
                low, high = bootstrap_interval(scores[metric])
                by_patient = dict(zip(scores["patient"], scores[metric]))
                row = {"patients": count, "method": name, "metric": metric, "mean": scores[metric].mean()}
                rows.append(row | {"low": low, "high": high, "by_patient": by_patient})
    given = shown_flags(sys.argv[1:] if argv is None else argv)
    about = {"command": shlex.join(["python", "benchmarks/learning_curve.py", *given]), "seeds": seeds}
    return write_curve(arguments.out, pd.DataFrame(rows), about)


def write_curve(out: Path, rows: pd.DataFrame, about: dict) -> Path:
    """Write the table (Markdown), the figure and the JSON; returns the table's path. about: the command and its seeds."""
    save_figure(curve_figure(rows), out / "learning_curve")
    measured_on = {"machine": machine(device_from(None, None)), "versions": software()}
    write_json(out / "learning_curve.json", {**about, **measured_on, "rows": rows.to_dict("records")})
    shown = rows.set_index(["method", "metric", "patients"])["mean"].unstack()
    header = ("method", "", *(f"{count} patients" for count in shown.columns))
    labels = {"pcc_all": "PCC(A)", "mse": "MSE"}
    cells = [
        (METHODS[method][0], labels[metric], *(number(value, 4 if metric == "mse" else 3) for value in values))
        for (method, metric), values in zip(shown.index, np.asarray(shown))
    ]
    caption = (
        f"`{about['command']}`: means over the same {len(TEST)} simulated test patients, two slides each (seeds: "
        f"{', '.join(map(str, about['seeds']))}); the bands of the figure are bootstrap intervals over these patients."
    )
    path = write_text(out / "learning_curve.md", f"{Table(header, tuple(cells)).to_markdown()}\n\n{caption}\n")
    say(path.read_text(encoding="utf-8"))
    return path


if __name__ == "__main__":
    run(main)
