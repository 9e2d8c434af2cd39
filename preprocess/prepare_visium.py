"""Bring 10x Visium and Visium HD into the documented layout: a training set of one's own, or an external test set.

    python preprocess/prepare_visium.py --samples samples.csv --name mine
    python preprocess/prepare_visium.py --samples samples.csv --name theirs --test --model_path logs/her2st/dml/exp_0
    python preprocess/prepare_visium.py --source OUTS --image FULLRES --name one_slide --model_path logs/her2st/dml/exp_0

samples.csv has the columns sample,patient,outs,image and one row a section: OUTS is Space Ranger's outs/ of any version,
FULLRES the image that was its input. A training set is data/NAME/ with patients as the sheet has them, an external set
(--test, and always with --source) is data/test/NAME/. Sections can be added later. Both follow the internal convention: x
is array_col, y is array_row. Neighboring columns of a row differ by 2 on the hexagonal array of Visium, so the 3 x 3
smoothing of the targets covers a spot and its four neighbors in the rows above and below, but not the two beside it in
its own row; the published external sets are treated the same way. Bins of Visium HD are added up to squares (--bin_um).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse
from functools import partial

import pandas as pd

from datasets.tables.spot_table import check_spots
from preprocess.raw.own_set import Section, SectionData, add_flags, own_set, prepare_sections
from preprocess.raw.prepare import source_folder
from preprocess.raw.sample_sheet import FORM, read_sample_sheet
from preprocess.raw.space_ranger.bins import BIN_UM
from preprocess.raw.space_ranger.output import SpaceRangerOutput, fitted_pitch, microns_per_pixel
from preprocess.raw.space_ranger.outs import CONTENTS, check_full_resolution, read_outs
from utils.cli import run
from utils.files import require_file, safe_name


def read_section(source: Path, image: Path, bin_um: float | None) -> SectionData:
    """Read one section of Space Ranger; errors as in `read_outs`, and ValueError if the image is not its input."""
    output = read_outs(source_folder(source, CONTENTS), bin_um)
    require_file(image, "--image should be the full-resolution image that was the input of Space Ranger.")
    unchecked = check_full_resolution(output.scale_factors, output.smaller, output.folder, image)
    microns = microns_per_pixel(output)
    return SectionData(
        counts=output.counts,
        spots=spot_table(output),
        positions_path=output.positions_path,
        microns=microns,
        notes=[*output.notes, pixel_note(microns, output), *unchecked],
    )


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
        return "the size of a pixel is unknown: neither scale factors, names of spots nor the array tell it"
    pitch = fitted_pitch(output.scale_factors, output.grid, output.positions.pixels)
    apart = "" if pitch is None else (
        f" ({pitch.microns / microns:.1f} px between neighbors, which are {pitch.microns:g} um apart)"
    )  # fmt: skip
    return f"{microns:.4f} um per pixel{apart}"


def sections_of(given: argparse.Namespace) -> list[Section]:
    """List the sections that the flags mean. Raises ValueError where they mean none or two things, or as the sheet does."""
    if given.samples is not None:
        both = [flag for flag in ("source", "image", "sample") if getattr(given, flag) is not None]
        if both:
            raise ValueError(f"--samples and --{both[0]} are both given; the sheet names every section.")
        rows = read_sample_sheet(given.samples, for_training=not given.test)
        return [
            Section(row.sample, row.patient, row.image, partial(read_section, row.outs, row.image, given.bin_um))
            for row in rows
        ]
    if given.source is None or given.image is None:
        raise ValueError(f"Give --samples FILE, {FORM}; or --source OUTS and --image FULLRES of one external slide.")
    slide = safe_name(given.sample or given.name, "Sample")
    return [Section(slide, None, given.image, partial(read_section, given.source, given.image, given.bin_um))]


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, help=FORM)
    parser.add_argument("--source", type=Path, help=f"of one external slide: {CONTENTS}")
    parser.add_argument("--image", type=Path, help="of one external slide: the full-resolution image")
    parser.add_argument("--sample", help="of one external slide: its name (default: that of the set)")
    parser.add_argument(
        "--bin_um", type=float, help=f"Visium HD: side of the squares that bins are added up to (default: {BIN_UM:g})"
    )
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the command line (of this process by default) and prepare."""
    given = build_parser().parse_args(argv)
    sections = sections_of(given)
    prepare_sections(own_set(given, is_external=given.test or given.samples is None), sections)


if __name__ == "__main__":
    run(main)
