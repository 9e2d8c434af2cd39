"""Patch and neighbor windows, the validity table and the eight views, against recorded and slow versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datasets.images.geometry import (
    dihedral_view,
    dihedral_views,
    neighbor_corners,
    neighbor_validity,
    patch_corner,
)


def test_validity_equals_the_recorded_table(golden):
    table = golden("masking_table")
    for case, expected in zip(table["cases_x_y_H_W_r_n"], table["mask"], strict=True):
        x, y, height, width, half, neighbors = (int(value) for value in case)
        got = neighbor_validity(np.array([[x, y]]), (width, height), 2 * half, neighbors)[0]
        assert np.array_equal(got, expected[: neighbors**2].astype(bool)), f"case {case}"


def test_validity_of_many_spots_equals_that_of_each():
    centers = np.random.default_rng(0).integers(0, 900, size=(200, 2))
    together = neighbor_validity(centers, (900, 700), 64)
    each = np.concatenate([neighbor_validity(center[None], (900, 700), 64) for center in centers])
    assert together.shape == (200, 25) and np.array_equal(together, each)
    assert together.any() and not together.all()
    assert together[:, 12].all(), "the spot's own tile always counts"


def test_a_valid_tile_lies_wholly_inside_the_image():
    centers = np.random.default_rng(1).integers(0, 600, size=(300, 2))
    width, height, size = 640, 600, 64
    corners = neighbor_corners(centers, size)
    inside = ((corners >= 0) & (corners + size <= np.array([width, height]))).all(axis=2)
    is_valid = neighbor_validity(centers, (width, height), size)
    middle = np.zeros((5, 5), dtype=bool)
    middle[2, :] = middle[:, 2] = True  # the middle row and column are never masked by their own axis
    assert inside[is_valid & ~middle.ravel()].all()
    assert not inside[~is_valid].any(), "every masked tile crosses an edge"


def test_corners_equal_a_loop():
    centers = np.array([[500, 300], [31, 77]])
    expected = [
        [(x - 32 + 64 * (column - 2), y - 32 + 64 * (row - 2)) for row in range(5) for column in range(5)]
        for x, y in centers
    ]
    got = neighbor_corners(centers, 64)
    assert np.array_equal(got, np.array(expected))
    assert np.array_equal(got[:, 12], patch_corner(centers, 64)), "tile 12 is the patch itself"


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="even number of pixels, found 223"):
        patch_corner(np.zeros((1, 2)), 223)
    with pytest.raises(ValueError, match=r"odd .*found 4"):
        neighbor_validity(np.zeros((1, 2)), (10, 10), 8, 4)


def test_views_equal_the_recorded_images(golden):
    recorded = golden("dihedral")
    patch = torch.from_numpy(recorded["patch"]).permute(2, 0, 1)
    for flags, image in zip(recorded["flags_hflip_vflip_rot90"], recorded["images"], strict=True):
        view = int(flags[0]) + 2 * int(flags[1]) + 4 * int(flags[2])
        assert torch.equal(dihedral_view(patch, view), torch.from_numpy(image).permute(2, 0, 1)), f"flags {flags}"


def test_each_image_gets_its_own_view():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 6, 6, generator=generator)
    views = torch.randint(0, 8, (40,), generator=generator)
    expected = torch.stack([dihedral_view(image, int(view)) for image, view in zip(images, views, strict=True)])
    assert torch.equal(dihedral_views(images, views), expected)


def test_the_eight_views_are_different_and_start_with_the_image():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    views = [dihedral_view(image, view) for view in range(8)]
    assert torch.equal(views[0], image)
    assert len({tuple(view.ravel().tolist()) for view in views}) == 8


def test_a_view_outside_the_group_is_refused():
    with pytest.raises(ValueError, match="0 to 7, found 8"):
        dihedral_view(torch.zeros(2, 2), 8)
