"""Precisions of a device: what `auto` means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from utils.precision import Precision

CPU = torch.device("cpu")


def test_precision_of_the_cpu():
    assert Precision("auto", CPU).name == "float32"
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        Precision("fp16", CPU)
    with Precision("bf16", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_mixed_precision_follows_the_matrix_units_of_the_device(capability, name, monkeypatch):
    """A card of before 2020 says that it supports bf16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert Precision("auto", torch.device("cuda", 1)).name == name
