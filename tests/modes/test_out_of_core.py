"""A training that reads neighbor features by row is the one that holds them, bit for bit; and what is held then."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from datasets.batches import BatchMaker
from datasets.features import neighbor_files, reader
from datasets.features.cache import read_features
from datasets.features.neighbor_files import NeighborFiles, Residence
from datasets.features.reader import FeatureReader
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.shares import share_of
from datasets.tables.slide_table import load_slide
from modes.train import train
from modes.training import run_data as run_data_module
from modes.training.compose import open_layout
from modes.training.plan import find_folds
from modes.training.run_data import RunData, open_run_data
from modes.training.split import prepare_split
from tests.fabricated_run import TINY, options, with_
from utils.config import Config, load_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(fabricated_data, tmp_path_factory) -> Config:
    """Two folds of a small set in which the neighbor features of one slide are published ones."""
    folder = tmp_path_factory.mktemp("out_of_core")
    shutil.copytree(fabricated_data, folder / "data", ignore=shutil.ignore_patterns("[ACD]2*", "*_external"))
    layout = layout_of(folder / "data")
    slide = layout.slides_on_disk()[1]
    path = layout.cache_path("neighbor", slide)
    torch.save(torch.from_numpy(read_features(path)), path.with_suffix(".pt"))
    path.unlink()
    assert layout.published_path("neighbor", slide) is not None
    (folder / "tiny.yaml").write_text(TINY)
    changes = [f"DATA.data_dir={folder / 'data'}", f"GENERAL.log_path={folder / 'logs'}", "TRAINING.epochs=2"]
    return load_config(folder / "tiny.yaml", changes)


def layout_of(data_dir: str | Path) -> Layout:
    return Layout(Path(data_dir), get_spec("demo", data_dir), patch_size=64, num_neighbors=3)


def opened(config: Config, residence: str) -> RunData:
    layout = open_layout(config, "tiny")
    slides = layout.patients_on_disk()
    folds, _ = find_folds(config, layout, slides, [0, 1])
    return open_run_data(with_(config, DATA={"residence": residence}), "tiny", layout, list(slides), CPU, folds)


@pytest.fixture(scope="module")
def held(config) -> RunData:
    return opened(config, "host")


@pytest.fixture(scope="module")
def on_disk(config) -> RunData:
    return opened(config, "disk")


@pytest.mark.parametrize("model", ["gene_dml", "ridge_neighbor"])
def test_a_training_out_of_core_is_that_in_memory(config, model):
    runs = [
        train(
            with_(config, MODEL={"name": model}, DATA={"residence": residence}),
            options(folds=[0], run_name=f"{model}_{residence}"),
        )
        for residence in ("host", "disk")
    ]
    first, second = (run / "fold_0" for run in runs)
    for name in ("metrics.jsonl", "split.json", "genes.txt", "per_gene.csv", "result.json"):
        assert (first / name).read_text() == (second / name).read_text(), name
    weights = [torch.load(fold / "best.pt", weights_only=True)["model"] for fold in (first, second)]
    assert weights[0] and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_rows_of_the_files_are_those_in_memory(held, on_disk):
    files, store = on_disk.store.neighbor_features, held.store
    assert isinstance(files, NeighborFiles) and isinstance(store.neighbor_features, torch.Tensor)
    assert (files.shape, files.dtype) == (tuple(store.neighbor_features.shape), store.neighbor_features.dtype)
    assert files.nbytes == store.neighbor_features.nbytes
    rows = torch.randperm(len(store.neighbor_features), generator=torch.Generator().manual_seed(1))
    assert torch.equal(files.read(rows), store.neighbor_features[rows])
    assert files.read(rows[:0]).shape == (0, *files.shape[1:])
    assert on_disk.digests == held.digests
    for rank in range(2):  # and a process of a team reads its own
        shares = [
            share_of(maker, rows[:31], torch.zeros(31, dtype=torch.long), torch.zeros(len(rows), 1), rank, 2)
            for maker in (held.maker, on_disk.maker)
        ]
        assert torch.equal(*(share.neighbor_features for share in shares)) and len(shares[0].rows) in (15, 16)


def test_only_the_counts_of_the_panels_are_held(on_disk):
    store = on_disk.store
    panels = {gene for record in find(on_disk) for gene in prepare_split(on_disk, record).genes}
    assert panels == set(store.slides[0].table.var_names) < set(store.slides[0].counts.genes)
    (whole,) = FeatureReader(on_disk.layout, "uni").read_tables([store.slides[0].name])
    assert whole.counts.digest == store.slides[0].counts.digest
    assert (whole.table[:, store.slides[0].table.var_names].X != store.slides[0].table.X).nnz == 0
    assert len({id(record.counts.genes) for record in store.slides}) == 1, "equal lists of genes are one"


def test_counts_of_all_genes_are_held_while_they_are_few_and_read_again_otherwise(config, on_disk, monkeypatch):
    loaded, slides = [], on_disk.store.slides
    monkeypatch.setattr(reader, "load_slide", lambda *given: loaded.append(given[1]) or load_slide(*given))
    one_slide = 12 * slides[0].table.n_obs * len(slides[0].counts.genes)
    for spare, times in ((1 << 30, 1), (one_slide, 2), (0, 2)):
        loaded.clear()
        monkeypatch.setattr(run_data_module, "_SPARE_BYTES", spare)
        found = opened(config, "disk").store.slides
        assert loaded.count(slides[-1].name) == times and loaded.count(slides[0].name) == (1 if spare else 2)
        for record, expected in zip(found, slides, strict=True):
            assert record.table.var_names.equals(expected.table.var_names)
            assert record.table.X.dtype == expected.table.X.dtype and (record.table.X != expected.table.X).nnz == 0


def find(run_data: RunData):
    return find_folds(run_data.config, run_data.layout, run_data.store.patients, [0, 1])[0]


def test_size_decides_where_it_is_left_to_it_and_that_is_said(config, held, monkeypatch, capsys):
    nbytes = held.store.neighbor_features.nbytes
    for free, processes, expected in ((10 * nbytes, "1", True), (10 * nbytes, "20", False), (nbytes, "1", False)):
        monkeypatch.setattr(neighbor_files, "available_memory", lambda free=free: free)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert Residence("auto").holds(nbytes, print) is expected
        assert ("in memory" if expected else "stay in their files") in capsys.readouterr().out
    assert Residence("host").holds(10**18) and not Residence("disk").holds(1)
    monkeypatch.setattr(neighbor_files, "available_memory", lambda: 0)
    assert isinstance(opened(config, "auto").store.neighbor_features, NeighborFiles)
    assert "stay in their files and are read by row" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cache", "published"])
def test_damage_is_found_before_the_training_starts(config, tmp_path, kind):
    shutil.copytree(config.DATA.data_dir, tmp_path / "data")
    layout = layout_of(tmp_path / "data")
    slide = layout.slides_on_disk()[kind == "published"]
    if kind == "cache":
        path = layout.cache_path("neighbor", slide)
        with h5py.File(path) as file:
            place = file["features"].id.get_offset() + file["features"].nbytes // 2
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"damage")
    else:
        path = layout.published_path("neighbor", slide)
        features = torch.load(path)
        features[3, 1, 2] = np.nan
        torch.save(features, path)
    with pytest.raises(ValueError, match=f"{path.name}.*(checksum|not finite)"):
        opened(replace(config, DATA=replace(config.DATA, data_dir=str(tmp_path / "data"))), "disk")


def test_slides_that_do_not_belong_together(config, tmp_path):
    layout = layout_of(config.DATA.data_dir)
    other, cache = tmp_path / "other.pt", layout.cache_path("neighbor", layout.slides_on_disk()[0])
    torch.save(torch.zeros(4, 9, 7), other)
    with pytest.raises(ValueError, match=r"differ in tiles or width.*other\.pt.*Extract them alike"):
        NeighborFiles([(cache, len(read_features(cache))), (other, 4)], Residence("disk"))


def test_a_maker_without_neighbor_features_gives_none(held):
    store = replace(held.store, neighbor_features=None)
    maker = BatchMaker(store, None, CPU, "disk")
    rows = torch.tensor([0, 1])
    assert maker.spots(rows, torch.zeros_like(rows), None, with_slides=False).neighbor_features is None
