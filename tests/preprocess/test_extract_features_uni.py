"""The extraction command on small slides in the true layout, with a real encoder."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datasets.features.cache import read_features, read_identity
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.features.places import find_cache
from datasets.images.geometry import dihedral_view, neighbor_corners, neighbor_validity
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from models.patch_encoders import build
from models.patch_encoders.build import build_patch_encoder
from preprocess.extract_features_uni import main
from preprocess.extraction import extract as extraction
from preprocess.extraction import parts, unnamed
from preprocess.extraction.extract import extract
from preprocess.extraction.pixels import choose_slides
from preprocess.extraction.plan import ExtractionSettings
from preprocess.extraction.writers import CacheWriters, locked
from preprocess.simulate_demo import simulate
from tests.caches import edited
from tests.command_line import call_extract
from tests.shortcuts import encode_once, read_encoders_once
from tests.team import run_team
from utils.locks import temporary_prefix

SIZE = 64


@pytest.fixture(autouse=True, scope="module")
def _encoders():
    with pytest.MonkeyPatch.context() as patch:
        read_encoders_once(patch)
        patch.setattr(build, "encode", encode_once)
        yield


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory) -> Path:
    """Smaller than that of other tests: an encoder sees every tile of every spot. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    simulate(folder, patients=("A", "B", "C"), slides_per_patient=1, grid=(4, 4), patch_size=SIZE, num_genes=24)
    return folder


@pytest.fixture(scope="module")
def patch_encoder():
    return build_patch_encoder("efficientnet-lite0")


def _copy(tiny_data: Path, folder: Path, slides: tuple[str, ...]) -> Path:
    """The named slides of the tiny data set, to be written to."""
    source, target = tiny_data / "demo", folder / "demo"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.h5"))
    for path in [*target.glob("ST-cnts/*"), *target.glob("ST-spotfiles/*")]:
        if path.name.split("_")[0] not in slides:
            path.unlink()
    return folder


@pytest.fixture
def data_dir(tiny_data, tmp_path) -> Path:
    return _copy(tiny_data, tmp_path, ("A1", "B1"))


@pytest.fixture(scope="module")
def extracted(tiny_data, tmp_path_factory) -> Path:
    """Slide A1 with all its caches. Read only."""
    torch.set_num_threads(1)
    folder = _copy(tiny_data, tmp_path_factory.mktemp("extracted"), ("A1",))
    _run(folder, "all", "--views", "2")
    return folder


def _run(data_dir: Path, extract_mode: str, *flags: str) -> None:
    shared = ["--config", "demo/dml", "--mode", "internal", "--data_dir", str(data_dir), "--device", "cpu"]
    main([*shared, "--extract_mode", extract_mode, *flags])


def _layout(data_dir: Path, name: str = "demo") -> Layout:
    return Layout(data_dir, get_spec(name, data_dir), patch_size=SIZE, num_neighbors=5, encoder="efficientnet-lite0")


def _caches(data_dir: Path) -> list[str]:
    """Every file in the folders of caches, temporary ones too."""
    return sorted(
        str(path.relative_to(data_dir / "demo")) for path in data_dir.rglob("*_64/*") if "ST-" not in str(path)
    )


def _encode(patch_encoder, pixels: np.ndarray, view: int = 0):
    return patch_encoder(dihedral_view(torch.from_numpy(pixels.copy()).permute(2, 0, 1), view)[None])


def test_all_caches_of_a_slide_equal_a_slow_version(extracted, patch_encoder):
    layout = _layout(extracted)
    table = load_slide(layout, "A1")
    centers = table.obsm["center"]
    target, neighbor, token = (read_features(layout.cache_path(kind, "A1")) for kind in ("target", "neighbor", "token"))
    assert target.shape == (table.n_obs, 112) and neighbor.shape == (table.n_obs, 25, 112)
    assert token.shape == (table.n_obs, 2, 16, 112) and token.dtype == np.float16
    assert np.array_equal(neighbor[:, 12], target), "the patch is the middle tile"
    with open_slide(layout.image_path("A1")) as image:
        corners = neighbor_corners(centers, SIZE)
        is_valid = neighbor_validity(centers, image.size, SIZE)
        assert not neighbor[~is_valid].any()
        for spot in range(0, table.n_obs, 5):
            for tile in np.flatnonzero(is_valid[spot])[::5]:
                pixels = image.read_region(*corners[spot, tile], SIZE, SIZE)
                expected = _encode(patch_encoder, pixels).pooled[0]
                np.testing.assert_allclose(neighbor[spot, tile], expected, rtol=1e-3, atol=1e-4)
            patch = image.read_region(*corners[spot, 12], SIZE, SIZE)
            np.testing.assert_allclose(target[spot], _encode(patch_encoder, patch).pooled[0], rtol=1e-3, atol=1e-4)
            for view in range(2):
                expected = _encode(patch_encoder, patch, view).tokens[0]
                np.testing.assert_allclose(token[spot, view], expected, rtol=2e-3, atol=2e-3)


def test_caches_say_what_they_are_of(extracted, patch_encoder):
    layout = _layout(extracted)
    table = load_slide(layout, "A1")
    identity = read_identity(layout.cache_path("token", "A1"))
    assert (identity.kind, identity.encoder, identity.encoder_sha256) == (
        "token",
        "efficientnet-lite0",
        patch_encoder.weights_sha256,
    )
    assert (identity.patch_size, identity.num_neighbors, identity.views, identity.dtype) == (SIZE, 5, 2, "float16")
    with open_slide(layout.image_path("A1")) as image:
        assert identity.image_size == image.size and identity.image_fingerprint == image.fingerprint()
    with h5py.File(layout.cache_path("target", "A1")) as file:
        assert file["spot_id"].asstr()[:].tolist() == list(table.obs_names)
        assert np.array_equal(file["coords"][:], table.obsm["center"])


def _paint(root: Path, is_exchanged: bool) -> dict[str, tuple[int, int]]:
    """Repaint the external slide: around each spot of the spot table a square in a colour of its own.

    The table is parsed here by hand, and its pixel columns are exchanged if asked for, so that nothing depends on the
    loader. Returns the true centre (x, y) of each spot id.
    """
    table = root / "ST-spotfiles" / "X1_selection.tsv"
    lines = [line.split("\t") for line in table.read_text().splitlines()]
    place = {name: lines[0].index(name) for name in ("x", "y", "pixel_x", "pixel_y")}
    (path,) = root.glob("ST-imgs/*/*/X1.*")
    picture = np.full((*Image.open(path).size[::-1], 3), 255, dtype=np.uint8)
    true_centers = {}
    for line in lines[1:]:
        column, row = int(float(line[place["x"]])), int(float(line[place["y"]]))
        x, y = int(float(line[place["pixel_x"]])), int(float(line[place["pixel_y"]]))
        picture[max(0, y - 24) : y + 24, max(0, x - 24) : x + 24] = (40 * column % 256, 40 * row % 256, 90)
        true_centers[f"{column}x{row}"] = (x, y)
        if is_exchanged:
            line[place["pixel_x"]], line[place["pixel_y"]] = line[place["pixel_y"]], line[place["pixel_x"]]
    table.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    path.unlink()
    Image.fromarray(picture).save(path.with_suffix(".png"))
    return true_centers


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_features_stay_with_their_spots_in_an_external_set(tiny_data, tmp_path, patch_encoder, is_exchanged):
    """Row by row of the loader's table, for both conventions of the pixel columns: the feature is that of the spot's id."""
    root = tmp_path / "test" / "painted"
    shutil.copytree(tiny_data / "test" / "demo_external", root, ignore=shutil.ignore_patterns("*.h5", "*.json"))
    convention = "exchanged_pixels: true\nsort_by: xy\n" if is_exchanged else ""
    (root / "dataset.yaml").write_text(f"training_type: demo\nimage_pattern: '*/*/{{slide}}.*'\n{convention}")
    true_centers = _paint(root, is_exchanged)
    flags = ["--mode", "external", "--test_name", "painted", "--data_dir", str(tmp_path), "--device", "cpu"]
    main([*flags, "--extract_mode", "all", "--views", "1"])

    layout = Layout(tmp_path, get_spec("painted", tmp_path), "painted", patch_size=SIZE, encoder="efficientnet-lite0")
    table = load_slide(layout, "X1")
    target, neighbor, token = (read_features(layout.cache_path(kind, "X1")) for kind in ("target", "neighbor", "token"))
    with open_slide(layout.image_path("X1")) as image:
        crops = [true_centers[spot] for spot in table.obs_names]
        patches = np.stack([image.read_region(x - 32, y - 32, SIZE, SIZE) for x, y in crops])
    expected = patch_encoder(torch.from_numpy(patches).permute(0, 3, 1, 2))
    tolerance = {"rtol": 1e-3, "atol": 5e-3}
    np.testing.assert_allclose(target, expected.pooled, **tolerance)
    np.testing.assert_allclose(neighbor[:, 12], expected.pooled, **tolerance)
    np.testing.assert_allclose(token[:, 0], expected.tokens, rtol=2e-3, atol=1e-2)
    differences = np.abs(target[:, None] - target[None]).max(axis=2) + np.eye(len(target))
    assert differences.min() > 0.05, "no two spots look alike, so that a wrong order would be seen"


def test_valid_caches_are_kept_and_invalid_ones_refused(data_dir, capsys):
    _run(data_dir, "target")
    assert _caches(data_dir) == ["gt_features_efficientnet-lite0_64/A1.h5", "gt_features_efficientnet-lite0_64/B1.h5"]
    layout = _layout(data_dir)
    path = layout.cache_path("target", "A1")
    before = path.stat().st_mtime_ns
    _run(data_dir, "target")
    said = capsys.readouterr().out
    assert "2 slides are complete and skipped: A1, B1" in said and "Nothing to do" in said
    assert path.stat().st_mtime_ns == before

    with edited(path) as file:
        file.attrs["encoder_sha256"] = "other"
    other = layout.cache_path("target", "B1")
    other.write_bytes(other.read_bytes()[: other.stat().st_size // 2])
    with pytest.raises(ValueError) as refused:
        _run(data_dir, "target")
    message = str(refused.value)
    assert "2 slides cannot be extracted" in message and "other weights" in message and "B1.h5 is truncated" in message
    assert "--config demo/dml --mode internal" in message and "--extract_mode target --slides B1" in message
    assert (
        "Work with those weights (--weights), or keep it elsewhere and run:" in message and "--overwrite" not in message
    )
    _run(data_dir, "target", "--slides", "A1", "--overwrite")
    assert read_identity(path).encoder_sha256 != "other"


def test_the_variant_of_the_token_cache_is_part_of_it(extracted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(extracted, folder)
    with pytest.raises(
        ValueError,
        match=r"(?s)views is 2, expected 1\. Work with --views 2, or keep it .*--views 1 --token_pool 1 --dtype float16",
    ) as refused:
        _run(folder, "token", "--views", "1")
    assert "--overwrite" not in str(refused.value)
    _run(folder, "token", "--views", "1", "--token_pool", "2", "--dtype", "float32", "--overwrite")
    layout = _layout(folder)
    pooled, whole = (read_features(_layout(place).cache_path("token", "A1")) for place in (folder, extracted))
    assert read_identity(layout.cache_path("token", "A1")).token_pool == 2
    assert pooled.shape == (len(whole), 1, 4, 112) and pooled.dtype == np.float32
    expected = whole[:, :1].astype(np.float32).reshape(-1, 2, 2, 2, 2, 112).mean(axis=(2, 4)).reshape(pooled.shape)
    np.testing.assert_allclose(pooled, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_slide_leaves_nothing_and_is_made_again(data_dir, patch_encoder, capsys, error):
    layout = _layout(data_dir)
    settings = ExtractionSettings(("target", "token"), num_workers=1, command="extract", views=1)
    num_batches = 0

    def interrupted(images):
        nonlocal num_batches
        num_batches += 1
        if num_batches == 4:  # in the second slide
            raise error("stopped")
        return patch_encoder(images)

    def encoder(encode):
        return BatchedPatchEncoder(encode, torch.device("cpu"), batch_size=8)

    with pytest.raises(error):
        extract(layout, choose_slides(layout, None, settings.kinds), patch_encoder, encoder(interrupted), settings)
    assert _caches(data_dir) == [
        "gt_features_efficientnet-lite0_64/A1.h5",
        "token_features_efficientnet-lite0_64/A1.h5",
    ], "A1 whole, nothing of B1"
    assert ("the same command goes on" in capsys.readouterr().out) == (error is KeyboardInterrupt)
    extract(layout, choose_slides(layout, None, settings.kinds), patch_encoder, encoder(patch_encoder), settings)
    assert "1 slides are complete and skipped: A1" in capsys.readouterr().out
    assert len(_caches(data_dir)) == 4


@pytest.mark.usefixtures("patch_encoder")
def test_a_slide_that_cannot_be_decoded_costs_no_other(data_dir, capsys):
    """It is opened while the slide before is encoded, and its error comes when that one is on the disk."""
    layout = _layout(data_dir)
    path = layout.image_path("B1")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"B1\.jpg cannot be decoded.*truncated"):
        _run(data_dir, "target")
    assert _caches(data_dir) == ["gt_features_efficientnet-lite0_64/A1.h5"]
    assert "A1: target of" in capsys.readouterr().out


def test_a_full_disk_at_the_end_of_a_slide_ends_the_run(data_dir, monkeypatch):
    """The files of a slide reach the disk while the next one is encoded; their error is not lost."""
    true_fsync, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        true_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"A1\.h5 cannot be written: there is no space left"):
        _run(data_dir, "target")
    assert _caches(data_dir) == [], "neither the slide that failed nor the one in work"


def test_slides_without_an_image(data_dir, capsys):
    layout = _layout(data_dir)
    layout.image_path("B1").unlink()
    _run(data_dir, "patch")
    assert "1 of 2 slides have no image and are skipped: B1" in capsys.readouterr().out
    assert _caches(data_dir) == ["patches_64/A1.h5"]
    with pytest.raises(ValueError, match="Slide B1 of demo has no image"):
        _run(data_dir, "patch", "--slides", "A1,B1", "--overwrite")
    with pytest.raises(ValueError, match=r"--slides Z9: no counts in .*Slides there: A1, B1"):
        _run(data_dir, "patch", "--slides", "Z9")
    layout.image_path("A1").unlink()
    with pytest.raises(FileNotFoundError, match="None of the 2 slides of demo has an image"):
        _run(data_dir, "patch")


@pytest.mark.parametrize("flags", [(), ("--slides", "A1")])
def test_an_empty_folder_of_counts(data_dir, flags):
    layout = _layout(data_dir)
    for path in layout.counts_dir.iterdir():
        path.unlink()
    layout.spec_path.unlink()
    message = rf"ST-cnts holds no counts\. Prepare them: python preprocess/simulate_demo\.py --data_dir {data_dir}$"
    with pytest.raises(FileNotFoundError, match=message):
        _run(data_dir, "target", *flags)


def test_patches_are_the_pixels_around_the_spots(data_dir):
    _run(data_dir, "patch", "--slides", "A1")
    layout = _layout(data_dir)
    patches = read_features(layout.cache_path("patch", "A1"))
    centers = load_slide(layout, "A1").obsm["center"]
    with open_slide(layout.image_path("A1")) as image:
        for patch, (x, y) in zip(patches, centers, strict=True):
            assert np.array_equal(patch, image.read_region(int(x) - 32, int(y) - 32, SIZE, SIZE))
    assert read_identity(layout.cache_path("patch", "A1")).encoder == "none"


def test_bad_slides_are_named_before_anything_is_encoded(data_dir):
    layout = _layout(data_dir)
    path = layout.image_path("B1")
    path.write_bytes(b"not an image")
    table = layout.spots_path("A1")
    lines = table.read_text().splitlines()
    cells = lines[5].split("\t")
    cells[lines[0].split("\t").index("pixel_x")] = "99999"
    table.write_text("\n".join([*lines[:5], "\t".join(cells), *lines[6:]]) + "\n")
    with pytest.raises(ValueError, match=r"(?s)2 slides cannot be.*outside .*A1\.jpg.*B1\.jpg is not an image"):
        _run(data_dir, "all")
    assert _caches(data_dir) == []


def test_a_truncated_image_leaves_no_cache(data_dir):
    path = _layout(data_dir).image_path("A1")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"A1\.jpg cannot be decoded.*truncated"):
        _run(data_dir, "target", "--slides", "A1")
    assert _caches(data_dir) == []


def test_the_size_is_announced_and_checked(data_dir, capsys, monkeypatch):
    free = shutil.disk_usage(data_dir)._replace(free=800_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    with pytest.raises(ValueError, match=r"0\.0008 GB are free there.*--views 1.*--token_pool 2"):
        _run(data_dir, "token")
    said = capsys.readouterr().out
    spots = sum(load_slide(_layout(data_dir), slide).n_obs for slide in ("A1", "B1"))
    assert f"2 slides, {spots} spots to do: token {spots * 8 * 16 * 112 * 2 / 1e9:.3g} GB (8, 16, 112)" in said
    assert _caches(data_dir) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extract_mode", "target"], "--mode internal needs --config"),
        (["--extract_mode", "target", "--mode", "external"], "--mode external needs --test_name"),
        (
            ["--extract_mode", "target", "--config", "demo/dml", "--test_name", "x"],
            "--test_name is for --mode external.",
        ),
        (["--extract_mode", "target", "--config", "demo/dml", "--views", "1"], "--views shape the token cache"),
        (
            ["--extract_mode", "all", "--config", "demo/dml", "--model_size", "large", "--encoder", "uni"],
            "--model_size large means --encoder uni2-h, but --encoder uni is given",
        ),
        (["--extract_mode", "all", "--mode", "external", "--test_name", "../x"], "is not a plain name"),
        (["--extract_mode", "patch", "--config", "demo/dml", "--num_n", "4"], "DATA.num_neighbors should be odd"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError) as refused:
        main([*flags, "--device", "cpu"])
    assert message in str(refused.value)


def test_an_encoder_that_cannot_be_had(data_dir):
    with pytest.raises(ValueError, match="Unknown encoder 'unii'"):
        _run(data_dir, "all", "--encoder", "unii")
    with pytest.raises(FileNotFoundError, match=r"weight file nowhere\.bin .*does not exist"):
        _run(data_dir, "all", "--weights", "nowhere.bin")
    with pytest.raises(ValueError, match=r"--token_pool 3 does not divide the 4 x 4 grid"):
        _run(data_dir, "token", "--token_pool", "3")


def test_the_command_as_the_readme_has_it(data_dir):
    """With the default device; status 2 and one message for wrong use."""
    words = ["--config", "demo/dml", "--mode", "internal", "--data_dir", data_dir, "--extract_mode", "target"]
    wrong = call_extract(*words, "--slides", "A1,Q7")
    assert wrong.status == 2 and "error: --slides Q7: no counts" in wrong.said
    assert _caches(data_dir) == []


def test_spots_that_do_not_belong_to_the_image_are_said_with_a_picture(data_dir, capsys):
    """The centres of A1 are those of an image of a fifth of the size, and one spot of B1 is not selected."""
    layout = _layout(data_dir)
    table = pd.read_csv(layout.spots_path("A1"), sep="\t")
    table[["pixel_x", "pixel_y"]] /= 5
    table.to_csv(layout.spots_path("A1"), sep="\t", index=False)
    counted = load_slide(layout, "B1").obs_names
    table = pd.read_csv(layout.spots_path("B1"), sep="\t")
    table["selected"] = [int(f"{round(x)}x{round(y)}" != counted[0]) for x, y in zip(table["x"], table["y"])]
    table.to_csv(layout.spots_path("B1"), sep="\t", index=False)
    _run(data_dir, "patch")
    said = capsys.readouterr().out
    assert "WARNING: A1: spots and image may not belong together: " in said and said.count("WARNING") == 1
    assert f"The picture: {layout.overlay_path('A1')}." in said and "B1: 1 spots are marked selected = 0" in said
    assert layout.overlay_path("A1").is_file() and layout.overlay_path("B1").is_file()
    assert len(read_identity(layout.cache_path("patch", "B1")).image_size) == 2
    with h5py.File(layout.cache_path("patch", "B1")) as file:
        assert len(file["spot_id"]) == len(counted) - 1


def test_processes_that_share_slides_make_the_caches_of_one(extracted, tiny_data, tmp_path):
    """Each slide is made once, by whoever comes first, and what torchrun started needs no flag for it."""
    folder = _copy(tiny_data, tmp_path, ("A1", "B1", "C1"))
    ended = run_team(2, lambda _rank: _run(folder, "all", "--views", "2"), tmp_path)
    assert [one.status for one in ended] == [0, 0], ended[0].output + ended[1].output
    for slide in ("A1", "B1", "C1"):
        made = [f"{slide}: target, neighbor, token of" in one.output for one in ended]
        assert sum(made) == 1, slide
    assert not [name for name in _caches(folder) if "/." in name]
    for kind in ("target", "neighbor", "token"):
        ours, theirs = (_layout(data).cache_path(kind, "A1") for data in (folder, extracted))
        assert np.array_equal(read_features(ours), read_features(theirs))
        assert read_identity(ours) == read_identity(theirs)


def test_a_large_slide_is_shared_by_the_processes_of_torchrun(extracted, tiny_data, tmp_path, monkeypatch):
    """The caches hold what one process makes of them, but for the batches in which the encoder sees the tiles."""
    monkeypatch.setattr(parts, "FEWEST", 6)
    folder = _copy(tiny_data, tmp_path, ("A1",))
    ended = run_team(2, lambda _rank: _run(folder, "all", "--views", "2"), tmp_path)
    assert [one.status for one in ended] == [0, 0], ended[0].output + ended[1].output
    said = "".join(one.output for one in ended)
    assert said.count("A1, spots ") >= 2 and said.count("A1: target, neighbor, token put together of 2 parts.") == 1
    assert len(_caches(folder)) == 3, "no part and no lock is left"
    for kind in ("target", "neighbor", "token"):
        ours, theirs = (_layout(data).cache_path(kind, "A1") for data in (folder, extracted))
        assert read_identity(ours) == read_identity(theirs)
        np.testing.assert_allclose(read_features(ours), read_features(theirs), rtol=1e-3, atol=1e-4)
        with h5py.File(ours) as one, h5py.File(theirs) as other:
            assert np.array_equal(one["spot_id"][:], other["spot_id"][:])
            assert np.array_equal(one["coords"][:], other["coords"][:])


def test_parts_of_a_slide_are_kept_when_it_goes_on(data_dir, monkeypatch):
    """Stopped after two of four parts; one of them is damaged meanwhile, and a part of another cut lies there, too."""
    monkeypatch.setattr(parts, "FEWEST", 3)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    put, count = CacheWriters.put, iter(range(3))

    def put_or_stop(writers, spots):
        if next(count) == 2:
            raise KeyboardInterrupt
        put(writers, spots)

    monkeypatch.setattr(CacheWriters, "put", put_or_stop)
    with pytest.raises(KeyboardInterrupt):
        _run(data_dir, "target", "--slides", "A1")
    layout = _layout(data_dir)
    kept, damaged = (data_dir / "demo" / name for name in _caches(data_dir))
    assert (kept.suffix, damaged.suffix) == (".part", ".part")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.copy(kept, kept.with_name("A1.spots_0-2.part"))
    monkeypatch.setattr(CacheWriters, "put", put)
    claimed: list[Path] = []
    monkeypatch.setattr(extraction, "_encode_one", _noting(extraction._encode_one, claimed))
    _run(data_dir, "target", "--slides", "A1")
    assert len(claimed) == 3 and kept not in claimed
    assert _caches(data_dir) == [str(layout.cache_path("target", "A1").relative_to(layout.root))]
    features = read_features(layout.cache_path("target", "A1"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    _run(data_dir, "target", "--slides", "A1", "--overwrite")
    np.testing.assert_allclose(features, read_features(layout.cache_path("target", "A1")), rtol=1e-3, atol=1e-4)


def _noting(genuine, claimed: list[Path]):
    def encode_one(layout, item, *others):
        claimed.extend(item.made.values())
        return genuine(layout, item, *others)

    return encode_one


def test_a_slide_that_another_process_makes_is_left_to_it(data_dir, capsys):
    path = find_cache(_layout(data_dir), "target", "A1")

    def hold(_rank: int) -> None:
        with locked([path]):
            (data_dir / "held").touch()
            while not (data_dir / "done").exists():
                time.sleep(0.01)

    holder = threading.Thread(target=lambda: ended.extend(run_team(1, hold, data_dir)))
    ended: list = []
    holder.start()
    while not (data_dir / "held").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(ValueError, match=r"A1.* is being made by process"):
            _run(data_dir, "target")
        capsys.readouterr()
        _run(data_dir, "target", "--parallel")
    finally:
        (data_dir / "done").touch()
        holder.join()
    assert "A1: another process is at it." in capsys.readouterr().out
    assert not path.exists() and find_cache(_layout(data_dir), "target", "B1").exists()
    with pytest.raises(ValueError, match="--overwrite with --parallel"):
        _run(data_dir, "target", "--parallel", "--overwrite")


def test_locks_that_a_killed_process_has_left_of_complete_slides_go(data_dir):
    _run(data_dir, "target")
    path = find_cache(_layout(data_dir), "target", "A1")
    left = path.with_name(".A1.lock")
    left.touch()
    _run(data_dir, "target")
    assert path.exists() and not left.exists()


@pytest.mark.parametrize("damaged", [None, "target", "neighbor", "swept"])
def test_caches_that_a_killed_process_has_written_whole_get_their_names(
    extracted, tmp_path, capsys, monkeypatch, damaged
):
    """Or are all made again in one pass, where the numbers of one are not what was written, or it goes at that moment."""
    data = shutil.copytree(extracted, tmp_path / "data")
    caches = {kind: _layout(data).cache_path(kind, "A1") for kind in ("target", "neighbor", "token")}
    written = {kind: cache.read_bytes() for kind, cache in caches.items()}

    def leave_unnamed(_rank: int) -> None:
        for kind in ("target", "neighbor"):
            content = bytearray(written[kind])
            content[-1] ^= kind == damaged
            cache = caches[kind]
            cache.rename(cache.with_name(f"{temporary_prefix('A1')}0123abcd.h5")).write_bytes(content)

    run_team(1, leave_unnamed, tmp_path)
    if damaged == "swept":
        publish = unnamed.publish

        def publish_and_sweep(file: Path, path: Path) -> None:
            publish(file, path)
            for left in caches["neighbor"].parent.glob(".A1.*.h5"):
                left.unlink()

        monkeypatch.setattr(unnamed, "publish", publish_and_sweep)
    assert [cache.exists() for cache in caches.values()] == [False, False, True]
    _run(data, "all", "--views", "2")
    said = "A1: target, neighbor had been written whole" if damaged is None else "A1: target, neighbor of "
    assert said in capsys.readouterr().out
    assert len(_caches(data)) == 3, "nothing is left"
    assert written["token"] == caches["token"].read_bytes()
    for kind in ("target", "neighbor"):
        assert damaged is not None or written[kind] == caches[kind].read_bytes()
        assert caches[kind].stat().st_mode == caches["token"].stat().st_mode
    np.testing.assert_allclose(read_features(caches["target"]), read_features(caches["neighbor"])[:, 12])
