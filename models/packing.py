"""Attention inside each of several slides whose spots lie one after the other in one list of rows.

Linear layers do not care where a slide ends, so they run once over all rows; only attention needs the borders. On a CPU
each slide is attended by itself; on CUDA many short calls would leave the device idle, so slides are padded to one
length and the padding is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import attend

# CUDA attention kernels read masks in groups of eight; an uneven width costs a copy of the mask in every call.
PADDED_WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class Padding:
    """Where the packed rows of several slides lie in a padded batch of shape (slides, width)."""

    places: Tensor
    slides: int
    width: int

    @staticmethod
    def of(lengths: list[int], device: torch.device) -> Padding:
        """lengths: rows of each slide. The places (R,) int64 are made on the host and sent once."""
        width = -(-max(lengths) // PADDED_WIDTH_MULTIPLE) * PADDED_WIDTH_MULTIPLE
        counts = torch.tensor(lengths)
        slide = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        start = torch.cumsum(counts, dim=0) - counts
        places = slide * width + torch.arange(len(slide)) - start[slide]
        return Padding(places=places.to(device, non_blocking=True), slides=len(lengths), width=width)

    def pad(self, rows: Tensor) -> Tensor:
        """(R, ...) to (slides, width, ...), zeros in the padding."""
        empty = rows.new_zeros((self.slides * self.width, *rows.shape[1:]))
        return empty.index_copy(0, self.places, rows).unflatten(0, (self.slides, self.width))

    def unpad(self, padded: Tensor) -> Tensor:
        """(slides, width, ...) to (R, ...), the padding left out."""
        return padded.flatten(end_dim=1).index_select(0, self.places)


def attend_looped(query: Tensor, key: Tensor, value: Tensor, *, query_lengths: list[int], lengths: list[int]) -> Tensor:
    """Attention slide by slide.

    query:   (B, H, d), the queries of slide 0, then of slide 1, ..., query_lengths of each.
    key:     (R, H, d), and value: the same for all spots, lengths of each.
    returns: (B, H, d) in the order of `query`. No matrix of spots by spots is kept.
    """
    slides = zip(query.split(query_lengths), key.split(lengths), value.split(lengths), strict=True)
    attended = [
        attend(*(part.transpose(0, 1)[None] for part in slide))[0].transpose(0, 1)
        for slide in slides
        if slide[0].shape[0]
    ]
    return torch.cat(attended) if attended else query


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, *, query_padding: Padding, padding: Padding, is_spot: Tensor
) -> Tensor:
    """The same as `attend_looped` in one call over a padded batch; is_spot (slides, width) hides the padded keys."""
    heads_first = [
        layout.pad(rows).transpose(1, 2) for layout, rows in ((query_padding, query), (padding, key), (padding, value))
    ]
    attended = attend(*heads_first, key_is_valid=is_spot)
    return query_padding.unpad(attended.transpose(1, 2))


class SlidePacking:
    """The borders of the slides in a list of rows, and the rows whose result is wanted.

    rows: (B,) int64 on the device of the features, or None for all rows in order.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        device: torch.device,
        rows: Tensor | None = None,
        padded: bool | None = None,
    ) -> None:
        """lengths: spots of each slide, all at least 1. rows: indices into all spots, any order, repeats allowed; on
        the host nothing has to wait for the device. padded: one padded call (default on CUDA) or a loop over slides."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"Every slide of a batch needs at least one spot, but the slides hold {lengths} spots.")
        self.lengths = list(lengths)
        self.query_lengths = self.lengths
        self.rows = self._by_slide = self._as_asked = None
        if rows is not None:
            self._group_by_slide(rows, device)
        is_padded = device.type == "cuda" if padded is None else padded
        self.padding = Padding.of(self.lengths, device) if is_padded and len(lengths) > 1 else None
        if self.padding is not None:
            self.query_padding = self.padding if rows is None else Padding.of(self.query_lengths, device)
            ones = torch.ones(sum(self.lengths), dtype=torch.bool, device=device)
            self.is_spot = self.padding.pad(ones)

    def _group_by_slide(self, rows: Tensor, device: torch.device) -> None:
        counts = torch.tensor(self.lengths)
        slide_of_row = torch.repeat_interleave(torch.arange(len(counts)), counts).to(rows.device)
        slide = slide_of_row[rows]
        by_slide = torch.argsort(slide, stable=True)
        self.query_lengths = torch.bincount(slide, minlength=len(counts)).tolist()
        self.rows = rows.to(device, non_blocking=True)
        self._by_slide = by_slide.to(device, non_blocking=True)
        self._as_asked = torch.argsort(by_slide).to(device, non_blocking=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (B, H, d) in the order of `rows`; key and value: (R, H, d). Returns (B, H, d) in the same order."""
        if self._by_slide is not None:
            query = query.index_select(0, self._by_slide)
        if self.padding is None:
            attended = attend_looped(query, key, value, query_lengths=self.query_lengths, lengths=self.lengths)
        else:
            attended = attend_padded(
                query,
                key,
                value,
                query_padding=self.query_padding,
                padding=self.padding,
                is_spot=self.is_spot,
            )
        return attended if self._as_asked is None else attended.index_select(0, self._as_asked)
