"""Packed attention: the loop over slides, the padded batch and attention slide by slide are one and the same."""

from __future__ import annotations

import pytest
import torch

from models.attention import TransformerLayer, attend
from models.packing import Padding, SlidePacking, attend_looped, attend_padded

LENGTHS = [5, 1, 11, 8]
COUNT = sum(LENGTHS)
# Any order, a repeated row, no row of slide 1.
ROWS = torch.tensor([24, 0, 9, 9, 3, 17, 8])


def random_rows(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(COUNT, 2, 4, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def slow(query, key, value):
    """One slide after the other, all queries."""
    parts = [part.split(LENGTHS) for part in (query, key, value)]
    slides = [[rows.transpose(0, 1)[None] for rows in slide] for slide in zip(*parts, strict=True)]
    return torch.cat([attend(*slide)[0].transpose(0, 1) for slide in slides])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [None, ROWS, torch.tensor([2]), torch.arange(COUNT).flip(0)])
def test_packed_attention_equals_slide_by_slide(padded, rows):
    query, key, value = random_rows()
    packing = SlidePacking(LENGTHS, device=torch.device("cpu"), rows=rows, padded=padded)
    asked = query if rows is None else query[rows]
    found = packing.attend(asked, key, value)
    expected = slow(query, key, value)
    expected = expected if rows is None else expected[rows]
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    leaves = (query, key, value)
    gradients = torch.autograd.grad((found * weight).sum(), leaves)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_the_padded_path_called_directly_equals_the_loop():
    query, key, value = random_rows(torch.float32)
    padding = Padding.of(LENGTHS, torch.device("cpu"))
    is_spot = padding.pad(torch.ones(COUNT, dtype=torch.bool))
    assert is_spot.sum(dim=1).tolist() == LENGTHS and padding.width % 8 == 0
    looped = attend_looped(query, key, value, query_lengths=LENGTHS, lengths=LENGTHS)
    padded = attend_padded(query, key, value, query_padding=padding, padding=padding, is_spot=is_spot)
    torch.testing.assert_close(padded, looped, atol=2e-6, rtol=1e-5)


def test_padding_and_back_is_the_identity():
    padding = Padding.of(LENGTHS, torch.device("cpu"))
    rows = torch.randn(COUNT, 3)
    padded = padding.pad(rows)
    assert torch.equal(padding.unpad(padded), rows)
    assert padded.square().sum() == pytest.approx(float(rows.square().sum()), rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_asking_for_rows_equals_computing_all(padded):
    torch.manual_seed(0)
    layer = TransformerLayer(dim=8, heads=2, hidden_dim=16, dropout=0.0).double()
    rows = torch.randn(COUNT, 8, dtype=torch.float64)
    everything = layer.forward_packed(rows, SlidePacking(LENGTHS, device=rows.device, padded=padded))
    asked = layer.forward_packed(rows, SlidePacking(LENGTHS, device=rows.device, rows=ROWS, padded=padded))
    torch.testing.assert_close(asked, everything[ROWS])
    one_by_one = torch.cat([layer(slide[None])[0] for slide in rows.split(LENGTHS)])
    torch.testing.assert_close(everything, one_by_one)


def test_a_slide_without_spots_is_refused():
    with pytest.raises(ValueError, match=r"at least one spot, but the slides hold \[3, 0\]"):
        SlidePacking([3, 0], device=torch.device("cpu"))
