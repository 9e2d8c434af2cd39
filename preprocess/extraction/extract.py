"""Plan and carry out the extraction of a data set's features: what is there and valid is kept, the rest is made.

Everything that can be known before the first patch is encoded is checked first: tables, images, existing caches, room
on the disk. All problems come in one message.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from datasets.features.cache import payload_bytes
from datasets.features.encoding import EncodingPlan, encode_slide
from datasets.features.identity import NO_ENCODER, CacheIdentity
from datasets.features.patch_encoder import BatchedPatchEncoder, Encoded, pooled_grid_side
from datasets.features.places import find_cache
from datasets.features.verify import verify_cache
from datasets.field_of_view import covered_px
from datasets.images.geometry import check_num_neighbors, check_patch_size
from datasets.images.overlay import compare_with_image
from datasets.images.slides import Slide
from datasets.layout import Layout
from datasets.tables.expression import spot_totals
from datasets.tables.slide_table import load_slide
from datasets.tables.spot_table import check_inside
from models.patch_encoders.build import PatchEncoder
from preprocess.extraction.parts import cut, is_made, join, part_of, remove_parts
from preprocess.extraction.patch_slide import PatchSlide
from preprocess.extraction.pixels import has_image, open_pixels
from preprocess.extraction.prefetch import opened_in_turn
from preprocess.extraction.writers import CacheWriters, check_nobody_makes, locked, sweep_folders, sweep_lock
from utils.cli import progress, say
from utils.files import check_writable
from utils.locks import Held
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
        """The command that makes one cache of one slide again, as these settings would."""
        variant = ""
        if kind == "token":
            variant = f" --views {self.views} --token_pool {self.token_pool} --dtype {self.token_dtype}"
        return f"{self.command} --extract_mode {kind}{variant} --slides {slide} --overwrite"


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


def extract(
    layout: Layout,
    slides: Sequence[str],
    patch_encoder: PatchEncoder | None,
    encoder: BatchedPatchEncoder | None,
    settings: ExtractionSettings,
) -> None:
    """Make the caches of `slides` (see `choose_slides`) that are not there yet.

    patch_encoder, encoder: the frozen encoder and the same on its device; None if only patches are cut.
    Raises ValueError / FileNotFoundError listing every slide that cannot be used, or the room that is missing on the
    disk, before anything is encoded. A slide that was interrupted leaves no file.
    """
    check_patch_size(layout.patch_size)
    check_num_neighbors(layout.num_neighbors)
    shapes = cache_shapes(layout, patch_encoder, settings)
    work = plan(layout, slides, patch_encoder, encoder, settings)
    to_do = {(item.slide, kind) for item in work for kind in item.identities}
    complete = sorted({(slide, kind) for slide in slides for kind in settings.kinds} - to_do)
    for cache in (find_cache(layout, kind, slide) for slide, kind in complete):
        sweep_lock(cache)
        remove_parts(cache)
    if not work:
        say(f"Nothing to do: all caches are there and valid ({', '.join(settings.kinds)}).")
        return
    caches = [path for item in work for path in item.paths.values()]
    if not settings.is_shared:
        check_nobody_makes(caches)
    sweep_folders(caches)
    _check_disk(layout, work, shapes, settings)
    try:
        extract_slides(layout, work, encoder, settings)
    except KeyboardInterrupt:
        say("Finished slides are kept, the one in work left no file; the same command goes on.")
        raise


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


def _check_disk(
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
            sizes[kind] += copies * payload_bytes((_count(item.rows), *shapes[kind]), identity.dtype)
    free = shutil.disk_usage(root).free
    spots = sum(_count(item.rows) for item in work)
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


def extract_slides(
    layout: Layout, work: Sequence[SlideWork], encoder: BatchedPatchEncoder | None, settings: ExtractionSettings
) -> None:
    """Make the missing caches of all slides, one slide after the other, each in one pass over its image.

    While a slide is encoded, the image of the next one is decoded and the files of the one before reach the disk. All
    files of a slide appear at its end; what was encoded whole is written also when a later slide fails.
    """
    encoder = encoder or BatchedPatchEncoder(_no_encoder, torch.device("cpu"))
    claimed: deque[tuple[SlideWork, ExitStack | None]] = deque()  # the slide in work and the one opened ahead

    def slides() -> Iterator[str]:
        for item in work:
            locks = _claim(item) if settings.is_shared else None
            if locks is not None or not settings.is_shared:
                claimed.append((item, locks))
                yield item.slide

    images = opened_in_turn(
        slides(),
        lambda slide: open_pixels(layout, slide, settings.kinds),
        lambda slide: has_image(layout, slide),
    )
    unfinished: list[_EncodedSlide] = []  # one at most
    with closing(images), progress(total=len(work), description="slides", unit="slide") as bar:
        try:
            for image in images:
                item, locks = claimed.popleft()
                unfinished.append(_encode_one(layout, item, image, encoder, settings, unfinished, locks))
                bar.update()
        finally:
            _finish(unfinished)
            for _, locks in claimed:
                if locks is not None:
                    locks.close()


def _claim(item: SlideWork) -> ExitStack | None:
    """Take the locks of what is to be made of a slide; None where another process makes it, or has made it meanwhile."""
    try:
        locks = locked(item.made.values())
    except Held:
        say(f"{item.title}: another process is at it.")
        return None
    if item.is_part and _is_made(item):
        locks.close()
        _join(item)
        return None
    if all(path.exists() for path in item.paths.values()):
        locks.close()
        return None
    return locks


def _is_made(item: SlideWork) -> bool:
    rows = item.rows
    return all(
        is_made(item.made[kind], identity, item.spot_ids[rows], item.centers[rows])
        for kind, identity in item.identities.items()
    )


def _join(item: SlideWork) -> None:
    """Put the caches of a slide together once all of its parts are there."""
    if not all(part_of(path, rows).exists() for path in item.paths.values() for rows in item.ranges):
        return
    try:
        with locked(item.paths.values()):
            joined = [
                join(path, item.ranges, item.identities[kind], item.spot_ids, item.centers)
                for kind, path in item.paths.items()
            ]
    except Held:  # the process that does it
        return
    if all(joined):
        say(f"{item.slide}: {', '.join(item.paths)} put together of {len(item.ranges)} parts.")


def _count(rows: slice) -> int:
    return rows.stop - rows.start


@dataclass(frozen=True)
class _EncodedSlide:
    """A slide whose blocks are all computed, and perhaps not yet on the disk.  summary: what to say when they are."""

    item: SlideWork
    summary: str
    writers: CacheWriters


def _finish(unfinished: list[_EncodedSlide]) -> None:
    """Wait for the files of these slides, and take them from the list."""
    while unfinished:
        slide = unfinished.pop()
        slide.writers.wait()
        say(slide.summary)
        if slide.item.is_part:
            _join(slide.item)


def _encode_one(
    layout: Layout,
    item: SlideWork,
    image: Slide | PatchSlide,
    encoder: BatchedPatchEncoder,
    settings: ExtractionSettings,
    before: list[_EncodedSlide],
    locks: ExitStack | None,
) -> _EncodedSlide:
    """Hand all spots of one slide, or of its part, to its writers.

    before: slides whose files have to be there first.  locks: of the caches, where they are held already.
    """
    rows = item.rows
    if isinstance(image, Slide) and rows.start == 0:
        problem = compare_with_image(image, item.centers, item.totals, layout.overlay_path(item.slide))
        if problem is not None:
            say(f"WARNING: {item.slide}: {problem}")
    started = time.perf_counter()
    encoding = EncodingPlan(
        kinds=tuple(item.identities),
        patch_size=layout.patch_size,
        source_size=next(iter(item.identities.values())).covered_px,
        num_neighbors=layout.num_neighbors,
        views=settings.views,
        token_pool=settings.token_pool,
        token_dtype=getattr(torch, settings.token_dtype),
    )
    spot_ids, centers = item.spot_ids[rows], item.centers[rows]
    with (
        progress(total=len(spot_ids), description=item.slide, unit="spot", leave=False) as bar,
        CacheWriters(item.made, item.identities, spot_ids, centers, locks) as writers,
    ):
        for spots in encode_slide(image, centers, encoder, encoding, num_workers=settings.num_workers):
            writers.put(spots)
            bar.update(_count(spots.rows))
        _finish(before)
    rate = len(spot_ids) / (time.perf_counter() - started)
    return _EncodedSlide(
        item, f"{item.title}: {', '.join(item.paths)} of {len(spot_ids)} spots, {rate:.1f} spots/s", writers
    )


def _no_encoder(_images: torch.Tensor) -> Encoded:
    raise AssertionError("patches are cut without an encoder")
