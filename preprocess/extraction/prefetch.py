"""The images of slides one after the other; a thread opens and decodes the next one while the present one is in use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from datasets.images.slides import Slide
from preprocess.extraction.patch_slide import PatchSlide

DECODED_AHEAD_BYTES = 1_000_000_000  # a larger image is decoded in its turn; three bytes a pixel, seven while decoding

Pixels = Slide | PatchSlide


def opened_in_turn(
    slides: Iterable[str], open_pixels: Callable[[str], Pixels], has_image: Callable[[str], bool]
) -> Generator[Pixels, None, None]:
    """Yield what `open_pixels` opens, in the order of `slides`, each closed when the next one is asked for.

    slides: of which one is asked for ahead of its turn.
    has_image: whether a slide may be opened ahead of its turn. One is, at most, and decoded if its pixels take no more
    than DECODED_AHEAD_BYTES.
    What opening or decoding raises is raised when the turn of that slide has come. Close the iterator when it is not
    used up: it then waits for the thread and closes what that has opened.
    """
    ahead: Future[Pixels] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="slide-opener") as pool:
        try:
            waiting = iter(slides)
            following = next(waiting, None)
            while following is not None:
                slide, following = following, next(waiting, None)
                pixels = open_pixels(slide) if ahead is None else ahead.result()
                ahead = None
                with pixels:
                    if following is not None and has_image(following):
                        ahead = pool.submit(_open_decoded, following, open_pixels)
                    yield pixels
        finally:
            if ahead is not None and not ahead.cancel() and ahead.exception() is None:
                ahead.result().close()


def _open_decoded(slide: str, open_pixels: Callable[[str], Pixels]) -> Pixels:
    pixels = open_pixels(slide)
    try:
        if isinstance(pixels, Slide) and pixels.decoded_bytes <= DECODED_AHEAD_BYTES:
            pixels.decode()
    except BaseException:
        pixels.close()
        raise
    return pixels
