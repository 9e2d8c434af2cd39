"""Features of a slide on disk: one HDF5 file per slide and kind, written whole, verified before it is used.

A file holds `features` (N, D) or (N, M, D), `tokens` (N, V, T, D) or `patches` (N, P, P, 3), always with `spot_id` (N,) and
`coords` (N, 2), the centres in level-0 pixels, and as attributes everything that the numbers depend on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from utils.files import write_atomically
from utils.runs import VERSION
from utils.untrusted.tensors import load_tensors

SCHEMA_VERSION = 1
DATASET_OF_KIND = {"target": "features", "neighbor": "features", "token": "tokens", "patch": "patches"}
FILL_RULE = "white outside the image; neighbor tiles that cross an edge are zero and masked"
NO_ENCODER = "none"  # of the patch cache
_READ_ERRORS = (OSError, KeyError, RuntimeError, UnicodeDecodeError)  # what h5py raises on a damaged file
_NAMED_AT_MOST = 5  # spots in a message


@dataclass(frozen=True)
class CacheIdentity:
    """Everything the numbers of a cache depend on; stored as attributes.

    kind: target | neighbor | token | patch.  image_size: (width, height) px.  patch_size: px at level 0.
    num_neighbors: tiles a side.  views: how many dihedral views of each patch.  token_pool: factor by which the grid of
    patch tokens was mean-pooled (1: as the encoder gives them).  precision: of the encoder's arithmetic.
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


def write_cache(
    path: str | Path,
    identity: CacheIdentity,
    spot_ids: Sequence[str],
    centers: np.ndarray,
    blocks: Iterable[np.ndarray],
) -> Path:
    """Stream a cache to disk; the file appears only when it is complete.

    blocks: arrays (b, ...) of consecutive spots, N rows in all; only one is held at a time. Whatever they raise leaves
        an older file as it was.
    """
    centers = np.asarray(centers, dtype=np.int64)
    assert centers.shape == (len(spot_ids), 2), f"{len(spot_ids)} spots, centres {centers.shape}"

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w") as file:
            for name, value in _attributes(identity).items():
                file.attrs[name] = value
            file.create_dataset("spot_id", data=np.asarray(spot_ids, dtype=object), dtype=h5py.string_dtype())
            file.create_dataset("coords", data=centers)
            _write_blocks(file, path, identity, len(spot_ids), blocks)

    return write_atomically(path, write)


def _write_blocks(
    file: h5py.File, path: str | Path, identity: CacheIdentity, num_spots: int, blocks: Iterable[np.ndarray]
) -> None:
    payload, done = None, 0
    for block in blocks:
        if payload is None:
            payload = _create_payload(file, identity, (num_spots, *block.shape[1:]))
        assert done + len(block) <= num_spots, f"more than {num_spots} rows for {path}"
        if identity.kind == "token":
            _write_chunks(payload, done, block)
        else:
            payload[done : done + len(block)] = block
        done += len(block)
    assert done == num_spots, f"{done} of {num_spots} rows for {path}"


def _create_payload(file: h5py.File, identity: CacheIdentity, shape: tuple[int, ...]) -> h5py.Dataset:
    """Tokens in one uncompressed chunk per spot and view, for random reads; everything else in one piece."""
    chunks = (1, 1, *shape[2:]) if identity.kind == "token" else None
    return file.create_dataset(DATASET_OF_KIND[identity.kind], shape, dtype=identity.dtype, chunks=chunks)


def _write_chunks(payload: h5py.Dataset, start: int, block: np.ndarray) -> None:
    """Write tokens (b, V, T, D) of the spots from `start` on, chunk by chunk, past the chunk cache of HDF5.

    A chunk is then copied once, into the page cache, instead of twice. Several threads would be slower than one, since
    the system lets only one of them at a time write into a file.
    """
    assert block.shape[1:] == payload.shape[1:], f"tokens {block.shape} for {payload.shape}"
    block = np.ascontiguousarray(block, dtype=payload.dtype)
    for spot, view in np.ndindex(block.shape[:2]):
        payload.id.write_direct_chunk((start + spot, view, 0, 0), block[spot, view])


def _attributes(identity: CacheIdentity) -> dict[str, object]:
    values = {name: _to_attribute(value) for name, value in dataclasses.asdict(identity).items()}
    return {"schema_version": SCHEMA_VERSION, "program_version": VERSION, **values}


def _to_attribute(value: object) -> object:
    if value is None:
        return math.nan
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def opened(path: str | Path, repair: Callable[[], str] | None = None) -> Iterator[h5py.File]:
    """Open a cache for reading.

    repair: spells the command that makes it again; asked only when something is wrong.
    Raises FileNotFoundError or, also while the caller reads, ValueError for a damaged file, with that command.
    """
    path = Path(path)
    repair = repair or partial(_usual_repair, path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Run:\n{repair()}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except _READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is truncated or no cache of ours ({reason}). Re-run:\n{repair()}") from error


def _usual_repair(path: Path) -> str:
    return f"python preprocess/extract_features_uni.py --slides {path.stem} --overwrite (with its other flags)"


def read_identity(path: str | Path) -> CacheIdentity:
    """What a cache says about itself. Raises ValueError if it is damaged or of another schema version."""
    with opened(path) as file:
        return identity_of(file, path)


def identity_of(file: h5py.File, path: str | Path, repair: Callable[[], str] | None = None) -> CacheIdentity:
    """Read what an opened cache says about itself. Raises ValueError if it is of another schema version."""
    found = file.attrs.get("schema_version")
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"{path} is a cache of schema version {found}, this program reads version {SCHEMA_VERSION}. "
            f"Re-run:\n{repair() if repair else 'its extraction with --overwrite'}"
        )
    values = {field.name: _from_attribute(file.attrs[field.name]) for field in dataclasses.fields(CacheIdentity)}
    values["image_size"] = tuple(int(length) for length in values["image_size"])
    return CacheIdentity(**values)


def _from_attribute(value: object) -> object:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def verify_cache(
    path: str | Path,
    expected: Mapping[str, object],
    spot_ids: Sequence[str],
    centers: np.ndarray,
    repair: Callable[[], str],
) -> CacheIdentity:
    """Check a cache against what it should have been made from, before its first number is used.

    expected: fields of CacheIdentity with the values they must have.  spot_ids (N,), centers (N, 2): the spots of the
    slide, in order.  repair: spells the command that makes the cache again.
    Returns what the cache says about itself. Raises FileNotFoundError, or one ValueError with every difference found.
    """
    with opened(path, repair) as file:
        identity = identity_of(file, path, repair)
        problems = [
            _describe_field(name, getattr(identity, name), value)
            for name, value in expected.items()
            if not _is_same(getattr(identity, name), value)
        ]
        problems += _compare_spots(
            file["spot_id"].asstr()[:].tolist(), file["coords"][:], list(spot_ids), np.asarray(centers)
        )
        rows = file[DATASET_OF_KIND[identity.kind]].shape[0]
        if rows != len(file["spot_id"]):
            problems.append(f"it holds {rows} rows for {len(file['spot_id'])} spots and is damaged")
    if len(problems) == 1:
        raise ValueError(f"{path} cannot be used: {problems[0]}. Re-run:\n{repair()}")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{path} cannot be used, for {len(problems)} reasons:\n{listed}\nRe-run:\n{repair()}")
    return identity


def _is_same(found: object, expected: object) -> bool:
    if isinstance(found, float) and isinstance(expected, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == (tuple(expected) if isinstance(expected, list) else expected)


def _describe_field(name: str, found: object, expected: object) -> str:
    if name == "image_fingerprint":
        return f"it was made from another image file (fingerprint {found}, the image there now has {expected})"
    if name == "encoder_sha256":
        return f"it was made with other weights of the encoder (SHA-256 {found}, expected {expected})"
    if name == "encoder":
        return f"it was made with encoder {found!r}, expected {expected!r}"
    return f"its {name.replace('_', ' ')} is {found}, expected {expected}"


def _compare_spots(
    found: list[str], found_centers: np.ndarray, expected: list[str], expected_centers: np.ndarray
) -> list[str]:
    """Sentences about spots that are missing, extra, in another order or elsewhere on the image."""
    if found != expected:
        missing = [spot for spot in expected if spot not in set(found)]
        extra = [spot for spot in found if spot not in set(expected)]
        if not missing and not extra:
            return [f"it holds the {len(found)} spots of the slide in another order"]
        return [
            f"it holds {len(found)} spots but the slide has {len(expected)} "
            f"({_counted(missing, 'missing')}; {_counted(extra, 'extra')}): it was made from another spot or count table"
        ]
    moved = np.flatnonzero((found_centers != expected_centers).any(axis=1))
    if len(moved):
        first = moved[0]
        return [
            f"{len(moved)} of its {len(found)} spots have another centre (spot {found[first]}: "
            f"{tuple(found_centers[first].tolist())}, expected {tuple(expected_centers[first].tolist())}): it was made "
            "from another spot table"
        ]
    return []


def _counted(spots: list[str], what: str) -> str:
    named = f": {', '.join(spots[:_NAMED_AT_MOST])}" if spots else ""
    return f"{len(spots)} {what}{named}{', ...' if len(spots) > _NAMED_AT_MOST else ''}"


def read_features(path: str | Path, rows: slice = slice(None)) -> np.ndarray:
    """The numbers of a cache (or only `rows`), in the order and type in which they are stored."""
    with opened(path) as file:
        return file[DATASET_OF_KIND[identity_of(file, path).kind]][rows]


def read_published(path: str | Path, num_spots: int) -> np.ndarray:
    """Features of the published download: a bare tensor (N, D) or (N, M, D) without identifiers, as float32.

    Its rows can only be told apart by their number, so a wrong number is refused with the likely cause.
    """
    return _published(Path(path), num_spots, memory_map=False).float().numpy()


def verify_published(path: str | Path, num_spots: int) -> tuple[int, ...]:
    """The shape of published features, checked as in `read_published`, without reading the numbers."""
    return tuple(_published(Path(path), num_spots, memory_map=True).shape)


def _published(path: Path, num_spots: int, *, memory_map: bool) -> torch.Tensor:
    tensor = load_tensors(path, memory_map=memory_map)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() not in (2, 3) or not tensor.is_floating_point():
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{path} should hold one tensor of features, N x D or N x M x D; found {found}.")
    if len(tensor) != num_spots:
        raise ValueError(
            f"{path} holds {len(tensor)} rows but slide {path.stem} has {num_spots} spots. {_likely_cause(tensor, num_spots)} "
            f"Published features have no identifiers, so they cannot be matched. Use the counts and spot table of the same "
            f"download, or make features from the image:\n"
            f"python preprocess/extract_features_uni.py --extract_mode {'target' if tensor.dim() == 2 else 'neighbor'} "
            f"--slides {path.stem} (with --config, or --mode external --test_name)"
        )
    return tensor


def _likely_cause(tensor: torch.Tensor, num_spots: int) -> str:
    rows = len(tensor)
    if (
        tensor.dim() == 2
        and num_spots
        and rows % num_spots == 0
        and math.isqrt(rows // num_spots) ** 2 == rows // num_spots
    ):
        return f"It looks like {rows // num_spots} neighbor tiles of each spot, flattened, in the folder of target features."
    if rows > num_spots:
        return "It was probably made from a longer table, for example all spots of the spot file, also those without counts."
    return (
        "It was probably made from a shorter table, for example only the spots marked as selected, or of another slide."
    )


def payload_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes that an array of this shape takes on disk."""
    return math.prod(shape) * np.dtype(dtype).itemsize
