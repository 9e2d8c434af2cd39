"""A tiny trained run, made once a session the way a user makes one: simulate, extract, train."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from datasets.known_sets import get_spec
from datasets.layout import Layout

CONFIG = """
DATA: {type: demo, patch_size: 64, num_neighbors: 3, num_genes: 24, encoder: efficientnet-lite0}
MODEL:
  {projection_dim: 32, neighbor_depth: 1, neighbor_mlp_ratio: 1, global_depth: 2, global_heads: 4, global_mlp_ratio: 1,
   fusion_mlp_dim: 32, gene_mlp_dim: 32, predictor_dim: 32}
LOSS: {k: 4, use_kmeans: true}
TRAINING: {batch_size: 64, epochs: 2, learning_rate: 1.0e-3}
"""


@dataclass(frozen=True)
class TinyRun:
    """path: run folder with folds 0 and 1.  data_dir: with caches of `demo` and none of test/demo_external.

    config_name: its YAML file.  Read only: `copy` gives a test its own.
    """

    path: Path
    data_dir: Path
    config_name: str

    def copy(self, folder: Path) -> Path:
        """A copy of the run folder below `folder`."""
        return Path(shutil.copytree(self.path, folder / "run"))


@pytest.fixture(autouse=True, scope="module")
def _shortcuts(_takes_shortcuts):
    """All tests of modes."""


@pytest.fixture(scope="session")
def tiny_run(tiny_data, made_once) -> TinyRun:
    """Gene-DML trained for two epochs on two folds of a part of `tiny_data`: patients A, B, C with one slide each."""
    folder = made_once("tiny_run", lambda folder: _train_tiny_run(tiny_data, folder))
    return TinyRun(folder / "logs" / "tiny" / "run", folder / "data", str(folder / "tiny.yaml"))


def _train_tiny_run(tiny_data: Path, folder: Path) -> None:
    from modes.train import TrainOptions, train
    from preprocess.extract_features_uni import main as extract
    from tests.shortcuts import shortcuts
    from utils.config import load_config

    torch.set_num_threads(1)
    data_dir, config_file = folder / "data", folder / "tiny.yaml"
    shutil.copytree(tiny_data, data_dir, ignore=shutil.ignore_patterns("?2*", "D*"))
    config_file.write_text(CONFIG)
    shared = ["--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "1"]
    extract(["--config", str(config_file), "--extract_mode", "all", "--views", "1", *shared])
    config = load_config(config_file, [f"DATA.data_dir={data_dir}", f"GENERAL.log_path={folder / 'logs'}"])
    options = TrainOptions(
        config_name="tiny",
        run_name="run",
        device=torch.device("cpu"),
        folds=[0, 1],
        resume=False,
        checkpoint_seconds=60.0,
        with_report=False,
    )
    with shortcuts():  # its predictions are copied and read by every other test
        train(config, options)


@pytest.fixture(scope="session")
def fabricated_data(tiny_data, made_once) -> Path:
    """A copy of `tiny_data` with fabricated features. Read only."""
    from tests.fabricated_run import fabricate

    def make(folder: Path) -> None:
        data = shutil.copytree(tiny_data, folder / "data")
        layout = Layout(data, get_spec("demo", data), patch_size=64, num_neighbors=3)
        for slide in layout.slides_on_disk():
            fabricate(layout, slide)

    return made_once("fabricated", make) / "data"
