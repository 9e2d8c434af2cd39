"""Carry out the extraction of a data set's features: what is there and valid is kept, the rest is made."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch

from datasets.features.encoding import EncodingPlan, encode_slide
from datasets.features.patch_encoder import BatchedPatchEncoder, Encoded
from datasets.features.places import find_cache
from datasets.images.geometry import check_num_neighbors, check_patch_size
from datasets.images.overlay import compare_with_image
from datasets.images.slides import Slide
from datasets.layout import Layout
from models.patch_encoders.build import PatchEncoder
from preprocess.extraction.parts import is_made, join, part_of, remove_parts
from preprocess.extraction.patch_slide import PatchSlide
from preprocess.extraction.pixels import has_image, open_pixels
from preprocess.extraction.plan import ExtractionSettings, SlideWork, cache_shapes, check_disk, num_rows, plan
from preprocess.extraction.prefetch import opened_in_turn
from preprocess.extraction.unnamed import name_what_is_whole
from preprocess.extraction.writers import CacheWriters, check_nobody_makes, locked, sweep_folders, sweep_lock
from utils.cli import progress, say
from utils.locks import Held


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
    if not settings.overwrite:
        work = name_what_is_whole(work)
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
    check_disk(layout, work, shapes, settings)
    try:
        extract_slides(layout, work, encoder, settings)
    except KeyboardInterrupt:
        say("Finished slides are kept, the one in work left no file; the same command goes on.")
        raise


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
            bar.update(num_rows(spots.rows))
        _finish(before)
    rate = len(spot_ids) / (time.perf_counter() - started)
    return _EncodedSlide(
        item, f"{item.title}: {', '.join(item.paths)} of {len(spot_ids)} spots, {rate:.1f} spots/s", writers
    )


def _no_encoder(_images: torch.Tensor) -> Encoded:
    raise AssertionError("patches are cut without an encoder")
