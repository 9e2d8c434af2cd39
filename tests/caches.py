"""Caches of features that are not as the program wrote them: changed and sealed again, or as earlier versions wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from datasets.features.identity import DATASET_OF_KIND, CacheIdentity
from datasets.features.sealed import CHECKSUM, checksums_of, seal

TOKENS_OF_UNI = CacheIdentity(
    kind="token",
    encoder="uni",
    encoder_sha256="ab12",
    image_size=(900, 800),
    image_fingerprint="f",
    patch_size=224,
    microns_per_pixel=None,
    num_neighbors=5,
    views=8,
    dtype="float16",
)


@contextmanager
def edited(path: Path) -> Iterator[h5py.File]:
    """Open a cache for changes, and seal it again: as if the program had written it so."""
    with h5py.File(path, "r+") as file:
        yield file
        numbers = file[DATASET_OF_KIND[file.attrs["kind"]]]
        file[CHECKSUM][...] = checksums_of(numbers[:], file[CHECKSUM].ndim)
        place = numbers.id.get_offset(), numbers.nbytes
    seal(path, *place)


def as_earlier(path: Path) -> None:
    """Write a cache again as earlier versions did: without seal and checksums, tokens in one chunk a spot and view."""
    with h5py.File(path) as file:
        attributes, data = dict(file.attrs), {name: item[()] for name, item in file.items() if name != CHECKSUM}
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        for name, values in data.items():
            if values.dtype.kind == "O":
                file.create_dataset(name, data=values, dtype=h5py.string_dtype())
            else:
                chunks = (1, 1, *values.shape[2:]) if name == "tokens" else None
                file.create_dataset(name, data=np.asarray(values), chunks=chunks)
