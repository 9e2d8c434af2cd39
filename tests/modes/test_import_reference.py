"""The recorded end-to-end case as a published checkpoint: imported, tested with the program, equal to the recording.

The recording becomes a data set on disk: its spots at their grid positions, placed on an image so that the masks of the
recording are those of the geometry; its features and tokens in caches of an encoder of width 32.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import main
from datasets.features.cache import write_cache
from datasets.features.identity import CacheIdentity
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from models.patch_encoders.build import PATCH_ENCODERS, PatchEncoderSpec
from utils.checkpoint import load_checkpoint
from utils.cli import run
from utils.files import write_atomically

PATCH, SIDE = 8, 200  # px; image of SIDE x SIDE
GENES = [f"G{i:02d}" for i in range(12)]
CONFIG = """
DATA: {type: recorded, patch_size: 8, num_genes: 12, encoder: recorded32}
MODEL: {projection_dim: 24, fusion_mlp_dim: 48, gene_mlp_dim: 48, predictor_dim: 72}
EVALUATION: {chunk_size: 16}
"""
RECORDED32 = PatchEncoderSpec(
    name="recorded32", timm_name="none", dim=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), hub=None
)


def place(mask: np.ndarray, number: int) -> tuple[float, float]:
    """A centre (x, y) of its own at which the neighbors of `mask` (5, 5) are those inside the image."""
    middle, near = 40 + 3 * number, 2 * PATCH  # near: the 5-wide window crosses the edge, the 3-wide one does not
    x = near if not mask[2, 0] else SIDE - near if not mask[2, 4] else middle
    y = near if not mask[0, 2] else SIDE - near if not mask[4, 2] else middle
    return x, y


def write_slide(layout: Layout, slide: str, yx: np.ndarray, masks: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    random = np.random.default_rng(len(yx))
    for path in (layout.new_counts_path(slide), layout.spots_path(slide), layout.images_dir / f"{slide}.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
    centers = np.array([place(mask, number) for number, mask in enumerate(masks.reshape(-1, 5, 5))])
    table = pd.DataFrame({"x": yx[:, 1], "y": yx[:, 0], "pixel_x": centers[:, 0], "pixel_y": centers[:, 1]})
    table.to_csv(layout.spots_path(slide), sep="\t", index=False)
    ids = [f"{x}x{y}" for y, x in yx]
    pd.DataFrame(random.poisson(5, (len(yx), 12)), ids, GENES).to_parquet(layout.new_counts_path(slide))
    Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(layout.images_dir / f"{slide}.png")
    loaded = load_slide(layout, slide)
    assert list(loaded.obs_names) == ids, "the recording lists its spots in the order of the data sets"
    with open_slide(layout.image_path(slide)) as image:
        size, fingerprint = image.size, image.fingerprint()
    for kind, values in arrays.items():
        identity = CacheIdentity(
            kind=kind, encoder="recorded32", encoder_sha256="recorded", image_size=size, image_fingerprint=fingerprint,
            patch_size=PATCH, microns_per_pixel=None, num_neighbors=5, views=1, dtype="float32",
        )  # fmt: skip
        write_cache(layout.cache_path(kind, slide), identity, ids, loaded.obsm["center"], [values])


@pytest.fixture
def recorded(golden, tmp_path, monkeypatch) -> dict[str, Path]:
    """data_dir, config and the published state dict of the recording; the encoder is one more row of the table."""
    monkeypatch.setitem(PATCH_ENCODERS, "recorded32", RECORDED32)
    train, evaluation = golden("genedml_train"), golden("genedml_eval")
    data_dir = tmp_path / "data"
    (data_dir / "recorded").mkdir(parents=True)
    (data_dir / "recorded" / "dataset.yaml").write_text("patient_pattern: '^([AB])'\nimage_pattern: '{slide}.png'\n")
    np.save(data_dir / "recorded" / "genes_recorded.npy", np.array(GENES))
    layout = Layout(data_dir, get_spec("recorded", data_dir), patch_size=PATCH)
    write_slide(
        layout, "A1", train["slide0_position_yx"], evaluation["mask"],
        {"target": train["slide0_features"], "neighbor": evaluation["neighbor"], "token": evaluation["tokens"][:, None]},
    )  # fmt: skip
    count = len(train["slide1_features"])
    write_slide(
        layout, "B1", train["slide1_position_yx"], np.ones((count, 25)),
        {"target": train["slide1_features"], "neighbor": np.zeros((count, 25, 32)), "token": np.zeros((count, 1, 10, 32))},
    )  # fmt: skip
    state = {k.removeprefix("param/"): torch.from_numpy(v) for k, v in train.items() if k.startswith("param/")}
    published = tmp_path / "published.pt"
    wrapped = {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 7}
    write_atomically(published, lambda temporary: torch.save(wrapped, temporary))
    (tmp_path / "recorded.yaml").write_text(CONFIG)
    return {"data_dir": data_dir, "config": tmp_path / "recorded.yaml", "published": published, "folder": tmp_path}


def call(monkeypatch, *arguments: object) -> int:
    """The program in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        run(main.main)
    return left.value.code


def convert(monkeypatch, recorded: dict[str, Path], out: Path, *more: object, fold: int = 0) -> int:
    return call(
        monkeypatch, "--mode", "import_reference", "--config_name", recorded["config"], "--data_dir",
        recorded["data_dir"], "--model_path", recorded["published"], "--fold", fold, "--out", out, *more,
    )  # fmt: skip


def test_an_imported_checkpoint_predicts_what_was_recorded(recorded, golden, monkeypatch, capsys):
    """Raw files -> features -> whole program -> .h5ad, against the predictions of the published code."""
    out = recorded["folder"] / "imported"
    assert convert(monkeypatch, recorded, out) == 0
    assert call(monkeypatch, "--mode", "test", "--model_path", out, "--device", "cpu", "--no_report") == 0
    predicted = anndata.read_h5ad(out / "fold_0" / "predictions" / "A1.h5ad")
    expected = golden("genedml_eval")
    layers = {
        "pred_fusion": predicted.X,
        **{f"pred_{s}": predicted.layers[s] for s in ("target", "neighbor", "global")},
    }
    for name, values in layers.items():
        greatest = np.abs(expected[name]).max()
        assert np.abs(values - expected[name]).max() <= 2e-5 * greatest, name
    assert list(predicted.var_names) == GENES
    said = capsys.readouterr().out
    assert "training mean unknown" in said and "mean over folds" in said


def test_what_is_not_known_of_it_is_a_dash_and_null(recorded, monkeypatch):
    out = recorded["folder"] / "imported"
    for fold in (0, 1):
        assert convert(monkeypatch, recorded, out, fold=fold) == 0
    assert call(monkeypatch, "--mode", "test", "--model_path", out, "--device", "cpu", "--no_report") == 0
    result = json.loads((out / "fold_0" / "result.json").read_text())
    assert result["training_mean"] == {"mse": None, "mae": None} and np.isfinite(result["mse"])
    summary = json.loads((out / "summary.json").read_text())
    assert [row["training_mean_mse"] for row in summary["folds"]] == [None, None]
    assert summary["headline"]["training_mean_mse"] == {"mean": None, "std": None}
    table = [line for line in (out / "summary.md").read_text().splitlines() if line.startswith("| 0 (A)")]
    assert table and [cell.strip() for cell in table[0].split("|")][-3:-1] == ["\N{EN DASH}"] * 2
    assert "a published checkpoint" in (out / "summary.md").read_text()


def test_the_split_is_the_whole_one_of_the_paper(recorded, monkeypatch):
    """Also under a configuration of the clean protocol no training patient is held out."""
    with open(recorded["data_dir"] / "recorded" / "dataset.yaml", "a") as described:
        described.write("microns_per_pixel: {A: 0.9, B: 0.5}\n")
    target = recorded["folder"] / "one.pt"
    assert convert(monkeypatch, recorded, target) == 0
    fold = load_checkpoint(target)
    assert fold.split.test_slides == ["A1"] and fold.split.train_slides == ["B1"]
    assert fold.split.validation_patients == [] and fold.split.protocol == "paper"
    assert fold.config.EVALUATION.protocol == "paper"
    assert torch.isnan(fold.training_mean).all() and fold.training_mean.shape == (2, 12)
    assert fold.field_of_view_um == PATCH * 0.5, "that of the training slides"
    assert fold.finished
    assert convert(monkeypatch, recorded, target) == 2, "a checkpoint is never replaced"


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        ("panel", (), r"it predicts 12 genes, .*genes_recorded\.npy lists 11; put the panel"),
        (None, ("--encoder", "kaiko-vits16"), r"features of width 32, the encoder kaiko-vits16 gives 384; name its encoder"),
        (None, ("--set", "MODEL.global_depth=2"), r"does not fit the model of its configuration"),
        ("weights", (), r"holds no state dict \(names -> tensors\).*Give the file of weights"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_sizes(recorded, monkeypatch, capsys, spoil, more, message):
    if spoil == "panel":
        np.save(recorded["data_dir"] / "recorded" / "genes_recorded.npy", np.array(GENES[:-1]))
    if spoil == "weights":
        torch.save({"epoch": 3}, recorded["published"])
    out = recorded["folder"] / "imported"
    assert convert(monkeypatch, recorded, out, *more) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not out.exists()
