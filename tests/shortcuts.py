"""What tests of other things leave out: the drawing of figures and of the explorer, and reading an encoder again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
from PIL import Image

from models.patch_encoders import build

_read = build.load_patch_encoder


@contextmanager
def shortcuts() -> Iterator[None]:
    """A figure is one pixel and the explorer its title; both are there. The encoder of an unchanged file is read once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("report.fold_figures", "report.write", "comparison.write"):
            patch.setattr(f"evaluation.{module}.save_figure", one_pixel)
        for module in ("evaluation.report.explorer", "modes.prediction.summary", "modes.external_test"):
            patch.setattr(f"{module}.write_explorer", title_page)
        patch.setattr(build, "load_patch_encoder", lambda spec, path: _read_once(spec, path, path.stat().st_mtime_ns))
        yield


@lru_cache(maxsize=4)
def _read_once(spec, path: Path, _mtime_ns: int):
    """An encoder is frozen, so whoever runs it can have the same."""
    return _read(spec, path)


def one_pixel(_figure, path: Path) -> tuple[Path, Path]:
    """In the place of `save_figure`; tests/evaluation/report looks at its figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        Image.new("RGB", (1, 1)).save(f"{path}{suffix}", format="PNG")
    return Path(f"{path}.png"), Path(f"{path}.svg")


def title_page(path: Path, predictions: Sequence[Path], *, title: str, genes: Sequence[str] = ()) -> Path:
    """In the place of `write_explorer`; tests/evaluation/report opens its pages."""
    assert predictions and all(prediction.is_file() for prediction in predictions)
    path.write_text(f"{title}: {', '.join(genes)}")
    return path


def keep_spots(root: Path, count: int = 12) -> None:
    """Cut every slide of a data set to its first spots, two rows of them; what is kept still has neighbors."""
    paths = list(root.glob("ST-spotfiles/*_selection.tsv"))
    assert paths
    for path in paths:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: count + 1]))
