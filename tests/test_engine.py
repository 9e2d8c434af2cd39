"""The loop: averages, precision, and errors that keep what was computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine import Precision, evaluate, train_one_epoch

CPU = torch.device("cpu")


class Spots(list):
    """A batch is anything with a length."""


def test_an_epoch_averages_over_spots_and_learns():
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    batches = [Spots([1.0] * 3), Spots([1.0])]
    constants = {3: 1.0, 1: 5.0}

    def step(batch):
        loss = (layer(torch.tensor(batch)[:, None]) ** 2).mean()
        return {"total": loss, "constant": torch.tensor(constants[len(batch)])}

    first = train_one_epoch(batches, step, optimizer, Precision("float32", CPU), "epoch 1")
    for _ in range(20):
        last = train_one_epoch(batches, step, optimizer, Precision("float32", CPU), "epoch")
    assert first["constant"] == pytest.approx((3 * 1 + 5) / 4)
    assert last["total"] < 0.01 * first["total"]


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_term():
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

    def step(batch):
        loss = layer.weight.sum()
        return {"total": loss, "group": loss * math.nan}

    with pytest.raises(
        ValueError, match=r"fold 1 epoch 2: the loss is no longer finite \(group\).*another run \(--run_name NAME\)"
    ):
        train_one_epoch([Spots([1.0])], step, optimizer, Precision("float32", CPU), "fold 1 epoch 2")


def test_evaluate_keeps_the_order_and_asks_for_no_gradient():
    seen = evaluate([1, 2, 3], lambda slide: (slide, torch.is_grad_enabled()), "evaluation")
    assert seen == [(1, False), (2, False), (3, False)]


def test_precision_of_the_cpu():
    assert Precision("auto", CPU).name == "float32"
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        Precision("fp16", CPU)
    with Precision("bf16", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_mixed_precision_follows_the_matrix_units_of_the_device(capability, name, monkeypatch):
    """A card of before 2020 says that it supports bf16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert Precision("auto", torch.device("cuda", 1)).name == name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_step_on_cuda(name):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs = torch.randn(32, 64, device=device)

    def step(batch):
        return {"total": (model(inputs).float() - inputs[:, :1]).square().mean()}

    precision = Precision(name, device)
    losses = [train_one_epoch([Spots([0])], step, optimizer, precision, "epoch")["total"] for _ in range(50)]
    assert losses[-1] < 0.2 * losses[0]
