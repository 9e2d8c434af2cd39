"""The array behind pixels: square and hexagonal, turned, stretched, with gaps; always one cell a spot."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.tables.array_grid import grid_of_pixels


def _array(kind: str, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Grid positions, and pixels 100 px apart."""
    y, x = (axis.ravel() for axis in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    if kind == "square":
        return np.stack([x, y], axis=1), np.stack([x * 100.0, y * 100.0], axis=1)
    doubled = 2 * x + y % 2
    return np.stack([doubled, y], axis=1), np.stack([doubled * 50.0, y * 100 * np.sqrt(0.75)], axis=1)


@pytest.mark.parametrize("kind", ["square", "hexagonal"])
@pytest.mark.parametrize(
    ("turn", "stretch", "missing"), [(0, 1, 0), (0.02, 1.03, 0.3), (-0.15, 1, 0.1), (0.3, 0.98, 0.2)]
)
def test_arrays_are_found_again(kind, turn, stretch, missing):
    random = np.random.default_rng(0)
    grid, pixels = _array(kind, 40, 30)
    keep = random.permutation(np.flatnonzero(random.random(len(grid)) >= missing))
    grid, pixels = grid[keep], pixels[keep] * [1, stretch]
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    found = grid_of_pixels(pixels @ rotation + random.normal(0, 3, pixels.shape) + (700, 400))
    difference = found.grid - grid
    assert found.kind == kind and found.moved == 0 and found.pitch_px == pytest.approx(97, abs=4)
    assert (difference == difference[0]).all() and found.grid.min() == 0


def test_pieces_of_tissue_far_apart_share_one_array():
    grid, pixels = _array("square", 30, 10)
    apart = (grid[:, 0] < 8) | (grid[:, 0] > 20)
    turn = np.array([[np.cos(0.03), np.sin(0.03)], [-np.sin(0.03), np.cos(0.03)]])
    found = grid_of_pixels(pixels[apart] @ turn)
    difference = found.grid - grid[apart]
    assert (difference == difference[0]).all()


def test_irregular_spots_get_a_cell_each_near_their_place():
    random = np.random.default_rng(1)
    pixels = random.uniform(0, 2000, (600, 2))
    found = grid_of_pixels(pixels)
    assert found.kind == "irregular" and 0 < found.moved < 150
    assert len(np.unique(found.grid, axis=0)) == 600
    away = found.grid * found.pitch_px - pixels
    assert np.linalg.norm(away - np.median(away, axis=0), axis=1).max() < 5 * found.pitch_px


def test_few_spots_and_equal_ones():
    assert grid_of_pixels(np.array([[5.0, 6.0]])).grid.tolist() == [[0, 0]]
    assert grid_of_pixels(np.zeros((0, 2))).grid.shape == (0, 2)
    two = grid_of_pixels(np.array([[0.0, 0.0], [0.0, 80.0]]))
    assert len(np.unique(two.grid, axis=0)) == 2
    with pytest.raises(ValueError, match=r"Two spots lie at the same place, pixel \(5, 6\)"):
        grid_of_pixels(np.array([[5.0, 6.0], [1.0, 1.0], [5.0, 6.0]]))


def test_a_line_of_spots_is_a_line_of_cells():
    pixels = np.stack([np.arange(12) * 100.0, np.full(12, 50.0)], axis=1)
    assert grid_of_pixels(pixels).grid.tolist() == [[i, 0] for i in range(12)]
