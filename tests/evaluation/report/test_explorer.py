"""The explorer: what is on the page is what is in the files, in few bytes, and it works in a browser."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from evaluation.predictions import MEASURED, Trust, read_prediction, write_prediction
from evaluation.report.explorer import slide_view, write_explorer
from tests.chromium import NEEDS_CHROMIUM, Browser
from tests.evaluation.report.test_write import Outline

MARKUP = "</script><img src=x onerror=document.title='ran'>"
GENES = ["ACTB", "<script>alert(1)</script>", "ERBB2", "CONSTANT"]


def write(path: Path, *, slide: str, shape: tuple[int, int] = (30, 4), counts: bool = True, side: int = 300) -> Path:
    """A prediction file of random numbers: without counts it has a standard deviation, as --mode predict writes."""
    generator = np.random.default_rng(len(slide) + shape[0])
    grid_xy = np.stack([np.arange(shape[0]) % 6, np.arange(shape[0]) // 6], axis=1)
    measured = generator.gamma(2, 0.3, size=shape).astype(np.float32)
    measured[:, -1] = 0.5
    predicted = (measured * 0.7 + generator.normal(0.2, 0.05, size=shape)).astype(np.float32)
    spots = [f"{index}x" for index in range(shape[0] - 1)] + [MARKUP]
    write_prediction(
        path,
        slide=slide,
        spot_ids=spots,
        genes=GENES if shape[1] == len(GENES) else [f"GENE{index}" for index in range(shape[1])],
        predictions={"fused": predicted},
        spatial_px=grid_xy * 100.0 + 100.0,
        grid_xy=grid_xy,
        measured=measured if counts else None,
        measured_unsmoothed=None,
        image=generator.integers(150, 255, size=(side, side, 3), dtype=np.uint8) if side else None,
        image_scale=0.5,
        spot_diameter_px=55.0,
        unit="log10(1 + counts)",
        provenance={"run": "fabricated"},
        trust=None if counts else Trust(std=np.abs(predicted) / 10),
    )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("explorer")
    return [
        write(folder / "A1.h5ad", slide="A1"),
        write(folder / "B1.h5ad", slide="<b>B1", shape=(24, 4), counts=False, side=0),
    ]


@pytest.fixture(scope="module")
def page(files: list[Path]) -> Path:
    return write_explorer(files[0].with_name("explorer.html"), files, title=f"Genes of {MARKUP}")


def test_values_are_right_to_half_a_step(files: list[Path]) -> None:
    for file in files:
        adata = read_prediction(file)
        view = slide_view(adata)
        layers = {"predicted": adata.X, **{name: adata.layers[name] for name in adata.layers if name}}
        assert set(view.codes) == set(layers)
        for name, codes in view.codes.items():
            read = view.low[name][:, None] + view.step[name][:, None] * codes
            assert (np.abs(read - layers[name].T) <= 0.501 * view.step[name][:, None] + 1e-6).all()


def test_page_is_self_contained_and_names_are_no_markup(page: Path) -> None:
    outline = Outline(page.read_text())
    assert not {tag for tag, _ in outline.tags} & {"img", "b", "iframe", "object", "embed", "link", "base"}
    scripts = outline.all("script")
    assert [script.get("type") for script in scripts] == ["application/json"] * 5 + [None] * 2
    assert all("src" not in attributes for _, attributes in outline.tags)
    policy = outline.all("meta")[1]["content"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1]
    assert "unsafe-eval" not in policy


def test_measured_values_are_called_smoothed_where_there_are_any(files: list[Path], page: Path) -> None:
    words = "rounded to 8 bits. Measured ones are smoothed (means over 3 x 3 spots)."
    assert words in page.read_text()
    assert MEASURED not in read_prediction(files[-1]).layers
    assert (
        "smoothed"
        not in write_explorer(page.with_name("one.html"), files[-1:], title="x").read_text().split("<main>")[0]
    )


def test_equal_files_give_equal_pages(files: list[Path], page: Path) -> None:
    again = write_explorer(page.with_name("again.html"), files, title=f"Genes of {MARKUP}")
    assert again.read_bytes() == page.read_bytes()


def test_a_page_that_would_be_too_large_holds_the_genes_asked_for_and_those_that_vary_most(files: list[Path]) -> None:
    path = files[0].with_name("small.html")
    text = write_explorer(path, files[:1], title="whole").read_text()
    slide = json.loads(text.split('id="slide-0">')[1].split("</script>")[0])
    assert slide["genes"] == GENES and "that vary most" not in text
    size = slide_view(read_prediction(files[0])).bytes_of_gene
    picture = len(json.dumps(slide["image"]))
    text = write_explorer(path, files[:1], title="small", genes=["CONSTANT"], max_bytes=picture + 2 * size).read_text()
    kept = json.loads(text.split('id="slide-0">')[1].split("</script>")[0])["genes"]
    spread = dict(zip(GENES, np.asarray(read_prediction(files[0]).X).std(axis=0)))
    assert set(kept) == {"CONSTANT", max(spread, key=lambda gene: spread[gene])}
    assert "Of 4 genes the 2 that vary most are here." in text


def test_all_of_her2st_fits_into_25_megabytes(tmp_path: Path) -> None:
    """Its 13 620 spots x 250 genes with counts and a standard deviation, its 36 pictures as noise, which compresses worst."""
    generator = np.random.default_rng(0)
    values = generator.gamma(2, 0.3, size=(13620, 250)).astype(np.float32)
    file = tmp_path / "all.h5ad"
    write_prediction(
        file, slide="all", spot_ids=[f"{spot}x{spot}" for spot in range(13620)],
        genes=[f"GENE{gene}" for gene in range(250)], predictions={"fused": values},
        spatial_px=generator.uniform(0, 4000, size=(13620, 2)), grid_xy=None, measured=values[::-1],
        measured_unsmoothed=None, image=generator.integers(120, 255, size=(1000, 1000, 3), dtype=np.uint8),
        image_scale=0.25, spot_diameter_px=100, unit="unit", provenance={}, trust=Trust(std=values / 10),
    )  # fmt: skip
    text = write_explorer(tmp_path / "explorer.html", [file], title="HER2ST").read_text()
    assert "that vary most" not in text
    picture = len(text.split('"url":"data:image/jpeg;base64,')[1].split('"')[0])
    assert len(text) + 35 * picture < 25_000_000


SHOWN = """(() => { const found = []; const walk = (node) => { for (const child of node.querySelectorAll('*')) {
  if (child.shadowRoot) { if (child.shadowRoot.querySelector('.bk-tooltip-row-label, .bk-tooltip-row-value'))
    found.push(child.shadowRoot.textContent); walk(child.shadowRoot); } } }; walk(document); return found.join(' '); })()"""
SPOTS = "Bokeh.documents[0].get_model_by_name('left_spots').data_source.data"


def model(name: str) -> str:
    return f"Bokeh.documents[0].get_model_by_name('{name}')"


def box(browser: Browser, expression: str) -> tuple[float, float, float, float]:
    """left, top, width, height of an element."""
    rect = f"(({expression}).getBoundingClientRect())"
    return tuple(browser.value(f"{rect}.{side}") for side in ("left", "top", "width", "height"))


def choose(browser: Browser, name: str, steps: int) -> None:
    """Go `steps` options down in a choice, by the keyboard."""
    browser.value(f"document.getElementById('{name}').focus()")
    for _ in range(steps):
        browser.key("ArrowDown")


@pytest.mark.browser
@NEEDS_CHROMIUM
def test_explorer_in_a_browser(page: Path, files: list[Path], tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        started = time.monotonic()
        browser.open(page)
        browser.wait("document.body && document.body.dataset.ready === 'yes'")
        assert time.monotonic() - started < 30  # a hang, not a measurement: the machine may be busy
        assert browser.value("document.title") == f"Genes of {MARKUP}"
        first = read_prediction(files[0])
        shown = np.array(browser.value(f"Array.from({SPOTS}.measured)"))
        np.testing.assert_allclose(shown, first.layers["measured"][:, 0], atol=0.01)

        # Another gene, one whose name is markup.
        choose(browser, "gene", 1)
        assert browser.value("document.getElementById('gene').selectedOptions[0].text") == GENES[1]
        shown = np.array(browser.value(f"Array.from({SPOTS}.error)"))
        np.testing.assert_allclose(shown, np.asarray(first.X)[:, 1] - first.layers["measured"][:, 1], atol=0.02)

        # The left panel: measured -> predicted -> error.
        choose(browser, "left", 2)
        assert browser.value("document.getElementById('left').value") == "error"
        assert browser.value(f"{model('left_spots')}.glyph.fill_color.field") == "error"
        low, high = (browser.value(f"{model('left_colors')}.{end}") for end in ("low", "high"))
        assert low == -high < 0

        # Pointing at the last spot, whose name is markup too, shows its values.
        left, top, width, height = box(browser, "document.getElementById('panels')")
        inner = f"Bokeh.index.find_one({model('left')})"
        frame = box(browser, f"{inner}.canvas_view.el")
        place = browser.value(
            f"[{inner}.frame.x_scale.compute({SPOTS}.x[29]), {inner}.frame.y_scale.compute({SPOTS}.y[29])]"
        )
        x, y = frame[0] + place[0], frame[1] + place[1]
        assert left < x < left + width and top < y < top + height
        browser.mouse("mouseMoved", x + 1, y + 1)
        browser.mouse("mouseMoved", x, y)
        browser.wait(f"{SHOWN}.includes('measured')")
        text = browser.value(SHOWN)
        assert MARKUP in text and f"{shown[29]:.3f}".replace("-", "") in text

        # The wheel zooms into both panels.
        before = browser.value(f"{model('right')}.x_range.end - {model('right')}.x_range.start")
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
        browser.wait(f"{model('right')}.x_range.end - {model('right')}.x_range.start < {0.95 * before}")
        assert browser.value(f"{model('left')}.x_range === {model('right')}.x_range")

        # The slide without counts and without an image: no measured values, no error, no tissue.
        choose(browser, "slide", 1)
        assert browser.value("[...document.getElementById('right').options].map((option) => option.text)") == [
            "predicted", "standard deviation",
        ]  # fmt: skip
        assert browser.value(f"{SPOTS}.x.length") == 24
        assert browser.value("document.getElementById('gene').selectedIndex") == 1
        assert browser.value("document.title") == f"Genes of {MARKUP}"
        assert browser.console == []
