"""Slides read once, checked once and held as flat arrays over all spots, so that no file is opened inside an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """One slide: its checked table, where its spots lie in the flat arrays of a SpotStore, and its image."""

    table: AnnData
    start: int
    stop: int
    image_size: tuple[int, int]  # width, height in px at level 0
    image: Path | None = None  # where only features are at hand
    covered_px: int | None = None  # level-0 px that a patch covers; None: the patch size
    fingerprint: str | None = None  # of the image, as far as it is known

    @property
    def name(self) -> str:
        """Name of the slide."""
        return self.table.uns["slide"]

    @property
    def patient(self) -> str:
        """The patient the slide is of."""
        return self.table.uns["patient"]

    @property
    def rows(self) -> Tensor:
        """Rows (N,) of its spots in the flat arrays."""
        return torch.arange(self.start, self.stop)


@dataclass
class SpotStore:
    """All R spots of all slides, row by row in the order of the slides.

    encoder: of the features.  target_features (R, D), neighbor_features (R, M, D) or None where they are not held,
    neighbor_is_valid (R, M) bool, grid_xy (R, 2) integer array positions, slide_of_row (R,) places in `slides`.
    """

    slides: list[SlideRecord]
    encoder: EncoderIdentity
    target_features: Tensor
    neighbor_features: Tensor | None
    neighbor_is_valid: Tensor
    grid_xy: Tensor
    slide_of_row: Tensor

    @property
    def patients(self) -> dict[str, str]:
        """Give the patient of each slide, in the order of the store."""
        return {slide.name: slide.patient for slide in self.slides}

    def rows_of(self, slides: Iterable[str]) -> Tensor:
        """Find the rows (n,) of the named slides, in the order of the store."""
        wanted = set(slides)
        chosen = [slide.rows for slide in self.slides if slide.name in wanted]
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long)

    def named(self, slides: Iterable[str]) -> list[SlideRecord]:
        """Find the named slides, in the order of the store."""
        wanted = set(slides)
        return [slide for slide in self.slides if slide.name in wanted]

    @property
    def nbytes(self) -> int:
        """Bytes of the features held."""
        return sum(t.nbytes for t in (self.target_features, self.neighbor_features) if t is not None)


def slide_of_row(records: Sequence[SlideRecord]) -> Tensor:
    """Count each row's slide: (R,) place among the records."""
    lengths = torch.tensor([record.stop - record.start for record in records])
    return torch.repeat_interleave(torch.arange(len(records)), lengths)
