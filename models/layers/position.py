"""Positional encoding of spots by a depthwise 3x3 convolution on their grid, computed on the list of spots itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Kernel entry 3 * (a + 1) + (b + 1) looks at the cell (x + a, y + b): the first kernel axis runs along x (golden README 2).
SHIFTS = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1))
# A cell is one 60-bit number made of slide, column and row; 20 bits each hold any array of spots.
CELLS_PER_AXIS = 1 << 20


def grid_neighbors(grid_xy: Tensor, lengths: list[int]) -> Tensor:
    """Row of the spot in each of the nine cells around every spot, for several slides at once.

    grid_xy: (R, 2) integer grid positions (x, y), slide after slide, any order inside a slide.
    lengths: spots of each slide; they add up to R.
    returns: (R, 9) int64 in the order of SHIFTS, R itself where the cell holds no spot of that slide.
    Raises ValueError when two spots of one slide share a cell. On a CUDA tensor that check waits for the device; give
    the positions on the host and nothing waits.
    """
    assert not grid_xy.is_floating_point(), "grid positions are integers"
    count = grid_xy.shape[0]
    if count != sum(lengths):
        raise ValueError(f"{count} grid positions do not fit slides of {lengths} spots, {sum(lengths)} in all.")
    slide = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(grid_xy.device)
    # One cell of margin on each side, so that a shift never reaches into the numbers of another column or slide.
    cell = grid_xy.long() - grid_xy.long().amin(dim=0) + 1
    numbers = (slide * CELLS_PER_AXIS + cell[:, 0]) * CELLS_PER_AXIS + cell[:, 1]
    sorted_numbers, order = torch.sort(numbers)
    repeated = sorted_numbers[1:] == sorted_numbers[:-1]
    if bool(repeated.any() | (cell.amax() >= CELLS_PER_AXIS - 1)):
        _refuse_grid(grid_xy, slide, order[1:][repeated])
    steps = torch.tensor([a * CELLS_PER_AXIS + b for a, b in SHIFTS], device=grid_xy.device)
    wanted = numbers[:, None] + steps
    found = torch.searchsorted(sorted_numbers, wanted).clamp(max=count - 1)
    return torch.where(sorted_numbers[found] == wanted, order[found], count)


def _refuse_grid(grid_xy: Tensor, slide: Tensor, repeated: Tensor) -> None:
    if not len(repeated):
        low, high = grid_xy.amin(dim=0).tolist(), grid_xy.amax(dim=0).tolist()
        raise ValueError(
            f"Grid positions run from {low} to {high}, but a grid of spots has fewer than {CELLS_PER_AXIS} columns "
            "and rows. Give the array coordinates of the spots, not pixels."
        )
    cells = sorted({(int(slide[row]), *grid_xy[row].tolist()) for row in repeated[:5]})
    listed = "; ".join(f"slide {index} of the batch at (x, y) = ({x}, {y})" for index, x, y in cells)
    raise ValueError(
        f"Duplicate grid positions: {len(repeated)} spots share the grid position of another spot of their slide "
        f"({listed}). Every spot needs a position of its own: correct the spot table."
    )


class _GatherConvolution(torch.autograd.Function):
    """out[n] = sum over s of kernel[s] * tokens[neighbors[n, s]], per channel.

    Being the neighbor at shift s is the reverse of being the one at shift 8 - s, so the gradient of the tokens is nine
    gathers as well: nothing is scattered with atomics (the result is the same every time) and the nine gathered copies
    are not kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, kernel: Tensor, neighbors: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, kernel, neighbors)
        return _weighted_gather(tokens, kernel, neighbors)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        tokens, kernel, neighbors = ctx.saved_tensors
        token_gradient = _weighted_gather(gradient, kernel.flip(0), neighbors)
        padded = _with_zero_row(tokens)
        kernel_gradient = torch.stack(
            [(gradient * padded.index_select(0, neighbors[:, s])).sum(dim=0) for s in range(len(SHIFTS))]
        )
        return token_gradient, kernel_gradient, None


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _weighted_gather(rows: Tensor, kernel: Tensor, neighbors: Tensor) -> Tensor:
    padded = _with_zero_row(rows)
    total = padded.index_select(0, neighbors[:, 0]) * kernel[0]
    for shift in range(1, len(SHIFTS)):
        total = torch.addcmul(total, padded.index_select(0, neighbors[:, shift]), kernel[shift])
    return total


class GridConvolution(nn.Module):
    """tokens + depthwise 3x3 convolution of the grid of tokens; cells without a spot contribute zero."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(dim))
        bound = 1 / math.sqrt(9)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, tokens: Tensor, neighbors: Tensor) -> Tensor:
        """Mix each spot with its grid neighbors.

        tokens:    (R, D) one row per spot, slides one after the other, any order inside a slide.
        neighbors: (R, 9) from `grid_neighbors` for the same rows.
        returns:   (R, D) in the order of `tokens`; an all-zero token keeps its place.
        """
        kernel = self.weight.flatten(start_dim=1).t().to(tokens.dtype)
        return tokens + self.bias.to(tokens.dtype) + _GatherConvolution.apply(tokens, kernel, neighbors)
