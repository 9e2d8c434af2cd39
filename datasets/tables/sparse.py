"""Sparse matrices from files: built only from numbers that are true references to rows and columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Stored:
    """A compressed sparse matrix as a file has it.

    data, indices (K,), indptr (rows + 1,) if it is compressed by rows, else (columns + 1,).  shape: (rows, columns).
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]
    by_rows: bool


def checked_sparse(stored: Stored) -> sparse.csr_matrix:
    """Build the (rows, columns) csr matrix, its rows sorted, after every reference in it has been checked.

    SciPy believes what it is given: an index too large gives wrong sums, a larger one ends the process.
    Raises ValueError, without the file, where arrays are of other lengths than the shape says, an index is out of range,
    `indptr` decreases, or an entry is there twice.
    """
    problem = _problem(stored)
    if problem:
        raise ValueError(f"its sparse matrix is damaged: {problem}")
    kind = sparse.csr_matrix if stored.by_rows else sparse.csc_matrix
    matrix = kind((stored.data, stored.indices, stored.indptr), shape=stored.shape)
    matrix.check_format(full_check=True)
    matrix = matrix.tocsr()
    matrix.sort_indices()
    if not matrix.has_canonical_format:
        raise ValueError("its sparse matrix is damaged: an entry of it is there twice")
    return matrix


def runs_of_lines(indptr: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Yield runs (start, stop) of rows, or of columns, with about `most` entries each; `indptr` begins with 0.

    Raises ValueError, without the file, where it goes back.
    """
    if not len(indptr) or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"its sparse matrix is damaged: indptr has {len(indptr)} entries, or goes back")
    start = 0
    while start < len(indptr) - 1:
        stop = int(np.searchsorted(indptr, indptr[start] + most, side="right")) - 1
        stop = min(max(stop, start + 1), len(indptr) - 1)
        yield start, stop
        start = stop


def stacked(parts: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Put matrices (N_i, columns) csr below each other: (sum of N_i, columns) csr.

    The list is emptied: numbers of a part are let go as soon as they are in the stack, so that both are never held whole.
    """
    columns = parts[0].shape[1]
    assert all(part.shape[1] == columns for part in parts)
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    data = [part.data[: part.nnz] for part in parts]
    indices = [part.indices[: part.nnz] for part in parts]
    parts.clear()
    all_data = np.concatenate(data)
    data.clear()
    all_indices = np.concatenate(indices)
    indices.clear()
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return sparse.csr_matrix((all_data, all_indices, indptr), shape=(len(lengths), columns))


def _problem(stored: Stored) -> str | None:
    """What is wrong with the arrays, before anything is built of them."""
    data, indices, indptr = stored.data, stored.indices, stored.indptr
    if min(stored.shape) < 0:
        return f"its shape is {stored.shape}"
    for name, array, kinds in (("data", data, "biuf"), ("indices", indices, "iu"), ("indptr", indptr, "iu")):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            return f"{name} is {array.dtype} of the shape {array.shape}"
    lines, length = stored.shape if stored.by_rows else stored.shape[::-1]
    what, across = ("rows", "columns") if stored.by_rows else ("columns", "rows")
    if len(indptr) != lines + 1:
        return f"indptr has {len(indptr)} entries for {lines} {what}"
    if len(data) != len(indices):
        return f"data has {len(data)} entries, indices has {len(indices)}"
    if indptr[0] != 0 or indptr[-1] != len(data) or (indptr[1:] < indptr[:-1]).any():
        return f"indptr does not lead from 0 to {len(data)} entries without going back"
    if len(indices) and (indices.min() < 0 or indices.max() >= length):
        wrong = indices[(indices < 0) | (indices >= length)][0]
        return f"indices holds {wrong}, but there are {length} {across}"
    return None
