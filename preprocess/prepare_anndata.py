"""Bring slides of any AnnData file into the documented layout: a training set of one's own, or an external test set.

    python preprocess/prepare_anndata.py --source F.h5ad --image DIR --slide_column slide --patient_column patient --name mine
    python preprocess/prepare_anndata.py --source F.h5ad --image IMAGE --name theirs --test --model_path logs/her2st/dml/exp_0

Counts come from X, a layer (--layer) or raw (--raw); centres from obsm["spatial"], in pixels of the image; places on the
array from obs["array_row"] and obs["array_col"], else from the pixels. A file of several slides tells them apart by a
column of obs, and --image is then SLIDE=PATH for each of them, or a folder with an image of each slide's name. A training
set takes several patients: name their column, or prepare a file for each with --patient into the same set.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse
from collections.abc import Sequence
from functools import partial

from datasets.field_of_view import MOST_MICRONS
from datasets.images.slides import open_slide
from datasets.layout import IMAGE_SUFFIXES
from preprocess.raw.anndata_file import AnnDataFile, SlideInFile, find_slides, read_slide
from preprocess.raw.own_set import Section, SectionData, add_flags, own_set, prepare_sections
from preprocess.raw.space_ranger.output import pixel_size
from preprocess.raw.space_ranger.outs import check_full_resolution
from utils.cli import run
from utils.files import require_file, safe_name
from utils.text import some


def read_section(source: AnnDataFile, slide: SlideInFile, image: Path, microns: float | None) -> SectionData:
    """Read one slide; errors as in `read_slide`, and ValueError if the image contradicts a smaller one that the file keeps.

    microns: of a pixel, None for what file and image say.
    """
    content = read_slide(source, slide)
    notes = list(content.notes)
    notes += check_full_resolution(content.factors, content.smaller, source.path, image)
    if microns is None and content.factors:
        grid, pixels = (content.spots[list(names)].to_numpy() for names in (("x", "y"), ("pixel_x", "pixel_y")))
        microns = pixel_size(content.factors, grid, pixels, source.path)
    if microns is None:
        with open_slide(image) as opened:
            microns = opened.microns_per_pixel
    known = "unknown; give --mpp if you know it" if microns is None else f"{microns:.4f} um"
    notes.append(f"a pixel is {known}")
    return SectionData(content.counts, content.spots, source.path, microns, notes)


def sections_of(given: argparse.Namespace) -> list[Section]:
    """List the slides of the file with their images. Raises ValueError where one has none, or its patient is not known."""
    if given.layer is not None and given.raw:
        raise ValueError("--layer and --raw are both given; counts come from one of them.")
    if given.patient is not None and given.patient_column is not None:
        raise ValueError("--patient and --patient_column are both given; one of them says who the patients are.")
    if given.patient is None and given.patient_column is None and not given.test:
        raise ValueError(
            "Training leaves whole patients out: give --patient_column, the column of obs that names them, or --patient for a "
            "file of one. An external set (--test) does without."
        )
    source = AnnDataFile(
        given.source, given.layer, given.raw, given.gene_column, given.slide_column, given.patient_column
    )
    slides = find_slides(source)
    names = [safe_name(slide.name or given.sample or given.name, "Slide") for slide in slides]
    if given.mpp is not None and not 0 < given.mpp < MOST_MICRONS:
        raise ValueError(
            f"--mpp is micrometres per pixel, more than 0 and less than {MOST_MICRONS}, found {given.mpp:g}."
        )
    if given.sample is not None and given.slide_column is not None:
        raise ValueError("--sample names the only slide of a file, and --slide_column names several. Leave one out.")
    images = images_of(given.image, names, is_one=given.slide_column is None)
    return [
        Section(
            name,
            given.patient or slide.patient,
            images[name],
            partial(read_section, source, slide, images[name], given.mpp),
        )
        for name, slide in zip(names, slides, strict=True)
    ]


def images_of(words: Sequence[str], slides: Sequence[str], *, is_one: bool) -> dict[str, Path]:
    """Find the image of each slide: one file, SLIDE=PATH for each, or a folder with images of the slides' names.

    Raises FileNotFoundError / ValueError naming the slides that have none or several, and names that are no slide.
    """
    hint = "--image should be the image that obsm['spatial'] is in pixels of."
    if is_one:
        if len(words) != 1:
            raise ValueError(
                f"--image names {len(words)} images for a file of one slide. Has it several (--slide_column)?"
            )
        return {slides[0]: require_file(words[0], hint)}
    if len(words) == 1 and Path(words[0]).is_dir():
        files = [path for path in sorted(Path(words[0]).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        found = {slide: [path for path in files if path.stem == slide] for slide in slides}
        wrong = [slide for slide in slides if len(found[slide]) != 1]
        if wrong:
            raise ValueError(
                f"--image {words[0]} holds no image, or several, of the name of {some(wrong)}; it has "
                f"{some([path.name for path in files])}. Rename them, or give --image SLIDE=PATH for each."
            )
        return {slide: paths[0] for slide, paths in found.items()}
    pairs = dict(word.partition("=")[::2] for word in words)
    if len(pairs) < len(words):
        raise ValueError(f"--image names a slide twice: {some(list(words), 12)}. Give each one image.")
    absent, strange = [s for s in slides if not pairs.get(s)], [s for s in pairs if s not in slides]
    if absent or strange:
        raise ValueError(
            f"--image should be SLIDE=PATH for each of {some(slides, 12)}, or a folder; missing are {some(absent) or 'none'}, "
            f"no slides of the file are {some(strange) or 'none'}."
        )
    return {slide: require_file(pairs[slide], hint) for slide in slides}


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the file, .h5ad")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        required=True,
        help="the image; of several slides SLIDE=PATH, or a folder",
    )
    parser.add_argument("--layer", help="layer that holds the counts (default: X)")
    parser.add_argument("--raw", action="store_true", help="counts and genes are those of raw")
    parser.add_argument("--gene_column", help="column of var with the symbols (default: its index)")
    parser.add_argument("--slide_column", help="column of obs that tells slides apart (default: the file is one slide)")
    parser.add_argument("--sample", help="name of the only slide (default: that of the set)")
    parser.add_argument("--patient_column", help="column of obs that names the patient")
    parser.add_argument("--patient", help="patient of all slides of the file")
    parser.add_argument("--mpp", type=float, help="micrometres per pixel (default: of the file, else of the image)")
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the command line (of this process by default) and prepare."""
    given = build_parser().parse_args(argv)
    sections = sections_of(given)
    prepare_sections(own_set(given, is_external=given.test), sections)


if __name__ == "__main__":
    run(main)
