"""The positional convolution against the recording and against loops over a dense grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layers.position import GridConvolution, grid_neighbors

REFERENCE = "image_encoder.global_encoder.pos_layer."


def slow_convolution(module: GridConvolution, tokens: Tensor, grid_xy: Tensor) -> Tensor:
    """One slide; C[y, x] = b + sum over a, b of w[a + 1, b + 1] T[y + b, x + a], spot by spot."""
    row_at = {tuple(cell): row for row, cell in enumerate(grid_xy.tolist())}
    result = []
    for row, (x, y) in enumerate(grid_xy.tolist()):
        total = tokens[row] + module.bias
        for a in (-1, 0, 1):
            for b in (-1, 0, 1):
                other = row_at.get((x + a, y + b))
                if other is not None:
                    total = total + module.weight[:, 0, a + 1, b + 1] * tokens[other]
        result.append(total)
    return torch.stack(result)


def random_slide(count: int, seed: int, *, width: int = 7, height: int = 9) -> Tensor:
    cells = torch.randperm(width * height, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([cells % width - 3, cells // width + 100], dim=1)


@pytest.fixture
def recording(golden, tools):
    return tools.as_tensors(golden("pegh"))


@pytest.fixture
def recorded(recording, tools):
    module = GridConvolution(dim=recording["x"].shape[-1])
    tools.load_part(module, recording, reference=REFERENCE, ours="global_encoder.position.")
    return module


def test_values_and_gradients_equal_the_recording(recording, recorded, tools):
    tokens = recording["x"][0].clone().requires_grad_()
    neighbors = grid_neighbors(recording["position_yx"].flip(1), [len(tokens)])
    found = recorded(tokens, neighbors)
    tools.close(found, recording["out"][0])
    (found * recording["loss_weight"][0]).sum().backward()
    tools.close(tokens.grad, recording["grad_x"][0], tolerance=tools.GRADIENT_TOLERANCE)
    tools.check_gradients(recorded, recording, reference=REFERENCE, ours="global_encoder.position.")


def test_the_result_follows_the_order_of_the_spots(recording, recorded, tools):
    order = recording["unsorted_perm"].long()
    neighbors = grid_neighbors(recording["position_yx"].flip(1)[order], [len(order)])
    tools.close(recorded(recording["x"][0][order], neighbors), recording["out"][0][order])


def test_an_all_zero_token_and_one_of_zero_sum_keep_their_place_and_their_convolution(recording, recorded):
    grid_xy = recording["position_yx"].flip(1)
    for name in ("x_zero_token", "x_zero_sum"):
        tokens = recording[name][0]
        found = recorded(tokens, grid_neighbors(grid_xy, [len(tokens)]))
        torch.testing.assert_close(found, slow_convolution(recorded, tokens, grid_xy), atol=1e-5, rtol=1e-5)


def test_several_slides_at_once_equal_loops_over_each():
    torch.manual_seed(1)
    module = GridConvolution(dim=4).double()
    slides = [random_slide(count, seed) for seed, count in enumerate((20, 1, 33, 7))]
    lengths = [len(slide) for slide in slides]
    tokens = torch.randn(sum(lengths), 4, dtype=torch.float64, requires_grad=True)
    found = module(tokens, grid_neighbors(torch.cat(slides), lengths))
    parts = zip(tokens.split(lengths), slides, strict=True)
    expected = torch.cat([slow_convolution(module, part, slide) for part, slide in parts])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    leaves = (tokens, *module.parameters())
    gradients = torch.autograd.grad((found * weight).sum(), leaves)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("kind", ["row", "column", "spot"])
def test_one_row_one_column_and_one_spot_work(kind):
    steps = torch.arange(1 if kind == "spot" else 6)
    zeros = torch.zeros_like(steps)
    grid_xy = torch.stack([steps, zeros] if kind == "row" else [zeros, steps], dim=1)
    module = GridConvolution(dim=3).double()
    tokens = torch.randn(len(steps), 3, dtype=torch.float64)
    found = module(tokens, grid_neighbors(grid_xy, [len(steps)]))
    torch.testing.assert_close(found, slow_convolution(module, tokens, grid_xy))


def test_the_gradient_is_that_of_finite_differences():
    module = GridConvolution(dim=2).double()
    neighbors = grid_neighbors(random_slide(9, 5, width=4, height=4), [9])
    tokens = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: module(tokens, neighbors), (tokens, module.weight, module.bias))


def test_neighbors_never_reach_into_another_slide():
    same = random_slide(12, 2)
    neighbors = grid_neighbors(torch.cat([same, same]), [12, 12])
    assert neighbors.shape == (24, 9) and torch.equal(neighbors[:, 4], torch.arange(24))
    assert ((neighbors[:12] < 12) | (neighbors[:12] == 24)).all() and (neighbors[12:] >= 12).all()


def test_duplicate_positions_are_refused_and_named(recording):
    with pytest.raises(
        ValueError, match=r"Duplicate grid positions: \d+ spots .*slide 0 of the batch.*correct the spot table"
    ):
        grid_neighbors(recording["position_dup"].flip(1), [len(recording["position_dup"])])
    first = random_slide(5, 0)
    second = torch.tensor([[4, 2], [4, 3], [4, 2]])
    with pytest.raises(ValueError, match=r"slide 1 of the batch at \(x, y\) = \(4, 2\)"):
        grid_neighbors(torch.cat([first, second]), [5, 3])


def test_positions_that_are_no_grid_and_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 0\] to \[2000000, 1\].*not pixels"):
        grid_neighbors(torch.tensor([[0, 0], [2_000_000, 1]]), [2])
    with pytest.raises(ValueError, match=r"2 grid positions do not fit slides of \[3\] spots"):
        grid_neighbors(torch.tensor([[0, 0], [1, 1]]), [3])
