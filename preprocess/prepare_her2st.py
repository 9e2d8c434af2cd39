"""Bring the public HER2ST download into the documented layout.

    python preprocess/prepare_her2st.py --source RAW --data_dir data

RAW is the download (github.com/almaan/her2st or Zenodo 4751624): a folder with ST-cnts/A1.tsv.gz,
ST-spotfiles/A1_selection.tsv and ST-imgs/A/A1/*.jpg, or one that holds them in data/. Counts keep every gene; the panel
genes_her2st.npy is that of the paper (highest mean expression over all slides). Pathologist's labels are copied too.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

from datasets.known_sets import SPECS
from datasets.layout import IMAGE_SUFFIXES, Layout
from datasets.tables.counts import read_counts
from datasets.tables.slide_table import read_both
from datasets.tables.spot_table import read_spots
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
from utils.text import some

CONTENTS = "the HER2ST download: ST-cnts/, ST-spotfiles/ and ST-imgs/, or data/ with them"


def prepare_her2st(source: Path, data_dir: Path, options: Options, slides: str | None = None) -> list[Prepared]:
    """Prepare `slides` ("A1,B2"; None = all that the source has counts for). See `preprocess.raw.prepare.prepare`."""
    source = source_folder(source, CONTENTS)
    folder = next((f for f in (source, source / "data") if (f / "ST-cnts").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{source} holds neither ST-cnts nor data/ST-cnts. Expected {CONTENTS}.")
    spec = SPECS["her2st"]
    raw = Layout(folder, spec, root=folder)
    found = raw.slides_with_counts()
    strangers = [name for name in found if name not in spec.slides]
    if strangers:
        say(f"Left out, as they are no slides of her2st: {some(strangers, 12)}.")
    found = [name for name in found if name in spec.slides]
    names = chosen_slides(found, slides, raw.counts_dir, of=spec.name, contents=CONTENTS)
    target = Layout(data_dir, spec)
    return prepare(target, names, lambda name: read_slide(raw, target, name), options, is_all=slides is None)


def read_slide(raw: Layout, target: Layout, name: str) -> RawSlide:
    """Read one slide of the download, which already lies in folders like ours."""
    patient = raw.spec.patient_of(name)
    folder = raw.images_dir / patient / name
    images = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if len(images) > 1:
        raise ValueError(f"Slide {name}: {folder} holds {len(images)} images, expected one: {some(images)}.")
    labels = raw.labels_dir / f"{name}_labeled_coordinates.tsv"
    counts_path, spots_path = raw.counts_path(name), raw.spots_path(name)
    counts, spots = read_both(name, lambda: read_counts(counts_path), lambda: read_spots(spots_path))
    return RawSlide(
        name=name,
        counts=counts,
        spots=spots,
        source=f"{counts_path} and {spots_path}",
        spots_file=spots_path,
        image=images[0] if images else None,
        extra={target.labels_dir / labels.name: labels} if labels.is_file() else {},
    )


def main() -> None:
    """Read the command line and prepare."""
    arguments = parser(__doc__, source=CONTENTS)
    arguments.add_argument("--slides", help="only these, for example A1,B2 (default: all)")
    given = arguments.parse_args()
    prepare_her2st(given.source, given.data_dir, options_of(given), given.slides)


if __name__ == "__main__":
    run(main)
