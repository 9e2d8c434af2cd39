"""TODO utils/text.py"""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few names and how many there are in all, for a message."""
    text = ", ".join(str(name) for name in list(names)[:shown])
    return text if len(names) <= shown else f"{text}, ... ({len(names)} in all)"
