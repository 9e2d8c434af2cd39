"""Bring a 10x Visium slide into the documented layout, as an external test set for models of a training panel.

    python preprocess/prepare_visium.py --source OUTS --image FULLRES --name NAME --data_dir data --training_type her2st

OUTS is Space Ranger's outs/ of any version, FULLRES the image that was its input. The result, data/test/NAME/, follows
the internal convention: x is array_col, y is array_row. Neighboring columns of a row differ by 2 there, so the 3 x 3
smoothing of the targets covers a spot and its four neighbors in the rows above and below, but not the two beside it in
its own row; the published external sets are treated the same way.
--sample gives the slide a name of its own, so that several slides share one set.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec, read_spec
from datasets.spec import write_spec as write_dataset_yaml
from datasets.tables.counts import gene_names
from datasets.tables.spot_table import check_spots, spot_ids
from preprocess.raw.files import image_size
from preprocess.raw.gene_map import with_genes
from preprocess.raw.prepare import Options, Prepared, RawSlide, place_slide, source_folder, tell, verify
from preprocess.raw.space_ranger import (
    CONTENTS,
    PITCH_UM,
    SpaceRangerOutput,
    check_full_resolution,
    microns_per_pixel,
    read_outs,
)
from preprocess.raw.training_panel import TrainingPanel, choose_names, training_panel
from utils.cli import run, say
from utils.commands import extraction_command
from utils.config import load_config
from utils.files import require_file, safe_name, write_atomically, write_text
from utils.text import some

IMAGE_PATTERN = "{slide}/*"


def prepare_visium(
    source: Path,
    image: Path,
    name: str,
    data_dir: Path,
    panel: TrainingPanel,
    *,
    sample: str | None = None,
    gene_map: Path | None = None,
    overwrite: bool = False,
    link: bool = False,
) -> Prepared:
    """Prepare one slide as data_dir/test/<name>; see the head of this file.

    sample: name of the slide, default the name of the set.  gene_map: table of Ensembl ids and symbols, for a source
    that has only one of them.
    Raises ValueError / FileNotFoundError before anything is written if the source, image or genes do not fit.
    """
    slide = safe_name(sample or name, "Sample")
    output = read_outs(source_folder(Path(source), CONTENTS))
    image = require_file(image, "--image should be the full-resolution image that was the input of Space Ranger.")
    check_full_resolution(output, image, image_size(image))
    microns = microns_per_pixel(output)
    layout = Layout(data_dir, _spec(data_dir, safe_name(name, "Data set"), slide, panel.type, microns))
    names, notes = choose_names(output.counts, panel, gene_map)
    raw = RawSlide(
        name=slide,
        counts=slide_counts(output, names, panel.genes),
        spots=spot_table(output),
        source=f"{output.counts.path} and {output.positions_path}",
        image=image,
    )
    joined, prepared = place_slide(layout, raw, Options(overwrite=overwrite, link=link, num_genes=0))
    write_dataset_yaml(layout.spec_path, layout.spec)
    prepared.notes += notes + duplicate_notes(names)
    prepared.notes += [
        f"left out, as they are no genes: {n} features {kind!r}" for kind, n in output.counts.left_out.items()
    ]
    prepared.notes.append(pixel_note(microns, output))
    prepared.notes += write_match(layout, panel)
    assert joined.n_obs == prepared.spots
    verify(layout, [prepared])
    tell(layout, [prepared])
    say_next(layout, panel)
    return prepared


def _spec(data_dir: Path, name: str, slide: str, training_type: str | None, microns: float | None) -> DatasetSpec:
    """The set's description, with what slides prepared before have left in it."""
    spec = DatasetSpec(name=name, image_pattern=IMAGE_PATTERN, external=True, training_type=training_type)
    path = Layout(data_dir, spec).spec_path
    sizes: dict[str, float] = {}
    if path.is_file():
        spec = read_spec(path, name=name, external=True)
        if spec.image_pattern != IMAGE_PATTERN or spec.exchanged_pixels:
            raise ValueError(f"{path} describes a set that this script has not made. Choose another --name.")
        if isinstance(spec.microns_per_pixel, Mapping):
            sizes = dict(spec.microns_per_pixel)
    elif (path.parent / "ST-cnts").is_dir():
        raise ValueError(
            f"{path.parent} holds counts but no {path.name}: a set of another origin, perhaps the published one with its "
            "exchanged pixel columns. Choose another --name, or move it away."
        )
    if microns is not None:
        sizes[slide] = microns
    return dataclasses.replace(spec, training_type=training_type or spec.training_type, microns_per_pixel=sizes or None)


def duplicate_notes(names: Sequence[str]) -> list[str]:
    """Say what became of genes that share a name."""
    index = pd.Index(names)
    twice = index[index.duplicated()].unique().tolist()
    return [f"{len(twice)} names belong to several genes, whose counts are added up: {some(twice)}"] if twice else []


def slide_counts(output: SpaceRangerOutput, names: Sequence[str], panel: Sequence[str]) -> AnnData:
    """Take the counts of the spots under tissue by "XxY" ids; genes of one name are added up, genes without any count left
    out unless the panel has them (measured and zero is not the same as not measured).

    Raises ValueError naming both files if they share no barcode, or a sum is no count.
    """
    counts, positions = output.counts, output.positions
    place = pd.Index(counts.barcodes).get_indexer(positions.ids)
    if (place < 0).all():
        raise ValueError(
            f"No barcode of {output.positions_path} ({some(positions.ids, 2)}) is in {counts.path} "
            f"({some(counts.barcodes, 2)}). They are of different slides."
        )
    found = place >= 0
    ids = [name for name, is_found in zip(spot_ids(*output.grid.T), found) if is_found]
    raw = AnnData(
        counts.matrix[place[found]],
        obs=pd.DataFrame(index=ids),
        var=pd.DataFrame(index=[str(i) for i in range(len(names))]),
    )
    merged = with_genes(raw, names, sorted(set(names)), str(counts.path))
    kept = np.asarray(merged.X.sum(axis=0)).ravel() > 0
    kept |= merged.var_names.isin(list(panel))
    return merged[:, kept].copy()


def spot_table(output: SpaceRangerOutput) -> pd.DataFrame:
    """Make the spot table: x = array_col, y = array_row, and pixels in the order (x, y); Space Ranger lists rows first."""
    positions = output.positions
    table = pd.DataFrame(
        {
            "x": output.grid[:, 0],
            "y": output.grid[:, 1],
            "pixel_x": positions.pixels[:, 0],
            "pixel_y": positions.pixels[:, 1],
            "barcode": positions.ids,
        }
    )
    return check_spots(table, str(output.positions_path))


def pixel_note(microns: float | None, output: SpaceRangerOutput) -> str:
    """Say how large a pixel is, and what that makes of the pitch of the array."""
    if microns is None:
        return "the size of a pixel is unknown: too few spots, and no spot_diameter_fullres"
    pitch = output.scale_factors.get("bin_size_um", PITCH_UM)
    return f"{microns:.4f} um per pixel ({pitch / microns:.1f} px between neighbors, which are {pitch:g} um apart)"


def write_match(layout: Layout, panel: TrainingPanel) -> list[str]:
    """Write the panel genes that every slide of the set has, and their indices into the panel.

    returns: sentences for the report. Raises ValueError if no gene is in all slides.
    """
    slides = layout.slides_with_counts()
    measured = set.intersection(*(set(gene_names(layout.counts_path(slide))) for slide in slides))
    matched = [gene for gene in panel.genes if gene in measured]
    missing = [gene for gene in panel.genes if gene not in measured]
    if not matched:
        raise ValueError(f"No gene of {panel.source} is in all {len(slides)} slides of {layout.root}: {some(slides)}.")
    indices = np.array([index for index, gene in enumerate(panel.genes) if gene in measured], dtype=np.int64)
    write_atomically(layout.panel_path, lambda temporary: np.save(temporary, np.array(matched)))
    write_atomically(layout.panel_index_path, lambda temporary: np.save(temporary, indices))
    record = {
        "panel": panel.source,
        "num_genes": len(panel.genes),
        "slides": slides,
        "missing": missing,
        "genes": matched,
    }
    write_text(layout.panel_path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    notes = [f"{len(matched)} of the {len(panel.genes)} genes of {panel.source} are measured"]
    return notes + ([f"not measured, so not scored: {some(missing, 12)}"] if missing else [])


def say_next(layout: Layout, panel: TrainingPanel) -> None:
    """Say the commands that lead to the test; for a run they make features as it was trained on."""
    run_path = "RUN" if panel.trained is None else panel.source
    for kind in ("target", "neighbor"):
        say(f"Next: {next_extraction(layout, panel, kind)}")
    say(
        f"Then: python main.py --mode external_test --test_name {layout.name} --model_path {run_path} "
        f"--data_dir {layout.data_dir}"
    )


def next_extraction(layout: Layout, panel: TrainingPanel, kind: str) -> str:
    """Spell the command that extracts features of this kind, as the run that is the panel's source was trained on.

    kind: "target" or "neighbor".
    """
    trained = panel.trained
    if trained is None or panel.config_name is None:
        config = "" if panel.type in SPECS else " --config CONFIG"
        return (
            f"python preprocess/extract_features_uni.py --mode external --extract_mode {kind} --test_name {layout.name} "
            f"--data_dir {layout.data_dir}{config}"
        )
    try:
        default = load_config(panel.config_name).DATA.encoder
    except (ValueError, FileNotFoundError):  # of a run made elsewhere
        default = None
    encoder = None if trained.encoder == default else trained.encoder
    return extraction_command(
        kind,
        encoder=encoder,
        data_dir=layout.data_dir,
        test_name=layout.name,
        patch_size=trained.patch_size,
        num_neighbors=trained.num_neighbors,
        config_name=panel.config_name,
    )


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help=CONTENTS)
    parser.add_argument("--image", type=Path, required=True, help="the full-resolution image")
    parser.add_argument("--name", required=True, help="name of the external set, below <data_dir>/test")
    parser.add_argument("--sample", help="name of the slide (default: that of the set)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
    parser.add_argument("--training_type", help="data set whose models will be tested; its panel is taken")
    parser.add_argument("--panel", type=Path, help="the training panel: .npy, or text with one gene a line")
    parser.add_argument("--model_path", type=Path, help="run whose genes are the panel")
    parser.add_argument("--gene_map", type=Path, help="table of Ensembl ids and symbols")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    parser.add_argument("--link", action="store_true", help="link the image instead of copying it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the command line (of this process by default) and prepare."""
    given = build_parser().parse_args(argv)
    prepare_visium(
        given.source,
        given.image,
        given.name,
        given.data_dir,
        training_panel(given.data_dir, given.name, given.panel, given.training_type, given.model_path),
        sample=given.sample,
        gene_map=given.gene_map,
        overwrite=given.overwrite,
        link=given.link,
    )


if __name__ == "__main__":
    run(main)
