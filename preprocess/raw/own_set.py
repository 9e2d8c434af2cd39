"""Sections of one's own, of Space Ranger or any AnnData, made a training set or an external one.

data/<name>/ or data/test/<name>/ follows the internal convention: x is array_col, y is array_row. Sections prepared before
stay in the set; what they are is in its dataset.yaml, which is written after every section.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec, read_spec, write_spec
from datasets.tables.counts import gene_names
from datasets.tables.genes_in_common import WHERE, genes_in_common
from preprocess.raw.gene_map import with_genes
from preprocess.raw.next_commands import say_next_of_external, say_next_of_training
from preprocess.raw.prepare import Options, Prepared, RawSlide, place_slide, tell, verify
from preprocess.raw.space_ranger.matrices import GeneCounts
from preprocess.raw.training_panel import TrainingPanel, choose_names, training_panel
from utils.cli import progress
from utils.files import safe_name, write_atomically, write_text
from utils.text import some

IMAGE_PATTERN = "{slide}/*"


@dataclass(frozen=True)
class SectionData:
    """What the source of a section holds.

    counts: rows are barcodes.  spots: checked table indexed by id, with a column `barcode`.  positions_path: where they are
    from.  microns: of a pixel, None if not known.  notes: what the report should say.
    """

    counts: GeneCounts
    spots: pd.DataFrame
    positions_path: Path
    microns: float | None
    notes: list[str]


@dataclass(frozen=True)
class Section:
    """One section: name, patient (None: it is one of its own), image, and how the rest is read when its turn comes."""

    slide: str
    patient: str | None
    image: Path
    read: Callable[[], SectionData]


@dataclass(frozen=True)
class OwnSet:
    """The set that sections go to. panel: genes of the models that an external set is for; empty where none is named.

    gene_map: table of Ensembl ids and symbols, for a source that has only one of them.
    """

    name: str
    data_dir: Path
    is_external: bool
    panel: TrainingPanel
    gene_map: Path | None
    overwrite: bool
    link: bool


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say what becomes of sections; `own_set` reads them."""
    parser.add_argument("--name", required=True, help="name of the set, its folder below --data_dir")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
    parser.add_argument("--test", action="store_true", help="make an external test set, below <data_dir>/test")
    parser.add_argument("--training_type", help="external set: data set whose models will be tested")
    parser.add_argument(
        "--panel", type=Path, help="external set: genes of the models, .npy, or text with one gene a line"
    )
    parser.add_argument(
        "--model_path", type=Path, help="external set: run that will be tested; its genes are the panel"
    )
    parser.add_argument("--gene_map", type=Path, help="table of Ensembl ids and symbols")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    parser.add_argument("--link", action="store_true", help="link images instead of copying them")


def own_set(given: argparse.Namespace, *, is_external: bool) -> OwnSet:
    """Take what the flags of `add_flags` mean.

    Raises ValueError for flags of an external set where a training set is made, for a name that cannot be one, and as
    `training_panel`.
    """
    unread = [flag for flag in ("training_type", "panel", "model_path") if getattr(given, flag) is not None]
    if unread and not is_external:
        raise ValueError(
            f"--{unread[0]} is for an external set (--test). A training set needs no panel: each fold chooses its own, and "
            "preprocess/select_genes.py makes one for --protocol paper."
        )
    name = safe_name(given.name, "Data set")
    if name in SPECS and not is_external:
        raise ValueError(
            f"--name {name} is the name of another data set; choose one of your own, for example my_{name}."
        )
    panel = training_panel(given.data_dir, name, given.panel, given.training_type, given.model_path)
    return OwnSet(name, given.data_dir, is_external, panel, given.gene_map, given.overwrite, given.link)


def prepare_sections(own: OwnSet, sections: Sequence[Section]) -> list[Prepared]:
    """Prepare sections one after the other, so that only one is held in memory; report, and say what comes next.

    Raises ValueError / FileNotFoundError before anything of a section is written if its files do not fit; of several
    sections all problems at once, when the good ones are on disk.
    """
    before = _spec_before(own)
    _extended(before, own, sections)  # nothing is read while the patients of some contradict what is there
    sizes = dict(before.microns_per_pixel) if isinstance(before.microns_per_pixel, Mapping) else {}
    placed: list[Section] = []
    prepared: list[Prepared] = []
    problems: list[Exception] = []
    for section in progress(sections, description=f"preparing {own.name}", unit="section"):
        layout = Layout(own.data_dir, _extended(before, own, [*placed, section]))
        try:
            prepared.append(_place(layout, section, own, sizes))
        except (ValueError, FileNotFoundError) as error:
            problems.append(error)
            continue
        placed.append(section)
        spec = dataclasses.replace(_extended(before, own, placed), microns_per_pixel=sizes or None)
        write_spec(layout.spec_path, spec)
    if problems and len(sections) == 1:
        raise problems[0]
    if problems:
        raise ValueError("\n".join(f"{error}" for error in problems))
    layout = Layout(own.data_dir, spec)
    if own.panel.genes:
        prepared[-1].notes += write_match(layout, own.panel)
    verify(layout, prepared)
    tell(Layout(own.data_dir, dataclasses.replace(spec, slides=())), prepared)
    if own.is_external:
        say_next_of_external(layout, own.panel)
    else:
        say_next_of_training(layout, len(_genes_in_common(layout)))
    return prepared


def _spec_before(own: OwnSet) -> DatasetSpec:
    """The set's description as sections prepared before have left it. ValueError for a set of another origin."""
    spec = DatasetSpec(name=own.name, image_pattern=IMAGE_PATTERN, external=own.is_external)
    other = Layout(own.data_dir, dataclasses.replace(spec, external=not own.is_external)).spec_path
    if other.is_file():
        kinds = ("an external set", "a training set")
        raise ValueError(f"{other} describes {kinds[own.is_external]} of this name. Choose another --name.")
    path = Layout(own.data_dir, spec).spec_path
    if path.is_file():
        spec = read_spec(path, name=own.name, external=own.is_external)
        if spec.image_pattern != IMAGE_PATTERN or spec.exchanged_pixels:
            raise ValueError(f"{path} describes a set that this script has not made. Choose another --name.")
    elif (path.parent / "ST-cnts").is_dir():
        raise ValueError(
            f"{path.parent} holds counts but no {path.name}: a set of another origin, perhaps the published one with its "
            "exchanged pixel columns. Choose another --name, or move it away."
        )
    return spec


def _extended(before: DatasetSpec, own: OwnSet, sections: Sequence[Section]) -> DatasetSpec:
    """The description with more sections. ValueError where one of them had another patient, without --overwrite."""
    patients = dict(before.patient_of_slide)
    for section in sections:
        there = patients.get(section.slide)
        if there is not None and section.patient is not None and there != section.patient and not own.overwrite:
            raise ValueError(
                f"{Layout(own.data_dir, before).spec_path} says that {section.slide} is of patient {there}, not of "
                f"{section.patient}. Correct one of the two, or use another name for the section."
            )
        if section.patient is not None:
            patients[section.slide] = section.patient
    slides = () if own.is_external else tuple(sorted({*before.slides, *(section.slide for section in sections)}))
    if patients and before.patient_pattern is None:  # whoever names some has to name all
        patients = {slide: slide for slide in slides} | patients
    return dataclasses.replace(
        before,
        patient_of_slide=dict(sorted(patients.items())),
        slides=slides,
        training_type=own.panel.type or before.training_type,
    )


def _place(layout: Layout, section: Section, own: OwnSet, sizes: dict[str, float]) -> Prepared:
    """Read one section and write it; its size of a pixel goes into `sizes`."""
    raw, microns, notes = _read(section, own)
    options = Options(overwrite=own.overwrite, link=own.link, num_genes=0)
    with _described(layout):
        joined, prepared = place_slide(layout, raw, options)
    assert joined.n_obs == prepared.spots
    prepared.notes += notes
    sizes.pop(section.slide, None)  # of an earlier preparation
    if microns is not None:
        sizes[section.slide] = microns
    return prepared


@contextmanager
def _described(layout: Layout) -> Iterator[None]:
    """Write the description before the first counts, which without one are taken for a set of another origin.

    It goes again where a section is refused before anything of it is written, so that what it says does not bind the next
    command.
    """
    is_first = not layout.spec_path.is_file()
    if is_first:
        write_spec(layout.spec_path, layout.spec)
    try:
        yield
    except (ValueError, FileNotFoundError):
        if is_first and not layout.counts_dir.exists():
            layout.spec_path.unlink()
        raise


def _read(section: Section, own: OwnSet) -> tuple[RawSlide, float | None, list[str]]:
    """The section as what is placed, its size of a pixel, and notes; the source's own matrix is let go."""
    data = section.read()
    names, notes = choose_names(data.counts, own.panel, own.gene_map)
    notes += data.notes + duplicate_notes(names)
    notes += [f"left out, as they are no genes: {n} features {kind!r}" for kind, n in data.counts.left_out.items()]
    paths = dict.fromkeys((data.counts.path, data.positions_path))
    raw = RawSlide(
        name=section.slide,
        counts=section_counts(data, names),
        spots=data.spots,
        source=" and ".join(map(str, paths)),
        image=section.image,
    )
    return raw, data.microns, notes


def section_counts(data: SectionData, names: Sequence[str]) -> AnnData:
    """Take the counts of the spots by "XxY" ids; genes of one name are added up.

    names: of the columns of the counts. Genes without any count stay: measured and zero is not the same as not measured, and
    the next section may come with another panel.
    Raises ValueError naming both files if they share no barcode, or a sum is no count.
    """
    counts, barcodes = data.counts, data.spots["barcode"]
    place = pd.Index(counts.barcodes).get_indexer(pd.Index(barcodes))
    if (place < 0).all():
        raise ValueError(
            f"No barcode of {data.positions_path} ({some(barcodes.tolist(), 2)}) is in {counts.path} "
            f"({some(counts.barcodes, 2)}). They are of different slides."
        )
    found = place >= 0
    is_in_order = np.array_equal(place, np.arange(counts.matrix.shape[0]))
    raw = AnnData(
        counts.matrix if is_in_order else counts.matrix[place[found]],
        obs=pd.DataFrame(index=data.spots.index[found]),
        var=pd.DataFrame(index=[str(i) for i in range(len(names))]),
    )
    return with_genes(raw, names, sorted(set(names)), str(counts.path))


def duplicate_notes(names: Sequence[str]) -> list[str]:
    """Say what became of genes that share a name."""
    index = pd.Index(names)
    twice = index[index.duplicated()].unique().tolist()
    return [f"{len(twice)} names belong to several genes, whose counts are added up: {some(twice)}"] if twice else []


def _genes_in_common(layout: Layout) -> list[str]:
    """The genes that every section of the set has. Raises ValueError, as `genes_in_common`, if there is none."""
    measured = {slide: gene_names(layout.counts_path(slide)) for slide in layout.slides_with_counts()}
    remedy = (
        f"Keep the counts of those with Ensembl ids elsewhere, and prepare them again with --gene_map FILE, {WHERE}."
    )
    return genes_in_common(measured, remedy=remedy)


def write_match(layout: Layout, panel: TrainingPanel) -> list[str]:
    """Write the panel genes that every slide of the set has, and their indices into the panel.

    returns: sentences for the report. Raises ValueError if no gene is in all slides.
    """
    slides, measured = layout.slides_with_counts(), set(_genes_in_common(layout))
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
