"""Where patches and neighbor tiles lie on the slide, which of them count, and the eight views of a square.

All positions are level-0 pixels, (x, y) with x to the right and y downwards. A patch of size P (even) around the centre
(x, y) covers columns x - P/2 .. x + P/2 - 1 and rows y - P/2 .. y + P/2 - 1. The n x n tiles around it do not overlap,
are numbered row by row (n * row + column), and the middle one is the patch itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_VIEWS = 8  # horizontal flip, vertical flip, quarter turn: the symmetries of the square
_HORIZONTAL, _VERTICAL, _QUARTER_TURN = 1, 2, 4


def check_patch_size(patch_size: int) -> int:
    """`patch_size` if a patch of it has a centre between four pixels, else ValueError."""
    if patch_size < 2 or patch_size % 2:
        raise ValueError(f"The patch size should be an even number of pixels, found {patch_size}.")
    return patch_size


def check_num_neighbors(num_neighbors: int) -> int:
    """`num_neighbors` (tiles a side) if a tile lies in the middle, else ValueError."""
    if num_neighbors < 1 or num_neighbors % 2 == 0:
        raise ValueError(
            f"The number of neighbors a side should be odd (the middle tile is the patch), found {num_neighbors}."
        )
    return num_neighbors


def patch_corner(centers: np.ndarray, patch_size: int) -> np.ndarray:
    """(N, 2) top left corners (x, y) of the patches around `centers` (N, 2)."""
    return np.asarray(centers, dtype=np.int64) - check_patch_size(patch_size) // 2


def neighbor_corners(centers: np.ndarray, patch_size: int, num_neighbors: int = 5) -> np.ndarray:
    """(N, n*n, 2) top left corners (x, y) of the tiles around `centers` (N, 2), row by row."""
    steps = np.arange(check_num_neighbors(num_neighbors)) - num_neighbors // 2
    rows, columns = np.meshgrid(steps, steps, indexing="ij")
    offsets = np.stack([columns.ravel(), rows.ravel()], axis=1) * patch_size
    return patch_corner(centers, patch_size)[:, None, :] + offsets[None, :, :]


def neighbor_validity(
    centers: np.ndarray, image_size: tuple[int, int], patch_size: int, num_neighbors: int = 5
) -> np.ndarray:
    """Which tiles count: (N, n*n) bool, False where a tile crosses an edge of the image (width, height).

    A side of a ring is invalid as a whole when the window of that ring crosses the edge of that side; the middle row
    and column never are (they hold the spot itself, whose missing pixels are white). golden/masking_table.npz.
    """
    centers = np.asarray(centers, dtype=np.int64)
    check_patch_size(patch_size)
    width, height = image_size
    column_is_valid = _line_validity(centers[:, 0], width, patch_size, check_num_neighbors(num_neighbors))
    row_is_valid = _line_validity(centers[:, 1], height, patch_size, num_neighbors)
    return (row_is_valid[:, :, None] & column_is_valid[:, None, :]).reshape(len(centers), num_neighbors**2)


def _line_validity(center: np.ndarray, length: int, patch_size: int, num_neighbors: int) -> np.ndarray:
    """(N, n) bool: which of the n tiles along one axis keep inside [0, length]."""
    is_valid = np.ones((len(center), num_neighbors), dtype=bool)
    for ring in range(num_neighbors // 2):
        reach = patch_size // 2 * (num_neighbors - 2 * ring)
        is_valid[:, ring] = center - reach >= 0
        is_valid[:, num_neighbors - 1 - ring] = center + reach <= length
    return is_valid


def dihedral_view(images: Tensor, view: int) -> Tensor:
    """One of the eight views of square images (..., S, S), the same for all.

    view: 0..7; bit 0 a horizontal flip, then bit 1 a vertical flip, then bit 2 a quarter turn counter-clockwise
    (golden/dihedral.npz).
    """
    assert images.shape[-1] == images.shape[-2], f"only a square keeps its shape when turned, got {images.shape}"
    if not 0 <= view < NUM_VIEWS:
        raise ValueError(f"A view is a number from 0 to {NUM_VIEWS - 1}, found {view}.")
    if view & _HORIZONTAL:
        images = images.flip(-1)
    if view & _VERTICAL:
        images = images.flip(-2)
    if view & _QUARTER_TURN:
        images = torch.rot90(images, 1, (-2, -1))
    return images


def dihedral_views(images: Tensor, views: Tensor) -> Tensor:
    """Its own view of each image: images (B, ..., S, S), views (B,) integers 0..7 on the same device.

    Three selections over the whole batch instead of one pass per view: no value of `views` is read by the host, so that
    a CUDA stream is never waited for.
    """
    assert images.shape[-1] == images.shape[-2], f"only a square keeps its shape when turned, got {images.shape}"
    views = views.to(images.device).reshape(-1, *([1] * (images.dim() - 1)))
    images = torch.where((views & _HORIZONTAL) > 0, images.flip(-1), images)
    images = torch.where((views & _VERTICAL) > 0, images.flip(-2), images)
    return torch.where((views & _QUARTER_TURN) > 0, torch.rot90(images, 1, (-2, -1)), images)
