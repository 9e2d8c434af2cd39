"""Simulate a small data set in the documented layout: H&E-like sections, and counts that depend on them.

    python preprocess/simulate_demo.py --data_dir data

writes <data_dir>/demo/ and, as an external test set with another stain and another order of genes,
<data_dir>/test/demo_external/. `simulation.json` in each says which genes depend on which scale; it is for the
reader, no program of the project opens it but this one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from datasets.layout import Layout
from datasets.spec import DatasetSpec, write_spec
from datasets.tables.expression import highest_mean_panel
from datasets.tables.slide_table import load_slide
from preprocess.simulation.genes import PROGRAM_OF, PROGRAMS, GeneModel, gene_model
from preprocess.simulation.slide import Slide, simulate_slide
from preprocess.simulation.tissue import generator
from utils.cli import progress, run, say
from utils.files import reading, safe_name, write_atomically, write_text
from utils.text import brief

DEFAULT_PATIENTS = ("A", "B", "C", "D", "E")
DEFAULT_GRID = (12, 10)
EXTERNAL_PATIENT, EXTERNAL_SLIDE = "X", "X1"
EXTERNAL_STAIN_SPREAD = 1.8  # the stain of another laboratory differs more than that of another patient
MISSING_FROM_EXTERNAL = 3  # panel genes that the external set has not measured
MICRONS_PER_PIXEL = 1.6  # what the size of the simulated nuclei amounts to
MANIFEST = "simulation.json"
REPLACED = ("ST-cnts", "ST-spotfiles", "ST-imgs")


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

    @property
    def slides(self) -> list[tuple[str, str]]:
        """(patient, slide) of every training slide: A1, A2, B1, ..."""
        numbers = range(1, self.slides_per_patient + 1)
        return [(patient, f"{patient}{number}") for patient in self.patients for number in numbers]


def simulate(
    data_dir: str | Path,
    *,
    name: str = "demo",
    patients: Sequence[str] = DEFAULT_PATIENTS,
    slides_per_patient: int = 2,
    grid: tuple[int, int] = DEFAULT_GRID,
    patch_size: int = 64,
    num_genes: int = 60,
    external: bool = True,
    seed: int = 2021,
    overwrite: bool = False,
) -> dict:
    """Write a simulated data set, and its external slide, below `data_dir`; a complete one is kept.

    name:       folder of the data set; the external one is test/<name>_external.
    patients:   capital letters; slides are called <patient><number>.
    grid:       columns and rows of the array of spots, some of which lie beside the tissue.
    patch_size: side of a patch and distance of two spots, px.
    num_genes:  size of the panel; twice as many are measured where the simulation knows that many.
    overwrite:  replace another simulation (never data of another origin).
    returns:    the content of simulation.json: arguments, and for every program of genes its scale and genes.
    Raises ValueError for arguments that make no data set and for a folder that holds anything else.
    """
    arguments = Arguments(
        name=safe_name(name, "Data set"),
        patients=tuple(patients),
        slides_per_patient=slides_per_patient,
        grid=grid,
        patch_size=patch_size,
        num_genes=num_genes,
        external=external,
        seed=seed,
    )
    _check(arguments)
    model = gene_model(seed, num_genes)
    layout, external_layout = _layouts(data_dir, arguments)
    layouts = [layout, external_layout] if external else [layout]
    if all([_is_complete(place.root, arguments, overwrite) for place in layouts]):
        return read_manifest(layout.root / MANIFEST)
    for place in layouts:
        _start(place, arguments)
    panel = _write_training_slides(layout, arguments, model)
    if external:
        _write_external_slide(external_layout, arguments, model, panel)
        _write_manifest(external_layout.root, arguments, panel)
    return _write_manifest(layout.root, arguments, panel)


def _layouts(data_dir: str | Path, arguments: Arguments) -> tuple[Layout, Layout]:
    """Where the training set and the external set lie."""
    spec = DatasetSpec(
        name=arguments.name,
        patient_pattern=r"^([A-Z]+)\d+$",
        image_pattern="{patient}/{slide}/*",
        microns_per_pixel=MICRONS_PER_PIXEL,
        prepared_by="simulate_demo.py",
    )
    external = replace(spec, name=f"{arguments.name}_external", external=True, training_type=arguments.name)
    return Layout(data_dir, spec), Layout(data_dir, external)


def _check(arguments: Arguments) -> None:
    """Raise one ValueError with every argument that makes no data set."""
    problems = []
    columns, rows = arguments.grid
    if not arguments.patients or arguments.slides_per_patient < 1:
        problems.append("there is no slide: give at least one patient and one slide per patient")
    wrong = [patient for patient in arguments.patients if not (patient.isascii() and patient.isupper())]
    if wrong or not all(patient.isalpha() for patient in arguments.patients):
        problems.append(f"patients are {', '.join(map(repr, arguments.patients))}: use capital letters A-Z")
    if len(set(arguments.patients)) < len(arguments.patients):
        problems.append(f"patients {', '.join(arguments.patients)} are not all different")
    if min(columns, rows) < 4:
        problems.append(f"the grid is {columns} x {rows} spots: at least 4 x 4 are needed")
    if arguments.patch_size < 16:
        problems.append(f"patch_size is {arguments.patch_size} px: nuclei need at least 16")
    if arguments.seed < 0:
        problems.append(f"seed is {arguments.seed}: it must not be negative")
    if problems:
        raise ValueError(f"These arguments make no data set: {'; '.join(problems)}.")


def _is_complete(root: Path, arguments: Arguments, overwrite: bool) -> bool:
    """Tell whether exactly this simulation lies in `root` and may stay. Raises ValueError if something else must stay."""
    manifest = root / MANIFEST
    if not manifest.is_file():
        if root.is_dir() and any(root.iterdir()):
            raise ValueError(
                f"{root} is not empty and has no {MANIFEST}: these data were not simulated, and they are kept. "
                f"Move them away or choose another --data_dir."
            )
        return False
    found = read_manifest(manifest)
    if overwrite:
        return False
    asked = json.loads(json.dumps(asdict(arguments)))
    differences = [
        f"{key} is {found['arguments'].get(key)}, asked for {value}"
        for key, value in asked.items()
        if found["arguments"].get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{root} holds another simulation: {'; '.join(differences)}. "
            f"Keep it elsewhere, or choose another --data_dir."
        )
    return found["is_complete"]


def read_manifest(path: Path) -> dict:
    """Read what was simulated. Raises ValueError for a file that does not say so."""
    with reading(path, "the description of a simulation"):
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"is_complete": bool, "arguments": dict, "programs": dict}
        if not isinstance(content, dict) or not all(isinstance(content.get(name), kinds[name]) for name in kinds):
            raise ValueError(f"expected {', '.join(kinds)}, found {brief(content)}")
        return content


def _start(layout: Layout, arguments: Arguments) -> None:
    """Mark the folder as a simulation in progress and remove the slides of an earlier one."""
    _write_manifest(layout.root, arguments, panel=[])
    for part in REPLACED:
        if (layout.root / part).is_dir():
            shutil.rmtree(layout.root / part)
    write_spec(layout.spec_path, layout.spec)


def _write_manifest(root: Path, arguments: Arguments, panel: list[str]) -> dict:
    """Write and return what was simulated; an empty panel says that the simulation has not ended."""
    programs = {
        program: {"scale": scale, "genes": [gene for gene in panel if PROGRAM_OF[gene] == program]}
        for program, (scale, _) in PROGRAMS.items()
    }
    content = {"is_complete": bool(panel), "arguments": asdict(arguments), "programs": programs}
    text = json.dumps(content, indent=2)
    write_text(root / MANIFEST, text + "\n")
    return json.loads(text)


def _write_training_slides(layout: Layout, arguments: Arguments, model: GeneModel) -> list[str]:
    """Write every training slide and the panel, chosen by the rule of the paper from the slides as they are read."""
    for patient, name in progress(arguments.slides, description="simulate", unit="slide", leave=False):
        slide = simulate_slide(
            model,
            seed=arguments.seed,
            patient=patient,
            name=name,
            grid=arguments.grid,
            pitch=arguments.patch_size,
        )
        _write_slide(layout, slide, genes=list(model.genes))
    slides = (load_slide(layout, name) for _, name in arguments.slides)
    panel = highest_mean_panel(slides, arguments.num_genes)
    write_atomically(layout.panel_path, lambda path: np.save(path, np.array(panel)))
    return panel


def _write_external_slide(layout: Layout, arguments: Arguments, model: GeneModel, panel: list[str]) -> None:
    """Write a slide of another laboratory: another stain, genes in another order, some of the panel missing."""
    slide = simulate_slide(
        model,
        seed=arguments.seed,
        patient=EXTERNAL_PATIENT,
        name=EXTERNAL_SLIDE,
        grid=arguments.grid,
        pitch=arguments.patch_size,
        origin=layout.name,
        stain_spread=EXTERNAL_STAIN_SPREAD,
    )
    random = generator(arguments.seed, layout.name, "genes")
    missing = random.choice(panel, size=MISSING_FROM_EXTERNAL, replace=False)
    measured = random.permutation([gene for gene in model.genes if gene not in missing]).tolist()
    _write_slide(layout, slide, genes=measured)
    genes = [gene for gene in measured if gene in panel]
    indices = np.array([panel.index(gene) for gene in genes], dtype=np.int64)
    write_atomically(layout.panel_path, lambda path: np.save(path, np.array(genes)))
    write_atomically(layout.panel_index_path, lambda path: np.save(path, indices))


def _write_slide(layout: Layout, slide: Slide, genes: list[str]) -> None:
    """Write counts (rows ordered by their ids as strings, as in the public tables), spot table and picture."""
    counts = slide.counts.sort_index()[genes]
    image_path = layout.images_dir / slide.patient / slide.name / f"{slide.name}.jpg"
    write_atomically(layout.new_counts_path(slide.name), counts.to_parquet)
    write_atomically(layout.spots_path(slide.name), lambda path: slide.spots.to_csv(path, sep="\t", index=False))
    write_atomically(image_path, lambda path: Image.fromarray(slide.picture).save(path, quality=92))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default="data", help="folder of all data sets (default: %(default)s)")
    parser.add_argument("--name", default="demo", help="name of the data set (default: %(default)s)")
    parser.add_argument("--patients", default=",".join(DEFAULT_PATIENTS), help="capital letters (default: %(default)s)")
    parser.add_argument(
        "--slides_per_patient", type=int, default=2, help="sections of a patient (default: %(default)s)"
    )
    size = "{} x {}".format(*DEFAULT_GRID)
    parser.add_argument(
        "--grid",
        type=int,
        nargs=2,
        default=DEFAULT_GRID,
        metavar=("COLUMNS", "ROWS"),
        help=f"spots of the array (default: {size})",
    )
    parser.add_argument("--patch_size", type=int, default=64, help="px, also the distance of two spots (default: 64)")
    parser.add_argument("--num_genes", type=int, default=60, help="genes of the panel (default: %(default)s)")
    parser.add_argument("--no_external", action="store_true", help="do not simulate the external test set")
    parser.add_argument("--seed", type=int, default=2021, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier simulation")
    return parser.parse_args()


def main() -> None:
    """Read the command line and simulate."""
    options = vars(_parse())
    options["patients"] = tuple(options["patients"].split(","))
    options["external"] = not options.pop("no_external")
    content = simulate(**options)
    num_genes = sum(len(program["genes"]) for program in content["programs"].values())
    num_slides = len(options["patients"]) * options["slides_per_patient"]
    say(
        f"{Path(options['data_dir']) / options['name']}: {num_slides} simulated slides of "
        f"{len(options['patients'])} patients, a panel of {num_genes} genes."
    )


if __name__ == "__main__":
    run(main)
