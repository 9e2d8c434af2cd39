"""Reports of blank figures, for tests of what leads to a report; that figures are drawn is seen by tests/evaluation/report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image


@contextmanager
def blank_figures() -> Iterator[None]:
    """Save every figure as one pixel, and the page of genes as its title."""

    def save_figure(_figure: object, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(f"{path}.png")
        Path(f"{path}.svg").touch()

    def write_explorer(path: Path, predictions: list[Path], *, title: str) -> None:
        assert predictions and all(file.is_file() for file in predictions)
        path.write_text(title)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("evaluation.report.fold_figures", "evaluation.report.write"):
            patch.setattr(f"{module}.save_figure", save_figure)
        for module in ("modes.prediction.summary", "modes.external_test"):
            patch.setattr(f"{module}.write_explorer", write_explorer)
        yield
