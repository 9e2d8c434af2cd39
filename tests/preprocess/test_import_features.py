"""Features in the files of other tools, in a shuffled order: to the spots they belong to, and through a training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from datasets.features.cache import read_features, read_identity
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from modes.test import test as run_test
from modes.train import TrainOptions, train
from preprocess.import_features import main
from tests.soak import user_readers
from utils.config import load_config

ENCODER, SIDE = "efficientnet-lite0", 64


@pytest.fixture
def layout(tiny_data, tmp_path) -> Layout:
    data_dir = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    return Layout(data_dir, get_spec("demo", data_dir), patch_size=SIDE, num_neighbors=3, encoder=ENCODER)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        """
DATA: {type: demo, patch_size: 64, num_neighbors: 3, num_genes: 24, encoder: efficientnet-lite0, tokens: pooled}
MODEL: {use_neighbor: false, projection_dim: 32, global_depth: 2, global_heads: 4, global_mlp_ratio: 1, fusion_mlp_dim: 32,
        gene_mlp_dim: 32, predictor_dim: 32}
LOSS: {k: 4, use_kmeans: true}
TRAINING: {batch_size: 64, epochs: 1}
"""
    )
    return path


def write(layout: Layout, slide: str, kind: str, shift: float = 0.0, leave_out: int = 0) -> np.ndarray:
    """A file of a tool with the patches of the spots in another order; returns the features in that of the spots."""
    centers = load_slide(layout, slide).obsm["center"]
    features = np.random.default_rng(len(slide)).normal(size=(len(centers), 112)).astype(np.float32)
    order = np.random.default_rng(1).permutation(len(centers))[leave_out:]
    folder = layout.data_dir.parent / "features"
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        values = features[order]
        file["embeddings" if kind == "hest" else "features"] = values[None] if kind == "trident" else values
        corners = centers[order] + shift if kind == "hest" else centers[order] - SIDE // 2 + shift
        file["coords"] = corners
        if kind == "trident":
            file["coords"].attrs.update(patch_size=32, patch_size_level0=SIDE, level0_magnification=40)
        if kind == "clam":
            file["coords"].attrs.update(patch_size=32, patch_level=1, downsample=[2.0, 2.0])
    return features


def imported(layout: Layout, config: Path, kind: str, *flags: str) -> None:
    source = layout.data_dir.parent / "features"
    shared = ["--source", str(source), "--config", str(config), "--data_dir", str(layout.data_dir)]
    main([*shared, "--format", kind, *flags])


@pytest.mark.parametrize("kind", ["trident", "clam", "hest"])
def test_each_spot_gets_its_own_feature(layout, config, kind):
    expected = write(layout, "A1", kind)
    imported(layout, config, kind)
    path = layout.cache_path("target", "A1")
    assert np.array_equal(read_features(path), expected)
    identity = read_identity(path)
    assert (identity.encoder, identity.encoder_sha256, identity.patch_size) == (ENCODER, "unknown", SIDE)
    with pytest.raises(ValueError, match=r"A1\.h5 is there already"):
        imported(layout, config, kind)


@pytest.mark.parametrize("says_width", [True, False])
def test_features_of_clam_in_a_file_of_tensors(layout, config, says_width):
    """h5_files with coordinates, pt_files with the features in the same order; patches may be all that knows the width."""
    expected = write(layout, "A1", "clam")
    source = layout.data_dir.parent / "features"
    for name in ("h5_files", "pt_files", "patches"):
        (source / name).mkdir()
    with h5py.File(source / "A1.h5", "r+") as file:
        torch.save(torch.from_numpy(file["features"][()]), source / "pt_files" / "A1.pt")
        del file["features"]
        with h5py.File(source / "patches" / "A1.h5", "w") as patches:
            patches["coords"] = file["coords"][()][:5]
            patches["coords"].attrs.update(file["coords"].attrs)
        if not says_width:
            for name in list(file["coords"].attrs):
                del file["coords"].attrs[name]
    (source / "A1.h5").rename(source / "h5_files" / "A1.h5")
    imported(layout, config, "clam")
    assert np.array_equal(read_features(layout.cache_path("target", "A1")), expected)
    if not says_width:
        (source / "patches" / "A1.h5").unlink()
        with pytest.raises(ValueError, match=r"A1\.h5: its coords do not say how wide .* none.*h5_files and patches"):
            imported(layout, config, "clam", "--overwrite")
        return
    torch.save(torch.zeros(3, 112), source / "pt_files" / "A1.pt")
    with pytest.raises(ValueError, match=r"A1\.pt holds features \(3, 112\) and coords"):
        imported(layout, config, "clam", "--overwrite")
    torch.save({"features": torch.zeros(3, 112)}, source / "pt_files" / "A1.pt")
    with pytest.raises(ValueError, match=r"A1\.pt holds dict, expected one tensor"):
        imported(layout, config, "clam", "--overwrite")


def test_barcodes_go_before_the_nearest_patch_but_not_against_the_coordinates(layout, config, capsys):
    """Patches lie anywhere within half a patch of their spots, so that many are nearer to another one."""
    expected = write(layout, "A1", "hest")
    table = load_slide(layout, "A1")
    spots = pd.read_csv(layout.spots_path("A1"), sep="\t").assign(barcode=lambda rows: [f"BC{i}-1" for i in rows.index])
    spots.to_csv(layout.spots_path("A1"), sep="\t", index=False)
    ids = [f"{round(x)}x{round(y)}" for x, y in zip(spots["x"], spots["y"], strict=True)]
    names = dict(zip(ids, spots["barcode"], strict=True))
    order = np.random.default_rng(1).permutation(table.n_obs)
    path = layout.data_dir.parent / "features" / "A1.h5"
    with h5py.File(path, "r+") as file:
        file["barcodes"] = np.array([[names[table.obs_names[row]]] for row in order], dtype="S")
        file["coords"][...] = file["coords"][()].mean(axis=0)  # all at one place: no coordinate tells them apart
    with pytest.raises(ValueError, match=r"named in it; their patch is typically .* another slide"):
        imported(layout, config, "hest")
    with h5py.File(path, "r+") as file:
        random = np.random.default_rng(2)
        centers = table.obsm["center"][order]
        file["coords"][...] = centers + random.integers(-SIDE // 2, SIDE // 2 + 1, centers.shape)
    imported(layout, config, "hest")
    assert np.array_equal(read_features(layout.cache_path("target", "A1")), expected)
    assert f"{table.n_obs} of the spots are named in it" in capsys.readouterr().out
    with h5py.File(path, "r+") as file:
        file["barcodes"][:2] = b"BC0-1"
    with pytest.raises(ValueError, match=r"A1\.h5 holds \d+ different barcodes for \d+ patches"):
        imported(layout, config, "hest", "--overwrite")


def test_a_file_of_another_slide_is_refused(layout, config):
    write(layout, "A1", "trident", shift=4000)
    with pytest.raises(
        ValueError, match=r"0 of \d+ spots lie in a patch.*typically \([\d.]+, [\d.]+\) px away.*another slide"
    ):
        imported(layout, config, "trident")
    assert not layout.cache_path("target", "A1").exists()


def test_spots_without_a_patch_are_said_and_refused_unless_allowed(layout, config, capsys):
    write(layout, "A1", "trident", leave_out=3)
    with pytest.raises(ValueError, match=r"3 find none: .*--max_missing SHARE"):
        imported(layout, config, "trident")
    imported(layout, config, "trident", "--max_missing", "0.5")
    assert "the other 3 take the feature of the nearest" in capsys.readouterr().out


def test_import_train_and_test(layout, config, tmp_path):
    for slide in layout.slides_with_counts():
        write(layout, slide, "trident")
    imported(layout, config, "trident")
    loaded = load_config(config, [f"DATA.data_dir={layout.data_dir}", f"GENERAL.log_path={tmp_path / 'logs'}"])
    run = train(loaded, TrainOptions("tiny", "run", torch.device("cpu"), [0], False, 60.0, with_report=False))
    assert json.loads((run / "fold_0" / "split.json").read_text())["tokens"] == {"source": "pooled"}
    run_test(run, None, [], torch.device("cpu"), None, False)
    assert np.isfinite(json.loads((run / "fold_0" / "result.json").read_text())["mse"])


@pytest.mark.parametrize("width", [0, -64, float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("kind", ["trident", "clam"])
def test_a_width_that_is_none_and_features_that_are_not_finite(tmp_path, kind, width):
    path = user_readers.features_of_a_tool(tmp_path, kind=kind)
    with h5py.File(path, "r+") as file:
        file["coords"].attrs["patch_size_level0" if kind == "trident" else "patch_size"] = width
    with pytest.raises(
        ValueError, match=r"S1\.h5: the width of a patch is .* px, expected a length from 1 to 1,000,000"
    ):
        user_readers.patches_of_a_tool(path, kind=kind)
    with h5py.File(path, "r+") as file:
        file["features"][2, 3] = np.nan
    with pytest.raises(
        ValueError, match=rf"S1\.h5: some numbers of its features are not finite\. Make them again with {kind}"
    ):
        user_readers.patches_of_a_tool(path, kind=kind)


@pytest.mark.parametrize(
    ("kind", "attribute", "value", "remedy"),
    [
        ("trident", "patch_size_level0", None, "patch_size_level0; .*--format clam"),
        ("clam", "downsample", None, "downsample or patch_level 0"),
        ("clam", "downsample", [], "downsample or patch_level 0"),
        ("clam", "patch_size", None, "h5_files and patches"),
    ],
)
def test_a_width_at_another_level_is_not_taken_for_that_of_the_image(tmp_path, kind, attribute, value, remedy):
    """patch_size is in px of the level that the encoder saw: without the other number nobody knows the width."""
    path = user_readers.features_of_a_tool(tmp_path, kind=kind)
    with h5py.File(path, "r+") as file:
        del file["coords"].attrs[attribute]
        file["coords"].attrs[b"\xff"] = 1  # h5py lists a name that is no UTF-8 as bytes
        if value is not None:
            file["coords"].attrs[attribute] = value
    with pytest.raises(ValueError, match=rf"S1\.h5: its coords do not say how wide .* {remedy}"):
        user_readers.patches_of_a_tool(path, kind=kind)
