"""What tests of other things leave out: drawing figures, and reading and encoding the same again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from anndata import AnnData
from PIL import Image
from torch import Tensor
from xxhash import xxh3_128_digest

from datasets.images import overlay
from datasets.images.slides import Slide
from datasets.images.spots_on_tissue import SpotsOnTissue, TissuePicture, check_spots_on_tissue
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from models.contract import ExpressionModel
from models.patch_encoders import build
from models.patch_encoders.spec import PatchEncoderSpec, TimmModel, Tokens
from modes.checks import tissue
from modes.prediction.model import make_model
from modes.training import memory
from utils.config import Config
from utils.files import sha256
from utils.text import parse_yaml
from utils.untrusted import hdf5
from utils.untrusted.tensors import load_tensors

_read, _encode, _look_at, _probe = build.load_patch_encoder, build.encode, TissuePicture.of, hdf5.probe_hdf5
_TOKENS: WeakKeyDictionary[TimmModel, dict[tuple, Tokens]] = WeakKeyDictionary()
_SEEN: dict[Hashable, TissuePicture] = {}
_ON_TISSUE: dict[Hashable, tuple[TissuePicture, SpotsOnTissue]] = {}  # a picture that is held keeps its id
_TABLES: dict[Hashable, AnnData] = {}
_PROBED: dict[Hashable, None] = {}
_SIZED: dict[Hashable, ExpressionModel] = {}
_CHECKPOINTS: dict[Hashable, object] = {}


@contextmanager
def shortcuts() -> Iterator[None]:
    """A figure is one pixel, the explorer its title and the picture in a prediction small; all are there. Encoders, tables,
    checkpoints and configurations are read, and predictions walked through, once as long as their files do not change, a batch
    of patches is encoded, the tissue of an image found and compared with spots, and the parameters of a model counted, once.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in ("report.style", "report.fold_figures", "report.write", "comparison.write"):
            patch.setattr(f"evaluation.{module}.save_figure", one_pixel)
        for module in ("evaluation.report.explorer", "modes.prediction.summary", "modes.external_test"):
            patch.setattr(f"{module}.write_explorer", title_page)
        patch.setattr("modes.prediction.write.THUMBNAIL_PX", 100)
        for module in ("datasets.features.reader", "modes.checks.data", "preprocess.extraction.plan"):
            patch.setattr(f"{module}.load_slide", load_slide_once)
        patch.setattr("utils.checkpoint.load_tensors", load_tensors_once)
        patch.setattr(hdf5, "probe_hdf5", probe_once)
        patch.setattr(memory, "make_model", sized_once)
        patch.setattr("utils.config.parse_yaml", lambda text: deepcopy(parse_yaml_once(text)))
        read_encoders_once(patch)
        patch.setattr(build, "encode", encode_once)
        patch.setattr(TissuePicture, "of", look_once)
        for module in (overlay, tissue):
            patch.setattr(module, "check_spots_on_tissue", check_once)
        patch.setattr(overlay, "draw_overlay", one_colour)
        yield


def read_encoders_once(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone the same encoder is read from an unchanged file once."""
    patch.setattr(build, "load_patch_encoder", lambda spec, path: _read_once(spec, path, path.stat().st_mtime_ns))
    patch.setattr(build, "sha256", lambda path: _hash_once(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _read_once(spec, path: Path, _mtime_ns: int):
    """An encoder is frozen, so whoever runs it can have the same."""
    return _read(spec, path)


@lru_cache(maxsize=4)
def _hash_once(path: Path, _mtime_ns: int) -> str:
    return sha256(path)


parse_yaml_once = lru_cache(maxsize=200)(parse_yaml)


def once(known: dict[Hashable, Any], key: Hashable, make: Callable[[], Any], most: int) -> Any:
    """What was made for this key before, or else is made now; of more than `most` of them all are forgotten."""
    if key not in known:
        if len(known) == most:
            known.clear()
        known[key] = make()
    return known[key]


def state_of(path: Path) -> bytes:
    """What is another when the file is, and the same of a copy."""
    return xxh3_128_digest(path.read_bytes())


def encode_once(spec: PatchEncoderSpec, encoder: TimmModel, images: Tensor) -> Tokens:
    """In the place of `encode`: the same patches in the same batch are encoded once."""
    if images.device.type != "cpu" or images.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return _encode(spec, encoder, images)
    key = (xxh3_128_digest(images.contiguous().numpy()), images.shape, torch.is_inference_mode_enabled())
    return once(_TOKENS.setdefault(encoder, {}), key, lambda: _encode(spec, encoder, images), 200)


def look_once(slide: Slide) -> TissuePicture:
    """In the place of `TissuePicture.of`."""
    return once(_SEEN, state_of(slide.path), lambda: _look_at(slide), 20)


def check_once(picture: TissuePicture, centers: np.ndarray, totals: np.ndarray | None) -> SpotsOnTissue:
    """In the place of `check_spots_on_tissue`."""
    key = (id(picture), centers.tobytes(), None if totals is None else totals.tobytes())
    return once(_ON_TISSUE, key, lambda: (picture, check_spots_on_tissue(picture, centers, totals)), 100)[1]


def load_slide_once(layout: Layout, slide: str, genes: Sequence[str] | None = None) -> AnnData:
    """In the place of `load_slide`; what is wrong with a slide is found again and again."""
    try:
        files = [state_of(path) for path in (layout.counts_path(slide), layout.spots_path(slide))]
    except (OSError, ValueError):
        return load_slide(layout, slide, genes)
    key = (*files, repr(replace(layout.spec, source=None)), slide, None if genes is None else tuple(genes))
    return once(_TABLES, key, lambda: load_slide(layout, slide, genes), 100).copy()


def load_tensors_once(path: str | Path, **how: Any) -> object:
    """In the place of `load_tensors`, for checkpoints; everybody gets tensors of his own."""
    try:
        key = (state_of(Path(path)), *how.items())
    except OSError:
        return load_tensors(path, **how)
    return _own(once(_CHECKPOINTS, key, lambda: _own(load_tensors(path, **how)), 50))


def probe_once(path: Path, *said: str) -> None:
    """In the place of `probe_hdf5`, for what is opened with `opened_hdf5`: our predictions are read again and again."""
    once(_PROBED, state_of(path), lambda: _probe(path, *said), 200)


def sized_once(config: Config, **sizes: int) -> ExpressionModel:
    """In the place of `make_model`, for whoever only counts parameters."""
    key = (repr(config.MODEL), config.DATA.num_neighbors, *sizes.items())
    return once(_SIZED, key, lambda: make_model(config, **sizes), 50)


def _own(value: Any) -> Any:
    """A copy whose numbers lie in memory, not in a file that a test may write over."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return type(value)(map(_own, value)) if isinstance(value, list | tuple) else value


def one_colour(_picture: TissuePicture, centers: np.ndarray, _is_on_tissue: np.ndarray) -> Image.Image:
    """In the place of `draw_overlay`; other spots give another colour."""
    return Image.new("RGB", (16, 16), tuple(int(v) % 256 for v in (*centers.sum(axis=0), len(centers))))


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
