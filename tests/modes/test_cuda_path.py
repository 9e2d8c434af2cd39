"""The way of a training on CUDA, followed without a GPU: no tensor lies in the wrong place, nothing waits for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from datasets.batches import TrainingBatches
from models.table import MODELS
from modes.prediction.slide import model_inputs
from modes.train import epoch_batches, make_step
from modes.training.compose import Optimization, forward, open_layout
from modes.training.fold import new_model, remember_training_spots
from modes.training.plan import find_folds
from modes.training.run_data import RunData, open_run_data
from modes.training.split import Split, prepare_split
from tests.dry_run import CUDA, dry_run
from tests.fabricated_run import TINY, with_
from utils.config import Config, load_config

TRAINED = [name for name, row in MODELS.items() if row.loss is not None]
SWITCHES = {
    "spectral": {"LOSS": {"use_kmeans": False}},
    "normalised": {"LOSS": {"normalize_fused": True}},
    "without group": {"LOSS": {"group_weight": 0.0}},
    "without instance": {"LOSS": {"instance_weight": 0.0}},
    "without neighbor": {"MODEL": {"use_neighbor": False}},
    "without global": {"MODEL": {"use_global": False}},
    "one layer": {"MODEL": {"global_depth": 1}},
    "host": {"DATA": {"residence": "host"}},
    "two slides": {"TRAINING": {"slides_per_batch": 2}},
}


@pytest.fixture(scope="module")
def config(fabricated_data, tmp_path_factory) -> Config:
    path = tmp_path_factory.mktemp("cuda") / "tiny.yaml"
    path.write_text(TINY)
    return load_config(path, [f"DATA.data_dir={fabricated_data}"])


def opened(config: Config, device: torch.device) -> tuple[RunData, Split]:
    layout = open_layout(config, "tiny")
    slides = layout.patients_on_disk()
    folds, _ = find_folds(config, layout, slides, [0], all_patients=False)
    run_data = open_run_data(config, "tiny", layout, list(slides), device, folds)
    return run_data, prepare_split(run_data, folds[0])


def follow(config: Config) -> dict[str, torch.Tensor]:
    """From the caches through two steps, the optimiser's included, and a slide in evaluation; the terms of the last step."""
    run_data, split = opened(config, CUDA)
    model = new_model(run_data, split)
    assert {value.device for value in model.state_dict().values()} <= {CUDA}
    optimization = Optimization.of(model, config, run_data.precision)
    precision, step = optimization.precision, make_step(model, config, run_data.encode)
    expression = split.targets.to(CUDA)
    batches = epoch_batches(run_data, split, expression, 1)
    assert isinstance(batches, TrainingBatches) and len(batches) > 1
    for batch in batches:
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


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("model", TRAINED)
def test_every_model_in_every_precision(config, model, precision):
    with dry_run():
        terms = follow(with_(config, MODEL={"name": model}, TRAINING={"precision": precision}))
    assert {term.device for term in terms.values()} == {CUDA}
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(config, switch):
    with dry_run():
        terms = follow(with_(with_(config, TRAINING={"precision": "bf16"}), **SWITCHES[switch]))
    assert terms["total"].device == CUDA


def test_a_tensor_in_the_wrong_place_and_a_wait_are_found(config):
    """The dry run itself: what it is for, it finds."""
    with dry_run():
        run_data, split = opened(config, CUDA)
        model = new_model(run_data, split)
        (batch, *_) = epoch_batches(run_data, split, split.targets.to(CUDA), 1)
        with pytest.raises(Exception, match=r"host and on the device|same device"):
            forward(
                model, run_data.encode, replace(batch, neighbor_is_valid=torch.ones(batch.neighbor_is_valid.shape) > 0)
            )
        with pytest.raises(Exception, match=r"host and on the device|same device"):
            batch.target_features[torch.tensor([0, 1])]
        with pytest.raises(DataDependentOutputException):
            float(batch.target_features.sum())
