"""TODO utils/text.py"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 2, 80, 80, 40


def shortened(value: object, length: int = 200) -> str:
    """Return a text, or the `repr` of any other value, on one line of at most `length` characters.

    What is nested is cut at its second level before it is written out, so that a few lines of YAML whose aliases multiply
    do not become a message of megabytes.
    """
    text = value[: 2 * length] if isinstance(value, str) else _BRIEF.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few names and how many there are in all, for a message."""
    text = ", ".join(str(name) for name in list(names)[:shown])
    return text if len(names) <= shown else f"{text}, ... ({len(names)} in all)"
