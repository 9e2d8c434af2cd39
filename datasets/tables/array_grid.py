"""Integer grid positions for spots that only have pixels: what the positional convolution and smoothing need.

The axes point as those of the image: x to the right, y downwards. A square array gives its columns and rows; a hexagonal
one (Visium) doubled columns: neighbors in a row differ by 2 in x, those in the next row by 1 in x and in y, exactly as
Space Ranger's array_col and array_row do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import KDTree

_LATTICE_ORDER = 0.75  # mean resultant of the directions of neighbors, 1 on a perfect array and about 0 on none
_REACH = 1.25  # distances, in pitches, that still are neighbors; the diagonal of a square is 1.41


@dataclass(frozen=True)
class ArrayGrid:
    """grid (N, 2) int64, no duplicates.  kind: "square", "hexagonal" or "irregular".  pitch_px: distance of neighbors.
    moved: how many spots had to take a free cell beside their own."""

    grid: np.ndarray
    kind: str
    pitch_px: float
    moved: int


def grid_of_pixels(pixels: np.ndarray) -> ArrayGrid:
    """Find the array that spots at `pixels` (N, 2) lie on, and the place of each spot on it.

    The pitch is the median distance to the nearest spot. Directions of neighbors tell a square from a hexagonal array
    and how it is turned. Places are counted from neighbor to neighbor, so a slight turn or stretch does not add up over
    the slide. Spots on no array are put into square cells of one pitch, unturned. Where two spots fall into one cell,
    the one farther from its middle takes the nearest free cell.
    Raises ValueError if two spots lie at the same place.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    if len(pixels) < 2:
        return ArrayGrid(np.zeros((len(pixels), 2), dtype=np.int64), "irregular", float("nan"), 0)
    tree = KDTree(pixels)
    nearest = tree.query(pixels, k=2)[0][:, 1]
    if nearest.min() == 0:
        first = int(np.argmin(nearest))
        raise ValueError(f"Two spots lie at the same place, pixel ({pixels[first, 0]:g}, {pixels[first, 1]:g}).")
    pitch = float(np.median(nearest))
    pairs = tree.query_pairs(_REACH * pitch, output_type="ndarray")
    kind, angle = _lattice(pixels[pairs[:, 1]] - pixels[pairs[:, 0]])
    basis = pitch * _basis(kind, angle)
    places = pixels @ np.linalg.inv(basis)
    cells = np.rint(places).astype(np.int64) if kind == "irregular" else _counted_cells(places, pairs)
    cells, moved = _without_collisions(cells, places - (places - cells).mean(axis=0))
    if kind == "hexagonal":
        cells = np.stack([2 * cells[:, 0] + cells[:, 1], cells[:, 1]], axis=1)
    return ArrayGrid(cells - cells.min(axis=0), kind, pitch, moved)


def _lattice(steps: np.ndarray) -> tuple[str, float]:
    """Kind of the array and its turn in radians, from the steps (M, 2) between neighbors."""
    if len(steps) == 0:
        return "irregular", 0.0
    directions = np.arctan2(steps[:, 1], steps[:, 0])
    orders = {kind: np.exp(1j * fold * directions).mean() for kind, fold in (("square", 4), ("hexagonal", 6))}
    kind = max(orders, key=lambda name: abs(orders[name]))
    if abs(orders[kind]) < _LATTICE_ORDER:
        return "irregular", 0.0
    return kind, float(np.angle(orders[kind])) / (4 if kind == "square" else 6)


def _basis(kind: str, angle: float) -> np.ndarray:
    """(2, 2) rows: the step along x and the step to the next row, for a pitch of one, turned by `angle`."""
    second = {"hexagonal": (0.5, np.sqrt(0.75))}.get(kind, (0.0, 1.0))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.array([(1.0, 0.0), second]) @ turn


def _counted_cells(places: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Integer cells, counted along neighbors from one spot of each connected piece; the pieces are placed by rounding."""
    count = len(places)
    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count)).tocsr()
    num_pieces, piece = connected_components(links, directed=False)
    cells = np.zeros((count, 2), dtype=np.int64)
    for first in np.unique(piece, return_index=True)[1]:
        order, parent = breadth_first_order(links, int(first), directed=False)
        for spot in order[1:].tolist():
            before = parent[spot]
            cells[spot] = cells[before] + np.rint(places[spot] - places[before]).astype(np.int64)
    largest = np.argmax(np.bincount(piece, minlength=num_pieces))
    transform = _affine(places[piece == largest], cells[piece == largest])
    for other in range(num_pieces):
        members = piece == other
        expected = np.column_stack([places[members], np.ones(members.sum())]) @ transform
        cells[members] += np.rint(np.median(expected - cells[members], axis=0)).astype(np.int64)
    return cells


def _affine(places: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(3, 2) map from (place, 1) to cells: the stretch and turn that rounding of a whole piece should follow."""
    corrections = np.linalg.lstsq(np.column_stack([places, np.ones(len(places))]), cells - places, rcond=None)[0]
    return corrections + np.eye(3, 2)


def _without_collisions(cells: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, int]:
    """Give every spot a cell of its own: the spot nearest to the middle keeps it, others take the nearest free one."""
    distance = np.linalg.norm(places - cells, axis=1)
    order = np.lexsort((np.arange(len(cells)), distance))
    taken: set[tuple[int, int]] = set()
    result, homeless = cells.copy(), []
    for spot in order.tolist():
        cell = (int(cells[spot, 0]), int(cells[spot, 1]))
        if cell in taken:
            homeless.append(spot)
        taken.add(cell)
    for spot in homeless:
        cell = _nearest_free(places[spot], taken)
        taken.add(cell)
        result[spot] = cell
    return result, len(homeless)


def _nearest_free(place: np.ndarray, taken: set[tuple[int, int]]) -> tuple[int, int]:
    """The free cell nearest to `place`: whole squares of cells are searched until no nearer one can exist."""
    middle_x, middle_y = (int(value) for value in np.rint(place))
    best, radius = None, 1
    while best is None or radius - 0.5 <= best[0]:
        for x in range(middle_x - radius, middle_x + radius + 1):
            for y in range(middle_y - radius, middle_y + radius + 1):
                on_ring = max(abs(x - middle_x), abs(y - middle_y)) == radius
                if on_ring and (x, y) not in taken:
                    candidate = (float(np.hypot(place[0] - x, place[1] - y)), x, y)
                    best = candidate if best is None else min(best, candidate)
        radius += 1
    return best[1], best[2]
