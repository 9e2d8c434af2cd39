"""Expression targets of the 36 HER2ST sections: from count files to smoothed logarithms.

    python benchmarks/bench_targets.py

With GENE_DML_HER2ST set to the public download the counts are the real ones, otherwise simulated ones of the same sizes.
The slow version is what the published code does: pandas tables, and for every spot a scan of the slide for the spots
around it. It stands for 13.5 s of smoothing and 17-19 s in all (the published code, on 2 cores).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from benchmarks.common import Goal, Report, begin, finish, flags, machine
from benchmarks.fabricated import NUM_GENES, PITCH, SECTION_SIZES, round_section
from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.tables.counts import read_counts
from datasets.tables.expression import highest_mean_panel, log10p1, normalise, smooth
from datasets.tables.slide_table import join
from datasets.tables.spot_table import check_spots, read_spots
from datasets.targets import slide_targets
from utils.cli import run

PANEL_GENES = 250
STAGES = ("tables", "library size and logarithm", "smoothing")
PUBLISHED = {"tables": 0.8, "library size and logarithm": 0.15, "smoothing": 13.5, "all": 17.0}


@dataclass(frozen=True)
class Section:
    """One section in memory: counts of all genes, spot table indexed by id."""

    name: str
    counts: AnnData
    spots: pd.DataFrame


def real_section(raw: Layout, name: str) -> Section:
    return Section(name, read_counts(raw.counts_path(name)), read_spots(raw.spots_path(name)))


def simulated_section(name: str, num_spots: int, num_genes: int) -> Section:
    """Sparse counts like those of a section: few genes carry most of them."""
    random = np.random.default_rng(sum(map(ord, name)))
    grid = round_section(num_spots)
    means = 12.0 / (1 + np.arange(num_genes)) ** 0.7
    counts = random.poisson(means * random.gamma(2.0, 0.5, (num_spots, 1))).astype(np.int32)
    ids = [f"{x}x{y}" for x, y in grid]
    genes = [f"GENE{i}" for i in range(num_genes)]
    x, y = grid.T
    spots = pd.DataFrame({"x": x, "y": y, "pixel_x": x * PITCH + 600.0, "pixel_y": y * PITCH + 600.0})
    table = AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(index=ids), var=pd.DataFrame(index=genes))
    return Section(name, table, check_spots(spots, name))


def sections(sizes: dict[str, int], num_genes: int) -> Iterator[Section]:
    """The real sections if GENE_DML_HER2ST says where they are, simulated ones of `sizes` otherwise."""
    folder = os.environ.get("GENE_DML_HER2ST")
    for name, num_spots in sizes.items():
        if folder:
            yield real_section(Layout(folder, SPECS["her2st"], root=folder), name)
        else:
            yield simulated_section(name, num_spots, num_genes)


def naive_targets(counts: pd.DataFrame, spots: pd.DataFrame, panel: list[str]) -> tuple[pd.DataFrame, list[float]]:
    """Targets with pandas, the obvious way: (N, G) indexed by spot id, and the seconds of each stage.

    counts: spots x genes; spots: with x and y, in the order of its file.
    """
    clock = [time.perf_counter()]
    ids = [f"{round(x)}x{round(y)}" for x, y in zip(spots["x"], spots["y"])]
    positions = spots[["x", "y"]].round().astype(int).set_axis(ids, axis=0)
    merged = counts[panel].join(positions, how="inner").sort_values(["y", "x"])
    clock.append(time.perf_counter())
    values = merged[panel]
    values = np.log10(1 + values.div(values.sum(axis=1), axis=0).fillna(0) * 1e4)
    clock.append(time.perf_counter())
    smoothed = naive_smooth(values, merged["x"], merged["y"])
    clock.append(time.perf_counter())
    return smoothed, np.diff(clock).tolist()


def naive_smooth(values: pd.DataFrame, xs: pd.Series, ys: pd.Series) -> pd.DataFrame:
    """For every spot a scan of the slide for those at most one row and one column away, and their mean."""
    means = [values[(xs >= x - 1) & (xs <= x + 1) & (ys >= y - 1) & (ys <= y + 1)].mean(axis=0) for x, y in zip(xs, ys)]
    return pd.DataFrame(means).set_axis(values.index, axis=0)


def fast_targets(section: Section, panel: list[str]) -> tuple[AnnData, np.ndarray, list[float]]:
    """The same with the project's functions, stage by stage."""
    clock = [time.perf_counter()]
    table = join(section.counts, section.spots, SPECS["her2st"], section.name)
    counts = table[:, panel].X.toarray()
    clock.append(time.perf_counter())
    values = log10p1(normalise(counts))
    clock.append(time.perf_counter())
    smoothed = smooth(values, table.obsm["grid"]).astype(np.float32)
    clock.append(time.perf_counter())
    return table, smoothed, np.diff(clock).tolist()


def measure(sizes: dict[str, int], num_genes: int, repeats: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds of each stage over all sections, slow and fast, and the greatest difference of the targets."""
    panel = highest_mean_panel((section.counts for section in sections(sizes, num_genes)), PANEL_GENES)
    slow, fast, difference = np.zeros(len(STAGES)), np.zeros(len(STAGES)), 0.0
    for section in sections(sizes, num_genes):
        found, stages = naive_targets(section.counts.to_df(), section.spots, panel)
        slow += stages
        runs = [fast_targets(section, panel) for _ in range(repeats)]
        fast += np.median([stages for _, _, stages in runs], axis=0)
        table, targets, _ = runs[0]
        assert np.array_equal(targets, slide_targets(table, panel)), "the stages are not what the program does"
        difference = max(difference, float(np.abs(found.loc[table.obs_names].to_numpy() - targets).max()))
    return slow, fast, difference


def main(argv: list[str] | None = None) -> Path:
    arguments = flags(__doc__).parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    is_real = bool(os.environ.get("GENE_DML_HER2ST"))
    sizes = SECTION_SIZES
    if arguments.quick:
        sizes = {"C1": SECTION_SIZES["C1"]} if is_real else {"B1": 40, "C1": 50}
    slow, fast, difference = measure(sizes, 400 if arguments.quick else NUM_GENES, repeats=3)
    slow, fast = dict(zip(STAGES, slow.tolist())), dict(zip(STAGES, fast.tolist()))
    slow["all"], fast["all"] = sum(slow.values()), sum(fast.values())
    is_whole = sizes == SECTION_SIZES
    origin = "of the public download" if is_real else "simulated, sizes of the public download"
    report = Report(
        name="targets",
        title="Expression targets",
        settings={"sections": len(sizes), "spots": sum(sizes.values()), "panel genes": PANEL_GENES, "counts": origin},
        rows=[
            {
                "stage": stage,
                "published code (s)": PUBLISHED[stage] if is_whole else None,
                "naive version (s)": slow[stage],
                "here (s)": fast[stage],
                "times faster": slow[stage] / fast[stage],
            }
            for stage in slow
        ],
        goals=goals(slow, fast, is_whole),
        notes=[
            f"Greatest difference between the two: {difference:.2g} (float32 rounding).",
            "Tables: count tables of all genes in memory -> join with the spot table, panel, order.",
        ],
        extra={"difference": difference},
    )
    return finish(report, arguments, device, started_on)


def goals(slow: dict[str, float], fast: dict[str, float], is_whole: bool) -> list[Goal]:
    """The two lines of the list; the naive version of the same run is the opponent."""
    found = []
    for stage, least, published in (("smoothing", 50, "13.5 s"), ("all", 10, "17 s")):
        times = slow[stage] / fast[stage]
        measured = f"{fast[stage]:.3g} s, {times:.0f} times faster (naive {slow[stage]:.1f} s)"
        what = "smoothing of all 36 sections" if stage == "smoothing" else "targets of all 36 sections, in all"
        found.append(Goal(what, published, f"{least} times faster", measured, times >= least if is_whole else None))
    return found


if __name__ == "__main__":
    run(main)
