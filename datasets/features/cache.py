"""Features of a slide on disk: one HDF5 file per slide and kind, written whole, verified before it is used.

A file holds `features` (N, D) or (N, M, D), `tokens` (N, V, T, D) or `patches` (N, P, P, 3), always with `spot_id` (N,) and
`coords` (N, 2), the centres in level-0 pixels, and as attributes everything that the numbers depend on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import h5py
import numpy as np

from datasets.features.identity import (
    DATASET_OF_KIND,
    CacheIdentity,
    attributes_of,
    check_structure,
    identity_of,
)
from datasets.features.sealed import (
    CHECKSUM,
    Payload,
    Seal,
    checksums_of,
    is_finite,
    read_seal,
    read_whole,
    write_sealed,
)
from utils.files import reading, write_atomically
from utils.text import checked_names, some
from utils.untrusted.hdf5 import probe_hdf5

_PIECE = 1 << 22  # bytes read and verified at a time
# What caches are, and that they are built so: a training opens each some five times, and the same seal is over the same.
_CHECKED: dict[Seal | None, CacheIdentity] = {}


def write_cache(
    path: str | Path,
    identity: CacheIdentity,
    spot_ids: Sequence[str],
    centers: np.ndarray,
    blocks: Iterable[np.ndarray],
    when_whole: Callable[[], object] | None = None,
) -> Path:
    """Stream a cache to disk; the file appears only when it is complete.

    blocks: arrays (b, ...) of consecutive spots, N rows in all; only one is held at a time. Whatever they raise leaves
        an older file as it was.
    when_whole: as for `write_atomically`.
    """
    centers = np.asarray(centers, dtype=np.int64)
    assert centers.shape == (len(spot_ids), 2), f"{len(spot_ids)} spots, centres {centers.shape}"

    def describe(file: h5py.File) -> None:
        for name, value in attributes_of(identity).items():
            file.attrs[name] = value
        file.create_dataset("spot_id", data=np.asarray(spot_ids, dtype=object), dtype=h5py.string_dtype())
        file.create_dataset("coords", data=centers)

    payload = Payload(
        Path(path), DATASET_OF_KIND[identity.kind], identity.dtype, len(spot_ids), _block_axes(identity.kind)
    )
    return write_atomically(path, lambda temporary: write_sealed(temporary, payload, describe, blocks), when_whole)


def _block_axes(kind: str) -> int:
    """Tokens have a checksum for every spot and view, since they are read so; everything else one for every spot."""
    return 2 if kind == "token" else 1


@dataclass(frozen=True)
class OpenCache:
    """A cache opened for reading: its structure is what was written (or, without a seal, fits what it says about itself).

    repair: spells the command that makes it again.
    """

    path: Path
    file: h5py.File
    identity: CacheIdentity
    is_sealed: bool  # caches of earlier versions are not, and have no checksums
    repair: Callable[[], str]

    @property
    def numbers(self) -> h5py.Dataset:
        """The features, tokens or patches, not read yet."""
        return self.file[DATASET_OF_KIND[self.identity.kind]]

    @property
    def spot_ids(self) -> list[str]:
        """Ids of the spots, in order. Raises ValueError for those that are no plain names."""
        return checked_names(self.file["spot_id"].asstr()[:].tolist(), "spots", self.path)

    @property
    def centers(self) -> np.ndarray:
        """(N, 2) level-0 px (x, y)."""
        return self.file["coords"][:]

    @property
    def checksums(self) -> np.ndarray | None:
        """uint64 (N,), or (N, V) of tokens; None without a seal."""
        return self.file[CHECKSUM][:] if self.is_sealed else None

    def read(self, rows: slice = slice(None), out: np.ndarray | None = None) -> np.ndarray:
        """Read the numbers of consecutive spots, verified while they are still in the processor's cache.

        out: is filled and returned where it has the shape and the type of the rows; a new array otherwise.
        Raises ValueError naming the spots whose numbers are not those that were written, or not finite.
        """
        numbers, (start, stop, step) = self.numbers, rows.indices(len(self.numbers))
        assert step == 1, "features are read in consecutive rows"
        shape = (max(stop - start, 0), *numbers.shape[1:])
        if out is None or out.shape != shape or out.dtype != numbers.dtype:
            out = np.empty(shape, numbers.dtype)
        is_written, finite = np.ones((2, len(out)), dtype=bool)
        at_once = max(1, _PIECE * len(out) // max(out.nbytes, 1))
        fill, checksums, axes = self._filler(), self.checksums, _block_axes(self.identity.kind)
        for first in range(0, len(out), at_once):
            piece, row = out[first : first + at_once], start + first
            fill(piece, row)
            if checksums is not None:
                same = checksums_of(piece, axes) == checksums[row : row + len(piece)]
                is_written[first : first + len(piece)] = same.reshape(len(piece), -1).all(axis=1)
            if not is_finite(piece):
                finite[first : first + len(piece)] = [is_finite(values) for values in piece]
        for is_right, what in ((is_written, "not what was written (checksum)"), (finite, "not finite")):
            if not is_right.all():
                self._refuse(start + np.flatnonzero(~is_right), what)
        return out

    def _filler(self) -> Callable[[np.ndarray, int], None]:
        """What fills an array with the rows from one on: past HDF5, which copies once more, where they lie in a row."""
        numbers = self.numbers
        begin, size = numbers.id.get_offset(), numbers.dtype.itemsize * math.prod(numbers.shape[1:])
        if begin is None:  # tokens of an earlier version lie in chunks
            return lambda piece, row: numbers.read_direct(piece, np.s_[row : row + len(piece)])
        return lambda piece, row: read_whole(self.path, piece, begin + row * size)

    def _refuse(self, rows: np.ndarray, what: str) -> NoReturn:
        spots = self.spot_ids
        raise ValueError(
            f"{self.path} is damaged: the numbers of {len(rows)} of its {len(spots)} spots are {what}: "
            f"{some([spots[row] for row in rows])}. {keeping(self.repair())}"
        )


@contextmanager
def opened(path: str | Path, repair: Callable[[], str] | None = None) -> Iterator[OpenCache]:
    """Open a cache for reading, once its seal is verified, or, for a cache of an earlier version, its structure.

    repair: spells the command that makes it again; asked only when something is wrong.
    Raises FileNotFoundError, or ValueError, also while the caller reads; no message says to replace the file.
    """
    path = Path(path)
    repair = repair or partial(_usual_repair, path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Run:\n{repair()}")
    keep = f"It is truncated or no cache of ours: keep it elsewhere, and extract slide {path.stem} again."
    with reading(path, "a cache of features", keep):
        found = _seal_of(path, repair)
        if found is None:
            probe_hdf5(path, "a cache of features", keep)
        with h5py.File(path, "r") as file:
            if CHECKSUM in file and found is None:
                raise ValueError(f"{path} is damaged: it has lost its seal. {keeping(repair())}")
            identity = _CHECKED.get(found)
            if identity is None:
                identity = identity_of(file.attrs)
                check_structure(file, identity)
                if found is not None:
                    _CHECKED[found] = identity
            yield OpenCache(path, file, identity, found is not None, repair)


def _seal_of(path: Path, repair: Callable[[], str]) -> Seal | None:
    try:
        return read_seal(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}. {keeping(repair())}") from error


def _usual_repair(path: Path) -> str:
    return f"python preprocess/extract_features_uni.py --slides {path.stem} (with its other flags)"


def keeping(command: str) -> str:
    """Advise to make a cache anew beside one that took as long, whatever is wrong with that: it may be whole, and wanted."""
    return f"Keep it elsewhere and run:\n{command}"


def read_identity(path: str | Path) -> CacheIdentity:
    """Read what a cache says about itself. Raises ValueError if it is damaged or of another schema version."""
    with opened(path) as cache:
        return cache.identity


def read_features(path: str | Path, rows: slice = slice(None), out: np.ndarray | None = None) -> np.ndarray:
    """Read the numbers of a cache (or only consecutive `rows`), in the order and type in which they are stored.

    out: is filled and returned where it has their shape and type; a new array otherwise.
    Raises ValueError for numbers that are not those that were written.
    """
    with opened(path) as cache:
        return cache.read(rows, out)


def payload_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes that an array of this shape takes on disk."""
    return math.prod(shape) * np.dtype(dtype).itemsize
