"""Imported before the libraries, whose start takes seconds: Ctrl-C meanwhile ends a program in order, without a traceback.

Once `utils.cli.run` has begun, that is its work.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

_INTERRUPTED = 130  # 128 and the number of SIGINT
_others = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _others(kind, error, trace)
        return
    parent_of = getattr(sys.modules.get("multiprocessing"), "parent_process", lambda: None)
    if parent_of() is None:  # the others keep silent
        sys.stderr.write("\ninterrupted: nothing was begun; run the same command again.\n")
        sys.stderr.flush()
    os._exit(_INTERRUPTED)  # Python itself would end by the signal, and some libraries do not end well half imported


sys.excepthook = _hook
