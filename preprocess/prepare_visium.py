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
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec, read_spec
from datasets.spec import write_spec as write_dataset_yaml
from datasets.tables.counts import gene_names
from datasets.tables.slide_table import check_spots, spot_ids
from preprocess.raw.files import image_size
from preprocess.raw.gene_map import is_ensembl, read_gene_map, symbols_of, with_genes, without_version
from preprocess.raw.matrices import GeneCounts
from preprocess.raw.prepare import Options, Prepared, RawSlide, place_slide, source_folder, tell, verify
from preprocess.raw.space_ranger import (
    CONTENTS,
    PITCH_UM,
    SpaceRangerOutput,
    check_full_resolution,
    microns_per_pixel,
    read_outs,
)
from utils.checkpoint import chosen_checkpoints, load_checkpoint
from utils.cli import run, say
from utils.commands import extraction_command
from utils.config import Data, load_config
from utils.files import load_names, require_file, safe_name, write_atomically, write_text
from utils.text import some

IMAGE_PATTERN = "{slide}/*"


@dataclass(frozen=True)
class TrainingPanel:
    """genes: those that the models predict, in order.  source: where they are listed.  type: the models' data set.

    trained, config_name: of the run that is the source, if it is one: what its features are, and its configuration.
    """

    genes: list[str]
    source: str
    type: str | None
    trained: Data | None = None
    config_name: str | None = None


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


def choose_names(counts: GeneCounts, panel: TrainingPanel, gene_map: Path | None) -> tuple[list[str], list[str]]:
    """A name for every gene in the words of the panel (symbols or Ensembl ids), and sentences about the choice.

    Raises ValueError with examples of both if no gene is in common.
    """
    ids = [without_version(gene) for gene in counts.ids]
    named = {"symbols": counts.symbols, "Ensembl ids": ids}
    if gene_map is not None:
        named["symbols by --gene_map"] = symbols_of(counts.ids, read_gene_map(gene_map))
    wanted = {without_version(gene) for gene in panel.genes}
    shared = {what: len(wanted & set(names)) for what, names in named.items()}
    best = max(shared, key=lambda what: shared[what])
    if shared[best] == 0:
        raise ValueError(_nothing_in_common(counts, panel))
    notes = []
    panel_is_ensembl = np.mean([is_ensembl(gene) for gene in panel.genes]) > 0.5
    if best != "symbols" or counts.symbols == counts.ids:
        notes.append(f"genes are matched by {best}: the panel lists {'Ensembl ids' if panel_is_ensembl else 'symbols'}")
    # The panel's own spelling, which may carry versions.
    spelling = {without_version(gene): gene for gene in panel.genes}
    return [spelling.get(gene, gene) for gene in named[best]], notes


def _nothing_in_common(counts: GeneCounts, panel: TrainingPanel) -> str:
    message = (
        f"No gene of the panel ({panel.source}: {some(panel.genes, 3)}) is in {counts.path} "
        f"(symbols {some(counts.symbols, 3)}; ids {some(counts.ids, 3)}). "
    )
    upper = {gene.upper() for gene in panel.genes} & {gene.upper() for gene in counts.symbols}
    if upper:
        return (
            message + f"{len(upper)} symbols differ only in upper and lower case: the slide may be of another species."
        )
    if all(is_ensembl(gene) for gene in counts.symbols[:100]) != all(is_ensembl(gene) for gene in panel.genes[:100]):
        return message + (
            "One lists Ensembl ids, the other symbols, and this file does not have both. Give a table with both: "
            "--gene_map FILE (a features.tsv.gz of any Space Ranger output)."
        )
    return message + "They are of different species or assays; choose another --panel."


def duplicate_notes(names: Sequence[str]) -> list[str]:
    """What became of genes that share a name."""
    index = pd.Index(names)
    twice = index[index.duplicated()].unique().tolist()
    return [f"{len(twice)} names belong to several genes, whose counts are added up: {some(twice)}"] if twice else []


def slide_counts(output: SpaceRangerOutput, names: Sequence[str], panel: Sequence[str]) -> AnnData:
    """Counts of the spots under tissue by "XxY" ids; genes of one name added up, genes without any count left out
    unless the panel has them (measured and zero is not the same as not measured)."""
    counts, positions = output.counts, output.positions
    place = pd.Index(counts.barcodes).get_indexer(positions.ids)
    if (place < 0).all():
        raise ValueError(
            f"No barcode of {output.positions_path} ({some(positions.ids, 2)}) is in {counts.path} "
            f"({some(counts.barcodes, 2)}). They are of different slides."
        )
    found = place >= 0
    ids = [name for name, is_found in zip(spot_ids(*positions.grid.T), found) if is_found]
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
    """x = array_col, y = array_row, and pixels in the order (x, y): Space Ranger lists rows first."""
    positions = output.positions
    table = pd.DataFrame(
        {
            "x": positions.grid[:, 0],
            "y": positions.grid[:, 1],
            "pixel_x": positions.pixels[:, 0],
            "pixel_y": positions.pixels[:, 1],
            "barcode": positions.ids,
        }
    )
    return check_spots(table, str(output.positions_path))


def pixel_note(microns: float | None, output: SpaceRangerOutput) -> str:
    if microns is None:
        return "the size of a pixel is unknown: too few spots, and no spot_diameter_fullres"
    pitch = output.scale_factors.get("bin_size_um", PITCH_UM)
    return f"{microns:.4f} um per pixel ({pitch / microns:.1f} px between neighbors, which are {pitch:g} um apart)"


def write_match(layout: Layout, panel: TrainingPanel) -> list[str]:
    """Write the panel genes that every slide of the set has, and their indices into the panel; returns the report."""
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
    """The commands that lead to the test; for a run they make features as it was trained on."""
    run_path = "RUN" if panel.trained is None else panel.source
    for kind in ("target", "neighbor"):
        say(f"Next: {next_extraction(layout, panel, kind)}")
    say(
        f"Then: python main.py --mode external_test --test_name {layout.name} --model_path {run_path} "
        f"--data_dir {layout.data_dir}"
    )


def next_extraction(layout: Layout, panel: TrainingPanel, kind: str) -> str:
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


def training_panel(
    data_dir: Path, name: str, panel: Path | None, training_type: str | None, model_path: Path | None
) -> TrainingPanel:
    """The panel that the flags mean: a file, the genes file of a data set, or the genes of a run's checkpoints.

    The clean protocol gives every fold a panel of its own; then it is the genes of any fold, in order of appearance.
    """
    if panel is not None and model_path is not None:
        raise ValueError("--panel and --model_path are both given; give the one that holds the genes of the model.")
    if model_path is not None:
        return _panel_of_run(model_path)
    training_type = training_type or (SPECS[name].training_type if name in SPECS else None)
    if panel is not None:
        return TrainingPanel(_read_panel(panel), str(panel), training_type)
    if training_type is None:
        raise ValueError(
            "The genes that the models predict are not known. Give --training_type TYPE (her2st, skinst, ...; its panel in "
            "--data_dir), --panel FILE, or --model_path RUN."
        )
    path = Layout(data_dir, DatasetSpec(name=training_type)).panel_path
    require_file(path, f"Prepare {training_type} first, or give the panel with --panel FILE or --model_path RUN.")
    return TrainingPanel(load_names(path), str(path), training_type)


def _read_panel(path: Path) -> list[str]:
    if path.suffix == ".npy":
        return load_names(path)
    lines = require_file(path, "--panel should be a .npy array of names or a text file, one gene a line.")
    genes = [line.strip() for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not genes or len(set(genes)) < len(genes):
        raise ValueError(
            f"{path} should hold distinct gene names, one a line; found {len(genes)}, {len(set(genes))} distinct."
        )
    return genes


def _panel_of_run(model_path: Path) -> TrainingPanel:
    paths, notes = chosen_checkpoints(model_path)
    for note in notes:
        say(note)
    folds = [load_checkpoint(path, memory_map=True) for path in paths]
    genes = list(dict.fromkeys(gene for fold in folds for gene in fold.genes))
    data = folds[0].config.DATA
    return TrainingPanel(genes, str(model_path), data.type, data, folds[0].config_name)


def build_parser() -> argparse.ArgumentParser:
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
