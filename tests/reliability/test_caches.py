"""Caches of features: a changed byte, an attribute that lies, a lock, a full disk; and what earlier versions wrote."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from datasets.features.block_store import BlockStore
from datasets.features.cache import opened, read_features, read_identity, write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.published import read_published
from datasets.features.sealed import is_finite, read_seal
from datasets.features.verify import verify_cache
from tests.caches import as_earlier, edited
from tests.ended import ended
from utils.files import UnwritableFile

SPOTS, DIM = 12, 6
IDS = [f"{row}x1" for row in range(SPOTS)]
CENTERS = np.arange(2 * SPOTS).reshape(SPOTS, 2)
REPAIR = "python preprocess/extract_features_uni.py --slides A1"
IDENTITY = CacheIdentity(
    kind="target",
    encoder="uni",
    encoder_sha256="ab12",
    image_size=(900, 800),
    image_fingerprint="f",
    patch_size=8,
    microns_per_pixel=0.5,
    num_neighbors=3,
    views=2,
    dtype="float32",
)
SHAPES = {"target": (DIM,), "neighbor": (9, DIM), "token": (2, 4, DIM), "patch": (8, 8, 3)}


def values_of(kind: str) -> np.ndarray:
    generator, shape = np.random.default_rng(0), (SPOTS, *SHAPES[kind])
    if kind == "patch":
        return generator.integers(0, 256, shape).astype(np.uint8)
    return generator.normal(size=shape).astype(np.float16 if kind == "token" else np.float32)


def written(path: Path, kind: str = "target") -> Path:
    values = values_of(kind)
    identity = dataclasses.replace(IDENTITY, kind=kind, dtype=str(values.dtype))
    return write_cache(path, identity, IDS, CENTERS, np.array_split(values, 3))


def refusal(path: Path, read: Callable[[Path], object] = read_features) -> str:
    with pytest.raises(ValueError, match=r"A1\.h5 ") as caught:
        read(path)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_changed_byte_is_found(kind, tmp_path):
    """No byte of a cache can change without a word, wherever it is; and the message names the file."""
    path = written(tmp_path / "A1.h5", kind)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    places = {*range(0, 700, 7), *generator.integers(0, len(content), 150).tolist(), len(content) - 1}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        refusal(path)


def test_a_byte_more_or_less_is_found_before_hdf5_sees_the_file(tmp_path):
    path = written(tmp_path / "A1.h5")
    content = path.read_bytes()
    for place in range(512, len(content), 97):
        path.write_bytes(content[:place] + b"\0" + content[place:])
        assert "A1.h5 is longer than what was written: it has " in refusal(path)
        path.write_bytes(content[:place] + content[place + 1 :])
        assert "A1.h5 is truncated: it has " in refusal(path)


def test_spots_whose_numbers_changed_are_named(tmp_path):
    path = written(tmp_path / "A1.h5")
    with h5py.File(path, "r+") as file:
        file["features"][3] = file["features"][4]
        file["features"][7, 2] += 1
    message = refusal(path)
    said = "the numbers of 2 of its 12 spots are not what was written (checksum): 3x1, 7x1. Keep it elsewhere and run:"
    assert said in message
    assert np.array_equal(read_features(path, slice(8, 12)), values_of("target")[8:])


def test_rows_in_another_order_are_found(tmp_path):
    path = written(tmp_path / "A1.h5")
    with h5py.File(path, "r+") as file:
        file["features"][...] = file["features"][:][::-1]
    assert "the numbers of 12 of its 12 spots are not what was written" in refusal(path)


def test_tokens_are_verified_where_they_are_read(tmp_path):
    path = written(tmp_path / "A1.h5", "token")
    with h5py.File(path, "r+") as file:
        file["tokens"][5, 1, 0, 0] = np.nan
    with BlockStore([path], "token") as store:
        assert np.array_equal(store.read([5, 4], [0, 1]).numpy(), values_of("token")[[5, 4], [0, 1]])
        with pytest.raises(ValueError, match=r"A1\.h5 is damaged: the tokens of spot 5x1 in view 1 are not what was"):
            store.read([4, 5], [0, 1])


@pytest.mark.parametrize("kind", SHAPES)
def test_caches_of_earlier_versions_are_read(kind, tmp_path):
    path = written(tmp_path / "A1.h5", kind)
    as_earlier(path)
    assert read_seal(path) is None
    assert np.array_equal(read_features(path), values_of(kind))
    assert np.array_equal(read_features(path, slice(3, 5)), values_of(kind)[3:5])
    if kind == "token":
        with BlockStore([path], "token") as store:
            assert np.array_equal(store.read([5, 4], [0, 1]).numpy(), values_of(kind)[[5, 4], [0, 1]])


def test_numbers_of_earlier_caches_must_be_finite(tmp_path):
    for kind, place in (("target", (3, 1)), ("neighbor", (3, 4, 1)), ("token", (3, 1, 2, 0))):
        path = written(tmp_path / kind / "A1.h5", kind)
        as_earlier(path)
        with h5py.File(path, "r+") as file:
            file["tokens" if kind == "token" else "features"][place] = np.inf
        assert "the numbers of 1 of its 12 spots are not finite: 3x1" in refusal(path)
    with (
        BlockStore([path], "token") as store,
        pytest.raises(ValueError, match=r"tokens of spot 3x1 in view 1 are not finite"),
    ):
        store.read([3], [1])


def test_earlier_caches_that_hdf5_would_read_for_ever(tmp_path):
    """One NUL inserted anywhere, as in the file with which this was found."""
    path = written(tmp_path / "A1.h5", "token")
    as_earlier(path)
    content = path.read_bytes()
    for place in range(100, len(content), 997):
        path.write_bytes(content[:place] + b"\0" + content[place:])
        for read in (read_features, read_identity, lambda path: BlockStore([path], "token")):
            message = refusal(path, read)
            assert "bytes were inserted or appended" in message and "overwrite" not in message


LIES = {
    "dtype": "float16",
    "num_neighbors": 5,
    "views": 5,
    "kind": "patch",
    "patch_size": 16,
    "image_size": 3,
    "encoder": [1, 2],
    "microns_per_pixel": "half",
    "schema_version": 7,
    "fill": 2.5,
    "token_pool": "two",
}


@pytest.mark.parametrize("name", LIES)
def test_attributes_are_compared_with_the_data(name, tmp_path):
    kind = {"dtype": "neighbor", "num_neighbors": "neighbor", "patch_size": "patch"}.get(name, "token")
    for is_earlier in (False, True):
        path = written(tmp_path / str(is_earlier) / "A1.h5", kind)
        if is_earlier:
            as_earlier(path)
        with h5py.File(path, "r+") if is_earlier else edited(path) as file:
            place = file["tokens" if kind == "token" else "patches" if kind == "patch" else "features"]
            file.attrs[name] = LIES[name]
            if name == "kind":  # so that the test can seal it again
                file["patches"] = place
        for read in (read_features, read_identity):
            message = refusal(path, read)
            assert "cannot be read as a cache of features" in message and "overwrite" not in message


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.create_group("features"),
        lambda file: file.create_dataset("features", data=np.zeros((SPOTS, DIM), np.complex64)),
        lambda file: file.create_dataset("features", data=np.zeros((SPOTS, DIM), np.float64)),
        lambda file: file.create_dataset("features", data=np.zeros((SPOTS - 1, DIM), np.float32)),
        lambda file: file.create_dataset("features", data=np.float32(1)),
        lambda file: file.create_dataset("features", (6 * 10**10,), "float32"),
        lambda file: file.__setitem__("features", h5py.SoftLink("/coords")),
        lambda file: file.__setitem__("features", h5py.ExternalLink("other.h5", "/features")),
        lambda _file: None,
    ],
)
def test_what_stands_in_the_place_of_features(change, tmp_path):
    path = written(tmp_path / "A1.h5")
    as_earlier(path)
    with h5py.File(path, "r+") as file:
        del file["features"]
        change(file)
    refusal(path)


@pytest.mark.parametrize(
    ("name", "values"), [("spot_id", np.arange(SPOTS)), ("coords", np.zeros((3, 2), int)), ("coords", np.zeros(SPOTS))]
)
def test_what_stands_in_the_place_of_spots(name, values, tmp_path):
    path = written(tmp_path / "A1.h5")
    as_earlier(path)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = values
    refusal(path)
    with pytest.raises(ValueError, match=r"A1\.h5 "):
        verify_cache(path, {}, IDS, CENTERS, lambda: REPAIR)


def test_a_locked_cache_is_whole(tmp_path):
    path = written(tmp_path / "A1.h5")
    with open(path, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        message = refusal(path)
    assert "it is locked (in use by another process, or the file system has no locks)" in message
    assert "HDF5_USE_FILE_LOCKING=FALSE" in message
    assert not any(word in message for word in ("overwrite", "truncated", "damaged", "delete"))


def test_a_cache_that_may_not_be_read(tmp_path, monkeypatch):
    path = written(tmp_path / "A1.h5")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(h5py, "File", denied)
    message = refusal(path)
    assert "the permission is missing" in message and "overwrite" not in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_written(value, tmp_path):
    values = values_of("target")
    values[3, 1] = value
    with pytest.raises(ValueError, match=r"A1\.h5 is not written: its features would hold numbers that are not finite"):
        write_cache(tmp_path / "A1.h5", IDENTITY, IDS, CENTERS, [values])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_finite_against_the_obvious_way(dtype):
    generator = np.random.default_rng(0)
    for length in (0, 1, 7, 300_000):
        values = generator.normal(size=length).astype(dtype)
        extremes = [np.finfo(dtype).max, -np.finfo(dtype).max, np.finfo(dtype).tiny, -0.0]
        values[: len(extremes)] = extremes[:length]
        assert is_finite(values)
        for wrong in (np.nan, -np.nan, np.inf, -np.inf):
            for place in {0, length // 2, length - 1} if length else ():
                changed = values.copy()
                changed[place] = wrong
                assert not is_finite(changed) and not np.isfinite(changed).all()
    assert is_finite(np.arange(3))


def test_published_features_must_be_finite(tmp_path):
    path = tmp_path / "A1.pt"
    for kind in ("target", "neighbor"):
        values = torch.from_numpy(values_of(kind).copy())
        torch.save(torch.nn.Parameter(values), path)
        assert np.array_equal(read_published(path, SPOTS), values_of(kind))
        values[2] = values[2] * torch.nan
        values[5].flatten()[0] = torch.inf
        torch.save(values, path)
        count = values[0].numel() + 1
        with pytest.raises(
            ValueError, match=rf"A1\.pt: {count} numbers of 2 of its 12 spots are not finite \(rows 2, 5"
        ):
            read_published(path, SPOTS)


@pytest.mark.parametrize("kind", ["target", "token"])
def test_a_full_disk_is_an_error_and_no_crash_at_exit(kind, small_disk, tmp_path):
    path, count = small_disk / "features" / "A1.h5", 4000
    identity = dataclasses.replace(IDENTITY, kind=kind, dtype="float32")
    shape = {"target": (128,), "token": (2, 4, 128)}[kind]
    blocks = (np.ones((100, *shape), np.float32) for _ in range(count // 100))

    def fill() -> int:
        try:
            write_cache(path, identity, [f"{row}x1" for row in range(count)], np.zeros((count, 2), int), blocks)
        except OSError as error:
            os.write(2, str(error).encode())
            return 1
        return 0

    status, said = ended(fill, tmp_path / "log")
    assert status == 1, said
    assert said.startswith(f"{path} cannot be written: there is no space left (") and "HDF5" not in said
    assert list(path.parent.iterdir()) == []
    assert UnwritableFile.__mro__[1] is OSError


def test_an_opened_cache_gives_its_spots(tmp_path):
    with opened(written(tmp_path / "A1.h5")) as cache:
        assert cache.spot_ids == IDS and np.array_equal(cache.centers, CENTERS) and cache.identity == IDENTITY
        assert cache.checksums is not None and cache.checksums.shape == (SPOTS,)
        out = np.empty((2, DIM), np.float32)
        assert cache.read(slice(1, 3), out) is out and np.array_equal(out, values_of("target")[1:3])
