"""One slide for several processes: each makes caches of some of its spots, and the last puts the slide's caches together.

A part lies beside the cache that it is of, and is one itself: `A1.spots_0-1024.part` beside `A1.h5`. What is there and
valid is kept by whoever starts again, with as many processes.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from datasets.features.cache import opened, write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.verify import verify_cache

FEWEST = 256  # spots of a part: some batches of the encoder
_PIECE = 1 << 26  # bytes that are copied at a time


def cut(num_spots: int, most: int) -> list[slice]:
    """Cut the spots of a slide into as few equal ranges as there can be of at most `most`, or FEWEST, spots."""
    count = max(1, -(-num_spots // max(most, FEWEST)))
    bounds = [num_spots * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def part_of(cache: Path, rows: slice) -> Path:
    """Name the file of some spots of a cache."""
    return cache.with_name(f"{cache.stem}.spots_{rows.start}-{rows.stop}.part")


def is_made(part: Path, identity: CacheIdentity, spot_ids: Sequence[str], centers: np.ndarray) -> bool:
    """Whether a part is there, made from what it would be made from now."""
    try:
        verify_cache(part, vars(identity), spot_ids, centers, repair=str)
    except (FileNotFoundError, ValueError):
        return False
    return True


def numbers_of(part: Path) -> Iterator[np.ndarray]:
    """Yield the numbers of a part, piece by piece. Raises ValueError for those that are not what was written."""
    with opened(part, partial(_repair, part)) as cache:
        count = len(cache.numbers)
        step = max(1, _PIECE * count // max(cache.numbers.nbytes, 1))
        for first in range(0, count, step):
            yield cache.read(slice(first, first + step))


def join(
    cache: Path, ranges: Sequence[slice], identity: CacheIdentity, spot_ids: Sequence[str], centers: np.ndarray
) -> bool:
    """Put a cache together from its parts, whose files go; False while one of them is missing.

    The lock of the cache is held. Raises ValueError for a part whose numbers are not those that were written.
    """
    parts = [part_of(cache, rows) for rows in ranges]
    if not all(is_made(part, identity, spot_ids[rows], centers[rows]) for part, rows in zip(parts, ranges)):
        return False
    write_cache(cache, identity, spot_ids, centers, chain.from_iterable(map(numbers_of, parts)))
    remove_parts(cache)
    return True


def remove_parts(cache: Path) -> None:
    """Remove the parts of a complete cache."""
    for part in cache.parent.glob(f"{glob.escape(cache.stem)}.spots_*-*.part"):
        part.unlink(missing_ok=True)


def _repair(part: Path) -> str:
    return f"the same command again (it makes {part.name} anew)"
