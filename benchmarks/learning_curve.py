"""How much data Gene-DML needs: scores of four fixed simulated patients against the number of training patients.

    python benchmarks/learning_curve.py

Sets of 2, 4, 8 and 16 training patients (two slides each), each one contained in the next; the same four patients test.
Learning rates and epochs are those that `accuracy_search.py` chose for four training patients; seeds 0, 1, 2. Intervals:
bootstrap over the test patients, whose values are means over seeds. Runs that are complete are kept, and so is what the
result holds of other seeds, counts and methods with the same settings: hours can be shared by several machines.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json
import shlex
import string

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
METRICS = {"pcc_all": "PCC(A)", "mse": "MSE"}
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


def scores_of(run_dir: Path) -> dict[str, dict[str, float]]:
    """PCC(A) and MSE of each test patient, mean over its slides: {pcc_all, mse: {patient: value}}."""
    (fold,) = run_dir.glob("fold_*")
    rows = aggregation.select(pd.read_csv(fold / "per_gene_slide.csv"))
    slides = rows.groupby("slide")[["pearson", "mse"]].mean().reset_index()
    patients = slides.groupby(slides["slide"].str[0])[["pearson", "mse"]].mean()
    return {"pcc_all": patients["pearson"].to_dict(), "mse": patients["mse"].to_dict()}


def curve_rows(runs: list[dict]) -> pd.DataFrame:
    """Average runs over their seeds: columns patients, method, metric, num_seeds, mean, low, high.

    runs: {patients, method, seed, scores (of `scores_of`), ...} each. The interval is over the test patients.
    """
    found: dict[tuple[int, str], list[dict]] = {}
    for run_ in sorted(runs, key=lambda run_: (run_["patients"], list(METHODS).index(run_["method"]), run_["seed"])):
        found.setdefault((run_["patients"], run_["method"]), []).append(run_)
    rows = []
    for (patients, method), of_method in found.items():
        for metric in METRICS:
            values = pd.DataFrame([run_["scores"][metric] for run_ in of_method]).mean()
            low, high = bootstrap_interval(values)
            row = {"patients": patients, "method": method, "metric": metric, "num_seeds": len(of_method)}
            rows.append(row | {"mean": values.mean(), "low": low, "high": high})
    return pd.DataFrame(rows)


def curve_figure(rows: pd.DataFrame) -> Figure:
    """PCC(A) and MSE of `curve_rows` against the number of training patients, one line a method, with intervals."""
    figure = new_figure(8.0, 3.2)
    for axes, metric in zip(figure.subplots(1, 2), METRICS):
        plain_axes(axes, grid="y")
        title(axes, METRICS[metric] if metric == "pcc_all" else f"{METRICS[metric]}, lower is better")
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
    given = shown_flags(sys.argv[1:] if argv is None else argv)
    measured = {
        "command": shlex.join(["python", "benchmarks/learning_curve.py", *given]),
        "machine": machine(device_from(None, None)),
        "versions": software(),
    }
    for count in counts:
        folder = arguments.work / f"patients_{count}"
        link_set(everything / "demo", folder / "data", TRAIN[:count], TEST)
        for name in arguments.methods.split(","):
            chosen = [*searched(name, found), *METHODS[name][1], *arguments.set]
            settings = [
                f"DATA.data_dir={folder / 'data'}",
                f"GENERAL.log_path={folder / 'logs'}",
                "LOSS.use_kmeans=true",
            ]
            config = load_config(config_name, [*settings, *chosen])
            for seed in seeds:
                say(f"== {count} patients, {METHODS[name][0]}, seed {seed}")
                # TESTED is the last patient in the order of names: lower-case letters follow capitals.
                (run_dir,) = train_method(config, name, config_name, [seed], None, folds=[count])
                row = {
                    "patients": count,
                    "method": name,
                    "seed": seed,
                    "settings": chosen,
                    "scores": scores_of(run_dir),
                }
                path = write_curve(arguments.out, [row], measured)
    say(path.read_text(encoding="utf-8"))
    return path


def write_curve(out: Path, runs: list[dict], measured: dict) -> Path:
    """Add runs to learning_curve.json, and make the table (Markdown) and the figure of all that are there.

    measured: command, machine and versions of these runs. Earlier ones of other patients, methods or seeds stay, if their
    settings are those of a run of the same method that is added. Returns the path of the table.
    """
    kept, source = [], out / "learning_curve.json"
    settings = {run_["method"]: run_["settings"] for run_ in runs}
    added = {(run_["patients"], run_["method"], run_["seed"]) for run_ in runs}
    if source.exists():
        kept = [
            run_
            for run_ in json.loads(source.read_text(encoding="utf-8"))["runs"]
            if run_["settings"] == settings.get(run_["method"], run_["settings"])
            and (run_["patients"], run_["method"], run_["seed"]) not in added
        ]
    runs = [*kept, *({**run_, **measured} for run_ in runs)]
    write_json(source, {"runs": runs})
    rows = curve_rows(runs)
    save_figure(curve_figure(rows), out / "learning_curve")
    shown, seeds = (
        rows.pivot(index=["method", "metric"], columns="patients", values=column) for column in ("mean", "num_seeds")
    )
    header = ("method", "", *(f"{count} patients" for count in shown.columns), "seeds")
    cells = []
    for (method, metric), values in shown.iterrows():
        numbers = (number(value, 4 if metric == "mse" else 3) for value in values)
        fewest, most = (int(count) for count in (seeds.loc[(method, metric)].min(), seeds.loc[(method, metric)].max()))
        of_each = str(most) if fewest == most else f"{fewest} to {most}"
        cells.append((METHODS[method][0], METRICS[metric], *numbers, of_each))
    caption = (
        f"`python benchmarks/learning_curve.py`: means over seeds and the same {len(TEST)} simulated test patients, two slides "
        "each; the bands of the figure are bootstrap intervals over these patients."
    )
    return write_text(out / "learning_curve.md", f"{Table(header, tuple(cells)).to_markdown()}\n\n{caption}\n")


if __name__ == "__main__":
    run(main)
