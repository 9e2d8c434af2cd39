"""Encoders of other widths and kinds, end to end: `large`, pooled features wider than tokens, convolutional; none mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from datasets.features.cache import write_cache
from datasets.features.identity import CacheIdentity
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from models.patch_encoders.build import patch_encoder_spec
from tests.caches import edited
from tests.command_line import Left, call_extract, call_main

PATCH, SLIDES, SPOTS = 56, ("A1", "B1"), 8
CONFIG = """
DATA: {type: demo, patch_size: 56, num_neighbors: 3, num_genes: 16}
MODEL: {projection_dim: 16, fusion_mlp_dim: 16, gene_mlp_dim: 16, predictor_dim: 16}
LOSS: {k: 4, use_kmeans: true}
TRAINING: {batch_size: 16, epochs: 1}
"""
# What --model_size would set for HER2ST takes gigabytes; the widths, which are the point here, stay.
FEW_LAYERS = [
    part
    for key in ("neighbor_depth=1", "neighbor_mlp_ratio=0.05", "global_depth=1", "global_mlp_ratio=0.05")
    for part in ("--set", f"MODEL.{key}")
]


@pytest.fixture
def place(tiny_data, tmp_path) -> Path:
    """A folder with two slides of twelve spots and a configuration."""
    shutil.copytree(tiny_data / "demo", tmp_path / "data" / "demo", ignore=shutil.ignore_patterns("?2*", "[CD]*"))
    for slide in SLIDES:
        path = layout_of(tmp_path).spots_path(slide)
        pd.read_csv(path, sep="\t").iloc[: SPOTS + 3].to_csv(path, sep="\t", index=False)
    (tmp_path / "wide.yaml").write_text(CONFIG)
    return tmp_path


def layout_of(place: Path) -> Layout:
    return Layout(place / "data", get_spec("demo", place / "data"), patch_size=PATCH, num_neighbors=3)


def fabricate(layout: Layout, encoder: str) -> None:
    """Features and tokens as wide as the encoder gives them; as many tokens as it gives for such a patch."""
    spec, random = patch_encoder_spec(encoder), np.random.default_rng(0)
    for slide in SLIDES:
        table = load_slide(layout, slide)
        shapes = {
            "target": (spec.pooled_dim,),
            "neighbor": (9, spec.pooled_dim),
            "token": (1, spec.num_tokens(PATCH), spec.dim),
        }
        with open_slide(layout.image_path(slide)) as image:
            size, fingerprint = image.size, image.fingerprint()
        for kind, shape in shapes.items():
            identity = CacheIdentity(
                kind=kind, encoder=encoder, encoder_sha256="fabricated", image_size=size, image_fingerprint=fingerprint,
                patch_size=PATCH, microns_per_pixel=None, num_neighbors=3, views=1, dtype="float32",
            )  # fmt: skip
            values = random.normal(size=(table.n_obs, *shape)).astype(np.float32)
            write_cache(layout.cache_path(kind, slide), identity, list(table.obs_names), table.obsm["center"], [values])


def train(place: Path, *more: object) -> Left:
    return call_main(
        "--mode", "train", "--config_name", place / "wide.yaml", "--data_dir", place / "data", "--log_path", place / "logs",
        "--device", "cpu", "--fold", 0, "--no_report", *FEW_LAYERS, *more,
    )  # fmt: skip


def test(place: Path, *more: object) -> Left:
    run = place / "logs" / "wide" / "exp_0"
    return call_main(
        "--mode", "test", "--fold", 0, "--model_path", run, "--data_dir", place / "data", "--device", "cpu", "--no_report",
        *more,
    )  # fmt: skip


test.__test__ = False  # the mode, not a test


def trained(place: Path) -> dict:
    return torch.load(place / "logs" / "wide" / "exp_0" / "fold_0" / "best.pt", weights_only=True)


@pytest.mark.parametrize(
    ("flags", "encoder", "num_tokens"),
    [
        (("--model_size", "large"), "uni2-h", 25),
        (("--encoder", "virchow2", "--set", "MODEL.use_neighbor=false"), "virchow2", 21),
    ],
)
def test_wide_features_train_and_test(place, flags, encoder, num_tokens):
    """uni2-h: 1536 and register tokens; virchow2: its pooled feature is twice as wide as its tokens."""
    spec, layout = patch_encoder_spec(encoder), layout_of(place)
    fabricate(layout, encoder)
    with h5py.File(layout.cache_path("token", "A1")) as file:
        assert file["tokens"].shape[2:] == (num_tokens, spec.dim)
    left = train(place, *flags)
    assert left.status == 0, left.said
    content = trained(place)
    assert content["encoder"] == {
        "name": encoder, "sha256": "fabricated", "dim": spec.pooled_dim, "token_dim": spec.dim, "token_pool": 1,
    }  # fmt: skip
    assert content["model"]["projection.weight"].shape == (16, spec.dim)
    assert content["model"]["global_encoder.norm.weight"].shape == (spec.pooled_dim,)
    if encoder == "uni2-h":
        sizes = content["config"]["MODEL"]
        assert (sizes["neighbor_heads"], sizes["global_heads"]) == (4, 8), "large has the heads of HER2ST"
    left = test(place)
    assert left.status == 0, left.said
    result = json.loads((place / "logs" / "wide" / "exp_0" / "fold_0" / "result.json").read_text())
    assert np.isfinite(result["mse"])


def test_a_convolutional_encoder_from_its_extraction_on(place):
    left = call_extract(
        "--config", place / "wide.yaml", "--extract_mode", "all", "--views", 1, "--encoder", "resnet50", "--random_weights",
        "--data_dir", place / "data", "--device", "cpu", "--num_workers", 0,
    )  # fmt: skip
    assert left.status == 0, left.said
    left = train(place, "--encoder", "resnet50")
    assert left.status == 0, left.said
    made = trained(place)["encoder"]
    assert (made["name"], made["dim"], made["token_dim"]) == ("resnet50", 1024, 1024)
    assert made["sha256"].startswith("random-"), "a checkpoint says that its encoder was not trained"
    assert test(place).status == 0

    # The same encoder with other weights; then another encoder: the checkpoint has neither.
    for path in (place / "data").rglob("*_56/*.h5"):
        with edited(path) as file:
            file.attrs["encoder_sha256"] = "of other weights"
    left = test(place)
    assert left.status == 2, left.said
    for part in (
        "best.pt was trained on features of resnet50",
        "random-",
        "of other wei...",
        "Keep those there elsewhere",
        "--encoder resnet50\n",
    ):
        assert part in left.said, left.said
    for path in (place / "data").rglob("*_56/*.h5"):
        with edited(path) as file:
            file.attrs["encoder"] = "kaiko-vits16"
    left = test(place)
    assert left.status == 2 and "made with encoder 'kaiko-vits16', expected 'resnet50'" in left.said, left.said
    left = test(place, "--encoder", "kaiko-vits16")
    assert left.status == 2 and "asked for 'kaiko-vits16'" in left.said and "DATA.encoder: the run has" in left.said, (
        left.said
    )
