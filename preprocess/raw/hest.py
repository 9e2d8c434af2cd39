"""What HEST-1k keeps of a sample: expression, patches, metadata; read, checked and told apart by patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import cKDTree

from datasets.features.cache import read_identity, write_cache
from datasets.features.identity import NO_ENCODER, CacheIdentity
from datasets.features.verify import verify_cache
from datasets.tables.counts import check_counts
from datasets.tables.slide_table import check_spots
from utils.files import sha256
from utils.text import some

# Control probes of imaging platforms, which count no gene.
_CONTROLS = (
    "NegControl",
    "BLANK",
    "Blank-",
    "antisense_",
    "UnassignedCodeword",
    "DeprecatedCodeword",
    "Intergenic_Region",
)
_PATCHES_AT_ONCE = 256
_PLACEMENT_TOLERANCE = 2.5  # px at level 0 between a patch's centre and its spot's


@dataclass(frozen=True)
class HestSample:
    """One sample: where its files are, and what the metadata table says of it."""

    name: str
    patient: str
    expression: Path
    patches: Path | None
    image: Path | None
    microns_per_pixel: float | None
    image_size: tuple[int, int]
    species: str


def read_metadata(path: Path) -> pd.DataFrame:
    """The metadata table (HEST_v1_1_0.csv or another version), indexed by id. Raises ValueError naming what is missing."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from error
    missing = [name for name in ("id", "patient", "dataset_title", "species") if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; found {some(list(table.columns), 8)}. Expected HEST_v*.csv."
        )
    return table.drop_duplicates("id").set_index("id")


def patients_of(metadata: pd.DataFrame, samples: Sequence[str]) -> dict[str, str]:
    """Sample -> patient. The table numbers patients within a study, so the study is part of the name; samples of a study
    that names no patient count as one, since sections of one person must not be split between training and test."""
    patients = {}
    for sample in samples:
        title, patient = metadata.loc[sample, "dataset_title"], metadata.loc[sample, "patient"]
        study = f"{_slug(title)[:24].strip('-')}-{hashlib.sha256(title.encode()).hexdigest()[:4]}"
        patients[sample] = f"{study}-{_slug(patient)}" if patient.strip() else study
    return patients


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def pixel_size(row: Mapping[str, str]) -> float | None:
    """Micrometres per pixel at level 0: estimated from the spots, else as the image says."""
    for column in ("pixel_size_um_estimated", "pixel_size_um_embedded"):
        try:
            size = float(row.get(column, ""))
        except ValueError:
            continue
        if 0 < size < 100:
            return size
    return None


def read_expression(sample: HestSample) -> tuple[AnnData, pd.DataFrame]:
    """Counts and spot table of a sample, both under ids "XxY"; control probes and spots off the tissue left out."""
    try:
        data = anndata.read_h5ad(sample.expression)
    except (OSError, KeyError) as error:
        raise ValueError(f"Slide {sample.name}: {sample.expression} is not a readable .h5ad file: {error}") from error
    if "spatial" not in data.obsm or np.shape(data.obsm["spatial"])[1:] != (2,):
        raise ValueError(
            f"Slide {sample.name}: {sample.expression} lacks obsm['spatial'], the centres in pixels (x, y)."
        )
    if "in_tissue" in data.obs:
        data = data[data.obs["in_tissue"].astype(float).to_numpy() != 0]
    data = data[:, [not gene.startswith(_CONTROLS) for gene in data.var_names]]
    spatial = np.asarray(data.obsm["spatial"], dtype=np.float64)
    grid = array_positions(data, spatial, f"Slide {sample.name}: {sample.expression}")
    spots = pd.DataFrame(
        {
            "x": grid[:, 0],
            "y": grid[:, 1],
            "pixel_x": spatial[:, 0],
            "pixel_y": spatial[:, 1],
            "barcode": data.obs_names.to_numpy(),
        }
    )
    spots = check_spots(spots, f"Slide {sample.name}: {sample.expression}")
    counts = check_counts(
        data.X, list(spots.index), data.var_names.tolist(), source=f"Slide {sample.name}: {sample.expression}"
    )
    return counts, spots


def array_positions(data: AnnData, spatial: np.ndarray, source: str) -> np.ndarray:
    """(N, 2) integer array positions, column x and row y, the axes pointing as those of the image.

    From array_col and array_row, else from names like "10x13", else from the pixels by the distance of neighbors. The
    columns of samples of the older arrays are exchanged in HEST, so the pixels decide which one runs along x.
    """
    if {"array_col", "array_row"} <= set(data.obs.columns):
        grid = data.obs[["array_col", "array_row"]].to_numpy(dtype=np.float64)
    elif all(re.fullmatch(r"\d+(\.\d+)?x\d+(\.\d+)?", name) for name in data.obs_names):
        grid = np.array([name.split("x") for name in data.obs_names], dtype=np.float64)
    elif len(spatial) > 1:
        distances, _ = cKDTree(spatial).query(spatial, k=2)
        grid = (spatial - spatial.min(axis=0)) / np.median(distances[:, 1])
    else:
        grid = np.zeros((len(spatial), 2))
    if not np.isfinite(grid).all():
        raise ValueError(
            f"{source}: array_col or array_row is missing for {(~np.isfinite(grid)).any(axis=1).sum()} spots."
        )
    grid = np.rint(grid).astype(np.int64)
    straight, crossed = (_alignment(grid[:, order], spatial) for order in ([0, 1], [1, 0]))
    return grid[:, ::-1] if crossed > straight else grid


def _alignment(grid: np.ndarray, spatial: np.ndarray) -> float:
    """How well array columns go with x and array rows with y: the sum of the two absolute correlations."""
    total = 0.0
    for axis in (0, 1):
        if np.ptp(grid[:, axis]) and np.ptp(spatial[:, axis]):
            total += abs(np.corrcoef(grid[:, axis], spatial[:, axis])[0, 1])
    return total


class HestPatches:
    """The patches of a sample: `img` (N, P, P, 3) uint8, `coords` their top left corners at level 0, `barcode`."""

    def __init__(self, sample: HestSample):
        self.sample = sample
        self.path = sample.patches
        try:
            with h5py.File(self.path, "r") as file:
                self.barcodes = [_text(name) for name in np.asarray(file["barcode"]).ravel()]
                self.corners = np.asarray(file["coords"], dtype=np.float64)
                self.shape, dtype = file["img"].shape, file["img"].dtype
        except (OSError, KeyError) as error:
            raise ValueError(f"Slide {sample.name}: {self.path} is no file of patches (truncated?): {error}") from error
        square = len(self.shape) == 4 and self.shape[1] == self.shape[2] and self.shape[3] == 3
        lengths = {len(self.barcodes), len(self.corners), self.shape[0]}
        if not square or dtype != np.uint8 or len(lengths) != 1 or len(set(self.barcodes)) != len(self.barcodes):
            raise ValueError(
                f"Slide {sample.name}: {self.path} holds img {self.shape} {dtype}, {len(self.corners)} coords and "
                f"{len(set(self.barcodes))} different barcodes; expected N patches (N, P, P, 3) uint8 and N of the others."
            )

    @property
    def size(self) -> int:
        return self.shape[1]

    def scale(self, barcodes: Sequence[str], centers: np.ndarray) -> float:
        """Level-0 pixels per pixel of a patch, from where the corners lie relative to the centres of their spots.

        Raises ValueError if the patches do not lie around their spots.
        """
        corners = self.corners[self._rows(barcodes)]
        offsets = centers - corners
        half = float(np.median(offsets))
        away = np.abs(offsets - half).max(axis=1) > _PLACEMENT_TOLERANCE
        if half <= 0 or away.any():
            first = int(np.flatnonzero(away)[0]) if away.any() else 0
            raise ValueError(
                f"Slide {self.sample.name}: {self.path}: {max(away.sum(), 1)} patches do not lie around their spots, for "
                f"example {barcodes[first]}: corner {corners[first].tolist()}, spot {centers[first].tolist()}. The "
                "patches and the expression are of different versions; download both again."
            )
        return 2 * half / self.size

    def blocks(self, barcodes: Sequence[str]) -> Iterator[np.ndarray]:
        """The patches of these spots, in this order, some hundred at a time."""
        rows = self._rows(barcodes)
        with h5py.File(self.path, "r") as file:
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
            repair = "python preprocess/prepare_hest.py --overwrite (with its other flags)"
            verify_cache(path, expected, list(joined.obs_names), centers, lambda: repair)
            return
        write_cache(path, identity, list(joined.obs_names), centers, self.blocks(barcodes))

    def _rows(self, barcodes: Sequence[str]) -> np.ndarray:
        return pd.Index(self.barcodes).get_indexer(list(barcodes))


def microns_of_patches(path: Path) -> float | None:
    """Micrometres per pixel of the patches in a cache."""
    return read_identity(path).microns_per_pixel


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
