"""Preparing what is large: memory and time of a Visium HD slide of 600 000 bins, and of an .h5ad of 100 000 spots.

    python benchmarks/bench_prepare.py

Both are simulated: as many counts that are not zero in each bin or spot as deep sequencing gives. `prepare_visium.py` and
`prepare_anndata.py` run whole, each in a process of its own whose memory is watched.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import anndata
import h5py
import numpy as np
import pandas as pd

from benchmarks.bench_predict import write_slide
from benchmarks.common import GIGA, Goal, Report, begin, finish, flags, machine, scratch, watched
from datasets.tables.counts import read_counts
from preprocess import prepare_anndata, prepare_visium
from preprocess.raw.space_ranger.bins import BIN_UM as SQUARE_UM
from utils.cli import run

BIN_UM, MICRONS = 8, 0.5  # of a bin, of a pixel
ROWS_AT_ONCE = 20_000
MOST_GB, MOST_SECONDS = 4, 300


@dataclass(frozen=True)
class Counts:
    """spots x genes, of which `of_spot` are not zero in each spot."""

    spots: int
    genes: int
    of_spot: int


BINS, QUICK_BINS = Counts(777**2, 18_000, 200), Counts(28**2, 200, 20)  # sides that squares of 56 um fill
SPOTS, QUICK_SPOTS = Counts(100_000, 20_000, 1900), Counts(400, 200, 20)


def write_compressed_rows(group: h5py.Group, counts: Counts, dtype: str) -> int:
    """Write data, indices (of genes, rising in a spot) and indptr, some spots at a time; returns the sum of the counts."""
    random, size, total = np.random.default_rng(0), counts.spots * counts.of_spot, 0
    data, indices = (
        group.create_dataset(name, (size,), kind) for name, kind in (("data", dtype), ("indices", "int32"))
    )
    for first in range(0, counts.spots, ROWS_AT_ONCE):
        shape = (min(ROWS_AT_ONCE, counts.spots - first), counts.of_spot)
        place = slice(first * counts.of_spot, (first + shape[0]) * counts.of_spot)
        values = 1 + random.poisson(0.3, shape)
        steps = random.integers(1, counts.genes // counts.of_spot, shape, endpoint=True, dtype=np.int32)
        data[place], indices[place] = values.ravel(), (steps.cumsum(axis=1) - 1).ravel()
        total += int(values.sum())
    group["indptr"] = np.arange(0, size + 1, counts.of_spot)
    return total


def write_hd(folder: Path, counts: Counts) -> tuple[int, list[str]]:
    """A large section of Visium HD and a small one of another patient, and their sheet; returns the counts of the large one.

    The second value: the flags of the command.
    """
    total = write_section(folder / "L", counts)
    write_section(folder / "S", replace(counts, spots=QUICK_BINS.spots))
    rows = [f"{name},P{name},{folder / name / 'outs'},{folder / name / 'slide.tif'}\n" for name in "LS"]
    (folder / "samples.csv").write_text("sample,patient,outs,image\n" + "".join(rows))
    return total, ["--samples", str(folder / "samples.csv"), "--link"]


def write_section(folder: Path, counts: Counts) -> int:
    """An outs/ of Visium HD, all bins under tissue, and its image; returns the sum of the counts."""
    side = math.isqrt(counts.spots)
    bins = folder / "outs" / "binned_outputs" / f"square_{BIN_UM:03d}um"
    (bins / "spatial").mkdir(parents=True)
    row, column = (axis.ravel() for axis in np.mgrid[0:side, 0:side])
    names = np.array([f"s_{BIN_UM:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column)])
    places = {"row": row, "col": column}
    pixels = {f"pxl_{name}_in_fullres": (place + 0.5) * BIN_UM / MICRONS for name, place in places.items()}
    table = pd.DataFrame({"barcode": names, "in_tissue": 1, "array_row": row, "array_col": column, **pixels})
    table.to_parquet(bins / "spatial" / "tissue_positions.parquet", index=False)
    factors = {"spot_diameter_fullres": BIN_UM / MICRONS, "bin_size_um": float(BIN_UM), "microns_per_pixel": MICRONS}
    (bins / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    with h5py.File(bins / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        total = write_compressed_rows(group, counts, "int32")  # its columns are the bins
        group["shape"], group["barcodes"] = np.array([counts.genes, counts.spots]), names.astype("S")
        features = group.create_group("features")
        for name, pattern in (("id", "ENSG{:011d}"), ("name", "GENE{}"), ("feature_type", "Gene Expression")):
            features[name] = np.array([pattern.format(gene) for gene in range(counts.genes)], dtype="S")
    write_slide(folder / "slide.tif", round(side * BIN_UM / MICRONS), 1.0)
    return total


def write_h5ad(folder: Path, counts: Counts) -> tuple[int, list[str]]:
    """A file of one slide, its image; returns the sum of the counts and the flags."""
    folder.mkdir(exist_ok=True)
    side, pitch = math.ceil(math.sqrt(counts.spots)), 16
    place = np.arange(counts.spots)
    centers = np.stack([place % side, place // side], axis=1) * pitch + pitch / 2
    slide = anndata.AnnData(
        obs=pd.DataFrame(index=[f"spot{spot}" for spot in range(counts.spots)]),
        var=pd.DataFrame(index=[f"GENE{gene}" for gene in range(counts.genes)]),
        obsm={"spatial": centers},
    )
    slide.write_h5ad(folder / "slide.h5ad")
    with h5py.File(folder / "slide.h5ad", "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = [counts.spots, counts.genes]
        total = write_compressed_rows(group, counts, "float32")
    write_slide(folder / "slide.tif", side * pitch, 1.0)
    flags = ["--source", str(folder / "slide.h5ad"), "--image", str(folder / "slide.tif"), "--patient", "P1"]
    return total, [*flags, "--mpp", str(MICRONS), "--link"]


def measured(
    what: str, prepare: Callable, written: tuple[int, list[str]], data_dir: Path, counts: Counts, apart: bool
) -> dict[str, object]:
    """Prepare one slide; a row with what it took, and whether every count has arrived."""
    total, given = written
    found = watched(prepare, [*given, "--name", "large", "--data_dir", str(data_dir)], apart=apart)
    path = max((data_dir / "large" / "ST-cnts").iterdir(), key=lambda path: path.stat().st_size)
    table = read_counts(path)
    return {
        "what": what,
        "spots": counts.spots,
        "genes": counts.genes,
        "not zero (million)": counts.spots * counts.of_spot / 1e6,
        "prepared spots": table.n_obs,
        "counts kept": int(table.X.sum(dtype=np.int64)) == total,
        "peak memory (GB)": found.peak_bytes / GIGA,
        "s": found.seconds,
    }


def main(argv: list[str] | None = None) -> Path:
    arguments = flags(__doc__).parse_args(argv)
    device = begin(arguments)
    started_on, is_quick = machine(device), arguments.quick
    kinds = (
        ("Visium HD", prepare_visium.main, write_hd, QUICK_BINS if is_quick else BINS),
        (".h5ad", prepare_anndata.main, write_h5ad, QUICK_SPOTS if is_quick else SPOTS),
    )
    rows = []
    for what, prepare, write, counts in kinds:
        with scratch() as folder:
            rows.append(measured(what, prepare, write(folder, counts), folder / "data", counts, not is_quick))
    report = Report(
        name="prepare",
        title="Preparing large slides",
        settings={"side of a bin (um)": BIN_UM, "side of a square (um)": SQUARE_UM},
        rows=rows,
        goals=[
            Goal(
                what=f"prepare {row['what']}, {row['spots']} spots x {row['genes']} genes",
                published="-",
                goal=f"under {MOST_GB} GB and {MOST_SECONDS / 60:.0f} minutes",
                measured=f"{row['peak memory (GB)']:.2f} GB, {row['s']:.0f} s",
                is_met=None if is_quick else row["peak memory (GB)"] < MOST_GB and row["s"] < MOST_SECONDS,
            )
            for row in rows
        ],
        notes=["The whole command, from the files to the prepared set, without what Python takes to start."],
        extra={"are_kept": all(row["counts kept"] for row in rows)},
    )
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
