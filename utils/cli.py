"""What every command line of the project shares: exit statuses, progress bars, the choice of the device."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from tqdm import tqdm

WRONG_USE, INTERRUPTED = 2, 130
INTERRUPTED_TEXT = "interrupted: finished work is kept; run the same command again (a training with --resume added)."


def run(main: Callable[[], None]) -> NoReturn:
    """Run a program and leave with its exit status.

    0 done; 2 wrong use or bad input (ValueError, FileNotFoundError: one message, no traceback); 130 interrupted
    (everything finished so far is on the disk); 1 anything else, with the traceback, since that is our fault.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED_TEXT}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def say(message: str) -> None:
    """Print a line to the user without tearing a progress bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def progress(
    iterable: Iterable | None = None, *, total: int | None = None, description: str = "", unit: str = "it", leave=True
):
    """A progress bar with a rate and an ETA on standard error; silent when that is no terminal and output is piped."""
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    )
