"""How a process ends that has run out of disk: with all that libraries do when it does."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path


def ended(work: Callable[[], int], log: Path) -> tuple[int, str]:
    """Exit status (negative for a signal) and output of a forked process that does the work and exits with what it returns.

    C's own exit, in which HDF5 closes what is open, and not Python's, in which pytest would end a second time.
    """
    process = os.fork()
    if process == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 70
        try:
            status = work()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            ctypes.CDLL(None).exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, log.read_text(errors="replace")
