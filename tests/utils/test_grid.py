"""The pairs of spots on an array, against a look at every pair."""

from __future__ import annotations

import numpy as np
import pytest

from utils.grid import steps_within


@pytest.mark.parametrize("radius", [1, 3, 5])
def test_steps_hold_the_pairs_that_a_look_at_every_pair_finds(radius):
    generator = np.random.default_rng(radius)
    cells = generator.permutation(14 * 11)[:60]
    grid = np.stack([cells % 14 - 6, 3 * (cells // 14) + 100], axis=1)
    distance = np.abs(grid[:, None] - grid[None]).max(axis=2)
    steps = steps_within(grid, radius)
    found = {(int(row), int(column)) for step in steps for row, column in zip(step.rows, step.columns)}
    assert found == set(zip(*(part.tolist() for part in np.nonzero(distance <= radius))))
    assert sum(len(step.rows) for step in steps) == len(found) and len(steps) == (2 * radius + 1) ** 2
    for step in steps:
        assert (grid[step.columns] - grid[step.rows] == (step.x, step.y)).all() and (np.diff(step.rows) > 0).all()


def test_positions_that_are_no_array_are_refused():
    with pytest.raises(
        ValueError, match=r"two spots share the grid position \(x, y\) = \(4, 2\); expected one per cell"
    ):
        steps_within(np.array([[4, 2], [1, 1], [4, 2]]), 1)
    with pytest.raises(ValueError, match=r"must be \(N, 2\) integers, found float64 of shape \(3, 2\)"):
        steps_within(np.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match="no array coordinates"):
        steps_within(np.array([[0, 0], [2**31, 2**31]]), 1)
