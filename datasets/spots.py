"""Slides read once, checked once and held as flat arrays over all spots, so that no file is opened inside an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

if TYPE_CHECKING:
    from datasets.features.neighbor_files import NeighborFiles
    from datasets.tables.summary import CountSummary

_NUMPY_TYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True)
class EncoderIdentity:
    """Which frozen encoder made the features: name and SHA-256 of its weights ("unknown" for the published files)."""

    name: str
    sha256: str


@dataclass(frozen=True)
class SlideRecord:
    """One slide: its checked table, where its spots lie in the flat arrays of a SpotStore, and its image.

    The table has the genes that were asked for, the summary is of all that were read.
    """

    table: AnnData
    start: int
    stop: int
    image_size: tuple[int, int]  # width, height in px at level 0
    image: Path | None = None  # where only features are at hand
    covered_px: int | None = None  # level-0 px that a patch covers; None: the patch size
    fingerprint: str | None = None  # of the image, as far as it is known
    summary: CountSummary | None = None

    @property
    def name(self) -> str:
        """Name of the slide."""
        return self.table.uns["slide"]

    @property
    def patient(self) -> str:
        """The patient the slide is of."""
        return self.table.uns["patient"]

    @property
    def counts(self) -> CountSummary:
        """What the counts come to of all genes that were read, also of those that the table does not hold."""
        assert self.summary is not None, "whoever reads counts sums them up"
        return self.summary

    @property
    def rows(self) -> Tensor:
        """Rows (N,) of its spots in the flat arrays."""
        return torch.arange(self.start, self.stop)


@dataclass
class SpotStore:
    """All R spots of all slides, row by row in the order of the slides.

    encoder: of the features.  target_features (R, D).  neighbor_features (R, M, D), in their files where they are not held,
    None where nobody asks for them.  neighbor_is_valid (R, M) bool.  grid_xy (R, 2) integer array positions.  slide_of_row (R,)
    places in `slides`.
    """

    slides: list[SlideRecord]
    encoder: EncoderIdentity
    target_features: Tensor
    neighbor_features: Tensor | NeighborFiles | None
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
        return named(self.slides, slides)

    def neighbors_of(self, rows: Tensor) -> Tensor | None:
        """Gather the neighbor features (n, M, D) of rows on the host, in the type that they are held in; None without any.

        Raises ValueError for a file that was damaged since.
        """
        held = self.neighbor_features
        if held is None:
            return None
        return take_rows(held, rows) if isinstance(held, Tensor) else held.read(rows)


def named(records: Sequence[SlideRecord], slides: Iterable[str]) -> list[SlideRecord]:
    """Find the named slides among records, in the order of these."""
    wanted = set(slides)
    return [record for record in records if record.name in wanted]


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], in memory of huge pages on the CPU: fresh memory costs more to touch than its rows to copy.

    NumPy asks for huge pages, PyTorch does not; measured four times faster for the neighbor features of a batch.
    """
    if values.device.type != "cpu":
        return values[rows]
    taken = torch.from_numpy(np.empty((len(rows), *values.shape[1:]), dtype=_NUMPY_TYPES[values.dtype]))
    return torch.index_select(values, 0, rows, out=taken)


def slide_of_row(records: Sequence[SlideRecord]) -> Tensor:
    """Count each row's slide: (R,) place among the records."""
    lengths = torch.tensor([record.stop - record.start for record in records])
    return torch.repeat_interleave(torch.arange(len(records)), lengths)
