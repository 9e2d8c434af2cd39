"""Precisions of a device; memory that is freed and taken again costs no page faults (in a process: it cannot be undone)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.devices import Precision, available_memory, granted_cpus

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
PAGES_OF_A_ROUND = 2 * 80 * 2**20 // 4096  # two blocks of 80 MiB in pages of 4 KiB
SCRIPT = """
import json, resource, sys
from unittest.mock import MagicMock
import numpy as np
sys.modules["torch"] = MagicMock()  # takes seconds, and has no part in it
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


def _group(folder: Path, limit: str, used: int, files: int, version: int) -> None:
    """A control group as the kernel shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"{names[2]}active_file {files // 2}\n{names[2]}inactive_file {files // 2}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_the_least_of_machine_and_control_groups(tmp_path, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    assert available_memory(tmp_path) == 8_192_000, "no control group"
    line, top = ("0::/job/step", "sys/fs/cgroup") if version == 2 else ("4:memory:/job/step", "sys/fs/cgroup/memory")
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/\n{line}\n")
    _group(tmp_path / top / "job", "5000000", 3_000_000, 1_000_000, version)
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    _group(tmp_path / top / "job/step", unlimited, 3_000_000, 1_000_000, version)
    assert available_memory(tmp_path) == 3_000_000, "the group above has a limit; files in memory are given up"
    _group(tmp_path / top / "job/step", "2500000", 3_000_000, 0, version)
    assert available_memory(tmp_path) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_granted_cpus_are_the_least_of_binding_and_control_groups(tmp_path, version):
    """A job with two CPUs and a quota of one and a half below a node with a quota of 64; then without any quota."""
    bound = len(os.sched_getaffinity(0))
    line, top = (
        ("0::/job/step", "sys/fs/cgroup") if version == 2 else ("4:cpu,cpuacct:/job/step", "sys/fs/cgroup/cpu,cpuacct")
    )

    def write(group: str, quota: int | None) -> None:
        folder = tmp_path / top / group
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (folder / "cpu.max").write_text(f"{'max' if quota is None else quota} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:memory:/\n{line}\n")
    write("", None)
    write("job", 6_400_000)
    write("job/step", 50_000)
    assert granted_cpus(tmp_path) == 1
    write("job/step", None)
    assert granted_cpus(tmp_path) == min(bound, 64)
    assert granted_cpus(tmp_path / "nothing") == bound


def test_precision_of_the_cpu():
    assert Precision("auto", CPU).name == "float32"
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        Precision("fp16", CPU)
    with Precision("bf16", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_mixed_precision_follows_the_matrix_units_of_the_device(capability, name, monkeypatch):
    """A card of before 2020 says that it supports bf16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert Precision("auto", torch.device("cuda", 1)).name == name
