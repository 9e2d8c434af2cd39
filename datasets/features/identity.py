"""What a cache of features says about itself, and whether that fits what it holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import h5py
import numpy as np

from utils.runs import VERSION
from utils.text import brief, is_plain

SCHEMA_VERSION = 1
DATASET_OF_KIND = {"target": "features", "neighbor": "features", "token": "tokens", "patch": "patches"}
_MAY_BE_UNKNOWN = ("microns_per_pixel", "patch_um", "covered_px")  # the last two also absent, in earlier versions
FILL_RULE = "white outside the image; neighbor tiles that cross an edge are zero and masked"
UNKNOWN = "unknown"  # SHA-256 and precision of features that other tools have made; it contradicts nothing
NO_ENCODER = "none"  # of the patch cache
_DTYPES = {"patch": ("uint8",)}
_FEATURE_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class CacheIdentity:
    """Everything the numbers of a cache depend on; stored as attributes.

    kind: target | neighbor | token | patch.  image_size: (width, height) px.  patch_size: px a side.
    num_neighbors: tiles a side.  views: how many dihedral views of each patch.  token_pool: factor by which the grid of
    patch tokens was mean-pooled (1: as the encoder gives them).  precision: of the encoder's arithmetic.
    patch_um: width in micrometres that was asked for (DATA.patch_um), None for none.  covered_px: level-0 px that a patch
    covers, None where that is the patch size.
    """

    kind: str
    encoder: str
    encoder_sha256: str
    image_size: tuple[int, int]
    image_fingerprint: str
    patch_size: int
    microns_per_pixel: float | None
    num_neighbors: int
    views: int
    dtype: str
    fill: str = FILL_RULE
    token_pool: int = 1
    precision: str = "float32"
    patch_um: float | None = None
    covered_px: int | None = None


_KINDS = get_type_hints(CacheIdentity)


def attributes_of(identity: CacheIdentity) -> dict[str, object]:
    """Return the attributes with which a cache is stored."""
    values = {name: _to_attribute(value) for name, value in dataclasses.asdict(identity).items()}
    return {"schema_version": SCHEMA_VERSION, "program_version": VERSION, **values}


def _to_attribute(value: object) -> object:
    if value is None:
        return math.nan
    return list(value) if isinstance(value, tuple) else value


def identity_of(attributes: Mapping[str, object]) -> CacheIdentity:
    """Read the attributes of a cache. Raises ValueError, without the name of the file, for another schema or wrong values."""
    found = attributes.get("schema_version")
    if found != SCHEMA_VERSION:
        raise ValueError(f"it has the schema version {found}, this program reads version {SCHEMA_VERSION}")
    found_or_none = {**dict.fromkeys(_MAY_BE_UNKNOWN[1:], math.nan), **attributes}
    values = {name: _from_attribute(name, found_or_none[name], kind) for name, kind in _KINDS.items()}
    if values["kind"] not in DATASET_OF_KIND:
        raise ValueError(f"it is of the unknown kind {brief(values['kind'])}")
    return CacheIdentity(**values)


def _from_attribute(name: str, value: object, kind: type) -> Any:
    """The value of an attribute in the type that the dataclass declares."""
    value = value.item() if isinstance(value, np.generic) else value
    if name == "image_size" and isinstance(value, np.ndarray) and value.shape == (2,) and value.dtype.kind in "iu":
        return tuple(value.tolist())
    if isinstance(value, float) and math.isnan(value) and name in _MAY_BE_UNKNOWN:
        return None
    # h5py gives bytes that are no UTF-8 as surrogates.
    is_text = isinstance(value, str)
    if name == "image_size" or not isinstance(value, kind) or (is_text and not is_plain(str(value))):
        raise ValueError(f"its {name.replace('_', ' ')} is {brief(value)}")
    return value


def check_structure(file: h5py.File, identity: CacheIdentity) -> None:
    """Compare what a cache says about itself with what it holds. Raises ValueError, without the name of the file."""
    data = {name: file[name] for name in (DATASET_OF_KIND[identity.kind], "spot_id", "coords")}
    if groups := [name for name, item in data.items() if not isinstance(item, h5py.Dataset)]:
        raise ValueError(f"{groups[0]} is no array")
    numbers, spot_id, coords = data.values()
    if h5py.check_string_dtype(spot_id.dtype) is None or spot_id.ndim != 1 or coords.dtype.kind != "i":
        raise ValueError("its spots are no list of names with their places")
    count, patch = len(spot_id), (identity.patch_size, identity.patch_size, 3)
    shapes = {
        "target": ((count,), 1, ()),
        "neighbor": ((count, identity.num_neighbors**2), 1, ()),
        "token": ((count, identity.views), 2, ()),
        "patch": ((count,), 0, patch),
    }
    first, free, last = shapes[identity.kind]
    shape = numbers.shape
    fits = len(shape) == len(first) + free + len(last) and shape[: len(first)] == first
    if not fits or shape[len(shape) - len(last) :] != last or coords.shape != (count, 2):
        raise ValueError(f"it says that it holds {identity.kind} features of {count} spots, and their shape is {shape}")
    if numbers.dtype != identity.dtype or identity.dtype not in _DTYPES.get(identity.kind, _FEATURE_DTYPES):
        raise ValueError(f"its numbers are {numbers.dtype}, {identity.dtype} by its own account")
