"""Our dropout: its share, its scale, independence of neighbours, its source of random numbers, gradients, other devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.contract import Sizes
from models.layers.dropout import LEVELS, Dropout, kept
from models.table import build_model
from utils.config import Config, with_overrides

MANY = 400_003  # not a multiple of four


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_share_and_expected_value_are_those_of_dropout(probability):
    found = Dropout(probability)(torch.ones(MANY))
    dropped = (found == 0).double().mean().item()
    deviation = (probability * (1 - probability) / MANY) ** 0.5
    assert abs(dropped - probability) < 4 * deviation
    scales = found.unique().tolist()
    assert len(scales) == 2 and scales[0] == 0
    assert scales[1] == pytest.approx(1 / (1 - round(probability * LEVELS) / LEVELS))
    assert scales[1] == pytest.approx(1 / (1 - probability), rel=1e-2 if probability == 0.99 else 1e-4)


def test_elements_are_dropped_independently():
    """Four elements share a draw: all sixteen patterns of them must come as often as independence says."""
    is_kept = kept(torch.ones(4 * 50_000), 0.3).view(-1, 4) > 0
    pattern = (is_kept * torch.tensor([8, 4, 2, 1])).sum(dim=1)
    found = torch.bincount(pattern, minlength=16) / len(pattern)
    for number in range(16):
        ones = bin(number).count("1")
        expected = 0.7**ones * 0.3 ** (4 - ones)
        assert abs(found[number].item() - expected) < 4.5 * (expected * (1 - expected) / len(pattern)) ** 0.5


def test_neighbouring_draws_do_not_repeat():
    rows = kept(torch.ones(200, 1000), 0.5) > 0
    assert len(rows.unique(dim=0)) == 200


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_type_are_those_of_the_input(shape, dtype):
    found = Dropout(0.3)(torch.ones(shape, dtype=dtype))
    assert found.shape == shape and found.dtype == dtype


def test_a_view_that_is_not_contiguous():
    values = torch.arange(1.0, 13).view(3, 4).T
    found = Dropout(0.5)(values)
    assert found.shape == (4, 3)
    assert (found == 0).logical_or(found == 2 * values).all()


def test_gradient_goes_through_what_was_kept():
    values = torch.randn(7, 9, requires_grad=True)
    found = Dropout(0.4)(values)
    found.sum().backward()
    assert torch.equal(values.grad == 0, found == 0)
    assert torch.allclose(values.grad * values, found)


def test_seed_and_restored_state_repeat_the_masks():
    values, layer = torch.ones(1000), Dropout(0.3)
    state = torch.get_rng_state()
    first, second = layer(values), layer(values)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(layer(values), first) and torch.equal(layer(values), second)


def test_nothing_happens_in_evaluation_or_without_a_probability():
    values = torch.randn(10)
    state = torch.get_rng_state()
    assert Dropout(0.3).eval()(values) is values
    assert torch.equal(Dropout(0.0)(values), values)
    assert torch.equal(torch.get_rng_state(), state)
    assert (Dropout(1.0)(values) == 0).all()
    assert (kept(values, 0.999_999) <= LEVELS).all()  # a probability that rounds to one still has a finite scale


def test_other_devices_use_the_kernel_of_pytorch(monkeypatch):
    monkeypatch.setattr("models.layers.dropout.kept", lambda *_: pytest.fail("CPU masks for another device"))
    found = Dropout(0.3)(torch.ones(3, device="meta"))
    assert found.device.type == "meta"


@pytest.mark.gpu
def test_on_cuda_the_share_is_right():
    found = Dropout(0.3)(torch.ones(MANY, device="cuda"))
    assert abs((found == 0).double().mean().item() - 0.3) < 0.005


@pytest.mark.parametrize("name", ["gene_dml", "triplex", "bleep", "mlp"])
def test_every_dropout_of_the_models_is_ours(name):
    config = with_overrides(Config(), [f"MODEL.name={name}", "MODEL.projection_dim=32"])
    model = build_model(config.MODEL, Sizes(32, 32, num_genes=5, num_neighbors=5))
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert found and all(isinstance(module, Dropout) for module in found)
