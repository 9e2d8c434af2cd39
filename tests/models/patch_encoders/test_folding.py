"""Batch normalisation folded into convolutions gives the same features, and is left alone where it would not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.patch_encoders import build
from models.patch_encoders.build import folded_encoder, patch_encoder_spec, random_patch_encoder
from models.patch_encoders.spec import create_encoder
from models.patch_encoders.weights import fold_batch_norms


def with_statistics(encoder: nn.Module) -> nn.Module:
    """As after a training: every normalisation does something of its own."""
    generator = torch.Generator().manual_seed(1)
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        for values, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2)):
            values.uniform_(low, high, generator=generator)
        if norm.affine:
            norm.weight.data.uniform_(-1.5, 1.5, generator=generator)
            norm.bias.data.uniform_(-1, 1, generator=generator)
    return encoder.eval()


def norms_of(encoder: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


@pytest.mark.parametrize(
    ("name", "left"), [("efficientnet-lite0", 0), ("resnet50", 0), ("timm:resnetv2_18", 9), ("timm:densenet121", 62)]
)
def test_features_stay(name, left):
    """In the last two some stand before their convolution, where they cannot be folded."""
    spec = patch_encoder_spec(name)
    torch.manual_seed(0)
    encoder = with_statistics(create_encoder(spec))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        before = encoder.forward_features(images)
        folded = fold_batch_norms(spec, encoder)
        assert norms_of(folded) == left < norms_of(encoder)
        after = folded.forward_features(images)
        assert torch.equal(encoder.forward_features(images), before), "the encoder itself is as it was"
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


class Small(nn.Module):
    """Convolution and normalisation; what else happens to the output of the convolution is the point."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, affine=way != "plain", track_running_stats=way != "of the batch")

    def forward_features(self, images: Tensor) -> Tensor:
        made = self.conv(images)
        if self.way == "twice":
            made = self.conv(made)
        normed = self.norm(made)
        return normed + made if self.way == "beside" else normed


@pytest.mark.parametrize(
    ("way", "is_folded"),
    [("plain", True), ("usual", True), ("beside", False), ("twice", False), ("of the batch", False)],
)
def test_what_would_give_other_features_is_left(way, is_folded):
    encoder = Small(way).eval() if way == "of the batch" else with_statistics(Small(way))
    folded = fold_batch_norms(patch_encoder_spec("resnet50"), encoder)
    assert norms_of(folded) == (not is_folded)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(folded.forward_features(images), encoder.forward_features(images))


def test_only_float32_on_a_cpu_runs_folded(monkeypatch):
    """In 16 bits the features would differ by percents, and nothing in a cache says which of the two it is of."""
    encoder = random_patch_encoder(patch_encoder_spec("efficientnet-lite0"))
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    ran = []
    monkeypatch.setattr(
        build, "folded_encoder", lambda spec, given: ran.append(spec.name) or folded_encoder(spec, given)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(images).tokens
        assert torch.equal(half, build.encode(encoder.spec, encoder.encoder, encoder.normalise(images)).tokens)
    assert ran == []
    encoder(images)
    assert ran == ["efficientnet-lite0"]
