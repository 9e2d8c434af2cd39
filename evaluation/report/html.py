"""One self-contained HTML page: inline style, embedded pictures, no script, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

# Twice the width at which the page shows a picture at most, for sharp screens and print.
MAX_PIXELS = 1800
_WIDE = 800  # of a page: panels beside each other, whose words cannot be read at half the size
STYLE = """
:root { color-scheme: light; --ink: #222; --muted: #666; --rule: #d9d9d9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h4 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul { max-width: 48rem; }
a { color: var(--accent); }
nav ul { list-style: none; padding: 0; margin: 1.2rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; }
.lead { font-size: 1.1rem; }
.notes { border-left: 3px solid #e69f00; background: #fdf8ee; padding: .6rem 1rem .6rem 2rem; margin: 1rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { width: max-content; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { text-align: right; padding: .28rem .45rem; white-space: nowrap; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal;
  max-width: 7rem; }
th.text, td.text { text-align: left; padding-left: 0; max-width: none; }
tr.sum td { font-weight: 600; background: #f7f7f7; }
figure { margin: 1rem 0 1.4rem; }
figure img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide img { max-width: max(100%, 44rem); }
figcaption { color: var(--muted); font-size: .875rem; margin-top: .3rem; max-width: 48rem; }
.row { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.row figure { flex: 0 1 19rem; margin-top: 0; }
pre { background: #f7f7f7; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; line-height: 1.4; }
footer { color: var(--muted); font-size: .875rem; margin-top: 3rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, tr, .notes { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  .scroll, .wide { overflow: visible; }
  .wide img { max-width: 100%; }
  table { width: auto; font-size: 7.5pt; }
  th, td { padding: .15rem .35rem; }
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own. body: HTML, escaped by whoever made it."""

    anchor: str
    heading: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """Put together the whole page. title, lead, footer: plain text."""
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.heading)}</a></li>' for part in sections)
    parts = "\n".join(
        f'<section id="{part.anchor}"><h2>{escape(part.heading)}</h2>\n{part.body}\n</section>' for part in sections
    )
    # The policy makes the browser itself refuse whatever is not on the page, were it ever to slip in.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n{parts}\n</main>\n'
        f"<footer><p>{escape(footer)}</p></footer>\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note_list(notes: Sequence[str]) -> str:
    """List what a reader must know before the numbers; nothing if there is nothing."""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def preformatted(text: str) -> str:
    return f"<pre>{escape(text.rstrip())}</pre>"


def scrollable(table: str) -> str:
    """Let a table scroll by itself on a narrow screen. It takes the focus, so that it scrolls by keyboard too."""
    return f'<div class="scroll" tabindex="0">{table}</div>'


def picture(path: Path, *, alt: str, caption: str, photograph: bool = False) -> str:
    """Make a <figure> with the image at `path` inside it as a data URI.

    A wide one is never shown so small that it cannot be read; on a narrow screen it scrolls by itself.
    photograph: pictures with tissue are embedded as JPEG, charts as PNG of few colors: a page of many stays small.
    """
    with Image.open(path, formats=("PNG",)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((MAX_PIXELS, MAX_PIXELS * 2), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if photograph:
        image.save(buffer, format="JPEG", quality=86, subsampling=0)
    else:
        image.quantize(colors=128, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    kind = "jpeg" if photograph else "png"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    # Shown at 60 % of its pixels: the figures are drawn at 160 dots per inch, a page has 96.
    width, height = round(image.width * 0.6), round(image.height * 0.6)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    opening = '<figure class="wide" tabindex="0">' if width > _WIDE else "<figure>"
    return (
        f'{opening}<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" width="{width}" height="{height}">'
        f"{below}</figure>"
    )
