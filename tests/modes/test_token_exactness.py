"""Training from the token cache is training with the frozen encoder in every step, seed for seed, step for step.

Not bit for bit: the cache was encoded patch after patch of a slide, all views together, the online encoder sees the
shuffled patches of a batch, and float32 sums of convolutions depend on the composition of a batch in their last bits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets.batches import TrainingBatches, epoch_rows
from datasets.targets import store_targets
from datasets.tokens import CachedTokens, CutPatches
from modes.prediction.model import make_model
from modes.train import TrainOptions, make_step, train
from modes.training.compose import Optimization, open_layout
from modes.training.run_data import open_run_data
from preprocess.extract_features_uni import main as extract
from tests.shortcuts import keep_spots
from utils.config import load_config
from utils.files import load_names
from utils.runs import generator_for, read_epochs, seed_everything

CONFIG = """
DATA: {type: demo, patch_size: 64, num_neighbors: 3, num_genes: 24, encoder: efficientnet-lite0}
MODEL:
  {projection_dim: 32, neighbor_depth: 1, neighbor_mlp_ratio: 1, global_depth: 2, global_heads: 4, global_mlp_ratio: 1,
   fusion_mlp_dim: 32, gene_mlp_dim: 32, predictor_dim: 32}
LOSS: {k: 4, use_kmeans: true}
TRAINING: {batch_size: 8, epochs: 2, learning_rate: 1.0e-3}
"""
FLOAT32_TOLERANCE = 1e-4  # relative, of every loss of every step
FLOAT16_TOLERANCE = 2e-3  # float16 keeps 11 bits of a token: 5e-4 of its value


@dataclass(frozen=True)
class Data:
    """A data folder with target and neighbor caches, and a configuration file; `variant` makes token caches beside it."""

    folder: Path
    config_file: Path

    def variant(self, name: str, *flags: str) -> Path:
        """A copy of the folder with token caches of these flags; made once."""
        copy = self.folder.parent / name
        if not copy.exists():
            shutil.copytree(self.folder, copy)
            extract(["--config", str(self.config_file), "--extract_mode", "token", *flags, *shared(copy)])
        return copy

    def config(self, folder: Path, *overrides: str):
        return load_config(self.config_file, [f"DATA.data_dir={folder}", *overrides])


def shared(folder: Path) -> list[str]:
    return ["--data_dir", str(folder), "--device", "cpu", "--num_workers", "1"]


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("exactness")
    folder, config_file = root / "without_tokens", root / "tiny.yaml"
    shutil.copytree(tiny_data, folder, ignore=shutil.ignore_patterns("?2*", "D*", "*_external"))
    keep_spots(folder / "demo")
    config_file.write_text(CONFIG)
    for kind in ("target", "neighbor"):
        extract(["--config", str(config_file), "--extract_mode", kind, *shared(folder)])
    return Data(folder, config_file)


@dataclass
class Record:
    """losses: of every step.  gradients: of the first step.  num_views: that the source offers."""

    losses: list[dict[str, float]]
    gradients: dict[str, Tensor]
    num_views: int


def train_steps(config, source_type: type, epochs: int = 2) -> Record:
    """Two epochs on all slides, as a fold does them, every step noted."""
    layout = open_layout(config, "tiny")
    slides = layout.slides_on_disk()
    run_data = open_run_data(config, "tiny", layout, slides, torch.device("cpu"))
    assert isinstance(run_data.maker.source, source_type)
    targets = store_targets(run_data.store, slides, load_names(layout.panel_path))
    seed_everything(config.GENERAL.seed)
    dim = run_data.store.target_features.shape[1]
    model = make_model(config, feature_dim=dim, token_dim=run_data.token_dim, num_genes=targets.shape[1]).train()
    optimizer = Optimization.of(model, config, run_data.precision).optimizer
    step = make_step(model, config, run_data.encode)
    record = Record([], {}, run_data.maker.source.num_views)
    for epoch in range(epochs):
        seed_everything(config.GENERAL.seed, epoch)
        generator = generator_for(config.GENERAL.seed, epoch)
        rows = epoch_rows(
            run_data.store.slide_of_row,
            torch.arange(len(run_data.store.slide_of_row)),
            batch_size=config.TRAINING.batch_size,
            minimum=config.LOSS.k,
            slides_per_batch=0,
            generator=generator,
        )
        for batch in TrainingBatches(run_data.maker, rows, targets, generator):
            optimizer.zero_grad(set_to_none=True)
            terms = step(batch)
            terms["total"].backward()
            record.losses.append({name: float(value.detach()) for name, value in terms.items()})
            if not record.gradients:
                record.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
    return record


def greatest_difference(first: Record, second: Record) -> float:
    """Relative difference of the losses, over all steps and terms."""
    assert len(first.losses) == len(second.losses) > 6
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(first.losses, second.losses) for name in a)


@pytest.fixture(scope="module")
def online(data) -> Record:
    return train_steps(data.config(data.folder, "DATA.tokens=online"), CutPatches)


def test_a_float32_cache_trains_like_the_encoder_step_for_step(data, online):
    folder = data.variant("float32", "--dtype", "float32")
    cached = train_steps(data.config(folder, "DATA.tokens=cache"), CachedTokens)
    assert online.num_views == cached.num_views == 8, "all views are drawn, in the same order, from both"
    assert greatest_difference(online, cached) < FLOAT32_TOLERANCE
    assert online.gradients.keys() == cached.gradients.keys()
    for name, expected in online.gradients.items():
        torch.testing.assert_close(cached.gradients[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_float16_cache_trains_like_it_within_its_rounding(data, online):
    cached = train_steps(data.config(data.variant("float16"), "DATA.tokens=cache"), CachedTokens)
    difference = greatest_difference(online, cached)
    assert 0 < difference < FLOAT16_TOLERANCE


def test_another_view_would_be_noticed(data, online):
    """The comparison above tells something: with the views of the cache turned differently the losses are others."""
    folder = data.variant("one_view", "--views", "1")
    cached = train_steps(data.config(folder, "DATA.tokens=cache"), CachedTokens)
    assert cached.num_views == 1
    assert greatest_difference(online, cached) > 10 * FLOAT16_TOLERANCE


def run_folder(data: Data, folder: Path, name: str, *overrides: str) -> Path:
    config = data.config(folder, f"GENERAL.log_path={folder.parent / 'logs'}", *overrides)
    options = TrainOptions(
        config_name="tiny",
        run_name=name,
        device=torch.device("cpu"),
        folds=[0],
        resume=False,
        checkpoint_seconds=60.0,
        with_report=False,
    )
    return train(config, options) / "fold_0"


def test_whole_runs_agree_as_well(data):
    """The program itself: every number of metrics.jsonl, evaluation included, and both name their source of tokens."""
    online = run_folder(data, data.folder, "online", "DATA.tokens=online")
    cached = run_folder(data, data.variant("float32", "--dtype", "float32"), "cached")
    for a, b in zip(read_epochs(online / "metrics.jsonl"), read_epochs(cached / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)
    assert tokens_of(online) == {"source": "encoder", "views": 8, "token_pool": 1}
    assert tokens_of(cached) == {
        "source": "cache",
        "views": 8,
        "token_pool": 1,
        "dtype": "float32",
        "precision": "float32",
    }


def tokens_of(fold: Path) -> dict:
    return json.loads((fold / "split.json").read_text())["tokens"]


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("one_view", ["--views", "1"], {"views": 1, "token_pool": 1}),
        ("pooled", ["--views", "2", "--token_pool", "2"], {"views": 2, "token_pool": 2}),
    ],
)
def test_variants_of_the_cache_are_named_in_the_run(data, name, flags, expected):
    fold = run_folder(data, data.variant(name, *flags), name, "TRAINING.epochs=1")
    assert tokens_of(fold) == {"source": "cache", "dtype": "float16", "precision": "float32", **expected}
    checkpoint = torch.load(fold / "best.pt", weights_only=True)
    assert checkpoint["encoder"]["token_pool"] == expected["token_pool"]
