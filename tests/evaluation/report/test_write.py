"""The files of a run for its readers: complete, equal for equal runs, self-contained, and truthful about caveats."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.comparison.runs import compare_methods
from evaluation.comparison.write import comparison_text, write_comparison
from evaluation.report import fold_figures
from evaluation.report.fold_figures import figures_of, figures_on_disk, write_figures
from evaluation.report.style import save_figure
from evaluation.report.write import format_table, write_report, write_summary
from evaluation.summary import summarise
from tests.shortcuts import one_pixel
from utils.text import UNIT

VOID = {"meta", "img", "br", "hr", "link", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Outline(HTMLParser):
    """Checks that tags are balanced and collects what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(outline: Outline) -> None:
    """Nothing on the page is loaded from anywhere."""
    assert not {tag for tag, _ in outline.tags} & {"script", "iframe", "object", "embed", "link", "base"}
    for tag, attributes in outline.tags:
        for name in ("src", "srcset", "href", "data", "action", "background", "style"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"<{tag} {name}={value[:60]}>"
    assert "url(" not in "".join(outline.words) and "@import" not in "".join(outline.words)


@contextmanager
def drawing_only(*patterns: str) -> Iterator[None]:
    """Figures of folds and comparisons are drawn where the path matches one of these; of the others there are the files."""

    def save(figure: Figure, path: Path) -> tuple[Path, Path]:
        return (save_figure if any(map(path.match, patterns)) else one_pixel)(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("report.fold_figures", "comparison.write"):
            patch.setattr(f"evaluation.{module}.save_figure", save)
        yield


@pytest.fixture(scope="module")
def summary_of_run(finished_run: Path) -> Mapping[str, object]:
    """Read only."""
    return summarise(finished_run)


@pytest.fixture
def summary(summary_of_run: Mapping[str, object]) -> dict:
    """The summary of `finished_run`, one's own."""
    return deepcopy(dict(summary_of_run))


@pytest.fixture(scope="module")
def paper_summary(make_run: Callable[..., Path], tmp_path_factory) -> Mapping[str, object]:
    """Of a run under the paper protocol. Read only."""
    return summarise(make_run(tmp_path_factory.mktemp("paper") / "paper", protocol="paper", predictions=False))


@pytest.fixture(scope="module")
def reported(finished_run: Path, tmp_path_factory) -> Path:
    """A run with summary, figures and report: a whole fold, and one as a baseline that is fitted in one step leaves
    it (no epochs, no clusters) when its predictions were deleted to save space."""
    run_dir = tmp_path_factory.mktemp("reported") / "fabricated"
    shutil.copytree(finished_run, run_dir)
    shutil.rmtree(run_dir / "fold_2")
    shutil.rmtree(run_dir / "fold_1" / "predictions")
    for name in ("metrics.jsonl", "clusters.csv"):
        (run_dir / "fold_1" / name).unlink()
    (run_dir / "versions.json").unlink()
    write_summary(run_dir, summarise(run_dir, ["Fold D was skipped: <no slide>."]))
    with drawing_only("fold_0/figures/*"):  # no picture of the other is looked at
        write_report(run_dir, genes=["ZYX"], count=1)
    return run_dir


def test_summary_markdown_names_the_protocol_first(summary: dict, tmp_path: Path) -> None:
    json_path, markdown_path = write_summary(tmp_path, summary)
    lines = markdown_path.read_text().splitlines()
    assert lines[0].startswith("**Clean protocol:")
    rows = [line for line in lines if re.match(r"\| (\d|mean over patients|std over folds)", line)]
    assert [row.split("|")[1].strip() for row in rows[:5]] == [
        "0 (A)", "1 (B)", "2 (C)", "mean over patients", "std over folds",
    ]  # fmt: skip
    fold = summary["folds"][0]
    cells = [cell.strip() for cell in rows[0].split("|")[2:-1]]
    scores = ("pcc_all", "pcc_h", "mse", "mae", "training_mean_mse", "training_mean_mae")
    assert cells == ["A", "2", "60", "4", *(f"{fold[name]:.4f}" for name in scores)]
    assert UNIT in markdown_path.read_text()
    assert json.loads(json_path.read_text()) == json.loads(json.dumps(summary))


def test_paper_protocol_prints_its_bias(paper_summary: Mapping[str, object], tmp_path: Path) -> None:
    text = format_table(paper_summary)
    assert text.startswith("paper protocol:") and "mean over folds" in text
    assert "Note: The epoch is chosen on the test fold" in text
    markdown = write_summary(tmp_path, paper_summary)[1].read_text()
    assert markdown.startswith("**Paper protocol:") and "- The epoch is chosen on the test fold" in markdown


def test_summary_json_does_not_depend_on_the_order_of_keys(summary: dict, tmp_path: Path) -> None:
    first = write_summary(tmp_path / "a", summary)[0].read_bytes()
    second = write_summary(tmp_path / "b", dict(reversed(summary.items())))[0].read_bytes()
    assert first == second


def test_summary_without_optional_parts_and_with_undefined_scores(summary: dict, tmp_path: Path) -> None:
    for name in ("intervals", "scales", "pcc_h", "selection_price", "patients", "gene_list_sizes", "num_genes"):
        del summary[name]
    summary["folds"][0]["pcc_h"] = None
    summary["folds"][1]["pcc_all"] = float("nan")
    summary["folds"][2]["test_patients"] = [f"patient_{index}" for index in range(30)]
    text = format_table(summary)
    assert "\N{EN DASH}" in text and "nan" not in text.lower() and "None" not in text
    assert "patient_0, patient_1 and 28 more" in text
    write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text())["folds"][1]["pcc_all"] is None


def test_an_interval_table_stands_only_where_a_score_has_an_interval(summary: dict, tmp_path: Path) -> None:
    heading = "## Mean over patients with bootstrap 95 % interval"
    assert heading not in write_summary(tmp_path, summary)[1].read_text(), "three patients have none"
    summary["intervals"]["mse"] |= {"low": 0.1, "high": 0.3}
    assert heading in write_summary(tmp_path, summary)[1].read_text()


def test_every_scale_is_explained_below_its_table_and_undefined_scores_have_no_column(
    summary: dict, tmp_path: Path
) -> None:
    def part(summary) -> str:
        return (
            write_summary(tmp_path, summary)[1].read_text().split("## Every scale and every target")[1].split("##")[0]
        )

    text = part(summary)
    assert "smoothed: each target is the mean over the spot and its neighbors (3 x 3 on the array)" in text
    assert "heads of one model that was trained with all scales together" in text and "MODEL.use_global=false" in text
    assert "| PCC(H) |" in text
    for row in summary["scales"]:
        row["pcc_h"] = None
    summary["scales"] = [row for row in summary["scales"] if row["scale"] in ("fused", "training_mean")]
    text = part(summary)
    assert "smoothed: each target" in text and "heads of one model" not in text and "PCC(H)" not in text


def test_pcc_h_that_is_chosen_on_the_test_is_marked_in_a_clean_run_alone(
    summary: dict, paper_summary: Mapping[str, object], tmp_path: Path
) -> None:
    text = write_summary(tmp_path / "clean", summary)[1].read_text()
    marked = f"{summary['pcc_h']['paper']['mean']:.4f} (chosen on the test, do not report)"
    rows = [line for line in text.splitlines() if line.startswith(("| paper:", "| clean:"))]
    assert [marked in row for row in rows] == [True, False, True, False]
    assert "do not report" not in write_summary(tmp_path / "paper", paper_summary)[1].read_text()


def test_summary_that_lacks_required_keys_is_refused(summary: dict, tmp_path: Path) -> None:
    del summary["protocol"], summary["folds"][1]["mse"], summary["headline"]["pcc_h"]
    with pytest.raises(ValueError, match=r"lacks protocol, folds\[1\]\.mse, headline\.pcc_h\. .*--mode test"):
        write_summary(tmp_path, summary)
    assert not list(tmp_path.iterdir())


def test_terminal_table_is_aligned(summary: dict) -> None:
    lines = format_table(summary).splitlines()
    rule = next(line for line in lines if line.startswith("---"))
    ends = [match.end() for match in re.finditer("-+", rule)]
    rows = [line for line in lines if re.match(r"\d \(", line)]
    assert len(rows) == 3
    for row in rows:
        assert len(row) == len(rule)
        assert all(row[end : end + 2].strip() == "" for end in ends)


def test_figures_of_a_fold(reported: Path) -> None:
    folder = reported / "fold_0" / "figures"
    names = {picture["name"]: picture for picture in json.loads((folder / "index.json").read_text())["pictures"]}
    kinds = {picture["kind"] for picture in names.values()}
    assert kinds == {"curves", "distribution", "bars", "patients", "clusters", "map", "scatter"}
    # The chosen gene on both slides, one best and one worst gene, each as map and scatter.
    maps = [picture for picture in names.values() if picture["kind"] == "map"]
    assert sorted(picture["group"] for picture in maps) == ["best", "chosen", "chosen", "worst"]
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 150 and len(np.unique(np.asarray(image.convert("L")))) > 10, name
        assert (folder / f"{name}.svg").read_text().count("<svg") == 1


def test_best_and_worst_are_those_of_the_table(reported: Path) -> None:
    table = pd.read_csv(reported / "fold_0" / "per_gene.csv")
    fused = table[(table["scale"] == "fused") & (table["truth"] == "smoothed")].set_index("gene")["pearson"]
    pictures = json.loads((reported / "fold_0" / "figures" / "index.json").read_text())["pictures"]
    best, worst = (next(p["alt"] for p in pictures if p["group"] == group) for group in ("best", "worst"))
    assert f" {fused.idxmax()} " in best and f" {fused.idxmin()} " in worst


def test_figures_are_made_again_only_when_something_changed(reported: Path, tmp_path: Path) -> None:
    fold_dir = tmp_path / "fold_1"
    shutil.copytree(reported / "fold_1", fold_dir)
    png = fold_dir / "figures" / "gene_bars.png"
    before = png.stat().st_mtime_ns
    pictures = figures_of(fold_dir, count=1, genes=["ZYX"])
    assert png.stat().st_mtime_ns == before and {picture.kind for picture in pictures} == {
        "distribution", "bars", "patients",
    }  # fmt: skip
    (fold_dir / "metrics.jsonl").write_text('{"epoch": 1, "train/total": 1.0}\n')
    with drawing_only():
        assert "curves" in {picture.kind for picture in figures_of(fold_dir, count=1, genes=["ZYX"])}
    assert png.stat().st_mtime_ns > before and (fold_dir / "figures" / "training_curves.svg").is_file()


def test_clusters_are_drawn_by_slide_where_one_patient_trains_and_not_at_all_of_one_slide(
    finished_run: Path, tmp_path: Path
) -> None:
    fold_dir = shutil.copytree(finished_run / "fold_0", tmp_path / "fold_0")
    path = fold_dir / "clusters.csv"
    of_all = pd.read_csv(path)

    def shown() -> list[str]:
        with drawing_only("clusters"):
            return [picture.alt for picture in figures_of(fold_dir, count=0) if picture.kind == "clusters"]

    assert [alt.split(" of which")[0] for alt in shown()] == ["Patients"]
    one = of_all[of_all["patient"] == "B"]
    one.to_csv(path, index=False)
    assert [alt.split(" of which")[0] for alt in shown()] == ["Slides"]
    svg = (fold_dir / "figures" / "clusters.svg").read_text()
    assert ">B1<" in svg and ">B2<" in svg
    one[one["slide"] == "B1"].to_csv(path, index=False)
    assert shown() == []


def test_figures_of_an_earlier_drawing_are_made_again(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    fold_dir = shutil.copytree(finished_run / "fold_0", tmp_path / "fold_0")
    with drawing_only():
        write_figures(fold_dir, count=0)
    assert figures_on_disk(fold_dir, count=0) is not None
    monkeypatch.setattr(fold_figures, "_DRAWING", fold_figures._DRAWING + 1)
    assert figures_on_disk(fold_dir, count=0) is None


def test_unknown_gene_is_an_error(finished_run: Path) -> None:
    with pytest.raises(ValueError, match=r"--genes NOPE: not among the 10 genes that .*fold_0 predicts"):
        write_figures(finished_run / "fold_0", genes=["NOPE"])


def test_report_is_well_formed_and_self_contained(reported: Path) -> None:
    outline = Outline((reported / "report.html").read_text())
    assert_self_contained(outline)
    assert len(outline.all("h1")) == 1 and len(outline.all("title")) == 1
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    images = outline.all("img")
    # 3 of the run; of fold 0 curves, clusters and genes: one chosen on two slides, best, worst, each in two pictures.
    assert len(images) == 3 + 2 + 8
    assert all(image["alt"] for image in images)
    is_wide = {int(image["width"]) > 800 for image in images}
    scrolling = [figure for figure in outline.all("figure") if figure.get("class") == "wide"]
    assert is_wide == {True, False} and len(scrolling) == sum(int(image["width"]) > 800 for image in images)
    anchors = {attributes["id"] for _, attributes in outline.tags if attributes.get("id")}
    assert {link["href"][1:] for link in outline.all("a")} <= anchors


def test_report_says_the_protocol_and_its_caveats_first(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    assert "Fold D was skipped: &lt;no slide&gt;." in text
    positions = [text.index(part) for part in ("<h1>", "Clean protocol:", "Fold D was skipped", "<table>", "<img")]
    assert positions == sorted(positions)
    assert text.rindex("seed: 5") > text.rindex("<img")


def test_report_of_a_fold_without_predictions_clusters_or_epochs(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    part = text[text.index('<section id="fold-1">') : text.index('<section id="settings">')]
    assert "No maps: this fold holds no prediction files" in part and "<img" not in part
    assert "versions.json is not in the run folder" in text
    assert not (reported / "fold_1" / "figures" / "training_curves.png").exists()


def test_report_needs_a_summary(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"summary.json does not exist\. .*--mode test"):
        write_report(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        write_report(tmp_path / "run")


def test_comparison(make_run: Callable[..., Path], finished_run: Path, tmp_path: Path) -> None:
    weaker = make_run(tmp_path / "weaker", signal=0.3, predictions=False)
    table = compare_methods({"gene_dml": [finished_run], "ridge <b>": [weaker]})
    markdown, csv, page = write_comparison(table, tmp_path / "out")
    as_read = pd.read_csv(csv)
    np.testing.assert_allclose(as_read["mean"], table["mean"])
    assert list(as_read["method"]) == list(table["method"])
    text = markdown.read_text()
    assert text.startswith("# Comparison with gene_dml") and "## MSE, lower is better" in text
    row = table[(table["metric"] == "pcc_all") & (table["method"] == "ridge <b>")].iloc[0]
    assert row["difference"] < 0 and f"{row['difference']:+.4f}" in text
    assert "3 pairs are too few for a test" in text and f"{row['by_patient']['B']:.4f}" in text
    assert f"- All tests: {row['wilcoxon_note']}." in text
    header = "| row minus gene_dml | 95 % |     p | genes better than gene_dml | median gene, row minus gene_dml |"
    assert re.sub(" +", " ", text).count(re.sub(" +", " ", header)) == 4
    assert (
        re.sub(" +", " ", comparison_text(table)).count("genes better than gene_dml median gene, row minus gene_dml")
        == 4
    )
    outline = Outline(page.read_text())
    assert_self_contained(outline)
    assert len(outline.all("table")) == 4 and len(outline.all("img")) == 1
    table.loc[table["metric"] == "pcc_h", "mean"] = np.nan
    with drawing_only():
        again = write_comparison(table, tmp_path / "out")[0].read_text()
    for text in (again, comparison_text(table)):
        assert (
            "Undefined for every method, and left out: PCC(H)." in text
            and text.count("genes better than gene_dml") == 3
        )
    with pytest.raises(ValueError, match="lacks the columns mean"):
        write_comparison(table.drop(columns="mean"), tmp_path)
    with pytest.raises(ValueError, match="has no row"):
        write_comparison(table.iloc[:0], tmp_path)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")
def test_report_renders_in_a_browser(reported: Path, tmp_path: Path) -> None:
    screenshot = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--hide-scrollbars", "--window-size=1100,3000", f"--screenshot={screenshot}",
        (reported / "report.html").resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Messages of the page itself (refused resources, errors) are logged as CONSOLE.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    with Image.open(screenshot) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (3000, 1100)
    # Ink in every fifth of the page, and most of it white: text and pictures, neither blank nor broken.
    assert all((part < 128).mean() > 0.002 for part in np.array_split(pixels, 5))
    assert 0.5 < (pixels > 240).mean() < 0.99
