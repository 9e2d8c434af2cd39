"""What every command line of the project shares: exit statuses, what is said, progress bars."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from utils.files import reason_of
from utils.text import ended, shortened

_OF_PYTORCH_WITHOUT_MEMORY = ("can't allocate memory", "CUDA out of memory")
WRONG_USE = 2
_is_quiet = False
_STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # of a cluster whose time is up; SIGINT is Python's own
_GO_ON = "run the same command again"


class Stopped(KeyboardInterrupt):
    """A signal that ends the program in order, as Ctrl-C does. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def going_on_by(advice: str) -> Iterator[None]:
    """Say how to go on, should the block be interrupted or its reader go, in place of "run the same command again"."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError) as end:
        end.add_note(advice)
        raise


def run(main: Callable[[], None]) -> NoReturn:
    """Run a program and leave with its exit status.

    0 done; 2 wrong use, bad input, or a machine that lacks the disk or the memory for it (ValueError, OSError, MemoryError,
    RecursionError: one message, no traceback); 128 and the number of the signal when interrupted, so 130 by Ctrl-C, 143 by
    SIGTERM (everything finished so far is on the disk); 1 anything else, with the traceback, since that is our fault, and
    without one if the reader of the output has gone (`| head`).
    """
    try:
        try:
            with _stopping_on_signals():
                main()
        finally:
            sys.stdout.flush()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    except BrokenPipeError as gone:
        print(f"stopped, for whoever read the output has gone: {_what_is_kept(gone)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes when it ends
        sys.exit(1)
    except (OSError, MemoryError, RecursionError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(WRONG_USE)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted: {_what_is_kept(interrupt)}", file=sys.stderr)
        sys.exit(128 + getattr(interrupt, "number", signal.SIGINT))
    except Exception as error:
        if any(words in str(error) for words in _OF_PYTORCH_WITHOUT_MEMORY):
            print(f"error: it takes more memory than there is ({shortened(str(error))})", file=sys.stderr)
            sys.exit(WRONG_USE)
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _what_is_kept(end: BaseException) -> str:
    """Where things stand after an end in order, and how to go on (`going_on_by`)."""
    return f"finished work is kept; {' '.join(getattr(end, '__notes__', ())) or _GO_ON}."


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Let the signals of a cluster end the block as Ctrl-C would; a process that is forked inside dies of them as usual."""
    process = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Stopped(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    with _handling_signals(stop):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let what the first signal of a cluster asks for come to its end, though the cluster repeats it; Ctrl-C still ends it."""
    with _handling_signals(signal.SIG_IGN):
        yield


@contextmanager
def _handling_signals(handling: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Handle the signals of a cluster so in the block, but for those that are ignored; other threads cannot, and do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}
    for number in (number for number, handler in before.items() if handler is not signal.SIG_IGN):
        signal.signal(number, handling)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _sentence(error: OSError | MemoryError | RecursionError) -> str:
    """One message for what the machine refused; an OSError without a number is ours and already is one."""
    if isinstance(error, OSError) and error.errno is None:
        return str(error)
    reason, advice = reason_of(error)
    named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"{named}{ended(reason)} {advice or ''}".rstrip()


def be_quiet() -> None:
    """Say nothing from now on and show no progress: another process speaks for this one. Errors are still told."""
    global _is_quiet
    _is_quiet = True


def say(message: str) -> None:
    """Print a line to the user without tearing a progress bar."""
    if _is_quiet:
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def progress(
    iterable: Iterable | None = None, *, total: int | None = None, description: str = "", unit: str = "it", leave=True
):
    """Show a progress bar with a rate and an ETA on standard error; none where that is no terminal: a log has lines."""
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        leave=leave,
        disable=_is_quiet or not sys.stderr.isatty(),
        dynamic_ncols=True,
        mininterval=0.5,
        file=sys.stderr,
    )
