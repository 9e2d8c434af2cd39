"""Patches scaled to one width in micrometres, and the pooled feature as the only token: from the caches to the scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.features.cache import read_features, read_identity
from datasets.images.geometry import neighbor_validity, patch_corner
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from evaluation.comparison.runs import compare_runs
from modes.external_test import external_test
from modes.predict import PredictOptions, predict
from modes.test import test as run_test
from modes.train import TrainOptions, train
from preprocess.extract_features_uni import main as extract
from tests.shortcuts import keep_spots
from utils.checkpoint import load_checkpoint
from utils.config import load_config

CPU = torch.device("cpu")
WIDTH = 204.8  # um: 128 px of the demo, whose patches are 64 px


def _data(tiny_run, folder: Path, *without: str) -> Path:
    """A copy of the data of `tiny_run`, whose external slide has a few spots."""
    data_dir = Path(shutil.copytree(tiny_run.data_dir, folder / "data", ignore=shutil.ignore_patterns(*without)))
    keep_spots(data_dir / "test" / "demo_external")
    return data_dir


def _extract(tiny_run, data_dir: Path, *flags: str) -> None:
    extract(
        ["--config", tiny_run.config_name, "--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "1", *flags]
    )


def _train(tiny_run, data_dir: Path, folder: Path, *overrides: str) -> Path:
    shared = [f"DATA.data_dir={data_dir}", f"GENERAL.log_path={folder}", "TRAINING.epochs=1", *overrides]
    return train(
        load_config(tiny_run.config_name, shared), TrainOptions("tiny", "run", CPU, [0], False, 60.0, with_report=False)
    )


@pytest.fixture(scope="module")
def wide(tiny_run, tmp_path_factory) -> Path:
    """A data folder with caches of patches 204.8 um wide and no others, of a few spots. Read only."""
    data_dir = _data(tiny_run, tmp_path_factory.mktemp("wide"), "*features*")
    keep_spots(data_dir / "demo")
    _extract(tiny_run, data_dir, "--extract_mode", "all", "--views", "1", "--match_mpp", f"{WIDTH}")
    return data_dir


def _layout(data_dir: Path, patch_um: float | None = WIDTH) -> Layout:
    spec = get_spec("demo", data_dir)
    return Layout(data_dir, spec, patch_size=64, num_neighbors=3, encoder="efficientnet-lite0", patch_um=patch_um)


def test_features_are_those_of_scaled_patches(wide):
    from models.patch_encoders.build import build_patch_encoder

    layout = _layout(wide)
    path = layout.cache_path("target", "A1")
    identity = read_identity(path)
    assert path.parent.name == "gt_features_efficientnet-lite0_64_204.8um"
    assert (identity.patch_size, identity.patch_um, identity.covered_px) == (64, WIDTH, 128)
    centers = load_slide(layout, "A1").obsm["center"]
    with open_slide(layout.image_path("A1")) as image:
        patches = [image.read_region(int(x), int(y), 128, 128, size=(64, 64)) for x, y in patch_corner(centers, 128)]
        is_valid = neighbor_validity(centers, image.size, 128, 3)
    pooled = build_patch_encoder("efficientnet-lite0")(torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)).pooled
    np.testing.assert_allclose(read_features(path), pooled.numpy(), rtol=1e-3, atol=1e-4)
    neighbors = read_features(layout.cache_path("neighbor", "A1"))
    assert np.array_equal(np.abs(neighbors).sum(axis=2) > 0, is_valid), "tiles are as wide as the patches"


def test_a_run_at_a_width_remembers_it(wide, tiny_run, tmp_path):
    run = _train(tiny_run, wide, tmp_path, f"DATA.patch_um={WIDTH}")
    assert load_checkpoint(run / "fold_0" / "best.pt").field_of_view_um == WIDTH
    assert json.loads((run / "fold_0" / "split.json").read_text())["features"]["patch_um"] == WIDTH
    image = next(wide.glob("test/demo_external/ST-imgs/*/*/X1.*"))
    spots = wide / "test/demo_external/ST-spotfiles/X1_selection.tsv"
    with pytest.raises(ValueError, match=r"needs the size of a pixel.*--mpp"):
        predict(run, PredictOptions(image, tmp_path / "x.h5ad", spots=spots), None, [], CPU)
    predict(run, PredictOptions(image, tmp_path / "x.h5ad", spots=spots, mpp=1.6), None, [], CPU)


def test_caches_of_another_width_are_refused_with_both(wide, tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"There are those of patches that are 204\.8 um wide, expected not scaled"):
        _train(tiny_run, wide, tmp_path)
    with pytest.raises(ValueError, match=r"are 204\.8 um wide, expected 150 um wide .*--match_mpp 150"):
        _train(tiny_run, wide, tmp_path, "DATA.patch_um=150")
    moved = Path(shutil.copytree(wide, tmp_path / "moved"))
    for folder in moved.glob("demo/*_204.8um"):
        folder.rename(folder.with_name(folder.name.replace("204.8um", "150um")))
    with pytest.raises(ValueError, match=r"its patches are 204\.8 um wide, expected 150 um wide \(DATA\.patch_um\)"):
        _train(tiny_run, moved, tmp_path, "DATA.patch_um=150")


def test_an_external_test_matches_the_training(tiny_run, tmp_path):
    """The external slide said to be twice as fine: the message gives the command, after which the widths agree."""
    data_dir = _data(tiny_run, tmp_path)
    described = data_dir / "test" / "demo_external" / "dataset.yaml"
    described.write_text(re.sub(r"microns_per_pixel: .*", "microns_per_pixel: 0.8", described.read_text()))
    run, overrides = tiny_run.copy(tmp_path), [f"DATA.data_dir={data_dir}"]
    with pytest.raises(ValueError, match=r"--match_mpp 102\.4") as refused:
        external_test(run, "demo_external", None, overrides, CPU, match_mpp=True)
    assert "--test_name demo_external" in str(refused.value)
    shared = ("--mode", "external", "--test_name", "demo_external", "--match_mpp", "102.4")
    for kind in ("target", "neighbor"):
        _extract(tiny_run, data_dir, *shared, "--extract_mode", kind)
    folder = external_test(run, "demo_external", None, overrides, CPU, match_mpp=True, with_report=False)
    assert folder == run / "external" / "demo_external" / "match_mpp", "a test without the flag has the folder above"
    notes = " ".join(json.loads((folder / "summary.json").read_text())["notes"])
    assert "A patch is 102 um wide on X1 and was 102 um wide in training." in notes
    (cache,) = data_dir.glob("test/demo_external/gt_features_*_102.4um/X1.h5")
    assert read_identity(cache).covered_px == 128


@pytest.fixture(scope="module")
def pooled(tiny_run, tmp_path_factory) -> tuple[Path, Path]:
    """(run of the pooled variant, data folder without token caches)"""
    folder = tmp_path_factory.mktemp("pooled")
    data_dir = _data(tiny_run, folder, "token_features*")
    return _train(tiny_run, data_dir, folder / "logs", "DATA.tokens=pooled"), data_dir


class TestPooled:
    def test_the_variant_is_recorded_and_tested(self, pooled):
        run, _ = pooled
        split = json.loads((run / "fold_0" / "split.json").read_text())
        assert split["tokens"] == {"source": "pooled"}
        before = json.loads((run / "fold_0" / "result.json").read_text())
        run_test(run, None, [], CPU, None, False)
        assert json.loads((run / "fold_0" / "result.json").read_text()) == before
        with pytest.raises(ValueError, match=r"DATA\.tokens: the run has 'pooled', asked for 'cache'"):
            run_test(run, None, ["DATA.tokens=cache"], CPU, None, False)

    def test_it_is_a_method_of_its_own_in_a_comparison(self, pooled, tiny_run, tmp_path):
        run, _ = pooled
        full = _train(tiny_run, tiny_run.data_dir, tmp_path)
        table = compare_runs([full, run], names=["tokens", "pooled"])
        assert set(table["method"]) == {"tokens", "pooled"}
        assert any("one token, the pooled feature" in note for note in table.attrs["notes"])

    def test_prediction_and_external_test_need_no_tokens(self, pooled, tiny_run, tmp_path):
        run, data_dir = pooled
        flags = ("--mode", "external", "--test_name", "demo_external")
        for kind in ("target", "neighbor"):
            _extract(tiny_run, data_dir, *flags, "--extract_mode", kind)
        folder = external_test(run, "demo_external", None, [], CPU, with_report=False)
        image = next(data_dir.glob("test/demo_external/ST-imgs/*/*/X1.*"))
        spots = data_dir / "test/demo_external/ST-spotfiles/X1_selection.tsv"
        out = predict(run, PredictOptions(image, tmp_path / "x.h5ad", spots=spots), None, [], CPU)
        import anndata

        tested, predicted = (anndata.read_h5ad(path) for path in (next(folder.glob("predictions/X1.h5ad")), out))
        shared = tested.var_names
        np.testing.assert_allclose(
            np.asarray(tested.X), np.asarray(predicted[tested.obs_names, shared].X), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize("is_first", [True, False])
    def test_it_is_not_averaged_with_a_run_of_all_tokens(self, pooled, tiny_run, tmp_path, is_first):
        """The tokens that are read for one would reach the other."""
        runs = [pooled[0], tiny_run.path] if is_first else [tiny_run.path, pooled[0]]
        image = next(tiny_run.data_dir.glob("test/demo_external/ST-imgs/*/*/X1.*"))
        spots = tiny_run.data_dir / "test/demo_external/ST-spotfiles/X1_selection.tsv"
        with pytest.raises(ValueError, match=r"cannot be averaged: DATA\.tokens=pooled in one of them, all tokens"):
            predict(runs, PredictOptions(image, tmp_path / "x.h5ad", spots=spots), None, [], CPU)
        with pytest.raises(ValueError, match=r"cannot be averaged: DATA\.tokens=pooled in one of them, all tokens"):
            run_test([runs[0], runs[1]], 0, [], CPU, None, False)

    def test_missing_tokens_name_the_variant(self, pooled, tiny_run, tmp_path):
        _, data_dir = pooled
        with pytest.raises(FileNotFoundError, match=r"have no token cache.*\n.*--set DATA\.tokens=pooled"):
            _train(tiny_run, data_dir, tmp_path, "DATA.tokens=cache")
        with pytest.raises(FileNotFoundError, match=r"No weights(.|\n)*--set DATA\.tokens=pooled"):
            _train(tiny_run, data_dir, tmp_path, "DATA.encoder=resnet50")
