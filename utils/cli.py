"""What every command line of the project shares: exit statuses, progress bars, the choice of the device."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
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


def device_from(gpu: int | None = None, device: str | None = None) -> torch.device:
    """The device asked for, or CUDA if there is one, or the CPU, said aloud.

    gpu: index of a CUDA device (`--gpu`); one that does not exist is an error, never a silent CPU.
    device: any PyTorch device name (`--device`).
    """
    if gpu is not None and device is not None:
        raise ValueError(f"--gpu {gpu} and --device {device} are both given; give one of them.")
    if device is not None:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"--device {device} is not a device of PyTorch: {str(error).splitlines()[0]}") from error
        return _cuda_device(chosen.index, f"--device {device}") if chosen.type == "cuda" else chosen
    if gpu is not None:
        return _cuda_device(gpu, f"--gpu {gpu}")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    say("No CUDA device found: running on the CPU.")
    return torch.device("cpu")


def _cuda_device(index: int | None, flag: str) -> torch.device:
    """The CUDA device of that index (None: the current one), made the current one: pinned memory, streams and the
    measure of memory in use follow the current device, not the tensors."""
    _require_cuda(index or 0, flag)
    if index is None:
        return torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _require_cuda(index: int, flag: str) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= index < count:
        found = f"{count} CUDA device{'s' if count != 1 else ''}"
        raise ValueError(f"{flag}: this machine has {found}. Leave the flag out or use --device cpu to run on the CPU.")
