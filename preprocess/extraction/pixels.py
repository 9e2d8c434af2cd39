"""Where the pixels of a slide come from: its image, or a cache of its patches."""

from __future__ import annotations

from collections.abc import Sequence

from datasets.features.places import find_cache
from datasets.images.slides import Slide, open_slide
from datasets.layout import Layout
from preprocess.extraction.patch_slide import PatchSlide
from utils.cli import say
from utils.text import some


def choose_slides(layout: Layout, requested: Sequence[str] | None, kinds: Sequence[str]) -> list[str]:
    """The slides asked for, or all with an image; those without are named. Reads no image, so it comes first.

    A patch cache stands for the image where neither neighbors nor the patches themselves are wanted.

    Raises ValueError for slides that are not there, FileNotFoundError if none has counts or an image.
    """
    known = layout.slides_with_counts()
    if not known:
        raise FileNotFoundError(f"{layout.counts_dir} holds no counts. {_how_to_prepare(layout)}")
    if requested is not None:
        unknown = [slide for slide in requested if slide not in known]
        if unknown:
            raise ValueError(
                f"--slides {', '.join(unknown)}: no counts in {layout.counts_dir}. Slides there: {some(known, 40)}."
            )
        return list(dict.fromkeys(requested))
    chosen: list[str] = []
    without: list[str] = []
    for slide in known:
        (chosen if _has_pixels(layout, slide, kinds) else without).append(slide)
    if without:
        say(f"{len(without)} of {len(known)} slides have no image and are skipped: {some(without, 40)}.")
    if not chosen:
        raise FileNotFoundError(
            f"None of the {len(known)} slides of {layout.name} has an image in {layout.images_dir}. Expected for "
            f"{known[0]}: {layout.images_dir / layout.image_pattern(known[0])}.{layout.patches_note(known[0])}"
        )
    return chosen


def _how_to_prepare(layout: Layout) -> str:
    if layout.spec.prepared_by is None:
        return f"docs/{'predict' if layout.spec.external else 'your_data'}.md says how to make them."
    return f"Prepare them: {layout.spec.preparation(layout.data_dir)}"


def _has_pixels(layout: Layout, slide: str, kinds: Sequence[str]) -> bool:
    return has_image(layout, slide) or _patches_suffice(layout, slide, kinds)


def has_image(layout: Layout, slide: str) -> bool:
    """Tell whether a slide has an image."""
    try:
        layout.image_path(slide)
    except FileNotFoundError:
        return False
    return True


def _patches_suffice(layout: Layout, slide: str, kinds: Sequence[str]) -> bool:
    return not {"neighbor", "patch"} & set(kinds) and find_cache(layout, "patch", slide).is_file()


def open_pixels(layout: Layout, slide: str, kinds: Sequence[str]) -> Slide | PatchSlide:
    """The image of a slide; its patch cache where there is no image and patches are enough."""
    try:
        return open_slide(layout.image_path(slide))
    except FileNotFoundError:
        if not _patches_suffice(layout, slide, kinds):
            raise
    return PatchSlide(find_cache(layout, "patch", slide))
