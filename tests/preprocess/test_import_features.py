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
from datasets.tables.spot_table import read_spots
from modes.test import test as run_test
from modes.train import TrainOptions, train
from preprocess.import_features import main
from tests.soak import user_readers
from utils.config import load_config

ENCODER, SIDE = "efficientnet-lite0", 64
HEST_SIDE = 80  # level-0 px of a patch of HEST, of which its file says nothing


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
        file["coords"] = centers[order] - (HEST_SIDE if kind == "hest" else SIDE) // 2 + shift
        if kind == "hest":
            file["barcodes"] = np.array([[name] for name in named_spots(layout, slide)], dtype="S")[order]
        if kind == "trident":
            file["coords"].attrs.update(patch_size=32, patch_size_level0=SIDE, level0_magnification=40)
        if kind == "clam":
            file["coords"].attrs.update(patch_size=32, patch_level=1, downsample=[2.0, 2.0])
    return features


def named_spots(layout: Layout, slide: str) -> list[str]:
    """Add barcodes to the spot table; returns them in the order of the spots."""
    path = layout.spots_path(slide)
    spots = pd.read_csv(path, sep="\t").assign(barcode=lambda rows: [f"BC{i}-1" for i in rows.index])
    spots.to_csv(path, sep="\t", index=False)
    return read_spots(path).loc[load_slide(layout, slide).obs_names, "barcode"].tolist()


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
    assert identity.covered_px == (HEST_SIDE if kind == "hest" else None)
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
    expected = write(layout, "A1", "trident")
    table, names = load_slide(layout, "A1"), named_spots(layout, "A1")
    order = np.random.default_rng(1).permutation(table.n_obs)
    path = layout.data_dir.parent / "features" / "A1.h5"
    with h5py.File(path, "r+") as file:
        file["barcodes"] = np.array([[names[row]] for row in order], dtype="S")
        file["coords"][...] = file["coords"][()].mean(axis=0)  # all at one place: no coordinate tells them apart
    with pytest.raises(ValueError, match=r"named in it; their patch is typically .* another slide"):
        imported(layout, config, "trident")
    with h5py.File(path, "r+") as file:
        random = np.random.default_rng(2)
        centers = table.obsm["center"][order]
        file["coords"][...] = centers - SIDE // 2 + random.integers(-SIDE // 2, SIDE // 2 + 1, centers.shape)
    imported(layout, config, "trident")
    assert np.array_equal(read_features(layout.cache_path("target", "A1")), expected)
    assert f"{table.n_obs} of the spots are named in it" in capsys.readouterr().out
    with h5py.File(path, "r+") as file:
        file["barcodes"][:2] = b"BC0-1"
    with pytest.raises(ValueError, match=r"A1\.h5 holds \d+ different barcodes for \d+ patches"):
        imported(layout, config, "trident", "--overwrite")


@pytest.mark.parametrize("with_barcodes", [True, False])
def test_coordinates_of_hest_that_are_centres(layout, config, with_barcodes):
    expected = write(layout, "A1", "hest", shift=HEST_SIDE // 2 + 1)
    if not with_barcodes:
        with h5py.File(layout.data_dir.parent / "features" / "A1.h5", "r+") as file:
            del file["barcodes"]
    imported(layout, config, "hest")
    path = layout.cache_path("target", "A1")
    assert np.array_equal(read_features(path), expected)
    assert read_identity(path).covered_px is None


@pytest.mark.parametrize("lacks_it", ["file", "spot table", "both differ"])
def test_corners_of_hest_without_barcodes_are_refused(layout, config, lacks_it):
    """A corner lies between four spots, so that the nearest spot is often a neighbor."""
    count, spots_path = len(write(layout, "A1", "hest")), layout.spots_path("A1")
    if lacks_it == "spot table":
        pd.read_csv(spots_path, sep="\t").drop(columns="barcode").to_csv(spots_path, sep="\t", index=False)
    else:
        with h5py.File(layout.data_dir.parent / "features" / "A1.h5", "r+") as file:
            if lacks_it == "file":
                del file["barcodes"]
            else:
                file["barcodes"][1:] = np.array([[f"X{i}-1"] for i in range(1, count)], dtype="S")
    named = 1 if lacks_it == "both differ" else 0
    has = 0 if lacks_it == "file" else count
    with pytest.raises(
        ValueError,
        match=rf"A1\.h5: {named} of {count} spots .* corners .*`barcode` .*\(it names {has}\).*prepare_hest\.py",
    ):
        imported(layout, config, "hest")
    assert not layout.cache_path("target", "A1").exists()


@pytest.mark.parametrize("change", ["one row", "one axis", "other side"])
def test_corners_of_hest_that_lie_differently_to_their_spots_are_refused(layout, config, change):
    write(layout, "A1", "hest", shift=HEST_SIDE if change == "other side" else 0)
    with h5py.File(layout.data_dir.parent / "features" / "A1.h5", "r+") as file:
        corners = file["coords"][()]
        corners[{"one row": 3, "one axis": np.s_[:, 1], "other side": np.s_[:0]}[change]] += 6
        file["coords"][...] = corners
    typical = {"one row": r"40\.\d, 40\.\d", "one axis": r"40\.\d, 34\.\d", "other side": r"-[34]\d\.\d, -[34]\d\.\d"}[
        change
    ]
    with pytest.raises(
        ValueError, match=rf"typically \({typical}\) px \(x, y\), from .* to .*Expected half a patch for all"
    ):
        imported(layout, config, "hest")


@pytest.mark.parametrize("kind", ["trident", "hest"])
def test_a_width_that_is_not_the_asked_one_is_refused(layout, config, kind):
    write(layout, "A1", kind)
    side = HEST_SIDE if kind == "hest" else SIDE
    microns = layout.spec.microns_of("A1")
    text = config.read_text()
    config.write_text(text.replace("num_genes: 24", f"num_genes: 24, patch_um: {1.5 * side * microns}"))
    with pytest.raises(
        ValueError,
        match=rf"A1\.h5: its patches are {side} px wide \({side * microns:.0f} um\), and DATA\.patch_um asks for "
        rf".* um \({side * 3 // 2} px\)",
    ):
        imported(layout, config, kind)
    config.write_text(text.replace("num_genes: 24", f"num_genes: 24, patch_um: {1.1 * side * microns}"))
    imported(layout, config, kind)
    (path,) = layout.data_dir.glob("**/A1.h5")
    assert (read_identity(path).covered_px or SIDE) == side


def test_features_of_another_width_than_the_encoders_are_refused(layout, config):
    write(layout, "A1", "trident")
    with pytest.raises(ValueError, match=r"A1\.h5: its features have width 112, those of uni have 1024.*--encoder"):
        imported(layout, config, "trident", "--encoder", "uni")
    assert not list(layout.data_dir.glob("**/A1.h5"))
    imported(layout, config, "trident", "--encoder", "timm:resnet10t")  # of no row: its width is not known here


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
