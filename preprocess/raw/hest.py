"""What HEST-1k keeps of a sample: expression, patches, metadata; read, checked and told apart by patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import cKDTree

from datasets.tables.counts import check_counts, gene_names
from datasets.tables.genes_in_common import check_one_kind
from datasets.tables.h5ad import read_h5ad
from datasets.tables.spot_table import GREATEST_COORDINATE, check_spots
from preprocess.raw.gene_map import GIVE_MAP, symbols_of, with_genes
from utils.files import reading
from utils.text import brief, checked_names, is_ensembl, some
from utils.untrusted.text import cells_of, text_of

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
# What is read of the metadata of a sample.
_COLUMNS = (
    "patient",
    "dataset_title",
    "species",
    "pixel_size_um_estimated",
    "pixel_size_um_embedded",
    "fullres_px_width",
    "fullres_px_height",
)
_YES, _NO = ("1", "1.0", "true"), ("0", "0.0", "false")


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


@dataclass(frozen=True)
class HestExpression:
    """counts (N, G) and spot table of a sample, under the same ids "XxY"; notes: what was left out or renamed."""

    counts: AnnData
    spots: pd.DataFrame
    notes: list[str]


def read_metadata(path: Path) -> pd.DataFrame:
    """Read the metadata table (HEST_v1_1_0.csv or another version), indexed by id; rows that say the same are one.

    Raises ValueError naming the columns that are missing. A sample may have several rows: see `check_metadata`.
    """
    with reading(path, "a table of metadata"):
        table = cells_of(text_of(path), ",")
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("its rows have a cell more than its first line names columns")
    missing = [name for name in ("id", *_COLUMNS[:3]) if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; found {some(list(table.columns), 8)}. Expected HEST_v*.csv."
        )
    read = ["id", *(name for name in _COLUMNS if name in table)]
    return table.drop_duplicates(read).set_index("id")


def check_metadata(metadata: pd.DataFrame, samples: Sequence[str], path: Path) -> None:
    """Raise ValueError for samples whose rows contradict each other, each with what they say. path: of the table."""
    contradictions = []
    for sample in samples:
        rows = metadata.loc[[sample]]
        for column in [name for name in _COLUMNS if name in rows and rows[name].nunique() > 1]:
            contradictions.append(f"{sample} has the {column} {' and '.join(map(brief, rows[column].unique()))}")
    if contradictions:
        raise ValueError(
            f"{path} has rows that contradict each other: {'; '.join(contradictions[:10])}. Keep the row of each sample that "
            "is right, or give the table of this version of HEST: --metadata FILE."
        )


def patients_of(metadata: pd.DataFrame, samples: Sequence[str]) -> dict[str, str]:
    """Map samples to patients. The table numbers patients within a study, so the study is part of the name; samples of a
    study that names no patient count as one, since sections of one person must not be split between training and test; and
    so do names that differ in large and small letters alone.

    Raises ValueError for a sample without a study, which cannot be told from others.
    """
    patients: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for sample in samples:
        title, patient = str(metadata.loc[sample, "dataset_title"]), str(metadata.loc[sample, "patient"])
        if not title.strip():
            raise ValueError(f"The metadata name no study (dataset_title) of {sample}, so its patient is not known.")
        study = f"{_slug(title)[:24].strip('-')}-{hashlib.sha256(title.encode()).hexdigest()[:4]}"
        patients[sample] = f"{study}-{_slug(patient)}" if patient.strip() else study
        patients[sample] = spelled.setdefault(patients[sample].casefold(), patients[sample])
    return patients


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def pixels(text: str) -> int:
    """Read a length in pixels; 0 where the table has none."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return 0


def check_image_size(sample: HestSample, size: tuple[int, int]) -> list[str]:
    """Raise ValueError if the whole-slide image has another (width, height) than the metadata say, beyond one percent.

    returns: a warning where they say none.
    """
    if 0 in sample.image_size:
        return [f"WARNING: the metadata do not say how large {sample.image} is, so its size was not checked."]
    if any(abs(found - stated) > 0.01 * stated for found, stated in zip(size, sample.image_size, strict=True)):
        raise ValueError(
            f"Slide {sample.name}: {sample.image} has {size[0]} x {size[1]} pixels, the metadata say {sample.image_size[0]} x "
            f"{sample.image_size[1]} (fullres_px_width, fullres_px_height): it is scaled, turned or of another slide. Take the "
            "image of HEST again, or, where the table is wrong, correct it: --metadata FILE."
        )
    return []


def pixel_size(row: Mapping[str, str]) -> float | None:
    """Find micrometres per pixel at level 0: estimated from the spots, else as the image says."""
    for column in ("pixel_size_um_estimated", "pixel_size_um_embedded"):
        try:
            size = float(row.get(column, ""))
        except ValueError:
            continue
        if 0 < size < 100:
            return size
    return None


def check_gene_names(samples: Sequence[HestSample], gene_map: Mapping[str, str] | None) -> None:
    """Raise ValueError if some samples list Ensembl ids, others symbols, and no map brings them together."""
    if gene_map is None:
        check_one_kind({sample.name: gene_names(sample.expression) for sample in samples}, GIVE_MAP)


def read_expression(
    sample: HestSample, with_patch: Collection[str] = (), gene_map: Mapping[str, str] | None = None
) -> HestExpression:
    """Read a sample without control probes and spots off the tissue, Ensembl ids as symbols where the map has them.

    with_patch: barcodes of spots that have a patch; HEST made patches on the tissue, so they go before `in_tissue`.
    Raises FileNotFoundError, or ValueError naming sample and file if it is damaged, lacks positions, or has no spot on
    the tissue.
    """
    source = f"Slide {sample.name}: {sample.expression}"
    data = read_h5ad(sample.expression, "the expression of a sample (.h5ad)", ("in_tissue", "array_col", "array_row"))
    if "spatial" not in data.obsm or np.shape(data.obsm["spatial"])[1:] != (2,):
        raise ValueError(f"{source} lacks obsm['spatial'], the centres in pixels (x, y).")
    is_left_out = ~(is_in_tissue(data, source) | data.obs_names.isin(list(with_patch)))
    if is_left_out.all():
        raise ValueError(
            f"{source}: in_tissue is 0 for all {data.n_obs} spots, and none has a patch. Correct the column, or leave it out."
        )
    notes = [f"left out, as in_tissue is 0 and no patch says otherwise: {is_left_out.sum()} spots"]
    data = data[~is_left_out, [not gene.startswith(_CONTROLS) for gene in data.var_names]]
    spatial = np.asarray(data.obsm["spatial"], dtype=np.float64)
    if not np.isfinite(spatial).all():
        raise ValueError(f"{source}: obsm['spatial'] holds values that are no numbers.")
    grid = array_positions(data, spatial, source)
    spots = pd.DataFrame(
        {
            "x": grid[:, 0],
            "y": grid[:, 1],
            "pixel_x": spatial[:, 0],
            "pixel_y": spatial[:, 1],
            "barcode": checked_names(data.obs_names.tolist(), "spots", source),
        }
    )
    spots = check_spots(spots, source)
    counts = check_counts(data.X, list(spots.index), data.var_names.tolist(), source=source)
    symbols = symbols_of(counts.var_names.tolist(), gene_map) if any(map(is_ensembl, counts.var_names)) else None
    if symbols is not None:
        counts = with_genes(counts, symbols, list(dict.fromkeys(symbols)), source)
        remaining = [gene for gene in counts.var_names if is_ensembl(gene)]
        notes += [f"{len(remaining)} of {counts.n_vars} genes are under an Ensembl id"] if remaining else []
    return HestExpression(counts, spots, notes if is_left_out.any() else notes[1:])


def is_in_tissue(data: AnnData, source: str) -> np.ndarray:
    """Tell, (N,) bool, what in_tissue says, as a number, a flag or a text; True without it. ValueError naming `source`."""
    if "in_tissue" not in data.obs:
        return np.ones(data.n_obs, dtype=bool)
    words = data.obs["in_tissue"].astype(str).str.lower()
    strange = sorted(set(words) - {*_YES, *_NO})
    if strange:
        raise ValueError(f"{source}: in_tissue should be 0 or 1, found {some(strange)}.")
    return words.isin(_YES).to_numpy()


def array_positions(data: AnnData, spatial: np.ndarray, source: str) -> np.ndarray:
    """Find (N, 2) integer array positions, column x and row y, the axes pointing as those of the image.

    From array_col and array_row, else from names like "10x13", else from the pixels by the distance of neighbors. The
    columns of samples of the older arrays are exchanged in HEST, so the pixels decide which one runs along x.
    Raises ValueError naming `source` if a position is missing or beyond any array.
    """
    if {"array_col", "array_row"} <= set(data.obs.columns):
        columns = data.obs[["array_col", "array_row"]].apply(pd.to_numeric, errors="coerce")
        grid = columns.to_numpy(dtype=np.float64)
    elif all(re.fullmatch(r"\d+(\.\d+)?x\d+(\.\d+)?", name) for name in data.obs_names):
        grid = np.array([name.split("x") for name in data.obs_names], dtype=np.float64)
    elif len(spatial) > 1:
        distances, _ = cKDTree(spatial).query(spatial, k=2)
        grid = (spatial - spatial.min(axis=0)) / np.median(distances[:, 1])
    else:
        grid = np.zeros((len(spatial), 2))
    is_wrong = ~(np.abs(grid) <= GREATEST_COORDINATE).all(axis=1)
    if is_wrong.any():
        raise ValueError(f"{source}: array_col or array_row is missing for {is_wrong.sum()} spots.")
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
