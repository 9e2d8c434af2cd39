"""What tests of other things leave out: drawing figures, and doing the same to the same encoder or image again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from xxhash import xxh3_128_digest

from datasets.images import overlay
from datasets.images.slides import Slide
from datasets.images.spots_on_tissue import TissuePicture
from models.patch_encoders import build
from models.patch_encoders.spec import PatchEncoderSpec, TimmModel, Tokens
from utils.files import sha256

_read, _encode, _look_at = build.load_patch_encoder, build.encode, TissuePicture.of
_TOKENS: WeakKeyDictionary[TimmModel, dict[tuple, Tokens]] = WeakKeyDictionary()
_SEEN: dict[tuple[str, int, int], TissuePicture] = {}


@contextmanager
def shortcuts() -> Iterator[None]:
    """A figure is one pixel and the explorer its title; both are there. Of an unchanged file the encoder is read, a batch of
    patches encoded and the tissue found once.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in ("report.fold_figures", "report.write", "comparison.write"):
            patch.setattr(f"evaluation.{module}.save_figure", one_pixel)
        for module in ("evaluation.report.explorer", "modes.prediction.summary", "modes.external_test"):
            patch.setattr(f"{module}.write_explorer", title_page)
        patch.setattr(build, "load_patch_encoder", lambda spec, path: _read_once(spec, path, path.stat().st_mtime_ns))
        patch.setattr(build, "sha256", lambda path: _hash_once(path, path.stat().st_mtime_ns))
        patch.setattr(build, "encode", encode_once)
        patch.setattr(TissuePicture, "of", look_once)
        patch.setattr(overlay, "draw_overlay", one_colour)
        yield


@lru_cache(maxsize=4)
def _read_once(spec, path: Path, _mtime_ns: int):
    """An encoder is frozen, so whoever runs it can have the same."""
    return _read(spec, path)


@lru_cache(maxsize=4)
def _hash_once(path: Path, _mtime_ns: int) -> str:
    return sha256(path)


def encode_once(spec: PatchEncoderSpec, encoder: TimmModel, images: Tensor) -> Tokens:
    """In the place of `encode`: the same patches in the same batch are encoded once."""
    if images.device.type != "cpu" or images.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return _encode(spec, encoder, images)
    known = _TOKENS.setdefault(encoder, {})
    key = (xxh3_128_digest(images.contiguous().numpy()), images.shape, torch.is_inference_mode_enabled())
    if key not in known:
        if len(known) == 200:
            known.clear()
        known[key] = _encode(spec, encoder, images)
    return known[key]


def look_once(slide: Slide) -> TissuePicture:
    """In the place of `TissuePicture.of`; a copy of an image has its name, its length and its time."""
    stat = slide.path.stat()
    key = (slide.path.name, stat.st_size, stat.st_mtime_ns)
    if key not in _SEEN:
        if len(_SEEN) == 20:
            _SEEN.clear()
        _SEEN[key] = _look_at(slide)
    return _SEEN[key]


def one_colour(picture: TissuePicture, centers: np.ndarray, _is_on_tissue: np.ndarray) -> Image.Image:
    """In the place of `draw_overlay`; other spots give another colour."""
    height, width, _ = picture.picture.shape
    return Image.new("RGB", (width, height), tuple(int(v) % 256 for v in (*centers.sum(axis=0), len(centers))))


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
