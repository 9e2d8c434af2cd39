"""The loop: averages, precision, and errors that keep what was computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine import train_one_epoch
from utils.devices import Precision

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

    def step(_batch):
        loss = layer.weight.sum()
        return {"total": loss, "group": loss * math.nan}

    with pytest.raises(
        ValueError, match=r"fold 1 epoch 2: the loss is no longer finite \(group\).*another run \(--run_name NAME\)"
    ):
        train_one_epoch([Spots([1.0])], step, optimizer, Precision("float32", CPU), "fold 1 epoch 2")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_step_on_cuda(name):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs = torch.randn(32, 64, device=device)

    def step(_batch):
        return {"total": (model(inputs).float() - inputs[:, :1]).square().mean()}

    precision = Precision(name, device)
    losses = [train_one_epoch([Spots([0])], step, optimizer, precision, "epoch")["total"] for _ in range(50)]
    assert losses[-1] < 0.2 * losses[0]
