"""Attention inside each of several slides whose spots lie one after the other in one list of rows.

Linear layers do not care where a slide ends, so they run once over all rows; only attention needs the borders. On a CPU
each slide is attended by itself; on CUDA many short calls would leave the device idle, so slides of similar length are
padded to one length and the padding is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers.attention import attend
from utils.devices import to_device

# CUDA attention kernels read masks in groups of eight; an uneven width costs a copy of the mask in every call.
PADDED_WIDTH_MULTIPLE = 8
# Slides are padded together down to this share of the longest one: attention pays for padding twice, so at least half
# of its work is on spots, and the sections of HER2ST (177 to 712 spots) make four calls.
SHORTEST_SHARE = 0.7


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Slides (indices) in groups of similar length, the longest first."""
    groups: list[list[int]] = []
    for slide in sorted(range(len(lengths)), key=lambda slide: -lengths[slide]):
        if groups and lengths[slide] >= SHORTEST_SHARE * lengths[groups[-1][0]]:
            groups[-1].append(slide)
        else:
            groups.append([slide])
    return groups


@dataclass(frozen=True)
class Padding:
    """Where the packed rows of several slides lie in padded batches, one batch (slides, width) for each group of slides."""

    places: Tensor  # (R,) int64 in the rows of all padded batches, one after the other
    shapes: list[tuple[int, int]]

    @staticmethod
    def of(lengths: list[int], groups: list[list[int]], device: torch.device) -> Padding:
        """lengths: rows of each slide, 0 allowed. groups: slides that are padded together. The places are made on the
        host and sent once."""
        shapes, start_of_slide, end = [], [0] * len(lengths), 0
        for group in groups:
            longest = max(1, *(lengths[slide] for slide in group))
            width = -(-longest // PADDED_WIDTH_MULTIPLE) * PADDED_WIDTH_MULTIPLE
            for place, slide in enumerate(group):
                start_of_slide[slide] = end + place * width
            shapes.append((len(group), width))
            end += len(group) * width
        counts = torch.tensor(lengths)
        shift = torch.tensor(start_of_slide) - (torch.cumsum(counts, dim=0) - counts)
        places = torch.arange(int(counts.sum())) + torch.repeat_interleave(shift, counts)
        return Padding(places=to_device(places, device), shapes=shapes)

    def pad(self, rows: Tensor) -> list[Tensor]:
        """(R, ...) to one (slides, width, ...) for each group, zeros in the padding."""
        sizes = [slides * width for slides, width in self.shapes]
        padded = rows.new_zeros((sum(sizes), *rows.shape[1:])).index_copy(0, self.places, rows)
        return [part.unflatten(0, shape) for part, shape in zip(padded.split(sizes), self.shapes)]

    def unpad(self, padded: list[Tensor]) -> Tensor:
        """One (slides, width, ...) for each group to (R, ...), the padding left out."""
        return torch.cat([part.flatten(end_dim=1) for part in padded]).index_select(0, self.places)


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
    query: Tensor, key: Tensor, value: Tensor, *, query_padding: Padding, padding: Padding, is_spot: list[Tensor]
) -> Tensor:
    """Do the same as `attend_looped` in one call for each group of slides; is_spot (slides, width) hides the padded keys."""
    parts = zip(query_padding.pad(query), padding.pad(key), padding.pad(value), is_spot, strict=True)
    attended = [
        attend(*(rows.transpose(1, 2) for rows in heads_last), key_is_valid=is_valid).transpose(1, 2)
        for *heads_last, is_valid in parts
    ]
    return query_padding.unpad(attended)


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
        the host nothing has to wait for the device. padded: few padded calls (default on CUDA) or a loop over slides.
        Raises ValueError for a slide without spots."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"Every slide of a batch needs at least one spot, but the slides hold {lengths} spots.")
        self.lengths = list(lengths)
        self.query_lengths = self.lengths
        self.rows: Tensor | None = None
        self._by_slide: Tensor | None = None
        self._as_asked: Tensor | None = None
        if rows is not None:
            self._group_by_slide(rows, device)
        is_padded = device.type == "cuda" if padded is None else padded
        self.padding = None
        if is_padded and len(lengths) > 1:
            groups = similar_lengths(self.lengths)
            self.padding = Padding.of(self.lengths, groups, device)
            self.query_padding = self.padding if rows is None else Padding.of(self.query_lengths, groups, device)
            ones = torch.ones(sum(self.lengths), dtype=torch.bool, device=device)
            self.is_spot = self.padding.pad(ones)

    def _group_by_slide(self, rows: Tensor, device: torch.device) -> None:
        counts = torch.tensor(self.lengths)
        slide_of_row = torch.repeat_interleave(torch.arange(len(counts)), counts).to(rows.device)
        slide = slide_of_row[rows]
        by_slide = torch.argsort(slide, stable=True)
        self.query_lengths = torch.bincount(slide, minlength=len(counts)).tolist()
        self.rows = to_device(rows, device)
        self._by_slide = to_device(by_slide, device)
        self._as_asked = to_device(torch.argsort(by_slide), device)

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
