"""Caches that a process had written whole when it was killed, but not all given their names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from datasets.features.identity import CacheIdentity
from preprocess.extraction.parts import is_made, numbers_of
from preprocess.extraction.plan import SlideWork
from preprocess.extraction.writers import locked_as_they_are
from utils.cli import say
from utils.files import publish
from utils.locks import Held, left_over


def name_what_is_whole(work: Sequence[SlideWork]) -> list[SlideWork]:
    """Give those caches their names that a process had written whole; returns the work that is left.

    The caches of a slide come out of one pass: a kind that is made alone is made in other batches, and differs from that of
    an undisturbed run in the last bits. So all that a slide lacks is taken, or nothing.
    """
    folders = {path.parent for item in work for path in item.made.values()}
    unnamed = {folder: left_over(folder) for folder in folders}
    return [item for item in work if not _is_named(item, unnamed) or item.is_part]


def _is_named(item: SlideWork, unnamed: dict[Path, list[Path]]) -> bool:
    of_kind = {kind: _of_cache(path, unnamed[path.parent]) for kind, path in item.made.items()}
    if not all(of_kind.values()):
        return False
    # Another process may do the same, or work at other slides and sweep the folder: what is gone then is made again, with all
    # that the slide lacks.
    with suppress(Held, FileNotFoundError), locked_as_they_are(item.made.values()):
        found = [(kind, _whole(item, kind, files)) for kind, files in of_kind.items()]
        whole = {kind: file for kind, file in found if file is not None}
        if len(whole) < len(found):
            return False
        for kind, file in whole.items():
            publish(file, item.made[kind])
        say(f"{item.title}: {', '.join(item.paths)} had been written whole, and have their names now.")
        return True
    return False


def _of_cache(path: Path, unnamed: list[Path]) -> list[Path]:
    return [file for file in unnamed if file.name.startswith(f".{path.stem}.") and file.suffix == path.suffix]


def _whole(item: SlideWork, kind: str, files: list[Path]) -> Path | None:
    return next((file for file in files if _is_whole(file, item, item.identities[kind])), None)


def _is_whole(file: Path, item: SlideWork, identity: CacheIdentity) -> bool:
    """Also its numbers are read: it may have been left by a machine that went down, and not by a kill."""
    if not is_made(file, identity, item.spot_ids[item.rows], item.centers[item.rows]):
        return False
    try:
        for _ in numbers_of(file):
            pass
    except (FileNotFoundError, ValueError):
        return False
    return True
