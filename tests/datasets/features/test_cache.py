"""Caches are written whole, read back, and refused for every kind of difference, with all of them in one message."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import torch

from datasets.features.cache import read_features, read_identity, write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.published import read_published, verify_published
from datasets.features.verify import verify_cache
from tests.caches import edited

IDENTITY = CacheIdentity(
    kind="target",
    encoder="uni",
    encoder_sha256="ab12",
    image_size=(9000, 8000),
    image_fingerprint="9000x8000-77-cd",
    patch_size=224,
    microns_per_pixel=0.68,
    num_neighbors=5,
    views=1,
    dtype="float32",
)
IDS = ["1x1", "2x1", "1x2", "2x2"]
CENTERS = np.array([[100, 100], [300, 100], [100, 300], [300, 300]])
FEATURES = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
REPAIR = "python preprocess/extract_features_uni.py --slides A1"
EXPECTED = {"encoder": "uni", "encoder_sha256": "ab12", "patch_size": 224, "image_fingerprint": "9000x8000-77-cd"}


def _write(path, identity=IDENTITY, ids=IDS, centers=CENTERS, features=FEATURES):
    return write_cache(path, identity, ids, centers, iter([features[:3], features[3:]]))


def _kept(path, expected=EXPECTED, ids=IDS, centers=CENTERS) -> str:
    """The message about a file that cannot be used: it says to keep it, whatever is wrong, for it may be whole."""
    with pytest.raises(ValueError) as refused:
        verify_cache(path, expected, ids, centers, repair=lambda: REPAIR)
    message = str(refused.value)
    assert str(path) in message and "eep it elsewhere" in message and "overwrite" not in message
    return message


def _refusal(path, expected=EXPECTED, ids=IDS, centers=CENTERS) -> str:
    """As `_kept`, with the command that makes another one."""
    message = _kept(path, expected, ids, centers)
    assert message.endswith(f"eep it elsewhere and run:\n{REPAIR}")
    return message


def test_what_is_written_is_read(tmp_path):
    path = _write(tmp_path / "gt_features_224" / "A1.h5")
    assert read_identity(path) == IDENTITY
    assert np.array_equal(read_features(path), FEATURES)
    assert np.array_equal(read_features(path, slice(1, 3)), FEATURES[1:3])
    everything = dataclasses.asdict(IDENTITY)
    assert verify_cache(path, everything, IDS, CENTERS, repair=lambda: REPAIR) == IDENTITY
    unknown_size = dataclasses.replace(IDENTITY, microns_per_pixel=None)
    assert read_identity(_write(tmp_path / "B1.h5", unknown_size)).microns_per_pixel is None
    with h5py.File(path) as file:
        assert file["features"].dtype == np.float32 and file["coords"].shape == (4, 2)
        assert {"schema_version", "program_version", "encoder_sha256", "fill"} <= set(file.attrs)


@pytest.mark.parametrize(
    ("kind", "dataset", "shape", "dtype"),
    [
        ("neighbor", "features", (4, 25, 6), "float32"),
        ("token", "tokens", (4, 8, 5, 6), "float16"),
        ("patch", "patches", (4, 8, 8, 3), "uint8"),
    ],
)
def test_every_kind(tmp_path, kind, dataset, shape, dtype):
    values = np.random.default_rng(1).integers(0, 200, size=shape).astype(dtype)
    identity = dataclasses.replace(IDENTITY, kind=kind, dtype=dtype, views=8, patch_size=8)
    path = _write(tmp_path / "A1.h5", identity, features=values)
    with h5py.File(path) as file:
        assert file[dataset].dtype == np.dtype(dtype) and file[dataset].shape == shape
    assert np.array_equal(read_features(path), values)


def test_tokens_are_stored_as_hdf5_itself_would(tmp_path):
    """Against the obvious way: the same values in one piece; blocks that are no plain arrays of the type too."""
    identity = dataclasses.replace(IDENTITY, kind="token", dtype="float16", views=2)
    values = np.random.default_rng(2).normal(size=(4, 2, 3, 5)).astype(np.float16)
    turned = np.ascontiguousarray(values[1:].transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    blocks = iter([values[:1].astype(np.float64), turned])
    path = write_cache(tmp_path / "A1.h5", identity, IDS, CENTERS, blocks)
    with h5py.File(tmp_path / "slow.h5", "w") as slow:
        slow.create_dataset("tokens", data=values)
        with h5py.File(path) as file:
            tokens = file["tokens"]
            assert (tokens.chunks, tokens.compression, tokens.dtype) == (None, None, np.float16)
            assert np.array_equal(tokens[:], slow["tokens"][:]) and np.array_equal(tokens[:], values)
            assert path.read_bytes()[tokens.id.get_offset() :][: values.nbytes] == values.tobytes()
    with pytest.raises(AssertionError, match="tokens"):
        write_cache(tmp_path / "B1.h5", identity, IDS, CENTERS, iter([values[:2], values[2:, :, :2]]))


def test_an_attribute_of_an_older_version_is_ignored(tmp_path):
    path = _write(tmp_path / "A1.h5")
    with edited(path) as file:
        file.attrs["is_compiled"] = True
    assert read_identity(path) == IDENTITY
    assert verify_cache(path, EXPECTED, IDS, CENTERS, repair=lambda: REPAIR) == IDENTITY


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_fingerprint": "1x1-1-a"}, r"another image file (fingerprint 1x1-1-a, expected 9000x"),
        ({"patch_size": 448}, r"its patch size is 448, expected 224. Keep it elsewhere and run:"),
        ({"patch_um": 112.0}, "its patches are 112 um wide, expected not scaled (DATA.patch_um). Keep it elsewhere"),
        ({"fill": "black"}, "its fill is black, expected white outside the image"),
        ({"precision": "bf16"}, "its precision is bf16, expected float32. Keep it elsewhere and run:"),
        ({"dtype": "float16"}, "its dtype is float16, expected float32. Keep it elsewhere and run:"),
    ],
)
def test_a_cache_made_otherwise_is_refused_and_kept(tmp_path, changed, message):
    features = FEATURES.astype(changed.get("dtype", "float32"))
    path = _write(tmp_path / "A1.h5", dataclasses.replace(IDENTITY, **changed), features=features)
    assert message in _refusal(path, EXPECTED | {name: getattr(IDENTITY, name) for name in changed})


@pytest.mark.parametrize(
    ("changed", "way"),
    [
        ({"views": 1}, "its views is 1, expected 8. Work with --views 1, or keep it elsewhere"),
        ({"views": 1, "dtype": "float32"}, "Work with --views 1 and --dtype float32, or keep it elsewhere"),
        ({"token_pool": 2}, "Work with --token_pool 2, or keep it elsewhere"),
        ({"views": 1, "patch_size": 64}, "its views is 1, expected 8\nKeep it elsewhere"),
    ],
)
def test_tokens_of_other_settings_are_kept_and_named_with_what_fits_them(tmp_path, changed, way):
    asked = dataclasses.replace(IDENTITY, kind="token", views=8, dtype="float16")
    made = dataclasses.replace(asked, **changed)
    path = _write(tmp_path / "A1.h5", made, features=np.zeros((4, made.views, 3, 5), made.dtype))
    assert way in _refusal(path, {name: getattr(asked, name) for name in ("patch_size", *changed)})


def test_features_of_other_weights_are_kept(tmp_path):
    message = _kept(_write(tmp_path / "A1.h5", dataclasses.replace(IDENTITY, encoder_sha256="ff")))
    assert "other weights of the encoder (SHA-256 ff, expected ab12)" in message
    assert "Work with those weights (--weights)" in message


def test_features_of_another_patch_encoder_are_kept(tmp_path):
    path = _write(tmp_path / "A1.h5", dataclasses.replace(IDENTITY, encoder="uni2-h", encoder_sha256="ff"))
    message = _kept(path)
    assert "encoder 'uni2-h', expected 'uni'" in message and "Work with DATA.encoder=uni2-h" in message


def test_other_spots_are_refused_with_their_numbers(tmp_path):
    path = _write(tmp_path / "A1.h5")
    more = [*IDS, "9x9", "8x9"]
    assert "holds 4 spots but the slide has 6 (2 missing: 9x9, 8x9; 0 extra)" in _refusal(
        path, ids=more, centers=np.zeros((6, 2))
    )
    assert "holds 4 spots but the slide has 3 (0 missing; 1 extra: 2x2)" in _refusal(
        path, ids=IDS[:3], centers=CENTERS[:3]
    )
    assert "holds the 4 spots of the slide in another order" in _refusal(path, ids=IDS[::-1], centers=CENTERS[::-1])
    moved = CENTERS + np.array([[0, 0], [5, 0], [0, 0], [0, 0]])
    assert "1 of its 4 spots have another centre (spot 2x1: (300, 100), expected (305, 100))" in _refusal(
        path, centers=moved
    )


def test_all_differences_are_in_one_message(tmp_path):
    path = _write(tmp_path / "A1.h5", dataclasses.replace(IDENTITY, encoder="resnet50", patch_size=64))
    message = _kept(path, ids=IDS[:2], centers=CENTERS[:2])
    assert "3 reasons" in message and "resnet50" in message and "patch size is 64" in message
    assert "0 missing; 2 extra: 1x2, 2x2" in message


def test_another_schema_and_damaged_files_are_refused(tmp_path):
    path = _write(tmp_path / "A1.h5")
    with edited(path) as file:
        file.attrs["schema_version"] = 0
    assert "schema version 0, this program reads version 1" in _kept(path)
    with pytest.raises(ValueError, match="schema version 0"):
        read_identity(path)

    path = _write(tmp_path / "B1.h5")
    (tmp_path / "C1.h5").write_bytes(path.read_bytes()[:-40])
    assert "C1.h5 is truncated: it has " in _refusal(tmp_path / "C1.h5")
    (tmp_path / "D1.h5").write_bytes(b"something else")
    assert "truncated or no cache of ours" in _kept(tmp_path / "D1.h5")
    with h5py.File(path, "r+") as file:
        del file["features"]
    assert "B1.h5 is truncated: it has " in _refusal(path)  # HDF5 gives the room back
    with pytest.raises(FileNotFoundError, match=r"E1\.h5 does not exist"):
        verify_cache(tmp_path / "E1.h5", EXPECTED, IDS, CENTERS, repair=lambda: REPAIR)


@pytest.mark.parametrize("error", [RuntimeError("the encoder broke"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = _write(tmp_path / "A1.h5")

    def half():
        yield FEATURES[:2] + 1
        raise error

    with pytest.raises(type(error)):
        write_cache(path, IDENTITY, IDS, CENTERS, half())
    with pytest.raises(type(error)):
        write_cache(tmp_path / "B1.h5", IDENTITY, IDS, CENTERS, half())
    assert np.array_equal(read_features(path), FEATURES)
    assert [file.name for file in tmp_path.iterdir()] == ["A1.h5"], "no temporary file, no half-written B1"


def test_a_wrong_number_of_rows_is_our_own_error(tmp_path):
    with pytest.raises(AssertionError, match="3 of 4 rows"):
        write_cache(tmp_path / "A1.h5", IDENTITY, IDS, CENTERS, iter([FEATURES[:3]]))
    assert not list(tmp_path.iterdir())


def test_published_tensors(tmp_path):
    path = tmp_path / "A1.pt"
    torch.save(torch.ones(4, 25, 6, dtype=torch.float16), path)
    features = read_published(path, 4)
    assert features.shape == (4, 25, 6) and features.dtype == np.float32
    with pytest.raises(
        ValueError, match=r"(?s)holds 4 rows but slide A1 has 3 spots.*longer table.*extract_mode neighbor"
    ):
        read_published(path, 3)
    with pytest.raises(ValueError, match="shorter table"):
        read_published(path, 9)
    torch.save(torch.ones(100, 6), path)
    with pytest.raises(ValueError, match="25 neighbor tiles of each spot, flattened"):
        read_published(path, 4)
    torch.save({"a": torch.ones(4, 6)}, path)
    with pytest.raises(ValueError, match=r"should hold one tensor .* found dict"):
        read_published(path, 4)


def test_published_tensors_are_verified_without_reading_them(tmp_path):
    path = tmp_path / "A1.pt"
    torch.save(torch.ones(4, 25, 6), path)
    assert verify_published(path, 4) == (4, 25, 6)
    with pytest.raises(ValueError, match="holds 4 rows but slide A1 has 5 spots"):
        verify_published(path, 5)
    torch.save(torch.ones(4, 6), path, _use_new_zipfile_serialization=False)
    assert verify_published(path, 4) == (4, 6), "the old format cannot be mapped, and is read"
    torch.save(Dangerous(), path)
    with pytest.raises(ValueError, match="not trusted"):
        verify_published(path, 4)


def test_published_files_may_not_run_code(tmp_path):
    torch.save(Dangerous(), tmp_path / "A1.pt")
    with pytest.raises(ValueError, match="not trusted"):
        read_published(tmp_path / "A1.pt", 4)


class Dangerous:
    """Anything that is not a tensor."""
