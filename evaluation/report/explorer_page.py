"""The page of the explorer: its two panels, its choices, and the data beside them."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.layouts import row
from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper, Range1d
from bokeh.models.annotations import ColorBar
from bokeh.models.tools import BoxZoomTool, PanTool, ResetTool, WheelZoomTool
from bokeh.plotting import figure
from bokeh.resources import Resources
from matplotlib.colors import to_hex

from evaluation.report.html import STYLE
from evaluation.report.style import INK, MUTED

SIDES = ("left", "right")
COLUMNS = ("x", "y", "spot", "measured", "predicted", "error", "std")
_MORE_STYLE = """
form { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; margin: 1.2rem 0; }
label { color: var(--muted); font-size: .875rem; }
select { display: block; font: inherit; color: var(--ink); min-width: 9rem; max-width: 100%; padding: .25rem; }
"""


def explorer_page(*, title: str, lead: str, slides: Sequence[dict[str, Any]]) -> str:
    """Put together the whole page. title, lead: plain text.  slides: what explorer.js reads of each."""
    drawing = Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0]
    own = Path(__file__).with_name("explorer.js").read_text(encoding="utf-8")
    # Only these two scripts run, by their hashes: a name that were markup after all would do nothing.
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (drawing, own))
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}"
    data = {
        "layout": _layout(),
        "palettes": _palettes(),
        "slides": [slide["name"] for slide in slides],
        **{f"slide-{index}": slide for index, slide in enumerate(slides)},
    }
    blocks = "\n".join(
        f'<script type="application/json" id="{name}">{_json(content)}</script>' for name, content in data.items()
    )
    names = {"slide": "Slide", "gene": "Gene", "left": "Left panel", "right": "Right panel"}
    choices = "".join(f'<label>{label}<select id="{name}"></select></label>' for name, label in names.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{_MORE_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n'
        f'<main>\n<form autocomplete="off">{choices}</form>\n<div id="panels"></div>\n'
        "<p>The wheel zooms, dragging moves, both panels together. Pointing at a spot shows its values. "
        "Error: predicted \N{MINUS SIGN} measured. Colors span the 1st to the 99th percentile of the slide.</p>\n</main>\n"
        f"{blocks}\n<script>{drawing}</script>\n<script>{own}</script>\n</body>\n</html>\n"
    )


@functools.cache  # Bokeh numbers what it makes: so equal runs get equal pages also within one process
def _layout() -> dict[str, Any]:
    """Two panels that share ranges and spots; what is data comes from explorer.js."""
    spots = ColumnDataSource({name: [] for name in COLUMNS}, name="spots")
    tissue = ColumnDataSource({name: [] for name in ("url", "x", "y", "width", "height")}, name="tissue")
    x_range, y_range = Range1d(name="x"), Range1d(name="y")
    panels = []
    for side in SIDES:
        wheel = WheelZoomTool()
        tools = [PanTool(), wheel, BoxZoomTool(match_aspect=True), ResetTool()]
        panel = figure(
            x_range=x_range, y_range=y_range, tools=tools, active_scroll=wheel, sizing_mode="stretch_width", aspect_ratio=1,
            min_width=300, name=side, toolbar_location="above",
        )  # fmt: skip
        panel.toolbar.logo = None
        panel.axis.visible = panel.grid.visible = False
        panel.outline_line_color = None
        panel.image_url("url", "x", "y", "width", "height", source=tissue, anchor="top_left", name=f"{side}_tissue")
        colors = LinearColorMapper(palette=["#ffffff"], low=0, high=1, name=f"{side}_colors")
        drawn = panel.circle(
            "x", "y", radius=1, source=spots, name=f"{side}_spots", line_color="#000000", line_alpha=0.3, line_width=0.3,
            fill_color={"field": "predicted", "transform": colors}, hover_line_color=INK, hover_line_alpha=1,
        )  # fmt: skip
        panel.add_tools(HoverTool(renderers=[drawn], tooltips=[("spot", "@spot")], name=f"{side}_hover"))
        bar = ColorBar(
            color_mapper=colors, height=12, title_text_font_style="normal", title_text_color=INK, bar_line_color=MUTED
        )
        panel.add_layout(bar, "below")
        panels.append(panel)
    whole = row(panels, sizing_mode="stretch_width", styles={"flex-wrap": "wrap"})
    return dict(json_item(whole, ID("panels")))


def _palettes() -> dict[str, list[str]]:
    """The colors of the pictures of the report."""
    maps = {"values": "viridis", "errors": "RdBu_r"}
    return {use: [to_hex(color) for color in matplotlib.colormaps[name](np.arange(256))] for use, name in maps.items()}


def _json(content: object) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
