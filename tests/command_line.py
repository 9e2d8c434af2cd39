"""The programs as a user calls them, in this process: exit status, and what they said."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import main
from preprocess import extract_features_uni
from utils.cli import run


@dataclass(frozen=True)
class Left:
    """How a program ended: its exit status, and its output with the message of an error in one text."""

    status: int
    said: str


def call(program: Callable[[], None], *arguments: object) -> Left:
    """Run a program's `main` with a command line, through the same door as the script."""
    before, sys.argv = sys.argv, ["program", *map(str, arguments)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run(program)
    except SystemExit as left:
        return Left(left.code or 0, said.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("run() always leaves")


def call_main(*arguments: object) -> Left:
    """python main.py ..."""
    return call(main.main, *arguments)


def call_extract(*arguments: object) -> Left:
    """python preprocess/extract_features_uni.py ..."""
    return call(extract_features_uni.main, *arguments)
