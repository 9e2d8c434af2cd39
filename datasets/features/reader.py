"""Features of slides, verified against their spots and images and then read into flat arrays.

First the cheap: tables, headers and identifiers of every slide (`FeatureReader.read_tables`). Whoever has something to
check does it then; after that the numbers are read (`read_features`), and the data folder is listed no more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from datasets.features.cache import keeping, read_features
from datasets.features.identity import UNKNOWN, CacheIdentity
from datasets.features.neighbor_files import IN_MEMORY, PUBLISHED, NeighborFiles, Residence
from datasets.features.places import find_cache, other_encoders, other_widths
from datasets.features.published import read_published, verify_published
from datasets.features.verify import expected_size, verify_cache
from datasets.images.geometry import neighbor_validity
from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.spots import EncoderIdentity, SlideRecord, SpotStore, slide_of_row
from datasets.tables.slide_table import load_slide
from datasets.tables.spot_table import check_inside
from datasets.tables.summary import CountSummary, summarise, with_genes
from utils.cli import progress, say

_SAME_IN_ALL = ("dtype", "precision", "fill")
_OF_IMAGE = ("image_size", "image_fingerprint")


@dataclass(frozen=True)
class Seen:
    """What the features of a slide were made of.

    image: where it is at hand.  image_size: (width, height) px.  covered_px: level-0 px that a patch covers, None for the
    patch size.  fingerprint: of the image.
    """

    image: Path | None
    image_size: tuple[int, int]
    covered_px: int | None
    fingerprint: str


class FeatureReader:
    """Finds each slide's features (our caches, else the published .pt), verifies and reads them.

    encoder: name of the patch encoder.  sha256: of its weights; None until the first slide with a cache says it, and then
    of all.  with_neighbors: whether there must be neighbor features.
    """

    def __init__(self, layout: Layout, encoder: str, sha256: str | None = None, *, with_neighbors: bool = True):
        self.layout, self.encoder, self.sha256 = layout, encoder, sha256
        self.kinds = ("target", "neighbor") if with_neighbors else ("target",)
        self._first: dict[str, CacheIdentity] = {}  # of the first slide with a cache, by kind
        self._genes: dict[tuple[str, ...], pd.Index] = {}

    def read_tables(
        self,
        slides: Sequence[str],
        genes: Sequence[str] | None = None,
        *,
        keep: Collection[str] | None = None,
        spare_bytes: int = 0,
    ) -> list[SlideRecord]:
        """Read the tables of the slides and verify every cache, before any feature is read.

        genes: read only their counts; None = all.  keep: of these hold only the counts of these genes, as far as the slide
        has them, so that memory does not grow with all genes; None = all.  spare_bytes: of counts of other genes that may
        be held all the same, slide after slide until they are used up, so that `read_genes` need not read again.
        Raises ValueError listing every slide that cannot be used and the command that repairs it.
        """
        records: list[SlideRecord] = []
        problems, start = [], 0
        for slide in slides:
            try:
                table = load_slide(self.layout, slide, genes)
                seen = self.verify(slide, table)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
                continue
            summary = self._pooled(summarise(table))
            spare_bytes -= _bytes_of(table)
            table = table if keep is None or spare_bytes >= 0 else with_genes(table, keep)
            records.append(SlideRecord(table, start, start + table.n_obs, **vars(seen), summary=summary))
            start += table.n_obs
        if problems:
            raise ValueError(_joined(problems))
        assert records, "at least one slide is read"
        return records

    def read_genes(self, records: Sequence[SlideRecord], genes: Collection[str]) -> list[SlideRecord]:
        """Hold the counts of these genes, as far as the slides have them, in place of those that the tables hold.

        What no table holds is read again. Raises ValueError for a slide whose files have changed since.
        """
        found = []
        for record in records:
            of_slide = record.counts.genes[record.counts.genes.isin(list(genes))]
            is_held = of_slide.isin(record.table.var_names).all()
            table = (
                with_genes(record.table, of_slide) if is_held else load_slide(self.layout, record.name, list(of_slide))
            )
            if table.obs_names.tolist() != record.table.obs_names.tolist():
                raise ValueError(
                    f"the counts or spots of slide {record.name} have changed while they were read. Run the command again."
                )
            found.append(replace(record, table=table))
        return found

    def _pooled(self, summary: CountSummary) -> CountSummary:
        """The summary with the very list of genes of an earlier slide, where they are the same."""
        genes = self._genes.setdefault(tuple(summary.genes), summary.genes)
        return replace(summary, log_sums=summary.log_sums.set_axis(genes))

    def verify(self, slide: str, table: AnnData) -> Seen:
        """Check a slide's features against its spots and image.

        Reads headers and identifiers only. table: with ids and centres; its counts are not used.
        Raises FileNotFoundError for features that are not there, ValueError for those that do not fit, with the command
        that makes them, and for several images.
        """
        image, identity = self._image(slide), None
        for kind in self.kinds:
            path = find_cache(self.layout, kind, slide)
            if path.exists():
                identity = self._verify_cache(kind, slide, table, image, identity)
            elif (published := self.layout.published_path(kind, slide)) is not None:
                verify_published(published, table.n_obs)
            else:
                raise FileNotFoundError(self._missing(kind, slide, path))
        if identity is not None:
            seen = Seen(image, identity.image_size, identity.covered_px, identity.image_fingerprint)
        else:  # published features do not tell it
            with open_slide(image or self.layout.image_path(slide)) as opened:
                seen = Seen(image, opened.size, None, opened.fingerprint())
        check_inside(table, seen.image_size, image or "its image")
        return seen

    def _missing(self, kind: str, slide: str, path: Path) -> str:
        others = other_encoders(self.layout, kind, slide)
        there = (
            f" There are those of {', '.join(others)}: work with DATA.encoder={others[0]}, or keep both."
            if others
            else ""
        )
        if widths := other_widths(self.layout, kind, slide):
            asked = f"{self.layout.patch_um:g} um wide" if self.layout.patch_um else "not scaled"
            there += f" There are those of patches that are {', '.join(widths)}, expected {asked} (DATA.patch_um)."
        if kind == "neighbor":
            there += " A training without them: --set MODEL.use_neighbor=false."
        return (
            f"{path} does not exist: slide {slide} has no {kind} features.{there} Run: "
            f"{self.layout.repair(kind, slide, self.encoder)}"
        )

    def _verify_cache(
        self, kind: str, slide: str, table: AnnData, image: Path | None, other: CacheIdentity | None
    ) -> CacheIdentity:
        """Verify one cache of a slide. other: the identity of its cache of another kind, which must be of the same image.

        Not compared: num_neighbors of target features, since these are of the spot's own patch whatever grid was configured
        when they were made; and microns_per_pixel, from which nothing is computed (a patch is `covered_px` wide), and which
        the data set may have learned since.
        """
        path = find_cache(self.layout, kind, slide)
        expected = {"kind": kind, "encoder": self.encoder, **expected_size(self.layout)}
        if kind == "neighbor":
            expected["num_neighbors"] = self.layout.num_neighbors
        if self.sha256 is not None:
            expected["encoder_sha256"] = self.sha256
        if kind in self._first:  # slides are not mixed that were encoded in another way
            expected |= {name: getattr(self._first[kind], name) for name in _SAME_IN_ALL}
        if other is not None and other.image_fingerprint != UNKNOWN:
            expected |= {name: getattr(other, name) for name in _OF_IMAGE}
        if image is not None:
            with open_slide(image) as opened:
                expected["image_fingerprint"] = opened.fingerprint()
        repair = partial(self.layout.repair, kind, slide, self.encoder)
        identity = verify_cache(path, expected, list(table.obs_names), table.obsm["center"], repair)
        if identity.encoder_sha256 != UNKNOWN:
            self.sha256 = self.sha256 or identity.encoder_sha256
        self._first.setdefault(kind, identity)
        return identity

    def _image(self, slide: str) -> Path | None:
        """The image, or None where only features are at hand; several images are still an error."""
        try:
            return self.layout.image_path(slide)
        except FileNotFoundError:
            return None

    def read_features(self, records: list[SlideRecord], residence: Residence = IN_MEMORY) -> SpotStore:
        """Read the features of the slides of `read_tables`; those of neighbors may stay in their files (`residence`).

        Raises ValueError for features of another width than those of the first slide.
        """
        validity = [
            neighbor_validity(
                record.table.obsm["center"],
                record.image_size,
                record.covered_px or self.layout.patch_size,
                self.layout.num_neighbors,
            )
            for record in records
        ]
        return SpotStore(
            slides=records,
            encoder=EncoderIdentity(self.encoder, self.sha256 or UNKNOWN),
            target_features=self._read_kind("target", records),
            neighbor_features=self._neighbors(records, residence) if "neighbor" in self.kinds else None,
            neighbor_is_valid=torch.from_numpy(np.concatenate(validity)),
            grid_xy=torch.from_numpy(np.concatenate([record.table.obsm["grid"] for record in records])),
            slide_of_row=slide_of_row(records),
        )

    def _neighbors(self, records: list[SlideRecord], residence: Residence) -> Tensor | NeighborFiles:
        """Held in memory, or the files of which the rows are read."""
        if residence.choice in ("auto", "disk"):
            slides = [(self._path("neighbor", record), len(record.rows)) for record in records]
            files = NeighborFiles(slides, residence)
            if not residence.holds(files.nbytes, say):
                return files.check()
        return self._read_kind("neighbor", records)

    def _path(self, kind: str, record: SlideRecord) -> Path:
        """The features of a slide of `read_tables`; FileNotFoundError if they were removed since."""
        path = find_cache(self.layout, kind, record.name)
        if path.exists():
            return path
        published = self.layout.published_path(kind, record.name)
        if published is None:
            raise FileNotFoundError(f"{path} is there no more. Run: {self.layout.repair(kind, record.name)}")
        return published

    def _read_kind(self, kind: str, records: list[SlideRecord]) -> Tensor:
        """One array over all slides, filled slide by slide: never more than one slide is held twice."""
        whole: Tensor | None = None
        for record in progress(records, description=f"{kind} features", unit="slide", leave=False):
            place = None if whole is None else whole[record.start : record.stop].numpy()
            path = self._path(kind, record)
            is_cache = path.suffix != PUBLISHED
            found = read_features(path, out=place) if is_cache else read_published(path, record.table.n_obs)
            if found is place:
                continue
            features = torch.from_numpy(found)
            if whole is None:
                whole = torch.empty((records[-1].stop, *features.shape[1:]), dtype=features.dtype)
            if features.shape[1:] != whole.shape[1:]:
                raise ValueError(
                    f"{kind} features of slide {record.name} have the shape {tuple(features.shape[1:])} a spot, those of "
                    f"slide {records[0].name} {tuple(whole.shape[1:])}. "
                    f"{keeping(self.layout.repair(kind, record.name, self.encoder))}"
                )
            whole[record.start : record.stop] = features
        assert whole is not None, "at least one slide is read"
        return whole


def _bytes_of(table: AnnData) -> int:
    counts = sparse.csr_matrix(table.X)
    return counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes


def _joined(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = [f"- {problem}" for problem in problems[:12]]
    if len(problems) > 12:
        shown.append(f"- ... and {len(problems) - 12} more of the kind")
    return "\n".join([f"{len(problems)} slides cannot be used:", *shown])
