"""What an extraction is asked for, and what is left to do of it, with every problem told before anything is encoded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from datasets.features.cache import payload_bytes
from datasets.features.identity import NO_ENCODER, CacheIdentity
from datasets.features.patch_encoder import BatchedPatchEncoder, pooled_grid_side
from datasets.features.places import find_cache
from datasets.features.verify import verify_cache
from datasets.field_of_view import covered_px
from datasets.layout import Layout
from datasets.tables.expression import spot_totals
from datasets.tables.slide_table import load_slide
from datasets.tables.spot_table import check_inside
from models.patch_encoders.build import PatchEncoder
from preprocess.extraction.parts import cut, part_of
from preprocess.extraction.pixels import open_pixels
from utils.cli import progress, say
from utils.files import check_writable
from utils.text import some

_CHECKED_FIELDS = (
    "kind",
    "encoder",
    "encoder_sha256",
    "image_fingerprint",
    "patch_size",
    "patch_um",
    "covered_px",
    "fill",
)
_CHECKED_OF_KIND = {"neighbor": ("num_neighbors",), "token": ("views", "dtype", "token_pool")}


@dataclass(frozen=True)
class ExtractionSettings:
    """What to extract and how.

    kinds: of target, neighbor, token, patch.  views, token_pool, token_dtype: the variant of the token cache.
    command: the program with the flags that all slides and kinds share, for messages.
    is_shared: other processes work at the same slides; each takes those that are free.
    num_processes: that torchrun has started; a slide with more than its share of all spots is cut for them.
    """

    kinds: tuple[str, ...]
    num_workers: int
    command: str
    overwrite: bool = False
    views: int = 8
    token_pool: int = 1
    token_dtype: str = "float16"
    is_shared: bool = False
    num_processes: int = 1

    def repair(self, kind: str, slide: str) -> str:
        """The command that makes one cache of one slide where there is none, as these settings would."""
        variant = ""
        if kind == "token":
            variant = f" --views {self.views} --token_pool {self.token_pool} --dtype {self.token_dtype}"
        return f"{self.command} --extract_mode {kind}{variant} --slides {slide}"


@dataclass(frozen=True)
class SlideWork:
    """One slide with the caches that have to be made, or some of its spots.

    totals (N,): counts of each spot, to compare with the image.  paths, identities: of the slide's caches, per kind.
    ranges: the parts that the slide is cut into, one for all spots where it is not.  rows: the range that this is.
    """

    slide: str
    spot_ids: list[str]
    centers: np.ndarray
    totals: np.ndarray
    paths: dict[str, Path]
    identities: dict[str, CacheIdentity]
    ranges: list[slice]
    rows: slice

    @property
    def is_part(self) -> bool:
        return len(self.ranges) > 1

    @property
    def made(self) -> dict[str, Path]:
        """What is written, per kind: the caches, or a part of each."""
        return {kind: part_of(path, self.rows) for kind, path in self.paths.items()} if self.is_part else self.paths

    @property
    def title(self) -> str:
        return f"{self.slide}, spots {self.rows.start} to {self.rows.stop - 1}" if self.is_part else self.slide


def cache_shapes(
    layout: Layout, patch_encoder: PatchEncoder | None, settings: ExtractionSettings
) -> dict[str, tuple[int, ...]]:
    """Shape of each kind for one spot. Raises ValueError if the encoder does not take such patches or such pooling."""
    size, tiles = layout.patch_size, layout.num_neighbors**2
    shapes: dict[str, tuple[int, ...]] = {"patch": (size, size, 3)}
    if patch_encoder is not None:
        num_tokens, prefix = patch_encoder.num_tokens(size), patch_encoder.spec.prefix_tokens
        shapes |= {"target": (patch_encoder.pooled_dim,), "neighbor": (tiles, patch_encoder.pooled_dim)}
        if settings.token_pool > 1:
            num_tokens = prefix + pooled_grid_side(num_tokens, prefix, settings.token_pool) ** 2
        shapes["token"] = (settings.views, num_tokens, patch_encoder.dim)
    return {kind: shapes[kind] for kind in settings.kinds}


def plan(
    layout: Layout,
    slides: Sequence[str],
    patch_encoder: PatchEncoder | None,
    encoder: BatchedPatchEncoder | None,
    settings: ExtractionSettings,
) -> list[SlideWork]:
    """What is left to do for each slide, or part of one; valid caches are said and kept. One error lists every problem."""
    work, problems, complete, num_spots = [], [], [], 0
    for slide in progress(slides, description="checking", unit="slide", leave=False):
        try:
            item = _plan_slide(layout, slide, patch_encoder, encoder, settings)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        num_spots += len(item.spot_ids)
        if item.identities:
            work.append(item)
        else:
            complete.append(slide)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} slides cannot be extracted:\n{listed}")
    if complete:
        say(f"{len(complete)} slides are complete and skipped: {some(complete, 40)}.")
    if settings.num_processes == 1:
        return work
    # Of all spots, not of those that are left, so that every process comes to the same parts whenever it starts.
    share = -(-num_spots // settings.num_processes)
    return [part for item in work for part in _in_parts(item, share)]


def _in_parts(item: SlideWork, most: int) -> list[SlideWork]:
    ranges = cut(len(item.spot_ids), most)
    return [replace(item, ranges=ranges, rows=rows) for rows in ranges]


def _plan_slide(
    layout: Layout,
    slide: str,
    patch_encoder: PatchEncoder | None,
    encoder: BatchedPatchEncoder | None,
    settings: ExtractionSettings,
) -> SlideWork:
    table = load_slide(layout, slide)
    spot_ids, centers, totals = list(table.obs_names), table.obsm["center"], spot_totals(table.X)
    with open_pixels(layout, slide, settings.kinds) as image:
        check_inside(table, image.size, image.path)
        common = CacheIdentity(
            kind="target",
            views=1,
            dtype="float32",
            encoder=patch_encoder.name if patch_encoder else NO_ENCODER,
            encoder_sha256=patch_encoder.weights_sha256 if patch_encoder else NO_ENCODER,
            image_size=image.size,
            image_fingerprint=image.fingerprint(),
            patch_size=layout.patch_size,
            microns_per_pixel=image.microns_per_pixel or layout.spec.microns_of(slide),
            num_neighbors=layout.num_neighbors,
            precision=encoder.precision if encoder else NO_ENCODER,
            patch_um=layout.patch_um,
            covered_px=covered_px(layout, slide, table.obsm["spatial"], image.microns_per_pixel),
        )
    pending = {}
    for kind in settings.kinds:
        identity = _of_kind(common, kind, settings)
        path = find_cache(layout, kind, slide)
        if path.exists() and not settings.overwrite:
            checked = (*_CHECKED_FIELDS, *_CHECKED_OF_KIND.get(kind, ()))
            expected = {name: getattr(identity, name) for name in checked}
            verify_cache(path, expected, spot_ids, centers, repair=partial(settings.repair, kind, slide))
        else:
            pending[kind] = identity
    if pending and table.uns["not_selected"]:
        say(f"{slide}: {len(table.uns['not_selected'])} spots are marked selected = 0 and left out.")
    paths = {kind: find_cache(layout, kind, slide) for kind in pending}
    every = slice(0, len(spot_ids))
    return SlideWork(slide, spot_ids, centers, totals, paths, pending, [every], every)


def _of_kind(common: CacheIdentity, kind: str, settings: ExtractionSettings) -> CacheIdentity:
    if kind == "token":
        pool = settings.token_pool
        return replace(common, kind=kind, views=settings.views, dtype=settings.token_dtype, token_pool=pool)
    return replace(common, kind=kind, dtype="uint8" if kind == "patch" else "float32")


def check_disk(
    layout: Layout, work: Sequence[SlideWork], shapes: dict[str, tuple[int, ...]], settings: ExtractionSettings
) -> None:
    """Announce what will be written.

    Raises ValueError with numbers and remedies if it does not fit on the disk, OSError if nothing can be written there.
    """
    root = layout.root
    sizes: dict[str, int] = dict.fromkeys(shapes, 0)
    for item in work:
        for kind, identity in item.identities.items():
            if not sizes[kind]:
                check_writable(item.paths[kind])
            copies = 2 if item.is_part else 1  # the parts stay until the cache is there
            sizes[kind] += copies * payload_bytes((num_rows(item.rows), *shapes[kind]), identity.dtype)
    free = shutil.disk_usage(root).free
    spots = sum(num_rows(item.rows) for item in work)
    parts = ", ".join(f"{kind} {size / 1e9:.3g} GB {shapes[kind]}" for kind, size in sizes.items() if size)
    slides = len({item.slide for item in work})
    say(f"{slides} slides, {spots} spots to do: {parts}; {free / 1e9:.3g} GB are free in {root}.")
    if sum(sizes.values()) <= free:
        return
    remedies = ["fewer slides at a time (--slides)", "another disk (--data_dir)"]
    if sizes.get("token"):
        quarter = sizes["token"] / settings.views / 1e9
        remedies = [
            f"one view instead of {settings.views} (--views 1, {quarter:.3g} GB; training then has no augmentation)",
            "pooled tokens (--token_pool 2, about a quarter)",
            *(["--dtype float16 (half)"] if settings.token_dtype == "float32" else []),
            "no token cache (--extract_mode target and neighbor; training then runs the encoder)",
            *remedies,
        ]
    raise ValueError(
        f"{sum(sizes.values()) / 1e9:.3g} GB are to be written to {root}, {free / 1e9:.3g} GB are free there. Possible: "
        f"{'; '.join(remedies)}."
    )


def num_rows(rows: slice) -> int:
    """Count the spots of a range."""
    return rows.stop - rows.start
