"""Memory that is freed and taken again costs no page faults any more. In a process of its own: it cannot be undone."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES_OF_A_ROUND = 2 * 80 * 2**20 // 4096  # two blocks of 80 MiB in pages of 4 KiB
SCRIPT = """
import json, resource, sys
import numpy as np
from utils.devices import keep_freed_memory

took_effect = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first, second = np.empty(80 * 2**20, np.uint8), np.empty(80 * 2**20, np.uint8)
    first[::4096], second[::4096] = 1, 1
    del first, second
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"took_effect": took_effect, "faults": faults}))
"""


def faults_of(what: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    kept, given_back = faults_of("keep"), faults_of("default")
    assert kept["took_effect"] is True
    assert kept["faults"][0] > 0 and max(kept["faults"][1:]) < PAGES_OF_A_ROUND / 100
    assert min(given_back["faults"]) > 10 * max(kept["faults"][1:]), "nothing was gained: is the function needed?"


def test_other_c_libraries_are_left_alone(monkeypatch):
    from utils import devices

    monkeypatch.setattr(devices.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda *_: pytest.fail("asked a library that may lack mallopt"))
    assert devices.keep_freed_memory() is False
