"""Bring the breast cancer data set of ST-Net (He et al. 2020, Mendeley 29ntw7sh4r) into the documented layout.

    python preprocess/prepare_stnet.py --source RAW --data_dir data --gene_map features.tsv.gz

RAW is the unpacked download: BC23287_C1_stdata.tsv.gz (counts of the whole array, Ensembl ids, genes without a count left
out), spots_BT23287_C1.csv (index "XxY", pixel columns X and Y, the spots on tissue), HE_BT23287_C1.jpg. The prefixes BT and
BC are used without a rule; here every slide is called BC..., as in the published splits. Genes that a section leaves out are
counted as zero, so that all sections have the same genes; ids that share a symbol are added up.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import re
from collections.abc import Sequence

import pandas as pd

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.tables.counts import gene_names, read_counts, round_ids
from datasets.tables.slide_table import read_both
from datasets.tables.spot_table import check_spots
from preprocess.raw.files import files_below, find_file, find_optional
from preprocess.raw.gene_map import WHERE, read_gene_map, symbols_of, with_genes
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
from utils.cli import run, say
from utils.files import reading
from utils.text import is_ensembl, some
from utils.untrusted.text import cells_of, text_of

CONTENTS = "the files of Mendeley 29ntw7sh4r: BC23287_C1_stdata.tsv.gz, spots_BT23287_C1.csv and HE_BT23287_C1.jpg"


def prepare_stnet(
    source: Path,
    data_dir: Path,
    options: Options,
    slides: str | None = None,
    gene_map: Path | None = None,
    keep_ensembl: bool = False,
) -> list[Prepared]:
    """Prepare `slides` (None = all that the source has counts for). See `preprocess.raw.prepare.prepare`.

    gene_map: table of Ensembl ids and symbols. keep_ensembl: go on with the ids as names where there is none.
    """
    files = files_below(source_folder(source, CONTENTS))
    spec = SPECS["stnet"]
    found = [slide for slide in spec.slides if any(re.fullmatch(counts_name(slide), path.name) for path in files)]
    names = chosen_slides(found, slides, source, of=spec.name, contents=CONTENTS)
    symbols = read_gene_map(gene_map) if gene_map else None
    genes = all_genes(files, names, symbols, keep_ensembl)
    return prepare(
        Layout(data_dir, spec),
        names,
        lambda name: read_slide(files, name, genes, symbols),
        options,
        is_all=slides is None,
    )


def counts_name(slide: str) -> str:
    """Spell the regular expression of the file of counts, which may be compressed."""
    return rf"B[CT]{slide[2:]}_stdata\.tsv(\.gz)?"


def all_genes(
    files: Sequence[Path], slides: Sequence[str], gene_map: dict[str, str] | None, keep_ensembl: bool
) -> list[str]:
    """List the genes of all sections together, as symbols, sorted. Raises ValueError if they are Ensembl ids without a map."""
    names: set[str] = set()
    for slide in slides:
        names |= set(gene_names(find_file(files, counts_name(slide), f"Slide {slide}, counts ({slide}_stdata.tsv.gz)")))
    genes = sorted(set(symbols_of(sorted(names), gene_map)))
    unmapped = [gene for gene in genes if is_ensembl(gene)]
    if unmapped and gene_map is None and not keep_ensembl:
        raise ValueError(
            f"{len(unmapped)} of {len(genes)} genes have Ensembl ids ({some(unmapped, 2)}). Give --gene_map FILE to have "
            f"symbols, {WHERE}. Or go on with the ids as names: --keep_ensembl."
        )
    if unmapped:
        say(f"{len(unmapped)} of {len(genes)} genes stay under their Ensembl id: {some(unmapped)}.")
    return genes


def read_slide(files: Sequence[Path], name: str, genes: Sequence[str], gene_map: dict[str, str] | None) -> RawSlide:
    """Read one section of the download, with the genes of all sections."""
    number = name[2:]
    counts_path = find_file(files, counts_name(name), f"Slide {name}, counts ({name}_stdata.tsv.gz)")
    spots_path = find_file(
        files, rf"spots_B[CT]{number}\.csv(\.gz)?", f"Slide {name}, spots on tissue (spots_{name}.csv)"
    )
    image = find_optional(files, rf"HE_B[CT]{number}\.(jpe?g|tiff?)(\.gz)?", f"Slide {name}, image")
    counts, spots = read_both(name, lambda: read_counts(counts_path), lambda: read_pixel_table(spots_path))
    return RawSlide(
        name=name,
        counts=with_genes(counts, symbols_of(counts.var_names, gene_map), genes, str(counts_path)),
        spots=spots,
        source=f"{counts_path} and {spots_path}",
        image=image,
        image_name=None if image is None else f"HE_{name}{Path(image.name.removesuffix('.gz')).suffix}",
    )


def read_pixel_table(path: Path) -> pd.DataFrame:
    """Read spots from `spots_*.csv`: index "XxY" (also "X10x13", as R makes names), columns X and Y in pixels of the image.

    returns: a spot table as `datasets.tables.slide_table.read_spots` gives it, for the errors, too.
    """
    with reading(path, "a table of spots"):
        table = cells_of(text_of(path), ",")
    if isinstance(table.index, pd.RangeIndex):  # R leaves out the name of the ids, and then they are the index already
        table = table.set_index(table.columns[0])
    columns = {str(name).strip().lower(): name for name in table.columns}
    if not {"x", "y"} <= set(columns):
        raise ValueError(
            f"{path}: expected an index of spot ids and the columns X and Y, found {some(list(table.columns))}."
        )
    ids, wrong = round_ids([str(spot).removeprefix("X") for spot in table.index])
    if wrong:
        raise ValueError(f"{path}: spot ids should look like '10x13', found {some(wrong)}.")
    grid = [spot.split("x") for spot in ids]
    spots = pd.DataFrame(
        {
            "x": [int(x) for x, _ in grid],
            "y": [int(y) for _, y in grid],
            "pixel_x": table[columns["x"]].to_numpy(),
            "pixel_y": table[columns["y"]].to_numpy(),
        }
    )
    return check_spots(spots, str(path))


def main() -> None:
    """Read the command line and prepare."""
    arguments = parser(__doc__, source=CONTENTS)
    arguments.add_argument("--slides", help="only these, for example BC23287_C1,BC23287_C2 (default: all)")
    arguments.add_argument(
        "--gene_map", type=Path, help="table of Ensembl ids and gene symbols (.tsv or .csv, also .gz)"
    )
    arguments.add_argument("--keep_ensembl", action="store_true", help="keep the Ensembl ids as names of the genes")
    given = arguments.parse_args()
    prepare_stnet(given.source, given.data_dir, options_of(given), given.slides, given.gene_map, given.keep_ensembl)


if __name__ == "__main__":
    run(main)
