"""One simulated slide: a section, its picture, the spots on it and their counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.ndimage import map_coordinates, uniform_filter

from preprocess.simulation.genes import GeneModel, draw_counts, expected_counts
from preprocess.simulation.staining import draw_stain, render
from preprocess.simulation.tissue import BACKGROUND, MARGIN, Section, generator, simulate_section

FIRST_GRID_POSITION = (4, 6)  # x, y; the arrays of real sections do not start at zero either
LISTED_WITHOUT_COUNTS = 3  # spots of the table that have no counts, as real tables hold a few
ARRAY_ERROR = 0.015  # standard deviation of the place of a spot, in pitches


@dataclass(frozen=True)
class Slide:
    """A simulated slide.

    picture: (height, width, 3) uint8.
    means:   (N, G) float64, expected counts in the order of `counts`: what an oracle knows. Never written to a file.
    counts:  spots x genes, the N spots on tissue, int64.
    spots:   the spot table of the public format, which lists a few spots more.
    """

    name: str
    patient: str
    section: Section
    picture: np.ndarray
    means: np.ndarray
    counts: pd.DataFrame
    spots: pd.DataFrame


def simulate_slide(
    model: GeneModel,
    *,
    seed: int,
    patient: str,
    name: str,
    grid: tuple[int, int],
    pitch: int,
    origin: str | None = None,
    stain_spread: float = 1.0,
) -> Slide:
    """Simulate one slide; the same arguments give the same slide.

    grid: columns and rows of the array of spots; pitch: px between two of them.
    origin: whose regions, stain and expression the slide shares, by default those of its patient.
    stain_spread: how far the stain of an origin lies from the usual one, 1 for the training patients.
    """
    origin = origin or patient
    width, height = (round((count - 1 + 2 * MARGIN) * pitch) for count in grid)
    section = simulate_section(seed, origin, name, (height, width), pitch)
    stain = draw_stain(seed, origin, name, stain_spread)
    picture = render(section, stain, generator(seed, origin, name, "picture"))
    spots = lay_spots(generator(seed, origin, name, "spots"), section, grid)
    is_measured = spots.pop("is_measured").to_numpy()
    centers = spots.loc[is_measured, ["pixel_x", "pixel_y"]].to_numpy()
    means = expected_counts(model, section, centers, seed=seed, patient=origin, slide=name)
    ids = [f"{x}x{y}" for x, y in spots.loc[is_measured, ["x", "y"]].to_numpy()]
    drawn = draw_counts(means, generator(seed, origin, name, "counts"))
    return Slide(name, patient, section, picture, means, pd.DataFrame(drawn, ids, list(model.genes)), spots)


def lay_spots(random: np.random.Generator, section: Section, grid: tuple[int, int]) -> pd.DataFrame:
    """The spot table: the places of the array on tissue, and the next few at its edge with is_measured False."""
    columns, rows = grid
    row, column = (index.ravel() for index in np.mgrid[0:rows, 0:columns])
    shift = random.normal(0.0, ARRAY_ERROR, (2, rows * columns)).clip(-0.05, 0.05)
    pixel = (np.stack([column, row]) + MARGIN + shift) * section.pitch
    covered = uniform_filter((section.region != BACKGROUND).astype(np.float32), section.pitch)
    share = map_coordinates(covered, pixel[::-1], order=1)
    is_measured = share >= 0.5
    num_listed = int(is_measured.sum()) + LISTED_WITHOUT_COUNTS
    listed = np.sort(np.argsort(-share, kind="stable")[:num_listed])
    left, top = FIRST_GRID_POSITION
    table = {
        "x": column + left,
        "y": row + top,
        "new_x": np.round(column + left + shift[0], 3),
        "new_y": np.round(row + top + shift[1], 3),
        "pixel_x": np.round(pixel[0], 2),
        "pixel_y": np.round(pixel[1], 2),
        "selected": 1,
        "is_measured": is_measured,
    }
    return pd.DataFrame(table).iloc[listed].reset_index(drop=True)
