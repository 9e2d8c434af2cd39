"""The doctor on pixels: do the spots of each slide lie on the tissue of its image?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from datasets.images.overlay import doubt, write_overlay
from datasets.images.slides import open_slide
from datasets.images.spots_on_tissue import SpotsOnTissue, TissuePicture, check_spots_on_tissue
from datasets.layout import Layout
from datasets.spots import SlideRecord
from modes.checks.findings import Findings
from utils.cli import progress

_SHOWN = 6  # warnings of one kind


def check_spots_on_images(layout: Layout, records: Sequence[SlideRecord], findings: Findings) -> None:
    """Warn of slides whose spots do not follow their image, and say where the pictures of both are.

    Costs about a second a slide with an image; slides without one are left out.
    """
    compared: dict[str, SpotsOnTissue] = {}
    doubts: list[str] = []
    for record in progress(records, description="spots on tissue", unit="slide", leave=False):
        found = findings.attempt("spots", partial(_compare, layout, record))
        if found is None:
            continue
        compared[record.name] = found
        if problem := doubt(found, layout.overlay_path(record.name)):
            doubts.append(f"{record.name}: {problem}")
    for text in doubts[:_SHOWN]:
        findings.warning("spots", text)
    if len(doubts) > _SHOWN:
        findings.warning("spots", f"... and {len(doubts) - _SHOWN} more of the kind.")
    if compared:
        findings.ok("spots", _summary(layout, compared))


def _compare(layout: Layout, record: SlideRecord) -> SpotsOnTissue | None:
    """None for a slide without an image."""
    try:
        path = layout.image_path(record.name)
    except FileNotFoundError:
        return None
    centers, overlay = record.table.obsm["center"], layout.overlay_path(record.name)
    with open_slide(path) as image:
        picture = TissuePicture.of(image)
    found = check_spots_on_tissue(picture, centers, record.counts.spot_totals)
    with suppress(OSError):  # the data folder may be read-only
        write_overlay(picture, centers, found.is_on_tissue, overlay)
    return found


def _summary(layout: Layout, compared: dict[str, SpotsOnTissue]) -> str:
    """The range of what was found, the spots on glass, and the pictures."""
    on_tissue = [100 * found.given.on_tissue for found in compared.values()]
    darkness = [found.given.darkness for found in compared.values() if found.given.darkness is not None]
    on_glass = sum(int((~found.is_on_tissue).sum()) for found in compared.values())
    correlated = f", darkness against counts {min(darkness):.2f} to {max(darkness):.2f}" if darkness else ""
    return (
        f"{min(on_tissue):.0f} to {max(on_tissue):.0f} % of the spots of {len(compared)} slides on tissue ({on_glass} spots on "
        f"glass){correlated}. Pictures: {layout.overlay_path('SLIDE')}."
    )
