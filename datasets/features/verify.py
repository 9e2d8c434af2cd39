"""Whether a cache was made from what it should have been made from: image, encoder, spots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets.features.cache import keeping, opened
from datasets.features.identity import UNKNOWN, CacheIdentity
from datasets.layout import Layout

_NAMED_AT_MOST = 5  # spots in a message
# What to set so that a cache of another value fits.
_SETTINGS = {"encoder": "DATA.encoder={}", "encoder_sha256": "those weights (--weights)"}
_OF_TOKENS = {name: f"--{name} {{}}" for name in ("views", "token_pool", "dtype")}


def verify_cache(
    path: str | Path,
    expected: Mapping[str, object],
    spot_ids: Sequence[str],
    centers: np.ndarray,
    repair: Callable[[], str],
) -> CacheIdentity:
    """Check a cache against what it should have been made from, before its first number is used.

    expected: fields of CacheIdentity with the values they must have.  spot_ids (N,), centers (N, 2): the spots of the
    slide, in order.  repair: spells the command that makes the cache again.
    Returns what the cache says about itself. Raises FileNotFoundError, or one ValueError with every difference found.
    """
    with opened(path, repair) as cache:
        identity = cache.identity
        differing = [name for name, value in expected.items() if not _is_same(getattr(identity, name), value)]
        problems = [_describe_field(name, getattr(identity, name), expected[name]) for name in differing]
        problems += _compare_spots(cache.spot_ids, cache.centers, list(spot_ids), np.asarray(centers))
    if len(problems) == 1:
        raise ValueError(f"{path} cannot be used: {problems[0]}. {_what_to_do(identity, differing, 1, repair)}")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        what_to_do = _what_to_do(identity, differing, len(problems), repair)
        raise ValueError(f"{path} cannot be used, for {len(problems)} reasons:\n{listed}\n{what_to_do}")
    return identity


def expected_size(layout: Layout) -> dict[str, object]:
    """Give the fields about the size of a patch that every cache of a data folder must agree with."""
    return {"patch_size": layout.patch_size, "patch_um": layout.patch_um}


def _what_to_do(identity: CacheIdentity, differing: Sequence[str], count: int, repair: Callable[[], str]) -> str:
    """A cache of other settings took as long as this would: work with them if that is all, and keep it in any case.

    count: of all problems, those with spots included.
    """
    settings = _SETTINGS | (_OF_TOKENS if identity.kind == "token" else {})
    own = {name: settings[name].format(getattr(identity, name)) for name in differing if name in settings}
    advice = keeping(repair())
    if not own or len(own) < count:
        return advice
    if "encoder" in own:
        own.pop("encoder_sha256", None)  # other weights, of course
    return f"Work with {' and '.join(own.values())}, or {advice[0].lower()}{advice[1:]}"


def _is_same(found: object, expected: object) -> bool:
    if found == UNKNOWN:
        return True
    if isinstance(found, float) and isinstance(expected, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == (tuple(expected) if isinstance(expected, list) else expected)


def _describe_field(name: str, found: object, expected: object) -> str:
    if name == "image_fingerprint":
        return f"it was made from another image file (fingerprint {found}, expected {expected})"
    if name == "encoder_sha256":
        return f"it was made with other weights of the encoder (SHA-256 {found}, expected {expected})"
    if name == "encoder":
        return f"it was made with encoder {found!r}, expected {expected!r}"
    if name == "patch_um":
        widths = [f"{width:g} um wide" if isinstance(width, float) else "not scaled" for width in (found, expected)]
        return f"its patches are {widths[0]}, expected {widths[1]} (DATA.patch_um)"
    return f"its {name.replace('_', ' ')} is {found}, expected {expected}"


def _compare_spots(
    found: list[str], found_centers: np.ndarray, expected: list[str], expected_centers: np.ndarray
) -> list[str]:
    """Sentences about spots that are missing, extra, in another order or elsewhere on the image."""
    if found != expected:
        is_there, is_expected = set(found), set(expected)
        missing = [spot for spot in expected if spot not in is_there]
        extra = [spot for spot in found if spot not in is_expected]
        if not missing and not extra:
            return [f"it holds the {len(found)} spots of the slide in another order"]
        return [
            f"it holds {len(found)} spots but the slide has {len(expected)} "
            f"({_counted(missing, 'missing')}; {_counted(extra, 'extra')}): it was made from another spot or count table"
        ]
    moved = np.flatnonzero((found_centers != expected_centers).any(axis=1))
    if len(moved):
        first = moved[0]
        return [
            f"{len(moved)} of its {len(found)} spots have another centre (spot {found[first]}: "
            f"{tuple(found_centers[first].tolist())}, expected {tuple(expected_centers[first].tolist())}): it was made "
            "from another spot table"
        ]
    return []


def _counted(spots: list[str], what: str) -> str:
    named = f": {', '.join(spots[:_NAMED_AT_MOST])}" if spots else ""
    return f"{len(spots)} {what}{named}{', ...' if len(spots) > _NAMED_AT_MOST else ''}"
