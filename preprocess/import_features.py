"""Take over pooled features that TRIDENT, CLAM or HEST have made, as target caches.

python preprocess/import_features.py --source FEATURES --format trident --config her2st/dml --encoder uni

FEATURES holds one file a slide, SLIDE.h5. Each spot gets the feature of the patch whose centre is nearest, at most half a
patch away, whatever the order of the file. Train on the caches with --set DATA.tokens=pooled.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from anndata import AnnData
from scipy.spatial import KDTree

from datasets.features.cache import write_cache
from datasets.features.identity import UNKNOWN, CacheIdentity
from datasets.features.places import find_cache
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from utils.cli import run, say
from utils.config import load_config
from utils.flags import parse_names
from utils.text import some
from utils.untrusted.hdf5 import opened_hdf5

FORMATS = ("trident", "clam", "hest")
SMALL_SHARE = 0.02  # of a slide's spots that may take the nearest patch although they lie in none
FITTING_SHARE = 0.5  # of a slide's spots; with fewer in a patch, the file is of another slide


@dataclass(frozen=True)
class Patches:
    """What a file holds of N patches: features (N, D), centers (N, 2) level-0 px, width in level-0 px where it says so."""

    features: np.ndarray
    centers: np.ndarray
    covered_px: int | None


def read_patches(path: Path, kind: str) -> Patches:
    """Read a file of TRIDENT, CLAM or HEST. Raises ValueError naming the file and what it lacks, FileNotFoundError."""
    with opened_hdf5(path, f"features of {kind}") as file:
        name = "embeddings" if "embeddings" in file else "features"
        if missing := [each for each in (name, "coords") if each not in file]:
            raise ValueError(f"it holds {some(sorted(file))}, and no {' and no '.join(missing)}")
        features, coords = np.asarray(file[name], dtype=np.float32), np.asarray(file["coords"], dtype=np.float64)
        covered = None if kind == "hest" else _covered_px(file["coords"], kind)
    features = features[0] if features.ndim == 3 and len(features) == 1 else features
    if features.ndim != 2 or coords.shape != (len(features), 2) or not len(features) or not np.isfinite(coords).all():
        raise ValueError(f"{path} holds features {features.shape} and coords {coords.shape}; expected N x D and N x 2.")
    return Patches(features, coords if covered is None else coords + covered / 2, covered)


def _covered_px(coords: h5py.Dataset, kind: str) -> int:
    """Level-0 px that a patch covers; `coords` of these tools are its top left corner."""
    attributes: dict[str, Any] = dict(coords.attrs)
    if "patch_size_level0" in attributes:
        return int(attributes["patch_size_level0"])
    downsample = np.ravel(attributes.get("downsample", attributes.get("downsample_level", 1)))[0]
    if "patch_size" not in attributes or (kind == "trident" and "patch_level" not in attributes):
        raise ValueError(f"its coords do not say how wide a patch is; their attributes are {some(sorted(attributes))}")
    return round(float(attributes["patch_size"]) * float(downsample))


def match(patches: Patches, table: AnnData, width: int, path: Path, max_missing: float) -> np.ndarray:
    """Find the patch (N,) of each spot. width: of a patch in level-0 px.

    Raises ValueError for a file of another slide, and where more than `max_missing` of the spots lie in no patch.
    """
    centers = table.obsm["spatial"]
    _, rows = KDTree(patches.centers).query(centers, p=np.inf)
    offsets = np.abs(patches.centers[rows] - centers)
    is_inside = offsets.max(axis=1) <= width / 2
    outside, count = np.flatnonzero(~is_inside), table.n_obs
    found = f"{path}: {is_inside.sum()} of {count} spots lie in a patch (half a patch is {width / 2:g} px)"
    if is_inside.mean() < FITTING_SHARE:
        typical = tuple(np.median(offsets, axis=0).round(1).tolist())
        raise ValueError(
            f"{found}; the nearest patch is typically {typical} px away. The file is of another slide, or its coordinates are "
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
    return rows


def import_slide(layout: Layout, slide: str, path: Path, kind: str, max_missing: float, overwrite: bool) -> None:
    """Write the target cache of a slide. Raises ValueError as `match`, and for a cache that is there."""
    target, table, patches = find_cache(layout, "target", slide), load_slide(layout, slide), read_patches(path, kind)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already. Give --overwrite to replace these features.")
    width = patches.covered_px or layout.patch_size
    rows = match(patches, table, width, path, max_missing)
    with open_slide(layout.image_path(slide)) as image:
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
    parser.add_argument("--source", type=Path, required=True, help="folder with one file a slide, SLIDE.h5")
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
    files = {slide: given.source / f"{slide}.h5" for slide in slides}
    without = [slide for slide, path in files.items() if not path.is_file()]
    if without and (given.slides or len(without) == len(slides)):
        raise FileNotFoundError(f"{given.source} has no file SLIDE.h5 for {some(without)}.")
    if without:
        say(f"{len(without)} of {len(slides)} slides have no file in {given.source} and are skipped: {some(without)}.")
    for slide in slides:
        if slide not in without:
            import_slide(layout, slide, files[slide], given.format, given.max_missing, given.overwrite)


if __name__ == "__main__":
    run(main)
