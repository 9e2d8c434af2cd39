"""What is needed of an AnnData file: counts, names of spots and genes, a few columns, positions; nothing else is touched.

What another program has added to the file, in encodings that AnnData does not know, does not matter then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from datasets.tables.sparse import Stored, checked_sparse
from utils.untrusted.hdf5 import opened_hdf5

_REMEDY = "Write it again with AnnData (adata.write_h5ad(path)), or take the original file again."


def read_h5ad(path: Path, what: str = "a table of counts (.h5ad)", columns: Sequence[str] = ()) -> AnnData:
    """Read the counts, the names and, where they are there, `columns` of obs and obsm["spatial"].

    returns: AnnData, X (N, G) csr, or dense if it is so in the file, of whatever type.
    Raises FileNotFoundError, or ValueError naming the file if it cannot be read, if a reference within the sparse matrix is
    wrong, or if the names are of other number than rows and columns.
    """
    with opened_hdf5(path, what, remedy=_REMEDY) as file:
        obs, var = frame_of(file["obs"], columns), frame_of(file["var"])
        matrix = _matrix(file["X"])
        spatial = np.asarray(anndata.io.read_elem(file["obsm/spatial"])) if "obsm/spatial" in file else None
        if matrix.shape != (len(obs), len(var)):
            raise ValueError(
                f"X is of the shape {matrix.shape}, but obs names {len(obs)} rows and var {len(var)} columns"
            )
        if spatial is not None and len(spatial) != len(obs):
            raise ValueError(f"obsm['spatial'] has {len(spatial)} rows, obs has {len(obs)}")
        return AnnData(matrix, obs=obs, var=var, obsm={} if spatial is None else {"spatial": spatial})


def read_names(path: Path, axis: str) -> list[str]:
    """Read the names of the spots (axis "obs") or genes ("var") alone. Errors as in `read_h5ad`."""
    with opened_hdf5(path, "a table of counts (.h5ad)", remedy=_REMEDY) as file:
        return frame_of(file[axis]).index.tolist()


def frame_of(stored: h5py.Group | h5py.Dataset, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read the index and some columns of obs or var; a data set of rows is how AnnData wrote it before version 0.7.

    Raises ValueError, without the file, where columns are of other lengths.
    """
    if isinstance(stored, h5py.Dataset):
        table = stored[()]
        name = "index" if "index" in table.dtype.names else table.dtype.names[0]
        parts = {key: table[key] for key in (name, *(c for c in columns if c in table.dtype.names))}
    else:
        name = stored.attrs["_index"]
        parts = {key: anndata.io.read_elem(stored[key]) for key in (name, *(c for c in columns if c in stored))}
    if any(len(part) != len(parts[name]) for part in parts.values()):
        lengths = ", ".join(f"{key} {len(part)}" for key, part in parts.items())
        raise ValueError(f"the columns of {stored.name} are of different lengths: {lengths}")
    index = pd.Index([entry.decode() if isinstance(entry, bytes) else str(entry) for entry in parts.pop(name)])
    return pd.DataFrame({key: np.asarray(part) for key, part in parts.items()}, index=index)


def _matrix(stored: h5py.Group | h5py.Dataset) -> np.ndarray | sparse.csr_matrix:
    if isinstance(stored, h5py.Dataset):
        return stored[()]
    attributes = stored.attrs
    kind = str(attributes.get("encoding-type", attributes.get("h5sparse_format")))
    shape = [int(length) for length in attributes.get("shape", attributes.get("h5sparse_shape"))]
    if kind.removesuffix("_matrix") not in ("csr", "csc") or len(shape) != 2:
        raise ValueError(f"X is a {kind} of the shape {tuple(shape)}, expected a dense, csr or csc matrix")
    data, indices, indptr = (stored[name][()] for name in ("data", "indices", "indptr"))
    return checked_sparse(Stored(data, indices, indptr, (shape[0], shape[1]), by_rows=kind.startswith("csr")))
