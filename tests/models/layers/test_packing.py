"""Packed attention: the loop over slides, the padded batch and attention slide by slide are one and the same."""

from __future__ import annotations

import pytest
import torch

from models.layers.attention import attend
from models.layers.packing import Padding, SlidePacking, attend_looped, attend_padded, similar_lengths
from models.layers.transformer import TransformerLayer

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


def test_slides_are_padded_with_those_of_similar_length():
    assert similar_lengths([5, 1, 11, 8]) == [[2, 3], [0], [1]]
    assert similar_lengths([712, 500, 498, 177]) == [[0, 1], [2], [3]], "498 is less than 0.7 of 712"
    assert similar_lengths([4, 4, 4]) == [[0, 1, 2]]


def test_the_padded_path_called_directly_equals_the_loop():
    query, key, value = random_rows(torch.float32)
    padding = Padding.of(LENGTHS, similar_lengths(LENGTHS), torch.device("cpu"))
    assert padding.shapes == [(2, 16), (1, 8), (1, 8)]
    is_spot = padding.pad(torch.ones(COUNT, dtype=torch.bool))
    assert [part.sum(dim=1).tolist() for part in is_spot] == [[11, 8], [5], [1]]
    looped = attend_looped(query, key, value, query_lengths=LENGTHS, lengths=LENGTHS)
    padded = attend_padded(query, key, value, query_padding=padding, padding=padding, is_spot=is_spot)
    torch.testing.assert_close(padded, looped, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[2, 3], [0], [1]]])
def test_padding_and_back_is_the_identity(groups):
    padding = Padding.of(LENGTHS, groups, torch.device("cpu"))
    rows = torch.randn(COUNT, 3)
    padded = padding.pad(rows)
    assert torch.equal(padding.unpad(padded), rows)
    squares = sum(float(part.square().sum()) for part in padded)
    assert squares == pytest.approx(float(rows.square().sum()), rel=1e-5), "zeros in the padding"


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


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, ROWS])
def test_padded_attention_on_cuda_equals_the_loop_on_the_cpu(rows):
    leaves, found = random_rows(torch.float32), []
    for device, padded in ((torch.device("cpu"), False), (torch.device("cuda"), None)):
        packing = SlidePacking(LENGTHS, device=device, rows=rows, padded=padded)
        query, key, value = (leaf.to(device) for leaf in leaves)
        attended = packing.attend(query if rows is None else query[rows.to(device)], key, value)
        gradients = torch.autograd.grad(attended.square().sum(), leaves)
        found.append([attended.cpu(), *gradients])
    for on_cpu, on_cuda in zip(*found, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, atol=1e-4, rtol=1e-4)
