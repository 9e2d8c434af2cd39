"""Prediction files: one AnnData `.h5ad` per slide that scanpy and squidpy plot without conversion; how far to trust them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem
from PIL import Image

from evaluation.slide_result import SCALES
from utils.files import reading, require_file, safe_name, write_atomically
from utils.text import brief, checked_names, some
from utils.trained_fold import made_again
from utils.untrusted.hdf5 import opened_hdf5

MEASURED = "measured"
MEASURED_UNSMOOTHED = "measured_unsmoothed"
# Space Ranger's own size of the smaller image; the viewers that ask for "lowres" expect about this.
LOWRES_PIXELS = 600
PLACEHOLDER = "none: a white sheet"
HELD_OUT_FILE = "held_out.json"
INTERVAL_LEVEL = 0.8
# What is read of a file: another program may have added, say, a graph of neighbors.
_PARTS = ("X", "layers", "obs", "obsm", "uns", "var")
_WHAT, _AGAIN = "a prediction (.h5ad)", "It may be truncated or changed: predict again, into another file."
_MEASURE_AGAIN = "Make it again: python main.py --mode test --model_path RUN"


@dataclass(frozen=True, eq=False)
class Trust:
    """What is known of how far a prediction of N spots and G genes can be trusted; None where it is not known.

    std (N, G): over the models that were averaged.  novelty (N,): see `datasets.novelty`.  pcc_cv, pcc_cv_std (G,): of
    the gene on held-out patients, NaN where not known.  half_width (G,): of the interval, in the unit of the predictions, NaN
    where not known.
    """

    std: np.ndarray | None = None
    novelty: np.ndarray | None = None
    pcc_cv: np.ndarray | None = None
    pcc_cv_std: np.ndarray | None = None
    half_width: np.ndarray | None = None

    def add_to(self, adata: anndata.AnnData) -> None:
        """Put what is known into the places of a prediction file; X of `adata` is the prediction."""
        if self.std is not None:
            adata.layers["std"] = self.std.astype(np.float32)
        if self.novelty is not None:
            adata.obs["novelty"] = self.novelty.astype(np.float32)
        for name, values in (("pcc_cv", self.pcc_cv), ("pcc_cv_std", self.pcc_cv_std)):
            if values is not None:
                adata.var[name] = values
        if self.half_width is not None:
            predicted = np.asarray(adata.X)
            adata.layers["lower"] = np.maximum(predicted - self.half_width, 0).astype(np.float32)
            adata.layers["upper"] = (predicted + self.half_width).astype(np.float32)


def write_prediction(
    path: Path,
    *,
    slide: str,
    spot_ids: Sequence[str],
    genes: Sequence[str],
    predictions: Mapping[str, np.ndarray | None],
    spatial_px: np.ndarray,
    grid_xy: np.ndarray | None,
    measured: np.ndarray | None,
    measured_unsmoothed: np.ndarray | None,
    image: np.ndarray | None,
    image_scale: float,
    spot_diameter_px: float,
    unit: str,
    provenance: Mapping[str, Any],
    trust: Trust | None = None,
) -> None:
    """Write the predictions of one slide, whole or not at all.

    predictions: "fused" (N, G), which becomes X, and optionally "target", "neighbor", "global" (layers); a scale
        that is None is left out.
    spatial_px: (N, 2) spot centres (x, y) in full-resolution pixels -> obsm["spatial"].
    grid_xy: (N, 2) integer array positions (x, y) -> obsm["grid"].
    measured, measured_unsmoothed: (N, G) in the same unit -> layers of the same names.
    image: (H, W, 3) uint8, down-scaled; image_scale: its pixels per full-resolution pixel. None when there is no
        image at hand (published features only): a white sheet below the spots takes its place, because scanpy plots
        nothing without an image; image_scale is then ignored.
    spot_diameter_px: diameter of a spot in full-resolution pixels: the size at which scanpy draws it.
    provenance: plain values (text, numbers, lists, dicts) -> uns["gene_dml"]; None values are left out.
    trust: -> layers["std", "lower", "upper"], obs["novelty"], var["pcc_cv", "pcc_cv_std"].

    Raises ValueError naming every array whose shape or content does not fit the spots and genes.
    """
    safe_name(slide, "slide")
    given = {scale: predictions.get(scale) for scale in SCALES}
    given |= {MEASURED: measured, MEASURED_UNSMOOTHED: measured_unsmoothed}
    arrays = {name: np.asarray(values) for name, values in given.items() if values is not None}
    spatial_px = np.asarray(spatial_px, dtype=np.float64)
    problems = _names_problems(spot_ids, genes, predictions)
    problems += _array_problems(arrays, spatial_px, grid_xy, (len(spot_ids), len(genes)))
    problems += _image_problems(image, image_scale, spot_diameter_px)
    if problems:
        raise ValueError(f"Cannot write the prediction of slide {slide} to {path}: " + "; ".join(problems))

    library = pd.Categorical([slide] * len(spot_ids))
    adata = anndata.AnnData(
        X=arrays.pop("fused").astype(np.float32),
        obs=pd.DataFrame({"library_id": library, "slide": library}, index=pd.Index(list(spot_ids), dtype=str)),
        var=pd.DataFrame(index=pd.Index(list(genes), dtype=str)),
        layers={name: values.astype(np.float32) for name, values in arrays.items()},
        obsm={"spatial": spatial_px},
    )
    if grid_xy is not None:
        adata.obsm["grid"] = np.asarray(grid_xy).astype(np.int64)
    adata.uns["spatial"] = {slide: _spatial_entry(image, image_scale, spot_diameter_px, spatial_px)}
    adata.uns["unit"] = unit
    adata.uns["gene_dml"] = _storable(provenance)
    if trust is not None:
        trust.add_to(adata)
    adata.strings_to_categoricals()
    # HDF5 writes into memory: on a full disk it would crash the process when that ends.
    # Level 1: on expression values the higher levels cost three times the time for a few percent of size.
    image_of_file = io.BytesIO()
    with h5py.File(image_of_file, "w") as file:
        write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
    write_atomically(path, lambda temporary: temporary.write_bytes(image_of_file.getbuffer()))


def read_prediction(path: Path) -> anndata.AnnData:
    """Read a file of `write_prediction`; raises FileNotFoundError or ValueError when it is none."""
    path = require_file(
        path, "Predictions are written by: python main.py --config_name CONFIG --mode test --model_path RUN"
    )
    with opened_hdf5(path, _WHAT, _remedy_of(path)) as file:
        parts = {name: file[name] for name in _PARTS if name in file}
        _check_dense(parts.values())
        adata = anndata.AnnData(**{name: read_elem(part) for name, part in parts.items()})
    missing = [f"uns['{key}']" for key in ("spatial", "unit", "gene_dml") if key not in adata.uns]
    missing += ["obsm['spatial']"] if "spatial" not in adata.obsm else []
    if missing:
        raise ValueError(
            f"{path} is an AnnData file but not a prediction of this program: it has no {', '.join(missing)}. "
            "Make one with: python main.py --mode predict --image SLIDE --model_path RUN --out FILE.h5ad"
        )
    for what, names in (("slides", adata.uns["spatial"]), ("spots", adata.obs_names), ("genes", adata.var_names)):
        checked_names(list(names), what, path)
    return adata


def read_compared(path: Path, genes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read what was predicted and what was measured of some genes, (N, G) each, and nothing else of a prediction file.

    Raises FileNotFoundError, or ValueError when it is none or lacks a gene or the measured values.
    """
    with opened_hdf5(path, _WHAT, _remedy_of(path)) as file:
        parts = [file[name] for name in ("var", "X", f"layers/{MEASURED}")]
        _check_dense(parts)
        known, predicted, measured = map(read_elem, parts)
        place = known.index.get_indexer(pd.Index(genes))
        if (place < 0).any():
            raise ValueError(f"it lacks the genes {some([gene for gene, at in zip(genes, place) if at < 0])}")
        if not predicted.shape == measured.shape == (len(predicted), len(known)):
            raise ValueError(
                f"of {len(known)} genes it holds {predicted.shape} predicted, {measured.shape} measured values"
            )
        return predicted[:, place], measured[:, place]


def _check_dense(parts: Iterable[h5py.Group | h5py.Dataset]) -> None:
    """Raise ValueError, without the file, for a sparse matrix: ours are dense, and SciPy believes any index it is given."""
    found: list[str] = []

    def note(_: str, item: h5py.Group | h5py.Dataset) -> None:
        kind = str(item.attrs.get("encoding-type", ""))
        if "h5sparse_format" in item.attrs or "csr" in kind or "csc" in kind:
            found.append(str(item.name).strip("/"))

    for part in parts:
        note("", part)
        if isinstance(part, h5py.Group):
            part.visititems(note)
    if found:
        raise ValueError(
            f"{some(found)} is a sparse matrix, which another program has written; predictions of ours are dense"
        )


def _remedy_of(path: Path) -> str:
    """What makes a prediction file again: it is of a scored fold, or somebody's own."""
    return made_again(path.parent, _AGAIN) if path.parent.name == "predictions" else _AGAIN


def slide_of(adata: anndata.AnnData) -> str:
    """Name the one slide of a prediction file; raises ValueError for a file of several."""
    names = list(adata.uns["spatial"])
    if len(names) != 1:
        raise ValueError(f"A prediction file holds one slide; this one holds {len(names)}: {', '.join(names)}.")
    return names[0]


def tissue_image(adata: anndata.AnnData) -> tuple[np.ndarray | None, float, float]:
    """Take the image out of a prediction file: (H, W, 3) uint8 or None, its pixels per full-resolution pixel, and the
    diameter of a spot in full-resolution pixels."""
    entry = adata.uns["spatial"][slide_of(adata)]
    factors = entry["scalefactors"]
    return (
        None if entry["metadata"].get("image") == PLACEHOLDER else entry["images"]["hires"],
        float(factors["tissue_hires_scalef"]),
        float(factors["spot_diameter_fullres"]),
    )


def _names_problems(spot_ids: Sequence[str], genes: Sequence[str], predictions: Mapping[str, Any]) -> list[str]:
    problems = []
    for what, names in (("spot ids", spot_ids), ("genes", genes)):
        counts = pd.Series(list(names), dtype=object).value_counts()
        repeated = sorted(str(name) for name in counts.index[counts > 1])
        if repeated:
            problems.append(f"{what} are not unique: {some(repeated)}")
    unknown = sorted(set(predictions) - set(SCALES))
    if unknown:
        problems.append(f"unknown scales {', '.join(unknown)}; known are {', '.join(SCALES)}")
    if predictions.get("fused") is None:
        problems.append('predictions["fused"] is missing')
    return problems


def _array_problems(
    arrays: Mapping[str, np.ndarray], spatial_px: np.ndarray, grid_xy: np.ndarray | None, shape: tuple[int, int]
) -> list[str]:
    problems = [
        f"{name} has shape {values.shape}, expected {shape} (spots, genes)"
        for name, values in arrays.items()
        if values.shape != shape
    ]
    problems += [
        f"{name} holds {count} numbers that are not finite"
        for name, values in arrays.items()
        if (count := np.count_nonzero(~np.isfinite(values)))
    ]
    positions = {"spatial_px": spatial_px} | ({} if grid_xy is None else {"grid_xy": np.asarray(grid_xy)})
    for name, values in positions.items():
        if values.shape != (shape[0], 2):
            problems.append(f"{name} has shape {values.shape}, expected {(shape[0], 2)}")
        elif not np.isfinite(values).all():
            problems.append(f"{name} holds values that are not finite")
    return problems


def _image_problems(image: np.ndarray | None, image_scale: float, spot_diameter_px: float) -> list[str]:
    problems = []
    if image is not None and (image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8):
        problems.append(f"image is {image.dtype} {image.shape}, expected uint8 (height, width, 3)")
    if not image_scale > 0:
        problems.append(f"image_scale is {image_scale}, expected a positive number")
    if not spot_diameter_px > 0:
        problems.append(f"spot_diameter_px is {spot_diameter_px}, expected a positive number")
    return problems


def _spatial_entry(
    image: np.ndarray | None, image_scale: float, spot_diameter_px: float, spatial_px: np.ndarray
) -> dict[str, Any]:
    """The Space Ranger-like entry that scanpy and squidpy look for in uns["spatial"]."""
    metadata = {}
    if image is None:
        metadata["image"] = PLACEHOLDER
        width, height = spatial_px.max(axis=0, initial=1.0) + spot_diameter_px
        image_scale = LOWRES_PIXELS / max(width, height)
        image = np.full((math.ceil(height * image_scale), math.ceil(width * image_scale), 3), 255, dtype=np.uint8)
    height, width = image.shape[:2]
    shrink = min(1.0, LOWRES_PIXELS / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    lowres = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    return {
        "images": {"hires": np.ascontiguousarray(image), "lowres": lowres},
        "scalefactors": {
            "tissue_hires_scalef": float(image_scale),
            # Rounding moves the true factor a little; the longer side rounds relatively less.
            "tissue_lowres_scalef": float(image_scale) * max(size) / max(height, width),
            "spot_diameter_fullres": float(spot_diameter_px),
            # Only viewers of whole Visium slides use it; they require the key.
            "fiducial_diameter_fullres": float(spot_diameter_px),
        },
        "metadata": metadata,
    }


def _storable(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as HDF5 can hold them: text, numbers, arrays and dicts; what is None is left out."""
    stored: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("/", "_")
        if value is None:
            continue
        if isinstance(value, Mapping):
            stored[name] = _storable(value)
        elif isinstance(value, (bool, int, float, str, np.generic, np.ndarray)):
            stored[name] = value
        elif isinstance(value, (list, tuple)):
            same_kind = all(isinstance(item, (bool, int, float)) for item in value)
            stored[name] = np.asarray(value if same_kind else [str(item) for item in value])
        else:
            stored[name] = str(value)
    return stored


@dataclass(frozen=True)
class HeldOut:
    """What is known of a run from its held-out patients. Lists follow `genes`; NaN where a value is not known.

    pcc, pcc_std: of each gene, PCC within a slide, mean over the slides of a patient, then mean and standard deviation over
    patients (divisor n - 1).  half_width: of the interval that holds `level` of the spots of held-out patients, in the unit
    of the predictions; [] where no prediction files are.  coverage: {patient: share of its spots inside the interval that
    the other patients give, mean over genes}; {} with fewer than two patients.
    """

    run: str
    patients: list[str]
    genes: list[str]
    pcc: list[float]
    pcc_std: list[float]
    level: float = INTERVAL_LEVEL
    half_width: list[float] = field(default_factory=list)
    coverage: dict[str, float] = field(default_factory=dict)

    def values_of(self, name: str, genes: Sequence[str]) -> np.ndarray:
        """Give the list `name` for the genes asked for (G,), NaN for those that the run did not hold out."""
        known = dict(zip(self.genes, getattr(self, name)))
        return np.array([known.get(gene, math.nan) for gene in genes], dtype=np.float64)

    def describe(self) -> str | None:
        """Say how often the intervals held, in a sentence; None where that could not be measured."""
        if not self.coverage:
            return None
        values = list(self.coverage.values())
        return (
            f"Intervals of {100 * self.level:.0f} % (split conformal over patients) held {100 * np.mean(values):.1f} % of the "
            f"spots of a patient left out, mean over genes and {len(values)} patients ({100 * min(values):.1f} to "
            f"{100 * max(values):.1f} %)."
        )


def read_held_out(run_dir: str | Path) -> HeldOut | None:
    """Read held_out.json of a run folder, None where there is none; ValueError for what is no such file."""
    path = Path(run_dir) / HELD_OUT_FILE
    if not path.is_file():
        return None
    with reading(path, "what a run has shown on held-out patients", remedy=_MEASURE_AGAIN):
        return _from_dict(json.loads(path.read_text(encoding="utf-8")), path)


def _from_dict(content: object, path: Path) -> HeldOut:
    if not isinstance(content, dict) or not isinstance(content.get("genes"), list):
        raise ValueError(f"{path} lists no genes. {_MEASURE_AGAIN}")
    genes = checked_names(content["genes"], "genes", path)
    patients = checked_names(content.get("patients", []), "patients", path)
    lists = {}
    for name in ("pcc", "pcc_std", "half_width"):
        found = content.get(name)
        may_be_empty = name == "half_width" and found == []
        if not isinstance(found, list) or (len(found) != len(genes) and not may_be_empty):
            raise ValueError(f"{path}: {name} should be a list of {len(genes)} numbers. {_MEASURE_AGAIN}")
        lists[name] = [_number(value, path, name) for value in found]
    coverage, level = content.get("coverage"), _number(content.get("level"), path, "level")
    if not isinstance(coverage, dict) or not 0 < level < 1:
        raise ValueError(
            f"{path}: coverage should be a table and level a share, found {brief(level)}. {_MEASURE_AGAIN}"
        )
    return HeldOut(
        run=str(content.get("run", "")),
        patients=patients,
        genes=genes,
        pcc=lists["pcc"],
        pcc_std=lists["pcc_std"],
        level=level,
        half_width=lists["half_width"],
        coverage={str(patient): _number(value, path, "coverage") for patient, value in coverage.items()},
    )


def _number(value: object, path: Path, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: {name} should hold numbers, found {brief(value)}. {_MEASURE_AGAIN}")
    return float(value)
