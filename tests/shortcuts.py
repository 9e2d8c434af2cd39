"""What tests of other things leave out: the drawing of figures and of the explorer, and building an encoder again and again."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image

from evaluation.comparison import write as comparison
from evaluation.report import explorer, fold_figures, write
from models.patch_encoders import build
from modes import external_test
from modes.prediction import summary

_loaded = lru_cache(maxsize=4)(build.load_patch_encoder)  # frozen, so whoever runs it can have the same


def take_shortcuts(patch) -> None:
    """A figure is one pixel and the explorer an empty page; both are there. An encoder is read from its file once."""
    for module in (fold_figures, write, comparison):
        patch.setattr(module, "save_figure", one_pixel)
    for module in (explorer, external_test, summary):
        patch.setattr(module, "write_explorer", empty_page)
    patch.setattr(build, "load_patch_encoder", _loaded)


def one_pixel(_figure, path: Path) -> tuple[Path, Path]:
    """In the place of `save_figure`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        Image.new("RGB", (1, 1)).save(f"{path}{suffix}", format="PNG")
    return Path(f"{path}.png"), Path(f"{path}.svg")


def empty_page(path: Path, predictions: list[Path], **_) -> Path:
    """In the place of `write_explorer`."""
    assert all(prediction.is_file() for prediction in predictions)
    path.write_text("<html></html>")
    return path


def few_spots(spots_dir: Path, count: int) -> None:
    """Keep the first spots of every slide: as many as a test needs."""
    for path in spots_dir.glob("*_selection.tsv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: count + 1]))
