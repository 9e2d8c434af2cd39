"""Slides in any AnnData file: read by rows, so that a file of gigabytes needs no more memory than its counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from datasets.tables.array_grid import grid_of_pixels
from datasets.tables.counts import are_numbered, wrong_counts
from datasets.tables.h5ad import frame_of
from datasets.tables.sparse import Stored, checked_sparse, runs_of_lines, stacked
from datasets.tables.spot_table import check_spots
from preprocess.raw.gene_map import SYMBOL_COLUMNS
from preprocess.raw.hest import array_positions, is_in_tissue
from preprocess.raw.space_ranger.matrices import GeneCounts
from preprocess.raw.space_ranger.output import SMALLER, checked_factors, not_added_up, with_bin_size
from utils.text import checked_names, is_ensembl, some
from utils.untrusted.hdf5 import opened_hdf5

_WHAT = "an AnnData file (.h5ad)"
_REMEDY = "Write it again with AnnData (adata.write_h5ad(path)), or take the original file again."
_AT_A_TIME = 1 << 24  # counts
_OF_SPOTS = ("array_col", "array_row", "in_tissue")
_SPOT_NAME = re.compile(r"\d+(\.\d+)?x\d+(\.\d+)?")


@dataclass(frozen=True)
class AnnDataFile:
    """A file, and where in it the counts and names are.

    layer: of the counts; None for X.  is_raw: those of `raw`.  gene_column: of var, with symbols; None for its index alone.
    slide_column, patient_column: of obs; None where the file is one slide, or patients are not in it.
    """

    path: Path
    layer: str | None = None
    is_raw: bool = False
    gene_column: str | None = None
    slide_column: str | None = None
    patient_column: str | None = None

    @property
    def place(self) -> str:
        """Where the counts are, as h5py calls it."""
        return "raw/X" if self.is_raw else "X" if self.layer is None else f"layers/{self.layer}"


@dataclass(frozen=True)
class SlideInFile:
    """Rows (N,) of a slide, in the order of the file; its name and patient, None where no column tells them."""

    name: str | None
    patient: str | None
    rows: np.ndarray


@dataclass(frozen=True)
class SlideContent:
    """counts and spots (with a column `barcode`) of a slide; factors: of Space Ranger, where the file kept them or
    the names of bins tell; smaller: (width, height) of the images that it kept, as in `SpaceRangerOutput`."""

    counts: GeneCounts
    spots: pd.DataFrame
    factors: dict[str, float]
    smaller: dict[str, tuple[int, int]]
    notes: list[str]


def find_slides(source: AnnDataFile) -> list[SlideInFile]:
    """Find the slides of a file, in the order of their names.

    Raises FileNotFoundError, or ValueError naming the file, and the columns that it has where one is missing, empty for
    some spots, or gives a slide two patients.
    """
    wanted = [name for name in (source.slide_column, source.patient_column) if name is not None]
    with opened_hdf5(source.path, _WHAT, _REMEDY) as file:
        obs = frame_of(file["obs"], wanted)
        columns = _names_in(file["obs"])
    missing = [name for name in wanted if name not in obs]
    if missing:
        raise ValueError(f"{source.path}: obs has no column {some(missing)}; it has {some(columns, 12) or 'none'}.")
    words = obs[wanted].astype(str)
    empty = [name for name in wanted if words[name].str.strip().isin(["", "nan", "None", "<NA>"]).any()]
    if empty:
        raise ValueError(f"{source.path}: {some(empty)} is empty for some spots. Fill it, or leave these spots out.")
    names = words[source.slide_column] if source.slide_column else pd.Series("", index=words.index)
    slides = []
    for name in sorted(set(names)):
        rows = np.flatnonzero(names.to_numpy() == name)
        patients = sorted(set(words[source.patient_column].to_numpy()[rows])) if source.patient_column else [None]
        if len(patients) > 1:
            raise ValueError(
                f"{source.path}: {f'slide {name}' if name else 'the file'} is of the patients {some(patients)}. A slide is of "
                "one: give the column of obs that tells slides apart (--slide_column)."
            )
        slides.append(SlideInFile(name or None, patients[0], rows))
    return slides


def read_slide(source: AnnDataFile, slide: SlideInFile) -> SlideContent:
    """Read counts, genes, positions and centres of one slide; spots off the tissue (in_tissue) are left out.

    Raises ValueError naming the file if the counts are none, with where else in it they may be; if centres are missing;
    or if names of spots repeat.
    """
    with opened_hdf5(source.path, _WHAT, _REMEDY) as file:
        obs = frame_of(file["obs"], _OF_SPOTS)
        if "obsm/spatial" not in file:
            raise ValueError(
                f"{source.path} has no obsm['spatial'], the centres of the spots in pixels of the image (x, y); obsm has "
                f"{some(_names_in(file['obsm'])) if 'obsm' in file else 'nothing'}. Put them there and write the file again."
            )
        spatial = np.asarray(file["obsm/spatial"][()], dtype=np.float64)
        if spatial.shape != (len(obs), 2):
            raise ValueError(
                f"{source.path}: obsm['spatial'] is {spatial.shape}, expected ({len(obs)}, 2): x, y in pixels."
            )
        table = AnnData(obs=obs.iloc[slide.rows], obsm={"spatial": spatial[slide.rows]})
        kept = is_in_tissue(table, str(source.path))
        if not kept.any():
            raise ValueError(f"{source.path}: in_tissue is 0 for all {len(kept)} spots of {slide.name or 'it'}.")
        notes = [] if kept.all() else [f"left out, as in_tissue is 0: {int((~kept).sum())} spots"]
        spots, array = _spot_table(table[kept].copy(), str(source.path))
        counts = _gene_counts(file, source, slide.rows[kept], spots["barcode"].tolist())
        factors, smaller = _of_space_ranger(file, slide.name)
        factors = with_bin_size(factors, spots["barcode"].tolist(), source.path)
        return SlideContent(counts, spots, factors, smaller, notes + array + not_added_up(factors))


def _spot_table(table: AnnData, source: str) -> tuple[pd.DataFrame, list[str]]:
    """The spots, and a note where their places on the array had to be found from the pixels."""
    spatial = table.obsm["spatial"]
    if not np.isfinite(spatial).all():
        raise ValueError(f"{source}: obsm['spatial'] holds values that are no numbers.")
    notes = []
    if {"array_col", "array_row"} <= set(table.obs.columns) or all(map(_SPOT_NAME.fullmatch, table.obs_names)):
        grid = array_positions(table, spatial, source)
    else:
        try:
            array = grid_of_pixels(spatial)
        except ValueError as error:
            raise ValueError(f"{source}: {error} Are there several slides in it (--slide_column)?") from error
        grid = array.grid
        notes = [f"no array_row and array_col: from the pixels, a {array.kind} array of {array.pitch_px:.1f} px"]
    if shared := int(pd.DataFrame(grid).duplicated().sum()):
        raise ValueError(
            f"{source}: {shared} of {len(grid)} spots have the place on the array of another one. Are there several slides in "
            "it (--slide_column)?"
        )
    spots = pd.DataFrame(
        {
            "x": grid[:, 0],
            "y": grid[:, 1],
            "pixel_x": spatial[:, 0],
            "pixel_y": spatial[:, 1],
            "barcode": checked_names(table.obs_names.tolist(), "spots", source),
        }
    )
    if not spots["barcode"].is_unique:
        twice = spots["barcode"][spots["barcode"].duplicated()].tolist()
        raise ValueError(
            f"{source}: spots of one slide share a name: {some(twice)}. Use adata.obs_names_make_unique()."
        )
    return check_spots(spots, source), notes


def _gene_counts(file: h5py.File, source: AnnDataFile, rows: np.ndarray, barcodes: list[str]) -> GeneCounts:
    if source.place not in file:
        there = [place for place in _places(file) if place != source.place]
        raise ValueError(f"{source.path} has no {source.place}; counts could be in {some(there) or 'nothing'}.")
    stored = file["raw/var" if source.is_raw else "var"]
    ids = checked_names(frame_of(stored).index.tolist(), "genes", source.path)
    column = source.gene_column
    if column is None and are_numbered(ids):
        raise ValueError(
            f"{source.path}: its genes have no names but 0, 1, 2, ...; var has the columns "
            f"{some(_names_in(stored), 12) or 'none'}. Say which holds the names: --gene_column NAME."
        )
    # The symbols that lie beside ids, as CELLxGENE writes them; spike-ins have no such id.
    if column is None and sum(map(is_ensembl, ids)) > len(ids) / 2:
        column = next((name for name in _names_in(stored) if name.lower() in SYMBOL_COLUMNS), None)
    var = frame_of(stored, [column] if column else [])
    if column is not None and column not in var:
        raise ValueError(f"{source.path}: var has no column {column}; it has {some(_names_in(stored), 12) or 'none'}.")
    symbols = ids if column is None else [str(name) for name in var[column]]
    symbols = [symbol if symbol not in ("", "nan", "None") else gene for symbol, gene in zip(symbols, ids, strict=True)]
    shape = _shape_of(file[source.place])
    if shape[1] != len(ids) or (len(rows) and rows[-1] >= shape[0]):
        raise ValueError(f"{source.path}: {source.place} is {shape}, but {len(ids)} genes are named.")
    parts = []
    for part in _parts(file[source.place], rows):
        if wrong := wrong_counts(part.data):
            raise ValueError(_no_counts(file, source, float(part.data[wrong[0][1]][0])))
        parts.append(part.astype(np.int32))
        del part  # not held while the next one is read, and the stack is made
    matrix = stacked(parts)
    if not _by_rows(file[source.place]):
        matrix = matrix.T.tocsr()
    return GeneCounts(matrix, barcodes, ids, checked_names(symbols, "genes", source.path), source.path)


def _parts(stored: h5py.Group | h5py.Dataset, rows: np.ndarray) -> Iterator[sparse.csr_matrix]:
    """The rows of a matrix, some at a time; of one that is compressed by columns its columns, as rows."""
    num_rows, num_columns = _shape_of(stored)
    if isinstance(stored, h5py.Dataset):
        step = max(1, _AT_A_TIME // max(1, num_columns))
        for start in range(0, num_rows, step):
            wanted = rows[(rows >= start) & (rows < start + step)]
            if len(wanted):
                yield sparse.csr_matrix(stored[start : start + step][wanted - start])
        return
    by_rows = _by_rows(stored)
    indptr = stored["indptr"][:].astype(np.int64)
    if len(indptr) != (num_rows if by_rows else num_columns) + 1:
        raise ValueError(
            f"its sparse matrix is damaged: indptr has {len(indptr)} entries, the shape is {_shape_of(stored)}"
        )
    for start, stop in runs_of_lines(indptr, _AT_A_TIME):
        wanted = rows[(rows >= start) & (rows < stop)] - start if by_rows else rows
        if not len(wanted):
            continue
        first, last = indptr[start], indptr[stop]
        shape = (stop - start, num_columns) if by_rows else (num_rows, stop - start)
        data, indices = stored["data"][first:last], stored["indices"][first:last]
        part = checked_sparse(Stored(data, indices, indptr[start : stop + 1] - first, shape, by_rows=by_rows))
        part = part if len(wanted) == part.shape[0] else part[wanted]
        yield part if by_rows else part.T.tocsr()


def _shape_of(stored: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    """Rows and columns. Raises ValueError, without the file, for what is no matrix."""
    shape = stored.shape if isinstance(stored, h5py.Dataset) else stored.attrs.get("shape", ())
    kind = "array" if isinstance(stored, h5py.Dataset) else str(stored.attrs.get("encoding-type"))
    if len(shape) != 2 or kind not in ("array", "csr_matrix", "csc_matrix"):
        raise ValueError(f"{stored.name} is a {kind} of the shape {tuple(shape)}, expected a dense, csr or csc matrix")
    return int(shape[0]), int(shape[1])


def _by_rows(stored: h5py.Group | h5py.Dataset) -> bool:
    return isinstance(stored, h5py.Dataset) or stored.attrs["encoding-type"] == "csr_matrix"


def _no_counts(file: h5py.File, source: AnnDataFile, value: float) -> str:
    """What to say of values that are no counts, with where in the file counts seem to be."""
    found = [place for place in _places(file) if place != source.place and _seems_counts(file[place])]
    flags = ["--raw" if place == "raw/X" else f"--layer {place.partition('/')[2]}" for place in found if place != "X"]
    flags += ["neither --layer nor --raw (X)"] if "X" in found else []
    remedy = f"Counts seem to be in {some(found)}: give {' or '.join(flags)}." if found else (
        "Nothing else in it holds counts: take the file from before sc.pp.normalize_total and sc.pp.log1p."
    )  # fmt: skip
    return (
        f"{source.path}: {source.place} holds {value:g} where raw counts were expected. Normalised, logarithmic or scaled "
        f"values cannot be turned back. {remedy}"
    )


def _places(file: h5py.File) -> list[str]:
    """Where a file may hold counts."""
    layers = [f"layers/{name}" for name in _names_in(file["layers"])] if "layers" in file else []
    return [place for place in ("X", *layers, "raw/X") if place in file]


def _seems_counts(stored: h5py.Group | h5py.Dataset) -> bool:
    """Whether the first values are counts, and not all zero."""
    if isinstance(stored, h5py.Group) and "data" not in stored:
        return False
    first = stored[:100] if isinstance(stored, h5py.Dataset) else stored["data"][:10_000]
    return first.dtype.kind in "biuf" and bool(first.any()) and not wrong_counts(first.ravel())


def _of_space_ranger(file: h5py.File, slide: str | None) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    """Space Ranger's scale factors and the sizes of its smaller images, as scanpy keeps them for every library; none where
    it is not clear which are meant.

    slide: its name where a column tells slides apart; then only the library of this name is its own.
    """
    libraries = file.get("uns/spatial", {})
    names = list(libraries)
    name = slide if slide in names else names[0] if slide is None and len(names) == 1 else None
    if name is None or f"{name}/scalefactors" not in libraries:
        return {}, {}
    stored, images = libraries[name]["scalefactors"], libraries[name].get("images", {})
    factors = checked_factors({key: float(stored[key][()]) for key in stored if stored[key].shape == ()})
    pictures = {key: images[key] for key in SMALLER if key in images and isinstance(images[key], h5py.Dataset)}
    return factors, {key: picture.shape[1::-1] for key, picture in pictures.items() if len(picture.shape) > 1}


def _names_in(stored: h5py.Group | h5py.Dataset) -> list[str]:
    names = stored.dtype.names or () if isinstance(stored, h5py.Dataset) else stored
    return [name for name in names if name not in ("_index", "__categories")]
