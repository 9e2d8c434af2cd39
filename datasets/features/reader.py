"""TODO datasets/features/reader.py"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from datasets.features.cache import read_features, read_identity, read_published, verify_cache, verify_published
from datasets.images.geometry import neighbor_validity
from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.spots import EncoderIdentity, SlideRecord, SpotStore, slide_of_row
from datasets.tables.slide_table import check_inside, load_slide
from utils.cli import progress
from utils.config import Data, load_config


def load_store(
    layout: Layout,
    slides: Sequence[str],
    *,
    encoder: str,
    sha256: str | None,
    config_name: str,
    with_neighbors: bool = True,
    hold_neighbors: bool = True,
    genes: Sequence[str] | None = None,
    inspect: Callable[[list[SlideRecord]], None] | None = None,
) -> SpotStore:
    """Read tables and features of the slides and verify every cache before anything is computed.

    sha256: weights that the features must come from; None takes those of the first slide, and all must agree.
    config_name: for the command that repairs a cache.
    hold_neighbors: False verifies the neighbor features but leaves them on disk, for slides too large to hold them
        (`read_rows` gets at them).  genes: read only their counts; None = all.
    inspect: called with the verified slides before any feature is read; what it raises stops here.
    Raises ValueError / FileNotFoundError listing every slide that cannot be used and the command that repairs it.
    """
    reader = FeatureReader(layout, encoder, sha256, config_name)
    records, problems, start = [], [], 0
    for slide in slides:
        try:
            table = load_slide(layout, slide, genes)
            image_size = reader.verify(slide, table, with_neighbors)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        records.append(SlideRecord(table, start, start + table.n_obs, image_size))
        start += table.n_obs
    if problems:
        raise ValueError(_joined(problems))
    assert records, "load_store needs at least one slide"
    if inspect is not None:
        inspect(records)
    return reader.read(records, with_neighbors and hold_neighbors)


def _joined(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = [f"- {problem}" for problem in problems[:12]]
    if len(problems) > 12:
        shown.append(f"- ... and {len(problems) - 12} more of the kind")
    return "\n".join([f"{len(problems)} slides cannot be used:", *shown])


def extraction_command(
    layout: Layout, kind: str, slides: str | None, encoder: str | None, config_name: str, overwrite: bool = False
) -> str:
    """The command that makes a cache where `layout` looks for it; slides: comma separated, None for all.

    Sizes are named where the configuration has others, and the configuration itself where it can be found from here.
    """
    external = layout.name if layout.root.parent.name == "test" else None
    try:
        data = load_config(config_name).DATA
    except (ValueError, FileNotFoundError):  # of a run made elsewhere; then only an external set may do without it
        data = None
    flags = [f"--config {config_name}"] if data or not external else []
    flags += [f"--mode external --test_name {external}" if external else "--mode internal"]
    flags += [f"--extract_mode {kind}", f"--data_dir {layout.data_dir}"]
    flags += [f"--encoder {encoder}"] if encoder else []
    if layout.patch_size != (data or Data).patch_size:
        flags.append(f"--set DATA.patch_size={layout.patch_size}")
    if layout.num_neighbors != (data or Data).num_neighbors:
        flags.append(f"--num_n {layout.num_neighbors}")
    flags += [f"--slides {slides}"] if slides else []
    flags += ["--overwrite"] if overwrite else []
    return f"python preprocess/extract_features_uni.py {' '.join(flags)}"


class FeatureReader:
    """Finds each slide's features (our caches, else the published .pt), verifies and reads them.

    sha256: of the weights; None until the first slide with a cache says it, and then of all.
    """

    def __init__(self, layout: Layout, encoder: str, sha256: str | None, config_name: str):
        self.layout, self.encoder, self.sha256, self.config_name = layout, encoder, sha256, config_name

    def verify(self, slide: str, table: AnnData, with_neighbors: bool) -> tuple[int, int]:
        """Check the slide's features against its spots and image; returns the image size (width, height).

        Reads headers and identifiers only. table: with ids and centres; its counts are not used.
        """
        image_size = None
        for kind in ("target", "neighbor") if with_neighbors else ("target",):
            path = self.layout.cache_path(kind, slide)
            if path.exists():
                image_size = self._verify_cache(kind, slide, table)
            elif (published := self.layout.published_path(kind, slide)) is not None:
                verify_published(published, table.n_obs)
            else:
                raise FileNotFoundError(
                    f"{path} does not exist: slide {slide} has no {kind} features. Run: {self._command(kind, slide)}"
                )
        if image_size is None:
            with open_slide(self.layout.image_path(slide)) as image:
                image_size = image.size
        check_inside(table, image_size, self._image_path(slide) or "its image")
        return image_size

    def _verify_cache(self, kind: str, slide: str, table: AnnData) -> tuple[int, int]:
        path = self.layout.cache_path(kind, slide)
        expected = {"kind": kind, "encoder": self.encoder, "patch_size": self.layout.patch_size}
        if kind == "neighbor":
            expected["num_neighbors"] = self.layout.num_neighbors
        if self.sha256 is not None:
            expected["encoder_sha256"] = self.sha256
        image_path = self._image_path(slide)
        if image_path is not None:
            with open_slide(image_path) as image:
                expected["image_fingerprint"] = image.fingerprint()
        command = self._command(kind, slide, overwrite=True)
        verify_cache(path, expected, list(table.obs_names), table.obsm["center"], repair=command)
        identity = read_identity(path)
        self.sha256 = self.sha256 or identity.encoder_sha256
        return tuple(identity.image_size)

    def _image_path(self, slide: str) -> Path | None:
        """The image, or None where only features are at hand; several images are still an error."""
        try:
            return self.layout.image_path(slide)
        except FileNotFoundError:
            return None

    def _command(self, kind: str, slide: str, overwrite: bool = False) -> str:
        return extraction_command(self.layout, kind, slide, self.encoder, self.config_name, overwrite)

    def read(self, records: list[SlideRecord], with_neighbors: bool) -> SpotStore:
        tables = [record.table for record in records]
        validity = [
            neighbor_validity(
                record.table.obsm["center"],
                record.image_size,
                self.layout.patch_size,
                self.layout.num_neighbors,
            )
            for record in records
        ]
        return SpotStore(
            slides=records,
            encoder=EncoderIdentity(self.encoder, self.sha256 or "unknown"),
            target_features=self._read_kind("target", records),
            neighbor_features=self._read_kind("neighbor", records) if with_neighbors else None,
            neighbor_is_valid=torch.from_numpy(np.concatenate(validity)),
            grid_xy=torch.from_numpy(np.concatenate([table.obsm["grid"] for table in tables])),
            slide_of_row=slide_of_row(records),
        )

    def _read_kind(self, kind: str, records: list[SlideRecord]) -> Tensor:
        """One array over all slides, filled slide by slide: never more than one slide is held twice."""
        flat = None
        for record in progress(records, description=f"{kind} features", unit="slide", leave=False):
            features = torch.from_numpy(self._read_slide(kind, record))
            if flat is None:
                flat = torch.empty((records[-1].stop, *features.shape[1:]), dtype=features.dtype)
            if features.shape[1:] != flat.shape[1:]:
                raise ValueError(
                    f"{kind} features of slide {record.name} have the shape {tuple(features.shape[1:])} a spot, those of "
                    f"slide {records[0].name} {tuple(flat.shape[1:])}. Run: {self._command(kind, record.name, True)}"
                )
            flat[record.start : record.stop] = features
        return flat

    def _read_slide(self, kind: str, record: SlideRecord) -> np.ndarray:
        path = self.layout.cache_path(kind, record.name)
        if path.exists():
            return read_features(path)
        return read_published(self.layout.published_path(kind, record.name), record.table.n_obs)


def read_rows(layout: Layout, kind: str, record: SlideRecord, rows: slice) -> np.ndarray:
    """Features ("target" or "neighbor") of consecutive spots of a slide that `load_store` has verified."""
    path = layout.cache_path(kind, record.name)
    if path.exists():
        return read_features(path, rows)
    return read_published(layout.published_path(kind, record.name), record.table.n_obs)[rows]
