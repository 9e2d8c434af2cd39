"""Slides read once, checked once and held as flat arrays over all spots, so that no file is opened inside an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from anndata import AnnData
from torch import Tensor


@dataclass(frozen=True)
class EncoderIdentity:
    """Which frozen encoder made the features: name and SHA-256 of its weights ("unknown" for the published files)."""

    name: str
    sha256: str


@dataclass(frozen=True)
class SlideRecord:
    """One slide: its checked table and where its spots lie in the flat arrays of a SpotStore."""

    table: AnnData
    start: int
    stop: int
    image_size: tuple[int, int]  # width, height in px at level 0

    @property
    def name(self) -> str:
        return self.table.uns["slide"]

    @property
    def patient(self) -> str:
        return self.table.uns["patient"]

    @property
    def rows(self) -> Tensor:
        return torch.arange(self.start, self.stop)


@dataclass
class SpotStore:
    """All spots of all slides, row by row in the order of the slides.

    target_features (R, D), neighbor_features (R, M, D) or None, neighbor_is_valid (R, M), grid_xy (R, 2),
    slide_of_row (R,).
    """

    slides: list[SlideRecord]
    encoder: EncoderIdentity
    target_features: Tensor
    neighbor_features: Tensor | None
    neighbor_is_valid: Tensor
    grid_xy: Tensor
    slide_of_row: Tensor

    def rows_of(self, slides: Iterable[str]) -> Tensor:
        """Rows of the named slides, in the order of the store."""
        wanted = set(slides)
        chosen = [slide.rows for slide in self.slides if slide.name in wanted]
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long)

    def named(self, slides: Iterable[str]) -> list[SlideRecord]:
        """The named slides in the order of the store."""
        wanted = set(slides)
        return [slide for slide in self.slides if slide.name in wanted]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.target_features, self.neighbor_features) if t is not None)


def slide_of_row(records: Sequence[SlideRecord]) -> Tensor:
    """(R,) place of each row's slide among the records."""
    lengths = torch.tensor([record.stop - record.start for record in records])
    return torch.repeat_interleave(torch.arange(len(records)), lengths)
