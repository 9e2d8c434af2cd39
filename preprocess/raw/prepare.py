"""What the preparing scripts share: raw slides in, the documented layout out, checked, with a report.

Nothing on disk is replaced without --overwrite: a file that is there already must hold what would be written, or the
script stops and says so. Every file is written whole or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from anndata import AnnData

from datasets.images.overlay import compare_with_image
from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.tables.expression import empty_spots, genes_by_mean, spot_totals
from datasets.tables.genes_in_common import IN_TABLES, genes_in_common
from datasets.tables.slide_table import join, load_slide
from datasets.tables.spot_table import check_inside
from preprocess.raw.files import image_size, place_file, write_counts, write_spots
from preprocess.raw.panels import write_panel
from utils.cli import progress, say
from utils.files import load_names
from utils.locks import sweep
from utils.text import some


@dataclass
class RawSlide:
    """One slide as its source has it.

    counts: raw counts, spots x genes.  spots: checked table indexed by id.  source: where both are from, for messages.
    spots_file: the original of the table when it can be copied as it is.  image: None = the source has none; image_name:
    its name here when not its own.  write_patches: given the checked slide, writes the patches that the source has in
    place of an image.  extra: further files, target -> source.  notes: what the report should say of it.  Files of the
    source may be compressed (.gz).
    """

    name: str
    counts: AnnData
    spots: pd.DataFrame
    source: str
    spots_file: Path | None = None
    image: Path | None = None
    image_name: str | None = None
    write_patches: Callable[[AnnData], None] | None = None
    extra: dict[Path, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How files are placed: link instead of copying images, replace what differs, size of the panel (0: none)."""

    overwrite: bool = False
    link: bool = False
    num_genes: int = 250


@dataclass
class Prepared:
    """What became of one slide, for the report."""

    name: str
    patient: str
    spots: int
    genes: int
    spots_without_counts: int
    counts_without_spot: int
    image: str
    notes: list[str] = field(default_factory=list)


def parser(description: str, *, source: str) -> argparse.ArgumentParser:
    """Declare the flags of every preparing script; `source` describes what --source must be."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--source", type=Path, required=True, help=source)
    result.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
    result.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    result.add_argument("--link", action="store_true", help="link images instead of copying them")
    result.add_argument("--num_genes", type=int, default=250, help="genes of the panel (default: 250; 0: no panel)")
    return result


def options_of(arguments: argparse.Namespace) -> Options:
    """Take the options from the flags of `parser`."""
    return Options(overwrite=arguments.overwrite, link=arguments.link, num_genes=arguments.num_genes)


def source_folder(source: Path, contents: str) -> Path:
    """`source` if it is a folder; FileNotFoundError telling what it should hold otherwise."""
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source} is not a folder. Expected {contents}.")
    return source


def chosen_slides(
    found: Sequence[str], wanted: str | None, where: Path, *, of: str, contents: str, flag: str = "--slides"
) -> list[str]:
    """Choose the slides of `--slides A,B` (all without it), sorted; ValueError for one that the source does not have.

    of, contents: the data set, and what its source should hold; FileNotFoundError with both if nothing was found.
    """
    if not found:
        raise FileNotFoundError(f"No slide of {of} was found in {where}. Expected {contents}.")
    if wanted is None:
        return sorted(found)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    absent = [name for name in names if name not in found]
    if absent or not names:
        raise ValueError(
            f"{flag} {wanted}: {some(absent) or 'nothing'} is not in {where}; found {some(sorted(found), 12)}."
        )
    return sorted(set(names))


def prepare(
    layout: Layout,
    names: Sequence[str],
    read: Callable[[str], RawSlide],
    options: Options,
    *,
    is_all: bool = True,
    remedy: str = IN_TABLES,
) -> list[Prepared]:
    """Bring raw slides into the documented layout, choose the panel, verify what was written, and report.

    read: gives one raw slide; called once a slide, so that only one is held in memory.  is_all: whether all slides of the
    source are asked for, and not only those of --slides.  remedy: against Ensembl ids on some slides and symbols on others.
    Raises ValueError collecting what is wrong with every slide; the good ones are on disk by then. If none is wrong, it is
    raised for too few genes in common, as `genes_in_common` does.
    """
    assert names, "chosen_slides gives at least one"
    prepared: list[Prepared] = []
    genes: dict[str, list[str]] = {}
    problems: list[str] = []

    def placed() -> Iterator[AnnData]:
        for name in progress(names, description=f"preparing {layout.name}", unit="slide"):
            try:
                slide, report = place_slide(layout, read(name), options)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
                continue
            prepared.append(report)
            genes[name] = slide.var_names.tolist()
            yield slide

    if options.num_genes:
        ranked = genes_by_mean(placed())
        if not problems:
            names = [slide.name for slide in prepared]
            genes_in_common(genes, options.num_genes, remedy=remedy)
            panel = sorted(ranked[: options.num_genes])
            say(write_panel(layout.panel_path, panel, overwrite=options.overwrite, method="mean", slides=names))
    else:
        for _ in placed():
            pass
    if problems:
        raise ValueError("\n".join(problems))
    verify(layout, prepared)
    tell(layout, prepared, is_all=is_all)
    return prepared


def place_slide(layout: Layout, raw: RawSlide, options: Options) -> tuple[AnnData, Prepared]:
    """Join and check one raw slide, write its counts, spot table and image.

    returns: the joined slide, and the report. Raises ValueError if the files do not fit together, the image is not that of
    the spots, or other files are there and --overwrite is not given.
    """
    patient = layout.spec.patient_of(raw.name)
    joined = join(raw.counts, raw.spots, layout.spec, f"Slide {raw.name}: {raw.source}")
    raw.counts = joined  # what the source held may be gigabytes, and is not needed any more
    joined.uns["slide"], joined.uns["patient"] = raw.name, patient
    if raw.image is not None:
        check_inside(joined, image_size(raw.image), raw.image)
    write_counts(layout.new_counts_path(raw.name), joined, overwrite=options.overwrite)
    if raw.spots_file is not None:
        place_file(raw.spots_file, layout.spots_path(raw.name), overwrite=options.overwrite)
    else:
        write_spots(layout.spots_path(raw.name), raw.spots, overwrite=options.overwrite)
    for target, origin in raw.extra.items():
        place_file(origin, target, overwrite=options.overwrite)
    image = "missing" if raw.image is None else place_image(layout, raw, raw.image, options)
    notes = [] if raw.image is None else compared_with_image(layout, joined)
    if raw.write_patches is not None:
        raw.write_patches(joined)
        image = "patches" if raw.image is None else f"{image}, patches"
    dropped = joined.uns["dropped"]
    return joined, Prepared(
        name=raw.name,
        patient=patient,
        spots=joined.n_obs,
        genes=joined.n_vars,
        spots_without_counts=len(dropped["spots_without_counts"]),
        counts_without_spot=len(dropped["counts_without_spot"]),
        image=image,
        notes=raw.notes + notes + left_out(joined),
    )


def compared_with_image(layout: Layout, slide: AnnData) -> list[str]:
    """Write the picture of a slide with its spots; a warning if they do not seem to belong together."""
    name, totals = slide.uns["slide"], spot_totals(slide.X)
    with open_slide(layout.image_path(name)) as image:
        problem = compare_with_image(image, slide.obsm["center"], totals, layout.overlay_path(name))
    return [f"WARNING: {problem}"] if problem else []


def left_out(slide: AnnData) -> list[str]:
    """Say which listed spots are not used, one sentence a reason."""
    without, not_selected = slide.uns["dropped"]["spots_without_counts"], slide.uns["not_selected"]
    notes = [f"without counts: {some(without)}"] if without else []
    return notes + ([f"{len(not_selected)} spots are marked selected = 0 and left out"] if not_selected else [])


def place_image(layout: Layout, raw: RawSlide, image: Path, options: Options) -> str:
    """Copy or link the image to the place that the spec's pattern finds; ValueError if another image is there."""
    name = raw.image_name or image.name.removesuffix(".gz")
    target = layout.images_dir / Path(layout.image_pattern(raw.name)).parent / name
    done = place_file(image, target, overwrite=options.overwrite, link=options.link)
    found = layout.image_path(raw.name)  # ValueError if another image is there as well
    assert found == target, f"{target} is not what {layout.image_pattern(raw.name)} finds: {found}"
    return done


def verify(layout: Layout, prepared: Sequence[Prepared]) -> None:
    """Read every slide back as training will, with the panel on disk, and note spots without any of its counts."""
    for folder in (layout.root, *(path for path in layout.root.iterdir() if path.is_dir())):
        sweep(folder)  # what a preparation that was killed has left
    panel = load_names(layout.panel_path) if layout.panel_path.exists() else None
    for slide in progress(prepared, description="verifying", unit="slide"):
        adata = load_slide(layout, slide.name, panel)
        assert adata.n_obs == slide.spots, f"{slide.name}: wrote {slide.spots} spots, read {adata.n_obs}"
        if panel is not None and (empty := empty_spots(adata.X)).any():
            ids = adata.obs_names[empty].tolist()
            slide.notes.append(f"no count of any panel gene, targets stay zero: {some(ids)}")


def tell(layout: Layout, prepared: Sequence[Prepared], *, is_all: bool = True) -> None:
    """Print the report: a table of slides, then what is missing, dropped or other than expected."""
    spec = layout.spec
    say(f"{'slide':<14}{'patient':<10}{'spots':>7}{'genes':>8}{'dropped':>9}  image")
    for slide in prepared:
        dropped = slide.spots_without_counts + slide.counts_without_spot
        say(f"{slide.name:<14}{slide.patient:<10}{slide.spots:>7}{slide.genes:>8}{dropped:>9}  {slide.image}")
    for slide in prepared:
        for note in slide.notes:
            say(f"{slide.name}: {note}")
    for sentence in findings(layout, prepared, is_all=is_all):
        say(sentence)
    patients = sorted({slide.patient for slide in prepared})
    say(
        f"{layout.root}: {len(prepared)} slides of {len(patients)} patients, {sum(slide.spots for slide in prepared)} "
        f"spots; {sum(slide.image != 'missing' for slide in prepared)} slides have an image."
    )
    if spec.slides and len(prepared) < len(spec.slides):
        say(f"Folds whose test patient has no slide will be skipped ({spec.fold_scheme}).")


def findings(layout: Layout, prepared: Sequence[Prepared], *, is_all: bool = True) -> list[str]:
    """Find what differs from what the data set is known to be, one sentence each."""
    spec, names, sentences = layout.spec, {slide.name for slide in prepared}, []
    absent = [slide for slide in spec.slides if slide not in names]
    if absent and not is_all:
        sentences.append(f"{len(names)} of {len(spec.slides)} slides were asked for and prepared.")
    elif absent:
        sentences.append(
            f"{len(absent)} of {len(spec.slides)} expected slides are not in the source: {some(absent, 12)}."
        )
    without_image = [slide.name for slide in prepared if slide.image == "missing"]
    if without_image:
        sentences.append(
            f"No image in the source for {len(without_image)} of {len(prepared)} slides: {some(without_image, 12)}. They count "
            "for the panel; training goes on with the others until images or features are there."
        )
    if spec.expected_spots:
        least, greatest = spec.expected_spots
        odd = [f"{slide.name} ({slide.spots})" for slide in prepared if not least <= slide.spots <= greatest]
        if odd:
            sentences.append(f"Spots outside the expected {least} to {greatest}: {some(odd, 12)}.")
    dropped = (
        sum(slide.spots_without_counts for slide in prepared),
        sum(slide.counts_without_spot for slide in prepared),
    )
    if any(dropped):
        sentences.append(f"Dropped: {dropped[0]} spots without counts, {dropped[1]} counts without a listed spot.")
    return sentences
