"""The patches that HEST-1k has cut around the spots of a sample, in place of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData

from datasets.features.cache import read_identity, write_cache
from datasets.features.identity import NO_ENCODER, CacheIdentity
from datasets.features.verify import verify_cache
from preprocess.raw.hest import HestSample
from utils.files import reading, sha256
from utils.text import checked_names
from utils.untrusted.hdf5 import opened_hdf5

_PATCHES_AT_ONCE = 256
PLACEMENT_TOLERANCE = 2.5  # px at level 0 between a patch's centre and its spot's


class HestPatches:
    """Patches of a sample: `img` (N, P, P, 3) uint8, `coords` their top left corners at level 0, `barcode`."""

    def __init__(self, sample: HestSample, path: Path):
        """Read everything but the pixels. ValueError naming sample and file if it is damaged or holds something else."""
        self.sample, self.path = sample, path
        with opened_hdf5(path, "a file of patches") as file:
            names = [_text(name) for name in np.asarray(file["barcode"]).ravel()]
            self.barcodes = checked_names(names, "barcodes", path)
            self.corners = np.asarray(file["coords"], dtype=np.float64)
            self.shape, dtype = file["img"].shape, file["img"].dtype
        square = len(self.shape) == 4 and self.shape[1] == self.shape[2] and self.shape[3] == 3
        square &= self.corners.ndim == 2 and self.corners.shape[1] == 2
        lengths = {len(self.barcodes), len(self.corners), self.shape[0]}
        if not square or dtype != np.uint8 or len(lengths) != 1 or len(set(self.barcodes)) != len(self.barcodes):
            raise ValueError(
                f"Slide {sample.name}: {self.path} holds img {self.shape} {dtype}, {len(self.corners)} coords and "
                f"{len(set(self.barcodes))} different barcodes; expected N patches (N, P, P, 3) uint8 and N of the others."
            )

    @property
    def size(self) -> int:
        """Side of a patch in pixels."""
        return self.shape[1]

    def scale(self, barcodes: Sequence[str], centers: np.ndarray) -> float:
        """Find level-0 pixels per pixel of a patch, from where the corners lie relative to the centres of their spots.

        Raises ValueError if the patches do not lie around their spots.
        """
        corners = self.corners[self._rows(barcodes)]
        offsets = centers - corners
        half = float(np.median(offsets))
        away = np.abs(offsets - half).max(axis=1) > PLACEMENT_TOLERANCE
        if half <= 0 or away.any():
            first = int(np.flatnonzero(away)[0]) if away.any() else 0
            raise ValueError(
                f"Slide {self.sample.name}: {self.path}: {max(away.sum(), 1)} patches do not lie around their spots, for "
                f"example {barcodes[first]}: corner {corners[first].tolist()}, spot {centers[first].tolist()}. The "
                "patches and the expression are of different versions; download both again."
            )
        return 2 * half / self.size

    def blocks(self, barcodes: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the patches of these spots, in this order, some hundred at a time."""
        rows = self._rows(barcodes)
        with reading(self.path, "a file of patches"), h5py.File(self.path, "r") as file:
            for start in range(0, len(rows), _PATCHES_AT_ONCE):
                wanted = rows[start : start + _PATCHES_AT_ONCE]
                order = np.argsort(wanted)
                yield file["img"][wanted[order]][np.argsort(order)]

    def write(self, path: Path, joined: AnnData, barcodes: Sequence[str], *, overwrite: bool) -> None:
        """Write the patch cache of a slide; one that is there must be of the same patches and spots."""
        centers = joined.obsm["center"]
        microns, scale = self.sample.microns_per_pixel, self.scale(barcodes, joined.obsm["spatial"])
        identity = CacheIdentity(
            kind="patch",
            encoder=NO_ENCODER,
            encoder_sha256=NO_ENCODER,
            image_size=self.sample.image_size,
            image_fingerprint=f"hest-{sha256(self.path)[:32]}",
            patch_size=self.size,
            microns_per_pixel=None if microns is None else round(microns * scale, 4),
            num_neighbors=0,
            views=1,
            dtype="uint8",
        )
        if path.exists() and not overwrite:
            expected = {"kind": "patch", "image_fingerprint": identity.image_fingerprint, "patch_size": self.size}
            repair = "python preprocess/prepare_hest.py (with its other flags)"
            verify_cache(path, expected, list(joined.obs_names), centers, lambda: repair)
            return
        write_cache(path, identity, list(joined.obs_names), centers, self.blocks(barcodes))

    def _rows(self, barcodes: Sequence[str]) -> np.ndarray:
        rows = pd.Index(self.barcodes).get_indexer(list(barcodes))
        assert (rows >= 0).all(), "only spots with a patch are asked for"
        return rows


def microns_of_patches(path: Path) -> float | None:
    """Read micrometres per pixel of the patches in a cache; None if it does not say."""
    return read_identity(path).microns_per_pixel


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
