"""Forked processes that find each other as those that torchrun starts do."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

LONGEST = 300.0  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process ended. status: exit status, negative for a signal. result: what its work returned, None if nothing."""

    status: int
    result: Any
    output: str


def run_team(size: int, work: Callable[[int], Any], folder: Path, *, with_torchrun: bool = True) -> list[Ended]:
    """Run work(rank) in `size` forked processes, with the environment that torchrun gives, and wait for all of them.

    Skips the test on a machine with CUDA, beside which PyTorch computes no gradients in forked processes.
    folder: for their results. with_torchrun: False for jobs that know nothing of each other.
    """
    if torch.cuda.is_available():
        pytest.skip("forked processes compute no gradients beside CUDA")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [_start(rank, size, port if with_torchrun else None, work, folder) for rank in range(size)]
    statuses, deadline = {}, time.monotonic() + LONGEST
    while len(statuses) < size:
        for pid in started:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [_ended(statuses[pid], folder / f"process_{rank}") for rank, pid in enumerate(started)]


def _start(rank: int, size: int, port: int | None, work: Callable[[int], Any], folder: Path) -> int:
    place = folder / f"process_{rank}"
    for suffix in (".result", ".log"):
        place.with_suffix(suffix).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # what was there before the fork is not looked through, and so not copied, again and again
    log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if port is not None:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        place.with_suffix(".result").write_bytes(pickle.dumps(work(rank)))
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as left:
        status = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ended(status: int, place: Path) -> Ended:
    result = place.with_suffix(".result")
    found = pickle.loads(result.read_bytes()) if result.exists() and status == 0 else None
    return Ended(status, found, place.with_suffix(".log").read_text(errors="replace"))
