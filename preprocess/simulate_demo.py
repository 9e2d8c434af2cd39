"""Simulate a small data set in the documented layout: H&E-like sections, spots, and counts that depend on them.

    python preprocess/simulate_demo.py --data_dir data

writes <data_dir>/demo/ and, as an external test set with another stain and another order of genes,
<data_dir>/test/demo_external/. `simulation.json` beside them says which genes depend on which scale; nothing reads it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import map_coordinates, uniform_filter

from preprocess.simulation.genes import (
    PROGRAM_OF,
    PROGRAMS,
    GeneModel,
    draw_counts,
    expected_counts,
    gene_model,
)
from preprocess.simulation.staining import draw_stain, render
from preprocess.simulation.tissue import BACKGROUND, Section, generator, simulate_section
from utils.cli import progress, run, say
from utils.files import safe_name, write_atomically, write_text

MARGIN = (
    1.6  # pitches from the edge of the image to the first spot: the outer neighbor tiles there lie outside
)
FIRST_GRID_POSITION = (4, 6)  # x, y; the arrays of real sections do not start at zero either
LISTED_WITHOUT_COUNTS = 3  # spots of the table that have no counts, as real tables hold a few
MISSING_FROM_EXTERNAL = 3  # panel genes that the external set has not measured
MANIFEST = "simulation.json"


@dataclass(frozen=True)
class Arguments:
    """What a simulation depends on; stored beside it."""

    name: str
    patients: tuple[str, ...]
    slides_per_patient: int
    grid: tuple[int, int]
    patch_size: int
    num_genes: int
    external: bool
    seed: int


@dataclass(frozen=True)
class Slide:
    """One simulated slide. picture: (height, width, 3) uint8; means: (N, G) expected counts; counts: spots x genes, the
    spots on tissue; spots: the spot table, which lists a few more."""

    name: str
    patient: str
    section: Section
    picture: np.ndarray
    means: np.ndarray
    counts: pd.DataFrame
    spots: pd.DataFrame


def simulate(
    data_dir: str | Path,
    *,
    name: str = "demo",
    patients: Sequence[str] = ("A", "B", "C", "D", "E"),
    slides_per_patient: int = 2,
    grid: tuple[int, int] = (13, 11),
    patch_size: int = 64,
    num_genes: int = 60,
    external: bool = True,
    seed: int = 2021,
    overwrite: bool = False,
) -> dict:
    """Write a simulated data set, and its external slide, below `data_dir`; a complete one is kept.

    name: folder of the data set; slides are called <patient><number>. grid: columns and rows of the array of spots.
    patch_size: side of a patch and distance of two spots, px. num_genes: size of the panel; twice as many are measured
    where the simulation knows that many. returns: the content of simulation.json. raises: ValueError for arguments that
    make no data set, and for a folder that holds anything else than this simulation (unless `overwrite`, which replaces
    another simulation, never other data).
    """
    arguments = Arguments(
        safe_name(name, "data set"),
        tuple(safe_name(patient, "patient") for patient in patients),
        slides_per_patient,
        tuple(grid),
        patch_size,
        num_genes,
        external,
        seed,
    )
    _check(arguments)
    root = Path(data_dir) / name
    external_root = Path(data_dir) / "test" / f"{name}_external"
    if _is_done(root, arguments, overwrite):
        return json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    folders = (root, external_root) if external else (root,)
    for folder in folders:
        _clear(folder)
        _write_manifest(folder, arguments, is_complete=False, panel=[])
    model = gene_model(seed, num_genes)
    panel = _write_training_slides(root, arguments, model)
    if external:
        _write_external_slide(external_root, arguments, model, panel)
        _write_manifest(external_root, arguments, is_complete=True, panel=panel)
    return _write_manifest(root, arguments, is_complete=True, panel=panel)


def slide_names(arguments: Arguments) -> list[tuple[str, str]]:
    """(patient, slide) of every training slide: A1, A2, B1, ..."""
    numbers = range(1, arguments.slides_per_patient + 1)
    return [(patient, f"{patient}{number}") for patient in arguments.patients for number in numbers]


def _check(arguments: Arguments) -> None:
    """Raise ValueError with every argument that makes no data set."""
    problems = []
    names = [slide for _, slide in slide_names(arguments)]
    if not names:
        problems.append("there is no slide: give at least one patient and one slide per patient")
    if len(set(names)) < len(names):
        problems.append(f"the slides {', '.join(names)} are not all different: give different patients")
    if min(arguments.grid) < 4:
        problems.append(
            f"the grid is {arguments.grid[0]} x {arguments.grid[1]} spots: at least 4 x 4 are needed"
        )
    if arguments.patch_size < 16:
        problems.append(f"patch_size is {arguments.patch_size} px: nuclei need at least 16")
    if arguments.seed < 0:
        problems.append(f"seed is {arguments.seed}: it must not be negative")
    if problems:
        raise ValueError("These arguments make no data set: " + "; ".join(problems) + ".")


def _is_done(root: Path, arguments: Arguments, overwrite: bool) -> bool:
    """True if exactly this simulation lies in `root`; raises if the folder holds something that must be kept."""
    if not (root / MANIFEST).is_file():
        return False
    found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(asdict(arguments)))
    if found["arguments"] == asked and not overwrite:
        return found["is_complete"]
    if not overwrite:
        differences = ", ".join(
            f"{key} {found['arguments'].get(key)} instead of {value}"
            for key, value in asked.items()
            if found["arguments"].get(key) != value
        )
        raise ValueError(
            f"{root} holds another simulation ({differences}). Add --overwrite to replace it, or choose another --data_dir."
        )
    return False


def _clear(folder: Path) -> None:
    """Remove an earlier simulation; raises ValueError for a folder whose data are not ours to remove."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is not empty and has no {MANIFEST}: these are not simulated data, and they are kept. "
            f"Move them away or choose another --data_dir."
        )
    for part in ("ST-cnts", "ST-spotfiles", "ST-imgs"):
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)


def _write_manifest(root: Path, arguments: Arguments, *, is_complete: bool, panel: list[str]) -> dict:
    """Write and return what was simulated and which panel genes depend on which scale."""
    programs = {
        program: {"scale": scale, "genes": [gene for gene in panel if PROGRAM_OF[gene] == program]}
        for program, (scale, _) in PROGRAMS.items()
    }
    manifest = {"is_complete": is_complete, "arguments": asdict(arguments), "programs": programs}
    write_text(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return json.loads(json.dumps(manifest))


def _write_training_slides(root: Path, arguments: Arguments, model: GeneModel) -> list[str]:
    """Simulate and write every training slide and the panel: the genes of the highest mean count over all spots."""
    total, num_spots = 0, 0
    for patient, name in progress(slide_names(arguments), description="simulate", unit="slide", leave=False):
        slide = simulate_slide(arguments, model, patient=patient, name=name)
        _write_slide(root, slide)
        total, num_spots = total + slide.counts.sum(), num_spots + len(slide.counts)
    mean = (total / num_spots).sort_index().sort_values(ascending=False, kind="stable")
    panel = mean.index[: arguments.num_genes].tolist()
    write_atomically(root / f"genes_{arguments.name}.npy", lambda path: np.save(path, np.array(panel)))
    return panel


def _write_external_slide(root: Path, arguments: Arguments, model: GeneModel, panel: list[str]) -> None:
    """Simulate and write a slide of another place: twice the difference in stain, genes in another order, some missing."""
    slide = simulate_slide(arguments, model, patient="X", name="X1", label="external", stain_spread=2.0)
    random = generator(arguments.seed, "external", "genes")
    missing = random.choice(panel, size=min(MISSING_FROM_EXTERNAL, len(panel) // 4), replace=False)
    measured = random.permutation([gene for gene in model.genes if gene not in missing])
    _write_slide(root, slide, genes=measured.tolist())
    genes = [gene for gene in measured.tolist() if gene in panel]
    indices = np.array([panel.index(gene) for gene in genes], dtype=np.int64)
    write_atomically(
        root / f"genes_{arguments.name}_external.npy", lambda path: np.save(path, np.array(genes))
    )
    write_atomically(root / "ind_match.npy", lambda path: np.save(path, indices))


def simulate_slide(
    arguments: Arguments,
    model: GeneModel,
    *,
    patient: str,
    name: str,
    label: str | None = None,
    stain_spread: float = 1.0,
) -> Slide:
    """Simulate one slide. label: what its randomness hangs on, by default the patient; stain_spread: how far the stain of
    patients differs from the usual one."""
    label, seed, pitch = label or patient, arguments.seed, arguments.patch_size
    width, height = (int(round((count - 1 + 2 * MARGIN) * pitch)) for count in arguments.grid)
    section = simulate_section(seed, label, name, (height, width), pitch)
    picture = render(section, draw_stain(seed, label, name, stain_spread), generator(seed, name, "picture"))
    spots = _lay_spots(generator(seed, name, "spots"), section, arguments.grid)
    on_tissue = spots.pop("is_measured").to_numpy()
    centers = spots.loc[on_tissue, ["pixel_x", "pixel_y"]].to_numpy()
    means = expected_counts(model, section, centers, seed=seed, patient=label, slide=name)
    ids = [f"{x}x{y}" for x, y in spots.loc[on_tissue, ["x", "y"]].to_numpy()]
    counts = pd.DataFrame(
        draw_counts(means, generator(seed, name, "counts")), index=ids, columns=list(model.genes)
    )
    return Slide(name, patient, section, picture, means, counts, spots)


def _lay_spots(random: np.random.Generator, section: Section, grid: tuple[int, int]) -> pd.DataFrame:
    """The spot table: the places of the array on tissue, and the next few at its edge with is_measured False."""
    columns, rows = grid
    row, column = (index.ravel() for index in np.mgrid[0:rows, 0:columns])
    shift = random.normal(0.0, 0.015, (2, rows * columns)).clip(
        -0.05, 0.05
    )  # pitches; the array is not perfect
    pixel = (np.stack([column, row]) + MARGIN + shift) * section.pitch
    covered = uniform_filter((section.region != BACKGROUND).astype(np.float32), section.pitch)
    share = map_coordinates(covered, pixel[::-1], order=1)
    listed = np.argsort(-share, kind="stable")[: int((share >= 0.5).sum()) + LISTED_WITHOUT_COUNTS]
    left, top = FIRST_GRID_POSITION
    table = pd.DataFrame(
        {
            "x": column + left,
            "y": row + top,
            "new_x": np.round(column + left + shift[0], 3),
            "new_y": np.round(row + top + shift[1], 3),
            "pixel_x": np.round(pixel[0], 2),
            "pixel_y": np.round(pixel[1], 2),
            "selected": 1,
            "is_measured": share >= 0.5,
        }
    )
    return table.iloc[np.sort(listed)].reset_index(drop=True)


def _write_slide(root: Path, slide: Slide, genes: list[str] | None = None) -> None:
    """Write counts (rows in the order of their ids as strings, as the public tables), spot table and picture."""
    counts = slide.counts.sort_index()
    counts = counts if genes is None else counts[genes]
    write_atomically(root / "ST-cnts" / f"{slide.name}_sub.parquet", counts.to_parquet)
    write_atomically(
        root / "ST-spotfiles" / f"{slide.name}_selection.tsv",
        lambda path: slide.spots.to_csv(path, sep="\t", index=False),
    )
    write_atomically(
        root / "ST-imgs" / slide.patient / slide.name / f"{slide.name}.jpg",
        lambda path: Image.fromarray(slide.picture).save(path, quality=92),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="folder of the data sets (default: data)"
    )
    parser.add_argument("--name", default="demo", help="name of the data set (default: demo)")
    parser.add_argument(
        "--patients", default="A,B,C,D,E", help="letters of the patients (default: A,B,C,D,E)"
    )
    parser.add_argument("--slides_per_patient", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=(13, 11), metavar=("COLUMNS", "ROWS"))
    parser.add_argument(
        "--patch_size", type=int, default=64, help="side of a patch and distance of spots, px"
    )
    parser.add_argument("--num_genes", type=int, default=60, help="genes of the panel (default: 60)")
    parser.add_argument("--no_external", action="store_true", help="do not simulate the external test set")
    parser.add_argument("--seed", type=int, default=2021)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier simulation")
    options = vars(parser.parse_args())
    options["patients"] = tuple(options["patients"].split(","))
    options["external"] = not options.pop("no_external")
    manifest = simulate(**options)
    where = options["data_dir"] / options["name"]
    slides = len(options["patients"]) * options["slides_per_patient"]
    genes = sum(len(program["genes"]) for program in manifest["programs"].values())
    say(
        f"{where}: {slides} simulated slides of {len(options['patients'])} patients, a panel of {genes} genes."
    )


if __name__ == "__main__":
    run(main)
