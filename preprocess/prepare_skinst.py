"""Bring the skin data set (GEO GSE144240, squamous cell carcinoma, Ji et al. 2020) into the documented layout.

    python preprocess/prepare_skinst.py --source RAW --data_dir data

RAW is the unpacked GSE144240_RAW.tar, files still compressed or not, in one folder or several:
*P2_ST_rep1_stdata.tsv (counts of the whole array), *spot*P2_ST_rep1.tsv (the spots on tissue), *P2_ST_rep1.jpg. Counts off
the tissue are dropped; every gene is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import re
from collections.abc import Sequence

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.tables.counts import read_counts
from datasets.tables.slide_table import read_both
from datasets.tables.spot_table import read_spots
from preprocess.raw.files import files_below, find_file, find_optional
from preprocess.raw.prepare import (
    Options,
    Prepared,
    RawSlide,
    chosen_slides,
    options_of,
    parser,
    prepare,
    source_folder,
)
from utils.cli import run

CONTENTS = "the files of GSE144240: *P2_ST_rep1_stdata.tsv, *spot*P2_ST_rep1.tsv and *P2_ST_rep1.jpg"


def prepare_skinst(source: Path, data_dir: Path, options: Options, slides: str | None = None) -> list[Prepared]:
    """Prepare `slides` (None = all that the source has counts for). See `preprocess.raw.prepare.prepare`."""
    files = files_below(source_folder(source, CONTENTS))
    spec = SPECS["skinst"]
    found = [s for s in spec.slides if any(re.fullmatch(counts_name(s), path.name) for path in files)]
    names = chosen_slides(found, slides, source, of=spec.name, contents=CONTENTS)
    return prepare(Layout(data_dir, spec), names, lambda name: read_slide(files, name), options, is_all=slides is None)


def counts_name(slide: str) -> str:
    """Spell the regular expression of the counts: the accession number may stand in front, the file may be compressed."""
    return rf"(.*[_-])?{slide}_stdata\.tsv(\.gz)?"


def read_slide(files: Sequence[Path], name: str) -> RawSlide:
    """Read one slide from among the files of the series."""
    counts_path = find_file(files, counts_name(name), f"Slide {name}, counts (*{name}_stdata.tsv)")
    # A series may have the spots of the whole array as well; the selection is what lies on tissue.
    selection = find_optional(files, rf".*spot.*selection.*[_-]{name}\.tsv(\.gz)?", f"Slide {name}")
    spots_path = selection or find_file(
        files, rf".*spot.*[_-]{name}\.tsv(\.gz)?", f"Slide {name}, spots on tissue (*spot*{name}.tsv)"
    )
    counts, spots = read_both(name, lambda: read_counts(counts_path), lambda: read_spots(spots_path))
    return RawSlide(
        name=name,
        counts=counts,
        spots=spots,
        source=f"{counts_path} and {spots_path}",
        spots_file=spots_path,
        image=find_optional(files, rf"(.*[_-])?{name}\.jpe?g(\.gz)?", f"Slide {name}, image"),
    )


def main() -> None:
    """Read the command line and prepare."""
    arguments = parser(__doc__, source=CONTENTS)
    arguments.add_argument("--slides", help="only these, for example P2_ST_rep1,P5_ST_rep2 (default: all)")
    given = arguments.parse_args()
    prepare_skinst(given.source, given.data_dir, options_of(given), given.slides)


if __name__ == "__main__":
    run(main)
