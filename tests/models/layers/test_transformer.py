"""Attention against sums written out by hand; pieces of a layer; chunked rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.layers import attention as attention_module
from models.layers.attention import attend, attend_plainly, in_chunks, relative_offset_index
from models.layers.transformer import Attention, TransformerLayer


def slow_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, valid: Tensor | None) -> Tensor:
    """Golden README, section 0: hidden scores are replaced by -65504 after the bias."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    if valid is not None:
        scores = torch.where(valid[:, None, None, :], scores, torch.tensor(-65504.0, dtype=scores.dtype))
    return torch.softmax(scores, dim=-1) @ value


def random_inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(5, 3, 9, 4, generator=generator, dtype=dtype) for _ in range(3)]
    bias = torch.randn(3, 9, 9, generator=generator, dtype=dtype)
    valid = torch.rand(5, 9, generator=generator) > 0.4
    valid[2] = False
    valid[3] = True
    return parts, bias, valid


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_attend_equals_the_sum_written_out(with_bias, with_mask):
    parts, bias, valid = random_inputs()
    leaves = [part.requires_grad_() for part in (*parts, bias)]
    chosen = {"bias": bias if with_bias else None, "key_is_valid": valid if with_mask else None}
    found = attend(*parts, **chosen)
    expected = slow_attend(*parts, chosen["bias"], chosen["key_is_valid"])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    leaves = leaves if with_bias else leaves[:3]
    gradients = torch.autograd.grad((found * weight).sum(), leaves)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fully_hidden_row_gets_the_uniform_average(with_bias, dtype):
    parts, bias, valid = random_inputs(dtype=torch.float32)
    parts = [(20 * part).to(dtype) for part in parts]
    found = attend(*parts, bias=bias if with_bias else None, key_is_valid=valid)
    assert torch.isfinite(found).all()
    average = parts[2][2].float().mean(dim=1, keepdim=True).expand(-1, 9, -1)
    torch.testing.assert_close(found[2].float(), average, atol=1e-5 if dtype == torch.float32 else 0.2, rtol=0)


def test_hidden_keys_have_no_influence_on_values_or_gradients():
    parts, bias, valid = random_inputs()
    key = parts[1].clone().requires_grad_()
    found = attend(parts[0], key, parts[2], bias=bias, key_is_valid=valid)
    found[0].square().sum().backward()
    assert (key.grad[0].transpose(0, 1)[~valid[0]] == 0).all()
    other = torch.where(valid[:, None, :, None], parts[1], torch.full_like(parts[1], 77.0))
    torch.testing.assert_close(attend(parts[0], other, parts[2], bias=bias, key_is_valid=valid)[:2], found[:2])


def test_relative_offset_index_equals_the_recorded_one(golden):
    recorded = torch.from_numpy(golden("neighbor_encoder")["bias_index"]).long()
    assert torch.equal(relative_offset_index(round(len(recorded) ** 0.5)), recorded)


def test_one_head_has_no_output_projection_and_a_square_has_a_zero_bias_table():
    names = set(Attention(dim=8, heads=1, dropout=0.5).state_dict())
    assert names == {"to_qkv.weight"}
    square = Attention(dim=8, heads=2, dropout=0.0, grid_side=3)
    assert set(square.state_dict()) == {"to_qkv.weight", "project.0.weight", "project.0.bias", "bias_table"}
    assert square.bias_table.shape == (2, 9) and not square.bias_table.any()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"width of 10 .* 4 attention heads.*MODEL\.neighbor_heads"):
        Attention(dim=10, heads=4, dropout=0.0)


def test_dropout_acts_in_training_only_and_train_and_eval_are_those_of_torch():
    torch.manual_seed(0)
    layer = TransformerLayer(dim=8, heads=2, hidden_dim=16, dropout=0.5)
    tokens = torch.randn(2, 5, 8)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))
    for module in layer.modules():
        assert type(module).train is torch.nn.Module.train and type(module).eval is torch.nn.Module.eval
        assert not module.training


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 23])
def test_chunks_change_no_number(monkeypatch, count):
    monkeypatch.setattr(attention_module, "CHUNK_ROWS", 8)
    calls = []

    def function(first: Tensor, second: Tensor) -> Tensor:
        calls.append(len(first))
        return torch.stack([first + second, first * second], dim=1)

    rows = torch.randn(2, count, 3)
    with torch.no_grad():
        found = in_chunks(function, rows[0], rows[1])
    assert max(calls) <= 8 and sum(calls) == count
    assert torch.equal(found, torch.stack([rows[0] + rows[1], rows[0] * rows[1]], dim=1))
    calls.clear()
    in_chunks(function, rows[0], rows[1])
    assert calls == [count]


def test_plain_attention_equals_the_kernel_and_its_gradients():
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(2, 1, 7, 300, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    weight = torch.randn(2, 1, 7, 300, generator=generator, dtype=torch.float64)
    plain, kernel = attend_plainly(*leaves), attend(*leaves)
    torch.testing.assert_close(plain, kernel)
    for found, wanted in zip(
        torch.autograd.grad((plain * weight).sum(), leaves), torch.autograd.grad((kernel * weight).sum(), leaves)
    ):
        torch.testing.assert_close(found, wanted)


def test_plain_attention_does_not_overflow_in_half_precision():
    wide = torch.full((1, 1, 3, 512), 12.0, dtype=torch.float16)  # q k^T is 73728, over the largest float16
    found = attend_plainly(wide, wide, torch.ones_like(wide))
    assert found.dtype == torch.float16 and torch.equal(found, torch.ones_like(wide))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 512])
def test_wide_heads_on_cuda_equal_the_cpu(width):
    parts = [torch.randn(3, 1, 40, width) for _ in range(3)]
    found = attend(*(part.cuda() for part in parts))
    torch.testing.assert_close(found.cpu(), attend(*parts), atol=1e-4, rtol=1e-4)
