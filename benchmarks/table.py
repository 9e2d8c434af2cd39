"""Put measured tables where readers find them: speed into docs/speed.md, accuracy into README.md.

    python benchmarks/table.py

Reads benchmarks/results/*.json (of `make bench`) and accuracy_demo/accuracy.md (of `accuracy_demo.py`) and replaces what
stands between the two marks of each page.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json

from benchmarks.common import RESULTS, described
from utils.cli import run, say
from utils.files import require_file, write_text

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md", help="where the speed goes")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="where the accuracy goes")
    arguments = parser.parse_args(argv)
    results = read_results(arguments.results)
    fill(arguments.page, described(results))
    say(f"{arguments.page.name}: {len(results)} benchmarks.")
    accuracy = arguments.results / "accuracy_demo" / "accuracy.md"
    if accuracy.is_file():
        fill(arguments.readme, accuracy.read_text(encoding="utf-8").strip())
        say(f"{arguments.readme.name}: accuracy.")


if __name__ == "__main__":
    run(main)
