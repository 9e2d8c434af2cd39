"""Where the cache of a slide lies: several patch encoders share a data folder, and none writes over what another has made."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from datasets.features.cache import read_identity
from datasets.features.identity import NO_ENCODER
from datasets.layout import Layout
from utils.config import Data


def find_cache(layout: Layout, kind: str, slide: str) -> Path:
    """Find the cache that the folder's encoder has made of a slide, in any of the places where it may lie.

    Where there is none, returns the place where it is to be written: never that of another encoder's cache.
    """
    usual, *others = layout.cache_paths(kind, slide)
    if usual.is_file() and _maker(usual) in (layout.encoder, NO_ENCODER, None):
        return usual  # a damaged one, too: whoever reads it says so
    for path in others:
        if path.is_file() and _maker(path) == layout.encoder:
            return path
    is_taken = usual.exists() and layout.encoder == Data.encoder  # whose usual place is the plain one
    return others[0] if is_taken else usual


def other_encoders(layout: Layout, kind: str, slide: str) -> list[str]:
    """Name the other encoders that have made a cache of a slide."""
    makers = {_maker(path) for path in layout.caches_of_all_encoders(kind, slide)}
    return sorted(maker for maker in makers if maker not in (layout.encoder, None))


def other_widths(layout: Layout, kind: str, slide: str) -> list[str]:
    """Say how wide the patches of the caches of a slide are that were made with another width (DATA.patch_um)."""
    own = layout.cache_path(kind, slide).parent
    folders = [path.parent.name for path in layout.caches_of_all_widths(kind, slide) if path.parent != own]
    return [f"{name.rpartition('_')[2][:-2]} um wide" if name.endswith("um") else "not scaled" for name in folders]


def _maker(path: Path) -> str | None:
    """The encoder that made a cache; None for a file that does not say."""
    found = path.stat()
    return _read_maker(path, found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=4096)
def _read_maker(path: Path, *_version: int) -> str | None:
    try:
        return read_identity(path).encoder
    except (ValueError, OSError):
        return None
