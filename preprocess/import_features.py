"""Take over pooled features that TRIDENT, CLAM or HEST have made, as target caches.

python preprocess/import_features.py --source FEATURES --format trident --config her2st/dml --encoder uni

FEATURES holds one file a slide, SLIDE.h5, or what CLAM writes (h5_files, pt_files, patches). Each spot gets the feature of
the patch of its barcode where both name them, else of the one whose centre is nearest; it is at most half a patch away,
whatever the order of the file. The coordinates of HEST are corners of patches whose width the file does not say: both are
found from the barcodes, which the spot table then needs. Train on the caches with --set DATA.tokens=pooled.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.spatial import KDTree

from datasets.features.cache import write_cache
from datasets.features.identity import UNKNOWN, CacheIdentity
from datasets.features.places import find_cache
from datasets.field_of_view import TOLERANCE, covered_px
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from datasets.tables.spot_table import read_spots
from models.patch_encoders.table import PATCH_ENCODERS
from preprocess.raw.hest_patches import PLACEMENT_TOLERANCE
from utils.cli import run, say
from utils.config import load_config
from utils.flags import parse_names
from utils.text import brief, checked_names, some
from utils.untrusted.hdf5 import opened_hdf5
from utils.untrusted.tensors import check_tensors, load_tensors

FORMATS = ("trident", "clam", "hest")
SMALL_SHARE = 0.02  # of a slide's spots that may take the nearest patch although they lie in none
FITTING_SHARE = 0.5  # of a slide's spots; with fewer in a patch, the file is of another slide
_WIDEST = 1_000_000  # level-0 px of a patch


@dataclass(frozen=True)
class Patches:
    """What a file holds of N patches: features (N, D), centers (N, 2) level-0 px, width in level-0 px where it says so, and
    barcodes (N) where it names them. Of HEST, centers are what it gives as coordinates, until `place_hest`."""

    features: np.ndarray
    centers: np.ndarray
    covered_px: int | None
    barcodes: list[str] | None


@dataclass(frozen=True)
class SlideFiles:
    """Of one slide: an .h5 with coordinates. Of CLAM also features in the same order (.pt), used where the .h5 has none,
    and the .h5 of its first step, which knows the width of a patch where that of the features does not."""

    coords: Path
    features: Path | None = None
    width: Path | None = None


def find_files(source: Path, slide: str, kind: str) -> SlideFiles | None:
    """Find the files of a slide; None where there is none with coordinates."""

    def first(name: str, *folders: str) -> Path | None:
        return next((path for folder in folders if (path := source / folder / name).is_file()), None)

    if kind != "clam":
        coords = first(f"{slide}.h5", "")
        return None if coords is None else SlideFiles(coords)
    width = first(f"{slide}.h5", "patches")
    coords = first(f"{slide}.h5", "", "h5_files") or width
    return None if coords is None else SlideFiles(coords, first(f"{slide}.pt", "", "pt_files"), width)


def read_patches(files: SlideFiles, kind: str) -> Patches:
    """Read what TRIDENT, CLAM or HEST have written. Raises ValueError naming the file and what it lacks."""
    path, what = files.coords, f"features of {kind}"
    with opened_hdf5(path, what) as file:
        name = "embeddings" if "embeddings" in file else "features"
        tensors = None if name in file else files.features
        needed = ["coords"] if tensors else [name, "coords"]
        if missing := [each for each in needed if each not in file]:
            raise ValueError(f"it holds {some(sorted(file))}, and no {' and no '.join(missing)}")
        features = None if tensors else np.asarray(file[name], dtype=np.float32)
        coords, attributes = np.asarray(file["coords"], dtype=np.float64), dict(file["coords"].attrs)
        names = next((file[each][()] for each in ("barcodes", "barcode") if each in file), None)
        barcodes = None if names is None else [n.decode() if isinstance(n, bytes) else str(n) for n in np.ravel(names)]
        checked_names(barcodes or [], "barcodes", path)
    if tensors is not None:
        path, features = tensors, _read_tensor(tensors, what)
    assert features is not None
    if files.width is not None and "patch_size" not in attributes:
        with opened_hdf5(files.width, "patches of clam") as file:
            attributes = dict(file["coords"].attrs) if "coords" in file else {}
    features = features[0] if features.ndim == 3 and len(features) == 1 else features
    if features.ndim != 2 or coords.shape != (len(features), 2) or not len(features) or not np.isfinite(coords).all():
        raise ValueError(f"{path} holds features {features.shape} and coords {coords.shape}; expected N x D and N x 2.")
    if not np.isfinite(features).all():
        raise ValueError(f"{path}: some numbers of its features are not finite. Make them again with {kind}.")
    covered = None if kind == "hest" else _covered_px(attributes, kind, files.coords)
    if barcodes is not None and (len(barcodes) != len(features) or len(set(barcodes)) != len(barcodes)):
        raise ValueError(f"{path} holds {len(set(barcodes))} different barcodes for {len(features)} patches.")
    return Patches(features, coords if covered is None else coords + covered / 2, covered, barcodes)


def _read_tensor(path: Path, what: str) -> np.ndarray:
    tensor = load_tensors(path, what=what)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{path} holds {type(tensor).__name__}, expected one tensor of features (N, D), as CLAM writes it."
        )
    check_tensors(path, {"features": tensor})
    return tensor.float().numpy()


def _covered_px(attributes: Mapping[str, Any], kind: str, path: Path) -> int:
    """Level-0 px that a patch covers, from the attributes of `coords`, which of these tools are its top left corner."""
    if "patch_size_level0" in attributes:
        return _width(attributes["patch_size_level0"], path)
    at_full_size = (1,) if np.array_equal(attributes.get("patch_level", -1), 0) else ()
    downsample = [*np.ravel(attributes.get("downsample", attributes.get("downsample_level", at_full_size)))]
    if kind == "trident" or "patch_size" not in attributes or not downsample:
        remedy = {
            "clam": "CLAM says it as patch_size, and downsample or patch_level 0. Give the folder that holds its h5_files "
            "and patches, too: those know it.",
            "trident": "TRIDENT says it as patch_size_level0; coordinates in CLAM's form are read with --format clam.",
        }[kind]
        found = some(sorted(map(str, attributes))) or "none"
        raise ValueError(f"{path}: its coords do not say how wide a patch is; their attributes are {found}. {remedy}")
    return _width(float(attributes["patch_size"]) * float(downsample[0]), path)


def _width(value: Any, path: Path) -> int:
    width = float(value) if isinstance(value, int | float | np.integer | np.floating) else np.nan
    if not 1 <= width <= _WIDEST:
        raise ValueError(f"{path}: the width of a patch is {brief(value)} px, expected a length from 1 to {_WIDEST:,}.")
    return round(width)


def place_hest(
    patches: Patches, centers: np.ndarray, barcodes: Sequence[str] | None, width: int, path: Path
) -> Patches:
    """Find centres and width of HEST's patches, whose coordinates are corners, from the pairs that share a barcode.

    A corner lies as near to a neighbor as to its own spot, so that without pairs only coordinates of the spots are taken.
    centers (N, 2), barcodes: of the spots.  width: of a patch in level-0 px if the coordinates are centres.
    Raises ValueError where the pairs disagree, and where barcodes are needed.
    """
    named = _named(patches, barcodes, len(centers))
    pairs = np.flatnonzero(named >= 0)
    found = f"{path}: {len(pairs)} of {len(centers)} spots are named in it"
    if len(pairs) < FITTING_SHARE * len(centers):
        distances, _ = KDTree(patches.centers).query(centers, p=np.inf)
        is_same = distances <= PLACEMENT_TOLERANCE
        if is_same.any() and not ((distances <= width / 2) & ~is_same).any():
            return patches
        raise ValueError(
            f"{found}, and {is_same.sum()} lie on one of its coordinates (the nearest is typically {np.median(distances):g} px "
            "away). HEST's coordinates are the corners of its patches; only barcodes tell whose. Give the spot table a column "
            f"`barcode` with those of the file (it names {len(patches.barcodes or [])}), or make the data set from HEST's own "
            "files with preprocess/prepare_hest.py."
        )
    offsets = centers[pairs] - patches.centers[named[pairs]]
    half = float(np.median(offsets))
    away = (np.abs(offsets - half) > PLACEMENT_TOLERANCE).any(axis=1)
    if half < -PLACEMENT_TOLERANCE or away.any():
        low, typical, high = (tuple(row) for row in np.quantile(offsets, [0, 0.5, 1], axis=0).round(1).tolist())
        raise ValueError(
            f"{found}; from its coordinates to them it is typically {typical} px (x, y), from {low} to {high}. Expected half "
            f"a patch for all and on both axes, within {PLACEMENT_TOLERANCE} px, or 0. The file is of another slide or "
            "version, or its coordinates or those of the spots are not those of the full resolution. Take both from the same "
            "download."
        )
    if half <= PLACEMENT_TOLERANCE:
        return patches
    whole = int(half + 0.1)  # HEST takes a whole half from the centre and cuts the fraction of a px off
    return replace(patches, centers=patches.centers + half, covered_px=_width(2 * whole, path))


def _named(patches: Patches, barcodes: Sequence[str] | None, count: int) -> np.ndarray:
    """Find the patch (N,) that has the barcode of each of `count` spots; -1 where none has it or one side names none."""
    if barcodes is None or patches.barcodes is None:
        return np.full(count, -1)
    return pd.Index(patches.barcodes).get_indexer(list(barcodes))


def match(
    patches: Patches, table: AnnData, barcodes: Sequence[str] | None, width: int, path: Path, max_missing: float
) -> np.ndarray:
    """Find the patch (N,) of each spot. barcodes: of the spots, where they are known.  width: of a patch in level-0 px.

    Slides of one kind have the same barcodes, so that a patch must also lie where the spot is.
    Raises ValueError for a file of another slide, and where more than `max_missing` of the spots lie in no patch.
    """
    centers = table.obsm["spatial"]
    _, nearest = KDTree(patches.centers).query(centers, p=np.inf)
    named = _named(patches, barcodes, len(centers))
    rows = np.where(named >= 0, named, nearest)
    offsets = np.abs(patches.centers[rows] - centers)
    is_inside = offsets.max(axis=1) <= width / 2
    outside, count = np.flatnonzero(~is_inside), table.n_obs
    by_name = f", {(named >= 0).sum()} of the spots are named in it" if (named >= 0).any() else ""
    found = f"{path}: {is_inside.sum()} of {count} spots lie in a patch (half a patch is {width / 2:g} px){by_name}"
    if is_inside.mean() < FITTING_SHARE:
        typical = tuple(np.median(offsets, axis=0).round(1).tolist())
        raise ValueError(
            f"{found}; their patch is typically {typical} px away. The file is of another slide, or its coordinates are "
            "not those of the full resolution."
        )
    if len(outside) > max_missing * count:
        raise ValueError(
            f"{found}; {len(outside)} find none: {some([table.obs_names[row] for row in outside])}. With --max_missing SHARE "
            f"(at least {len(outside) / count:.3f}) they take the feature of the nearest patch."
        )
    if len(outside):
        say(
            f"{found}; the other {len(outside)} take the feature of the nearest: {some(list(table.obs_names[outside]))}."
        )
    else:
        say(f"{found}.")
    return np.where(is_inside, rows, nearest)


def _check_width(layout: Layout, features: np.ndarray, path: Path) -> None:
    """Raise ValueError for features that are not as wide as those of the encoder whose name the cache will bear."""
    spec, width = PATCH_ENCODERS.get(layout.encoder), features.shape[1]
    if spec is not None and width != spec.pooled_dim:
        raise ValueError(
            f"{path}: its features have width {width}, those of {spec.name} have {spec.pooled_dim}: another encoder made them. "
            "Name it with --encoder."
        )


def _check_covered(layout: Layout, covered: int | None, asked: int, path: Path) -> None:
    """Raise ValueError for patches that cover more or less than DATA.patch_um asks for, by more than `TOLERANCE`."""
    if layout.patch_um is not None and covered is not None and abs(covered / asked - 1) > TOLERANCE:
        raise ValueError(
            f"{path}: its patches are {covered} px wide ({layout.patch_um * covered / asked:.0f} um), and DATA.patch_um asks "
            f"for {layout.patch_um:g} um ({asked} px). Correct DATA.patch_um, or make the features again from patches of that "
            "width."
        )


def import_slide(layout: Layout, slide: str, files: SlideFiles, kind: str, max_missing: float, overwrite: bool) -> None:
    """Write the target cache of a slide.

    Raises ValueError as `place_hest` and `match`, for a cache that is there, and for features of another encoder or of
    patches of another width than the configuration says.
    """
    target, table, patches = find_cache(layout, "target", slide), load_slide(layout, slide), read_patches(files, kind)
    spots = read_spots(layout.spots_path(slide))
    barcodes = spots.loc[table.obs_names, "barcode"].astype(str).tolist() if "barcode" in spots else None
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already. Keep it elsewhere and repeat.")
    _check_width(layout, patches.features, files.coords)
    centers = table.obsm["spatial"]
    with open_slide(layout.image_path(slide)) as image:
        asked = covered_px(layout, slide, centers, image.microns_per_pixel) or layout.patch_size
        if kind == "hest":
            patches = place_hest(patches, centers, barcodes, asked, files.coords)
        _check_covered(layout, patches.covered_px, asked, files.coords)
        width = patches.covered_px or asked
        rows = match(patches, table, barcodes, width, files.coords, max_missing)
        identity = CacheIdentity(
            kind="target",
            encoder=layout.encoder,
            encoder_sha256=UNKNOWN,
            image_size=image.size,
            image_fingerprint=image.fingerprint(),
            patch_size=layout.patch_size,
            microns_per_pixel=image.microns_per_pixel or layout.spec.microns_of(slide),
            num_neighbors=layout.num_neighbors,
            views=1,
            dtype="float32",
            precision=UNKNOWN,
            patch_um=layout.patch_um,
            covered_px=None if width == layout.patch_size else width,
        )
    write_cache(target, identity, list(table.obs_names), table.obsm["center"], [patches.features[rows]])


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, required=True, help="folder with one file a slide, SLIDE.h5, or those of CLAM"
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="which tool has made them")
    parser.add_argument("--config", required=True, help="configuration, such as her2st/dml, or a YAML file")
    parser.add_argument("--encoder", help="patch encoder that made the features (default: of the configuration)")
    parser.add_argument("--data_dir", help="folder of the data sets")
    parser.add_argument("--test_name", help="external test set below <data_dir>/test")
    parser.add_argument("--slides", type=parse_names, help="only these, comma separated")
    parser.add_argument(
        "--max_missing", type=float, default=SMALL_SHARE, help="share of a slide's spots without a patch"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace caches of this encoder that are there")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Import every slide that has a file; nothing is known of the weights but the encoder's name."""
    given = arguments_of(words)
    flags = {"DATA.encoder": given.encoder, "DATA.data_dir": given.data_dir}
    data = load_config(given.config, [f"{key}={value}" for key, value in flags.items() if value is not None]).DATA
    spec = get_spec(given.test_name or data.type, data.data_dir)
    layout = Layout(
        data.data_dir,
        spec,
        given.test_name,
        patch_size=data.patch_size,
        num_neighbors=data.num_neighbors,
        encoder=data.encoder,
        patch_um=data.patch_um,
    )
    slides = given.slides or layout.slides_with_counts()
    files = {slide: found for slide in slides if (found := find_files(given.source, slide, given.format)) is not None}
    without = [slide for slide in slides if slide not in files]
    if without and (given.slides or len(without) == len(slides)):
        raise FileNotFoundError(f"{given.source} has no file SLIDE.h5 for {some(without)}.")
    if without:
        say(f"{len(without)} of {len(slides)} slides have no file in {given.source} and are skipped: {some(without)}.")
    for slide, found in files.items():
        import_slide(layout, slide, found, given.format, given.max_missing, given.overwrite)


if __name__ == "__main__":
    run(main)
