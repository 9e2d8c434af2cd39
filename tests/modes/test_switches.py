"""The switches that were tried on the group loss: each changes what it says, and trains through to its table."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import switches
from benchmarks.accuracy import DATA_SETS, DataSet
from datasets.features.cache import opened, read_features, write_cache
from models.contract import Embeddings
from models.layers.precision import unit
from models.losses import GeneDMLLoss
from utils.config import Loss


def laid_out(source: Path, _raw: Path, data_dir: Path) -> None:
    if not data_dir.exists():
        shutil.copytree(source, data_dir)


def embeddings_of(num_spots: int) -> Embeddings:
    gene, fused, cluster = (torch.randn(num_spots, 6, generator=torch.manual_seed(seed)) for seed in range(3))
    return Embeddings({"target": unit(fused)}, unit(gene), fused, unit(cluster), unit(gene))


def test_one_label_gives_the_group_loss_and_two_give_the_mean_of_both():
    loss, embeddings = GeneDMLLoss(Loss(k=4, use_kmeans=True, instance_weight=0.0)), embeddings_of(24)
    whole = loss._alignment(embeddings)["group"]
    assert torch.equal(switches.grouped_within(loss, embeddings, torch.zeros(24, dtype=torch.long)), whole)
    labels = torch.tensor([0, 1, 1] * 8)
    found = switches.grouped_within(loss, embeddings, labels)
    parts = []
    for label, k in ((0, 2), (1, 3)):
        spots = torch.nonzero(labels == label).squeeze(1)
        alone = GeneDMLLoss(replace(loss.settings, k=k))
        parts.append(alone._alignment(switches.of_spots(embeddings, spots))["group"])
    assert found == pytest.approx(float(parts[0] / 3 + 2 * parts[1] / 3))


def test_balanced_batches_hold_as_many_spots_of_each_label():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 4)
    rows = torch.cat([torch.arange(50), torch.arange(50, 60)])  # label 2 is not of the training
    batches = switches.balanced_rows(labels, rows, 12, torch.Generator())
    assert [torch.bincount(labels[batch]).tolist() for batch in batches] == [[6, 6]] * 5
    assert len(torch.cat(batches).unique()) == 30 + 10, "none of the large group comes twice, all of the small one come"


def test_the_switches_train_and_are_compared(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(switches, "train_method", partial(switches.train_method, folds=[0]))
    found = {"methods": {"gene_dml": {"learning_rate": "1e-3", "weight_decay": "0", "epochs": 1}}}
    (tmp_path / "search.json").write_text(json.dumps(found))
    tiny = DataSet("tiny", tiny_run.config_name, partial(laid_out, tiny_run.data_dir), views=1)
    monkeypatch.setitem(DATA_SETS, "tiny", tiny)
    arguments = ["--data", "tiny", "--work", str(tmp_path), "--search", str(tmp_path / "search.json"), "--seeds", "0"]
    names = "within_patient,balanced_slide,standardised"
    path = switches.main([*arguments, "--switches", names, "--device", "cpu", "--out", str(tmp_path / "out")])
    rows = path.read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:6]] == [
        "Gene-DML",
        "clusters within a patient",
        "batches balanced over slides",
        "features standardised per slide",
    ]
    losses = []
    for name in ("gene_dml", *names.split(",")):
        (log,) = tmp_path.glob(f"**/accuracy/**/{name}/seed_0/fold_0/metrics.jsonl")
        losses.append(json.loads(log.read_text().splitlines()[0]))
    assert len({record["train/group"] for record in losses}) == 4


def test_features_have_no_mean_and_one_deviation_a_slide_and_masked_tiles_stay_zero(tiny_run, tmp_path):
    laid_out(tiny_run.data_dir, tmp_path, tmp_path / "data")
    neighbor = next((tmp_path / "data").rglob("n_features_*/*.h5"))
    with opened(neighbor) as cache:
        tiles, others = cache.read(), (cache.identity, cache.spot_ids, cache.centers)
    tiles[0, :3] = 0
    write_cache(neighbor, *others, [tiles])
    before = {path: read_features(path) for path in sorted((tmp_path / "data").rglob("*.h5"))}
    switches.standardise_caches(tmp_path / "data")
    after = {path: read_features(path) for path in before}
    for path, old in before.items():
        was_inside = old.any(axis=-1)
        inside = after[path][was_inside].astype(np.float64)
        assert np.abs(inside.mean(axis=0)).max() < 1e-3 and np.abs(inside.std(axis=0) - 1).max() < 1e-2, path
        assert not after[path][~was_inside].any()
    assert not after[neighbor][0, :3].any() and after[neighbor][0, 3:].any()
    files = {path: path.stat().st_mtime_ns for path in before}
    switches.standardise_caches(tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in before} == files, "a second time changes nothing"
    write_cache(neighbor, *others, [tiles])  # extracted again
    switches.standardise_caches(tmp_path / "data")
    assert np.array_equal(read_features(neighbor), after[neighbor])


def test_images_are_brought_to_one_stain(tmp_path):
    pytest.importorskip("torchstain")
    random = np.random.default_rng(0)
    colors = {"a": [150, 60, 140], "b": [200, 120, 160]}

    def lay_out(_raw, data_dir):
        (data_dir / "ST-imgs").mkdir(parents=True)
        for name, color in colors.items():
            shades = random.uniform(0.4, 1.6, (64, 64, 1)) * (255 - np.array(color)) + random.normal(0, 6, (64, 64, 3))
            pixels = np.clip(255 - shades, 1, 254).astype(np.uint8)
            Image.fromarray(pixels).save(data_dir / "ST-imgs" / f"{name}.png")

    data = switches.normalised(DataSet("stained", "demo/dml", lay_out))
    for _ in range(2):  # the second time nothing is left to do
        data.lay_out(tmp_path, tmp_path / "data")
    before = [np.array(color) for color in colors.values()]
    means = [
        np.asarray(Image.open(tmp_path / "data" / "ST-imgs" / f"{name}.png")).reshape(-1, 3).mean(axis=0)
        for name in colors
    ]
    assert np.abs(means[0] - means[1]).max() < np.abs(before[0] - before[1]).max() / 2
