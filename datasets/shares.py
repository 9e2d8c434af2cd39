"""What one of several processes has of a batch: its spots, and the slides that it encodes for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.batches import BatchMaker, SpotBatch
from utils.devices import to_device


@dataclass(frozen=True)
class SharedBatch(SpotBatch):
    """The b of B spots that are this process's own; N processes have them one after the other.

    The fields of the slides (slide_features, grid_xy, lengths, slide_rows) are those of the slides that this process
    encodes, which are others than those of its own spots; they are None and empty where it encodes none.
    sizes: own spots of each process. whole_expression: (B, G). encoded: for how many of the B spots each process encodes
    the slide. places: (b,) where the own spots are among the B encoded ones, process after process; on the host.
    """

    sizes: Sequence[int] = ()
    whole_expression: Tensor | None = None
    encoded: Sequence[int] = ()
    places: Tensor | None = None

    def __len__(self) -> int:
        """B, of the whole batch: the loss is its mean."""
        return sum(self.sizes)


def share_of(maker: BatchMaker, rows: Tensor, views: Tensor, expression: Tensor, rank: int, size: int) -> SharedBatch:
    """Gather what process `rank` of `size` has of the batch of `rows`, whose order is kept over the processes.

    rows, views: (B,) of the whole batch, the same on every process. expression: (R, G) of all spots, on the device.
    """
    parts = rows.tensor_split(size)
    sizes = [len(part) for part in parts]
    start = sum(sizes[:rank])
    own = maker.spots(parts[rank], views.tensor_split(size)[rank], expression, with_slides=False)
    slide_of_spot = maker.store.slide_of_row[rows]
    owner = _owners(maker, slide_of_spot, size)
    of_this = rows[owner == rank]
    slides = vars(maker.slides_of(of_this)) if len(of_this) else {}
    return SharedBatch(
        **{**vars(own), **slides},
        sizes=sizes,
        whole_expression=expression[to_device(rows, maker.device)],
        encoded=torch.bincount(owner, minlength=size).tolist(),
        places=torch.argsort(torch.argsort(owner, stable=True))[start : start + sizes[rank]],
    )


def _owners(maker: BatchMaker, slide_of_spot: Tensor, size: int) -> Tensor:
    """(B,) the process that encodes the slide of each spot: the costly slides first, each to who has least to do so far."""
    slides, place = torch.unique(slide_of_spot, return_inverse=True)
    width = maker.store.target_features.shape[1]
    lengths = [len(maker.store.slides[slide].rows) for slide in slides.tolist()]
    costs = [length * (length + 6 * width) for length in lengths]  # of attention, and of the linear layers
    load, owners = [0] * size, [0] * len(costs)
    for slide in sorted(range(len(costs)), key=lambda slide: -costs[slide]):
        owners[slide] = load.index(min(load))
        load[owners[slide]] += costs[slide]
    return torch.tensor(owners)[place]
