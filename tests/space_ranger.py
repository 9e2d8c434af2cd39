"""Writes a folder like Space Ranger's outs/, of either generation, for a picture that is given."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
from PIL import Image
from scipy import sparse


@dataclass(frozen=True)
class Outs:
    """What was written: pixels (N, 2) are (x, y); counts (N, G); only `in_tissue` spots have counts."""

    folder: Path
    image: Path
    barcodes: list[str]
    array_row: np.ndarray
    array_col: np.ndarray
    pixels: np.ndarray
    in_tissue: np.ndarray
    counts: np.ndarray
    ids: list[str]
    symbols: list[str]


def write_outs(
    folder: Path,
    picture: np.ndarray,
    symbols: Sequence[str],
    *,
    generation: int = 2,
    matrix: str = "h5",
    pitch: float = 60.0,
    margin: float = 40.0,
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> Outs:
    """Hexagonal spots over a picture (H, W, 3), every fifth one beside the tissue; counts depend on the seed alone.

    generation: 1 = tissue_positions_list.csv without a header, 2 = tissue_positions.csv, 3 = the same as .parquet.
    matrix: "h5", "h5 v2", "mtx".
    """
    random = np.random.default_rng(seed)
    height, width = picture.shape[:2]
    rows = int((height - 2 * margin) // (pitch * np.sqrt(0.75))) + 1
    spots = [
        (row, column, margin + column * pitch / 2, margin + row * pitch * np.sqrt(0.75))
        for row in range(rows)
        for column in range(row % 2, int((width - 2 * margin) // (pitch / 2)) + 1, 2)
    ]
    array_row, array_col, x, y = (
        np.array(column) for column in zip(*[spots[i] for i in random.permutation(len(spots))])
    )
    in_tissue = np.arange(len(x)) % 5 != 0
    barcodes = [f"{''.join(random.choice(list('ACGT'), 12))}{i:03d}-1" for i in range(len(x))]
    counts = random.poisson(random.gamma(2, 3, (len(x), len(symbols))))
    ids = list(ids) if ids is not None else [f"ENSG{i:011d}" for i in range(1, len(symbols) + 1)]
    image = folder.parent / "fullres.tif"
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    Image.fromarray(picture).save(image)
    Image.fromarray(picture).resize((width // 4, height // 4)).save(spatial / "tissue_hires_image.png")
    scale = (width // 4) / width
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": 0.65 * pitch, "fiducial_diameter_fullres": pitch}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    lines = [
        f"{barcode},{int(inside)},{row},{column},{py:.3f},{px:.3f}"
        for barcode, inside, row, column, px, py in zip(barcodes, in_tissue, array_row, array_col, x, y)
    ]
    header = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    if generation == 1:
        (spatial / "tissue_positions_list.csv").write_text("\n".join(lines) + "\n")
    else:
        (spatial / "tissue_positions.csv").write_text("\n".join([header, *lines]) + "\n")
    if generation == 3:
        csv = spatial / "tissue_positions.csv"
        pd.read_csv(csv).to_parquet(csv.with_suffix(".parquet"), index=False)
        csv.unlink()
    kept = np.flatnonzero(in_tissue)[::-1]  # Space Ranger sorts its barcodes; the order differs from the positions
    stored = sparse.csc_matrix(counts[kept].T)
    _write_matrix(folder, matrix, stored, [barcodes[i] for i in kept], ids, list(symbols))
    return Outs(
        folder, image, barcodes, array_row, array_col, np.stack([x, y], axis=1), in_tissue, counts, ids, list(symbols)
    )


def _write_matrix(
    folder: Path, kind: str, stored: sparse.csc_matrix, barcodes: list[str], ids: list[str], symbols: list[str]
) -> None:
    if kind == "mtx":
        target = folder / "filtered_feature_bc_matrix"
        target.mkdir()
        with gzip.open(target / "matrix.mtx.gz", "wb") as file:
            scipy.io.mmwrite(file, stored)
        with gzip.open(target / "barcodes.tsv.gz", "wt") as file:
            file.write("".join(f"{barcode}\n" for barcode in barcodes))
        with gzip.open(target / "features.tsv.gz", "wt") as file:
            file.write("".join(f"{i}\t{symbol}\tGene Expression\n" for i, symbol in zip(ids, symbols)))
        return
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix" if kind == "h5" else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(stored, name)
        group["shape"] = np.array(stored.shape)
        group["barcodes"] = np.array(barcodes, dtype="S")
        names = group.create_group("features") if kind == "h5" else group
        names["id" if kind == "h5" else "genes"] = np.array(ids, dtype="S")
        names["name" if kind == "h5" else "gene_names"] = np.array(symbols, dtype="S")
        if kind == "h5":
            names["feature_type"] = np.array(["Gene Expression"] * len(ids), dtype="S")


@dataclass(frozen=True)
class Bins:
    """What was written of Visium HD, by its finest bins: counts (rows, columns, genes), is_tissue (rows, columns).

    microns: of a pixel.  origin: pixel (x, y) of the corner of the array; its axes are those of the image.
    """

    folder: Path
    counts: np.ndarray
    is_tissue: np.ndarray
    microns: float
    origin: float


def write_hd_outs(
    folder: Path,
    symbols: Sequence[str],
    *,
    sizes: Sequence[int] = (2, 8),
    shape: tuple[int, int] = (112, 140),
    seed: int = 0,
) -> Bins:
    """An outs/ of Visium HD: binned_outputs/square_*um with tissue_positions.parquet, for each of `sizes` (um).

    shape: rows and columns of bins of 2 um.  All sizes hold the same counts; a bin is under tissue where half of it is.
    """
    random = np.random.default_rng(seed)
    finest, microns, origin = min(sizes), 0.5, 40.0
    rows, columns = (length * 2 // finest for length in shape)
    counts = random.poisson(0.3, (rows, columns, len(symbols)))
    row, column = np.mgrid[0:rows, 0:columns]
    is_tissue = row + column > rows // 4  # a corner is glass
    for size in sizes:
        side = size // finest
        blocks = (rows // side, side, columns // side, side)
        _write_bins(
            folder / "binned_outputs" / f"square_{size:03d}um",
            size,
            counts.reshape(*blocks, -1).sum(axis=(1, 3)),
            is_tissue.reshape(blocks).mean(axis=(1, 3)) >= 0.5,
            symbols,
            microns,
            origin,
        )
    return Bins(folder, counts, is_tissue, microns, origin)


def _write_bins(
    folder: Path,
    size: int,
    counts: np.ndarray,
    is_tissue: np.ndarray,
    symbols: Sequence[str],
    microns: float,
    origin: float,
) -> None:
    rows, columns = is_tissue.shape
    (folder / "spatial").mkdir(parents=True)
    row, column = (axis.ravel() for axis in np.mgrid[0:rows, 0:columns])
    names = np.array([f"s_{size:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)])
    table = pd.DataFrame(
        {
            "barcode": names,
            "in_tissue": is_tissue.ravel().astype(np.int64),
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": origin + (row + 0.5) * size / microns,
            "pxl_col_in_fullres": origin + (column + 0.5) * size / microns,
        }
    )
    order = np.random.default_rng(size).permutation(len(table))
    table.iloc[order].to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False)
    factors = {"spot_diameter_fullres": size / microns, "bin_size_um": float(size), "microns_per_pixel": microns}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    under = np.flatnonzero(is_tissue.ravel())
    stored = sparse.csc_matrix(counts.reshape(rows * columns, -1)[under].T)
    ids = [f"ENSG{i:011d}" for i in range(1, len(symbols) + 1)]
    _write_matrix(folder, "h5", stored, names[under].tolist(), ids, list(symbols))
