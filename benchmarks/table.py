"""Put measured tables where readers find them: speed into docs/speed.md, accuracy into docs/evaluation.md and README.md.

    python benchmarks/table.py

Reads benchmarks/results/*.json (of `make bench`) and what accuracy.py, learning_curve.py, groups.py and switches.py have
put into folders there, and replaces what stands between the two marks of each page. The README has the real data sets
side by side, without ablations. The curve is drawn into images/ beside docs/evaluation.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json

import pandas as pd

from benchmarks.accuracy import METHODS, TITLES
from benchmarks.common import RESULTS, described
from benchmarks.learning_curve import curve_figure, curve_rows
from evaluation.report.style import save_figure
from evaluation.report.tables import Table, number
from utils.cli import run, say
from utils.files import require_file, write_text

REAL = {"mob": "olfactory bulb", "her2st": "HER2ST"}
ABLATIONS = [name for name in METHODS if name == "pooled" or name.startswith("no_")]
ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: python benchmarks/table.py -->", "<!-- end of what was measured -->"


def read_results(folder: Path) -> list[dict]:
    """The JSON of every benchmark in `folder`, trials left out, sorted by file name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [content for content in found if not content.get("is_quick", True)]
    if not found:
        raise FileNotFoundError(f"{folder} holds no results of the benchmarks. Run: make bench")
    return found


def fill(page: Path, text: str) -> None:
    """Replace what stands between the marks. ValueError if the page lacks them."""
    content = require_file(page, "It should hold the two marks between which the tables go.").read_text(
        encoding="utf-8"
    )
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{page} should hold the lines '{BEGIN}' and '{END}' once each, in this order.")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def read_accuracy(folder: Path) -> dict[str, pd.DataFrame]:
    """The compared methods of every data set and patch encoder that was measured, by the name of its folder."""
    return {
        path.parent.name: pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["rows"])
        for path in sorted(folder.glob("*/accuracy.json"))
    }


def side_by_side(accuracy: dict[str, pd.DataFrame]) -> str:
    """PCC(A) and MSE of the methods on the real data sets, best first by the mean of both PCC(A)."""
    columns = {}
    for data in REAL:
        rows = accuracy[data].set_index(["method", "metric"])["mean"].unstack()
        columns |= {f"{REAL[data]} PCC(A)": rows["pcc_all"], "MSE " + data: rows["mse"]}
    shown = pd.DataFrame(columns).drop(index=ABLATIONS, errors="ignore")
    shown = shown.loc[shown.filter(like="PCC").mean(axis=1).sort_values(ascending=False, na_position="last").index]
    rows = [
        (TITLES[str(method)], *(number(value, 3) for value in values))
        for method, *values in shown.itertuples(name=None)
    ]
    names = ("method", *(name.split(" ")[0] if name.startswith("MSE") else name for name in shown.columns))
    commands = " and ".join(f"`python benchmarks/accuracy.py --data {data}`" for data in REAL)
    return f"{Table(names, tuple(rows)).to_markdown()}\n\n{commands}: means over two patients each; no test can be made of two."


def further_parts(results: Path, images: Path) -> list[str]:
    """The learning curve, drawn into `images`, what the group loss groups, and switches, as far as they were measured."""
    parts = []
    curve = results / "accuracy" / "learning_curve"
    if (curve / "learning_curve.json").exists():
        runs = json.loads((curve / "learning_curve.json").read_text(encoding="utf-8"))["runs"]
        save_figure(curve_figure(curve_rows(runs)), images / "learning_curve")
        shown = (curve / "learning_curve.md").read_text(encoding="utf-8").strip()
        figure = "![PCC(A) and MSE against the number of training patients](images/learning_curve.svg)"
        parts.append(f"### Learning curve\n\n{figure}\n\n{shown}")
    for title, pattern in (("Clusters", "groups/*/groups.md"), ("Switches", "switches/*/accuracy.md")):
        for path in sorted(results.glob(pattern)):
            parts.append(f"### {title}: {path.parent.name}\n\n{path.read_text(encoding='utf-8').strip()}")
    return parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md", help="where the speed goes")
    parser.add_argument(
        "--evaluation", type=Path, default=ROOT / "docs" / "evaluation.md", help="where all accuracy goes"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="where the summary of accuracy goes")
    arguments = parser.parse_args(argv)
    results = read_results(arguments.results)
    fill(arguments.page, described(results))
    say(f"{arguments.page.name}: {len(results)} benchmarks.")
    folder = arguments.results / "accuracy"
    accuracy = read_accuracy(folder)
    if set(REAL) <= set(accuracy):
        parts = [
            f"### {name}\n\n{(folder / name / 'accuracy.md').read_text(encoding='utf-8').strip()}" for name in accuracy
        ]
        parts += further_parts(arguments.results, arguments.evaluation.parent / "images")
        fill(arguments.evaluation, "\n\n".join(parts))
        fill(arguments.readme, side_by_side(accuracy))
        say(f"{arguments.evaluation.name}, {arguments.readme.name}: accuracy on {', '.join(accuracy)}.")


if __name__ == "__main__":
    run(main)
