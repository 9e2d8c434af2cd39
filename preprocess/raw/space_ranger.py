"""Read Space Ranger's `outs/` of every generation: positions, counts with ids and symbols, scale factors."""

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

from datasets.tables.positions import Positions, read_positions
from preprocess.raw.files import files_below, find_file
from utils.text import some

CONTENTS = (
    "Space Ranger's outs/: spatial/tissue_positions.csv (or tissue_positions_list.csv before 2.0) and "
    "filtered_feature_bc_matrix.h5 or the folder filtered_feature_bc_matrix/"
)
PITCH_UM, PITCH_SPOT_UM = 100.0, 65.0  # centre to centre of neighbors; what spot_diameter_fullres stands for
_EXPRESSION = "Gene Expression"
_READ_ERRORS = (OSError, KeyError, EOFError, UnicodeDecodeError, ValueError)


@dataclass(frozen=True)
class GeneCounts:
    """matrix (barcodes, genes) csr raw counts; ids and symbols of the genes, equal where the file has only one."""

    matrix: sparse.csr_matrix
    barcodes: list[str]
    ids: list[str]
    symbols: list[str]
    path: Path


@dataclass(frozen=True)
class SpaceRangerOutput:
    """positions: spots under tissue only.  scale_factors: those of scalefactors_json.json, empty without it.
    hires_size: (width, height) of tissue_hires_image, None without it."""

    folder: Path
    positions: Positions
    positions_path: Path
    counts: GeneCounts
    scale_factors: dict[str, float]
    hires_size: tuple[int, int] | None


def read_outs(source: Path) -> SpaceRangerOutput:
    """Read a folder `outs/`, or one that holds it, also with the file names of a GEO download (<sample>_<name>.gz).

    Raises FileNotFoundError / ValueError naming what is missing, unreadable or inconsistent.
    """
    files = files_below(source)
    positions_path = _positions_file(files, source)
    positions = read_positions(positions_path)
    if positions.grid is None:
        raise ValueError(f"{positions_path} has no array positions ({positions.kind}). Expected {CONTENTS}.")
    under_tissue = positions.under_tissue()
    if len(under_tissue) == 0:
        raise ValueError(
            f"{positions_path}: none of {len(positions)} spots is under tissue (in_tissue is 0 everywhere)."
        )
    return SpaceRangerOutput(
        folder=source,
        positions=under_tissue,
        positions_path=positions_path,
        counts=_read_counts(files, source),
        scale_factors=_scale_factors(files),
        hires_size=_hires_size(files),
    )


def _positions_file(files: Sequence[Path], source: Path) -> Path:
    """The table with a header where there are both."""
    for pattern in (r"(.*_)?tissue_positions\.csv(\.gz)?", r"(.*_)?tissue_positions_list\.(csv|txt)(\.gz)?"):
        found = find_file(files, pattern, f"Spot positions in {source}", required=False)
        if found is not None:
            return found
    if any(path.name.endswith("tissue_positions.parquet") for path in files):
        raise ValueError(
            f"{source} is Visium HD (tissue_positions.parquet): its bins are no spots of 55 um. Export one bin size as "
            "tissue_positions.csv with its filtered_feature_bc_matrix.h5 and prepare that folder."
        )
    raise FileNotFoundError(
        f"{source} holds no tissue_positions.csv and no tissue_positions_list.csv. Expected {CONTENTS}."
    )


def _read_counts(files: Sequence[Path], source: Path) -> GeneCounts:
    path = find_file(
        files, r"(.*_)?filtered_(feature|gene)_bc_matri(x|ces)(_h5)?\.h5", f"Counts in {source}", required=False
    )
    folder = None if path else _matrix_folder(files, source)
    try:
        counts = _read_h5(path) if path else _read_matrix_market(folder)
    except _READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path or folder} is not a readable matrix of Space Ranger: {reason}") from error
    values = counts.matrix.data
    if len(values) and (values.min() < 0 or (values != np.round(values)).any()):
        wrong = values[(values < 0) | (values != np.round(values))][0]
        raise ValueError(
            f"{counts.path} holds {wrong:g} where raw counts were expected. Take the matrix of Space Ranger."
        )
    twice = pd.Index(counts.barcodes)[pd.Index(counts.barcodes).duplicated()]
    if len(twice):
        raise ValueError(f"{counts.path} lists barcodes twice: {some(twice.tolist())}.")
    return counts


def _matrix_folder(files: Sequence[Path], source: Path) -> Path:
    folders = sorted({path.parent for path in files if path.name in ("matrix.mtx", "matrix.mtx.gz")})
    filtered = [folder for folder in folders if "filtered" in str(folder.relative_to(source))]
    found = filtered or [folder for folder in folders if "raw" not in str(folder.relative_to(source))]
    if len(found) != 1:
        what = (
            f"{len(found)} matrix folders ({some(found)})" if found else "no filtered_feature_bc_matrix, .h5 or folder"
        )
        raise FileNotFoundError(f"{source} holds {what}. Expected {CONTENTS}.")
    return found[0]


def _read_h5(path: Path) -> GeneCounts:
    """Version 3 (group `matrix` with `features`) and version 2 (one group a genome) of the 10x format."""
    with h5py.File(path, "r") as file:
        group = file["matrix"] if "matrix" in file else file[_only_genome(file, path)]
        shape = tuple(int(length) for length in group["shape"][:])  # genes, barcodes
        stored = (group["data"][:], group["indices"][:], group["indptr"][:])
        barcodes = group["barcodes"].asstr()[:].tolist()
        is_version_3 = "features" in group
        ids = group["features/id" if is_version_3 else "genes"].asstr()[:].tolist()
        symbols = group["features/name" if is_version_3 else "gene_names"].asstr()[:].tolist()
        kinds = group["features/feature_type"].asstr()[:] if "features/feature_type" in group else None
    matrix = sparse.csc_matrix(stored, shape=shape).T.tocsr()
    return _genes_only(GeneCounts(matrix, barcodes, ids, symbols, path), kinds)


def _only_genome(file: h5py.File, path: Path) -> str:
    genomes = [name for name in file if isinstance(file[name], h5py.Group) and "barcodes" in file[name]]
    if len(genomes) != 1:
        raise ValueError(f"expected the group 'matrix' or one genome, found {', '.join(file) or 'nothing'}")
    return genomes[0]


def _read_matrix_market(folder: Path) -> GeneCounts:
    """matrix.mtx, barcodes.tsv and features.tsv (genes.tsv before version 3), compressed or not."""
    with _opened(folder, "matrix.mtx") as file:
        matrix = sparse.csr_matrix(scipy.io.mmread(file).T)
    barcodes = _lines(folder, "barcodes.tsv")
    genes = [line.split("\t") for line in _lines(folder, "features.tsv", "genes.tsv")]
    if matrix.shape != (len(barcodes), len(genes)):
        raise ValueError(
            f"the matrix is {matrix.shape[::-1]}, but there are {len(genes)} genes and {len(barcodes)} barcodes"
        )
    kinds = np.array([columns[2] for columns in genes]) if len(genes[0]) > 2 else None
    ids, symbols = [columns[0] for columns in genes], [columns[min(1, len(columns) - 1)] for columns in genes]
    return _genes_only(GeneCounts(matrix, barcodes, ids, symbols, folder), kinds)


def _genes_only(counts: GeneCounts, kinds: np.ndarray | None) -> GeneCounts:
    """Without antibody, CRISPR and other features."""
    if kinds is None or (kinds == _EXPRESSION).all():
        return counts
    keep = np.flatnonzero(kinds == _EXPRESSION)
    ids, symbols = ([names[i] for i in keep] for names in (counts.ids, counts.symbols))
    return GeneCounts(counts.matrix[:, keep], counts.barcodes, ids, symbols, counts.path)


def _opened(folder: Path, *names: str):
    for name in names:
        if (folder / name).is_file():
            return open(folder / name, "rb")
        if (folder / f"{name}.gz").is_file():
            return gzip.open(folder / f"{name}.gz", "rb")
    raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}, compressed or not")


def _lines(folder: Path, *names: str) -> list[str]:
    with _opened(folder, *names) as file:
        return file.read().decode("utf-8").split("\n")[:-1]


def _scale_factors(files: Sequence[Path]) -> dict[str, float]:
    path = find_file(files, r"(.*_)?scalefactors_json\.json(\.gz)?", "Scale factors", required=False)
    if path is None:
        return {}
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = json.load(file)
        return {name: float(value) for name, value in content.items() if isinstance(value, int | float)}
    except (ValueError, AttributeError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not the scalefactors_json.json of Space Ranger: {error}") from error


def _hires_size(files: Sequence[Path]) -> tuple[int, int] | None:
    path = find_file(files, r"(.*_)?tissue_hires_image\.(png|jpe?g|tiff?)", "Smaller image", required=False)
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def check_full_resolution(output: SpaceRangerOutput, image: Path, size: tuple[int, int]) -> None:
    """Raise ValueError if `image` of `size` (width, height) cannot be the one that the positions refer to.

    tissue_hires_scalef is the size of the smaller image over that of the full-resolution one: this tells a smaller, an
    enlarged or a turned image even where all positions lie inside it.
    """
    scale = output.scale_factors.get("tissue_hires_scalef")
    if not scale or output.hires_size is None:
        return
    expected = tuple(length / scale for length in output.hires_size)
    if _is_near(size, expected, scale):
        return
    found = f"{image} has {size[0]} x {size[1]} pixels"
    wanted = f"about {expected[0]:.0f} x {expected[1]:.0f} (tissue_hires_image {output.hires_size} / {scale:g})"
    if size == output.hires_size:
        cause = "It is the smaller tissue_hires_image itself"
    elif _is_near(size[::-1], expected, scale):
        cause = "Its sides are exchanged: it was turned after Space Ranger ran"
    else:
        ratio = (size[0] / expected[0] + size[1] / expected[1]) / 2
        cause = f"It is scaled by about {ratio:.3g}, or the image of another slide"
    raise ValueError(
        f"{found}, the positions refer to {wanted}. {cause}. Give the image that was the input of Space Ranger (--image)."
    )


def _is_near(size: Sequence[int], expected: Sequence[float], scale: float) -> bool:
    """Within the rounding of the smaller image, and one percent for viewers that pad to whole tiles."""
    return all(abs(found - wanted) <= 2 / scale + 0.01 * wanted for found, wanted in zip(size, expected))


def microns_per_pixel(output: SpaceRangerOutput) -> float | None:
    """Size of a pixel, from the distance of neighbors on the array, which is 100 um on every Visium slide.

    The hexagonal array is fitted to the pixels of all spots, so that missing spots do not matter: (2, 0), (1, 1) and
    (1, -1) in (array_col, array_row) are steps to neighbors. With too few spots for a fit, from spot_diameter_fullres
    (65 um). None if neither is there.
    """
    grid = output.positions.grid.astype(np.float64)
    design = np.column_stack([grid, np.ones(len(grid))])
    if np.linalg.matrix_rank(design) == 3:
        steps = np.linalg.lstsq(design, output.positions.pixels, rcond=None)[0][:2]
        neighbors = np.array([(2.0, 0.0), (1.0, 1.0), (1.0, -1.0)]) @ steps
        return PITCH_UM / float(np.linalg.norm(neighbors, axis=1).mean())
    diameter = output.scale_factors.get("spot_diameter_fullres")
    return PITCH_SPOT_UM / diameter if diameter else None
