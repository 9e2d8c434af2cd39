"""Features are brought to mean 0 and deviation 1 of the training spots, and weights without the layer still load."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.baselines.probes import build_linear_probe
from models.contract import ModelInputs, Sizes
from models.layers.standardise import Standardise
from models.table import MODELS, build_model
from utils.config import Model

SIZES = Sizes(feature_dim=6, token_dim=6, num_genes=3, num_neighbors=5)


def features(count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 6, generator=generator) * torch.tensor([3.0, 0.01, 1.0, 50.0, 1.0, 1.0]) + 7
    values[:, 5] = 2.5  # constant
    return values


def test_the_training_spots_get_mean_0_and_deviation_1():
    layer = Standardise(6)
    layer.fit(features())
    found = layer(features()).double().numpy()
    expected = features().double().numpy()
    expected = (expected - expected.mean(axis=0)) / np.where(expected.std(axis=0) > 0, expected.std(axis=0), 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found[:, :5].std(axis=0), 1, rtol=1e-5)
    assert (found[:, 5] == 0).all()


def test_parts_of_the_spots_give_what_all_of_them_give():
    whole, parts = Standardise(6), Standardise(6)
    whole.fit(features())
    parts.fit(iter(features().split([1, 30, 9])))
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.deviation, whole.deviation, rtol=1e-6, atol=0)
    assert parts.deviation[5] == 1, "constant"


def test_before_it_is_fitted_it_changes_nothing():
    assert torch.equal(Standardise(6)(features()), features())


@pytest.mark.parametrize("name", ["mlp", "linear_probe", "bleep"])
def test_the_trained_baselines_of_one_patch_standardise_and_their_weights_carry_it(name):
    model = build_model(Model(name=name), SIZES)
    model.standardise_inputs(features())
    again = build_model(Model(name=name), SIZES)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.standardise.mean, model.standardise.mean) and model.standardise.mean.min() > 2


def test_the_probe_does_not_see_the_unit_of_its_features():
    torch.manual_seed(0)
    probe = build_linear_probe(Model(), SIZES)
    probe.standardise_inputs(features())
    first = probe(ModelInputs(target_features=features())).fused
    probe.standardise_inputs(features() * 100 + 5)
    second = probe(ModelInputs(target_features=features() * 100 + 5)).fused
    torch.testing.assert_close(first, second, atol=2e-3, rtol=0)


def test_weights_of_a_run_without_the_layer_load_and_see_the_features_as_they_are():
    model = build_model(Model(name="mlp"), SIZES)
    model.standardise_inputs(features())
    old = {name: value for name, value in model.state_dict().items() if not name.startswith("standardise")}
    model.load_state_dict(old)
    assert torch.equal(model.standardise(features()), features())


def test_the_models_of_the_paper_take_features_as_they_are():
    sizes = replace(SIZES, feature_dim=64, token_dim=64)
    for name in MODELS.keys() - {"mlp", "linear_probe", "bleep"}:
        assert not any(isinstance(module, Standardise) for module in build_model(Model(name=name), sizes).modules())
