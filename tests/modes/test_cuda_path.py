"""The way of a training on CUDA, followed without a GPU: no tensor lies in the wrong place, nothing waits for the device."""

from __future__ import annotations

import shutil
import traceback
from dataclasses import replace
from itertools import islice

import pytest
import torch

from datasets.batches import TrainingBatches
from models.table import MODELS
from modes.prediction.model import needs_of
from modes.prediction.slide import model_inputs
from modes.train import epoch_batches, make_step
from modes.training.compose import Optimization, forward, open_layout
from modes.training.fold import new_model, remember_training_spots
from modes.training.plan import find_folds
from modes.training.run_data import RunData, open_run_data
from modes.training.split import Split, prepare_split
from tests.dry_run import CUDA, dry_run
from tests.fabricated_run import TINY, with_
from tests.team import run_team
from utils.config import Config, load_config

AGAIN = ("gene_dml float32", "gene_dml fp16")  # the second step begins with what the optimiser and the scaler hold
TRAINED = [name for name, row in MODELS.items() if row.loss is not None]
# Of half precision fp16 alone: bf16 is the same way without the scaler, and that of the switches.
IN_PRECISION = [f"{model} {precision}" for model in TRAINED for precision in ("float32", "fp16")]
SWITCHES = {
    "spectral, normalised": {"LOSS": {"use_kmeans": False, "normalize_fused": True}},
    "without group": {"LOSS": {"group_weight": 0.0}},
    "without instance": {"LOSS": {"instance_weight": 0.0}},
    "without neighbor": {"MODEL": {"use_neighbor": False}},
    "without global": {"MODEL": {"use_global": False}},
    "one layer": {"MODEL": {"global_depth": 1}},
    "host, two slides": {"DATA": {"residence": "host"}, "TRAINING": {"slides_per_batch": 2}},
}


@pytest.fixture(scope="module")
def config(fabricated_data, tmp_path_factory) -> Config:
    """Of one slide of each patient."""
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copytree(fabricated_data, folder / "data", ignore=shutil.ignore_patterns("?2*"))
    (folder / "tiny.yaml").write_text(TINY)
    return load_config(folder / "tiny.yaml", [f"DATA.data_dir={folder / 'data'}"])


OPENED: dict[str, tuple[RunData, Split]] = {}


def opened(config: Config) -> tuple[RunData, Split]:
    """The data on the device and the split, opened once for all ways that read the same."""
    read = str((config.DATA, needs_of(config)))
    if read not in OPENED:
        layout = open_layout(config, "tiny")
        slides = layout.patients_on_disk()
        folds, _ = find_folds(config, layout, slides, [0], all_patients=False)
        run_data = open_run_data(config, "tiny", layout, list(slides), CUDA, folds)
        OPENED[read] = run_data, prepare_split(run_data, folds[0])
    run_data, split = OPENED[read]
    return replace(run_data, config=config), split


def follow(config: Config, steps: int) -> dict[str, torch.Tensor]:
    """From the caches through steps, the optimiser's included, and a slide in evaluation; the terms of the last step."""
    run_data, split = opened(config)
    model = new_model(run_data, split)
    assert {value.device for value in model.state_dict().values()} <= {CUDA}
    optimization = Optimization.of(model, config, run_data.precision)
    precision, step = optimization.precision, make_step(model, config, run_data.encode)
    expression = split.targets.to(CUDA)
    batches = epoch_batches(run_data, split, expression, 1)
    assert isinstance(batches, TrainingBatches) and len(batches) > 1
    for batch in islice(batches, steps):
        with precision.autocast():
            terms = step(batch)
        precision.scaler.scale(terms["total"])
        for value in model.parameters():
            value.grad = torch.zeros_like(value)
        precision.scaler.step(optimization.optimizer)
        precision.scaler.update()
    if model.needs.training_spots:
        remember_training_spots(model, run_data, split, expression)
        return terms  # its prediction asks how many spots it remembers, and waits for the number
    model.eval()
    slide = run_data.maker.slide(run_data.store.slides[0])
    with torch.inference_mode(False), torch.no_grad(), precision.autocast():
        whole = None
        if model.needs.slides:
            whole = model.encode_slides(slide.slide_features, slide.grid_xy, [len(slide)], None)
        for chunk in slide.chunks(len(slide)):
            predicted = model(model_inputs(chunk, run_data.encode(chunk), whole)).fused
    assert predicted.device == CUDA and predicted.shape == (len(slide), len(split.genes))
    return terms


def cases(config: Config) -> dict[str, Config]:
    found = {}
    for name in IN_PRECISION:
        model, precision = name.split()
        found[name] = with_(config, MODEL={"name": model}, TRAINING={"precision": precision})
    half = with_(config, TRAINING={"precision": "bf16"})
    return found | {name: with_(half, **changes) for name, changes in SWITCHES.items()}


@pytest.fixture(scope="module")
def ways(config, tmp_path_factory) -> dict[str, str]:
    """What each way has met, in words, "" for nothing.

    In a process of its own: after fake tensors PyTorch believes in the device, and refuses gradients in forked processes.
    """

    def met_on(name: str, way: Config) -> str:
        try:
            terms = follow(way, steps=2 if name in AGAIN else 1)
        except Exception:
            return traceback.format_exc()
        places = {(str(term.device), term.dtype) for term in terms.values()}
        return "" if places == {("cuda:0", torch.float32)} else f"loss terms are {places}"

    def work(_rank: int) -> dict[str, str]:
        with dry_run():
            met = {name: met_on(name, way) for name, way in cases(config).items()}
            return {**met, **{name: met_on_wrong(config, name) for name in WRONG}}

    (ended,) = run_team(1, work, tmp_path_factory.mktemp("ways"), with_torchrun=False)
    assert ended.status == 0, ended.output
    return ended.result


@pytest.mark.parametrize("name", IN_PRECISION)
def test_every_model_in_every_precision(ways, name):
    assert ways[name] == ""


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch(ways, name):
    assert ways[name] == ""


WRONG = {
    "a mask on the host": lambda batch: replace(batch, neighbor_is_valid=torch.ones(batch.neighbor_is_valid.shape) > 0),
    "an index on the host": lambda batch: replace(
        batch, target_features=batch.target_features[torch.arange(len(batch))]
    ),
    "a wait": lambda batch: replace(batch, target_features=batch.target_features * float(batch.target_features.sum())),
}


def met_on_wrong(config: Config, name: str) -> str:
    run_data, split = opened(config)
    model = new_model(run_data, split)
    (batch, *_) = epoch_batches(run_data, split, split.targets.to(CUDA), 1)
    try:
        forward(model, run_data.encode, WRONG[name](batch))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", WRONG)
def test_what_the_dry_run_is_for_it_finds(ways, name):
    expected = "DataDependentOutputException" if name == "a wait" else "host and on the device"
    assert expected in ways[name]
