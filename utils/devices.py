"""What a machine has, asked in one place: its devices, the precision they compute in, the memory that is left."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from utils.cli import say

_BF16_CAPABILITY = (8, 0)  # Ampere


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it: from page-locked memory, the only kind that a CUDA copy does not wait for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def device_from(gpu: int | None = None, device: str | None = None) -> torch.device:
    """The device asked for, or CUDA if there is one, or the CPU, said aloud.

    gpu: index of a CUDA device (`--gpu`); one that does not exist is an error, never a silent CPU.
    device: any PyTorch device name (`--device`).
    PyTorch's threads are no more than the CPUs that this process may use.
    """
    torch.set_num_threads(min(torch.get_num_threads(), granted_cpus()))
    if gpu is not None and device is not None:
        raise ValueError(f"--gpu {gpu} and --device {device} are both given; give one of them.")
    if device is not None:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"--device {device} is not a device of PyTorch: {str(error).splitlines()[0]}") from error
        if chosen.type == "cuda":
            return _cuda_device(chosen.index, f"--device {device}")
        try:
            torch.zeros(1, device=chosen).item()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"--device {device} cannot compute on this machine: {str(error).splitlines()[0]}"
            ) from error
        return chosen
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


def half_precision(device: torch.device) -> str:
    """Name of the 16-bit type for mixed precision on a CUDA device: bf16 where its matrix units have it, fp16 elsewhere.

    `torch.cuda.is_bf16_supported` is no answer: it also says yes for older cards, which emulate bf16 without their
    matrix units, and it asks the current device instead of this one.
    """
    assert device.type == "cuda", device
    if torch.version.hip is not None:
        return "bf16"
    return "bf16" if torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY else "fp16"


class Precision:
    """Mixed precision: autocast and, for fp16 alone, the gradient scaler.

    name: auto (CUDA: bf16 where the device has it, fp16 elsewhere; CPU: float32) | float32 | bf16 | fp16.
    Raises ValueError for fp16 on the CPU.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = half_precision(device) if device.type == "cuda" else "float32"
        if name == "fp16" and device.type != "cuda":
            raise ValueError("TRAINING.precision=fp16 needs a CUDA device; on the CPU use float32 or bf16.")
        self.name, self.device = name, device
        self.dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Open the context in which the model runs in this precision."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def granted_cpus(root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use: those it is bound to, within the quota of its control groups.

    root: where /proc and /sys are looked for.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(math.ceil(share) for share in _cpu_quotas(root))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPUs that the groups of this process are limited to, of either version, up to the topmost visible one."""
    for top, folder, is_second in _groups_of(root, "cpu"):
        for group in (folder, *folder.parents):
            if is_second:
                words = (group / "cpu.max").read_text().split() if (group / "cpu.max").exists() else ["max", "1"]
                quota, period = -1 if words[0] == "max" else int(words[0]), int(words[1])
            else:
                quota, period = (_read_int(group / f"cpu.cfs_{name}_us") or -1 for name in ("quota", "period"))
            if quota > 0 and period > 0:
                yield quota / period
            if group == top:
                break


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take: of the machine, and of every control group with a limit.

    root: where /proc and /sys are looked for.  Files that the system keeps in memory count as free: it gives them up.
    """
    amounts = [limit - used for limit, used in _control_groups(root)]
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        amounts.append(_numbers_of(meminfo)["MemAvailable:"] * 1024)
    else:
        amounts.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(amounts))


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of the groups that this process is in, of either version, up to the topmost visible one."""
    for top, folder, is_second in _groups_of(root, "memory"):
        names = (
            ("memory.max", "memory.current", "")
            if is_second
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        )
        for group in (folder, *folder.parents):
            if (limit := _read_int(group / names[0])) is not None and (used := _read_int(group / names[1])) is not None:
                counted = _numbers_of(group / "memory.stat")
                yield limit, used - sum(counted.get(f"{names[2]}{kind}_file", 0) for kind in ("active", "inactive"))
            if group == top:
                break


def _groups_of(root: Path, controller: str) -> Iterator[tuple[Path, Path, bool]]:
    """(topmost visible folder, folder of this process, whether it is of the second version) of its control groups."""
    groups, membership = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, inside = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            named = groups / controllers  # "cpu,cpuacct"; most systems have a link "cpu" to it, too
            top = groups if controllers == "" else named if named.is_dir() else groups / controller
            yield top, top / inside.lstrip("/"), controllers == ""


def _read_int(path: Path) -> int | None:
    """The number in a file; None without the file, or where it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers_of(path: Path) -> dict[str, int]:
    """A table of the kernel: a name and a number on each line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) >= 2}


# Numbers of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next request instead of handing it back to the system.

    A training step on the CPU frees and takes gigabytes. glibc gives large blocks back at once, and the system clears
    every page again when it is asked for: up to a third of a step at UNI size. The greatest memory a process needs
    stays about the same; it just keeps it until its end. Only with glibc (Linux); elsewhere nothing is changed.

    returns: whether it took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, never))
