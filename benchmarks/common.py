"""What every benchmark shares: flags, timing, memory of a child process, the machine, the tables, JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from utils.devices import device_from
from utils.runs import versions, write_json

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
SCRATCH = FOLDER / "scratch"  # ignored by git
MEGA, GIGA, TERA = 1e6, 1e9, 1e12


@dataclass(frozen=True)
class Goal:
    """One line of the list that says when the program is fast enough.

    published: what the published code needed, in words.  goal: what is asked for, in words.  measured: here, in words.
    is_met: None where this machine or these settings cannot tell.
    """

    what: str
    published: str
    goal: str
    measured: str
    is_met: bool | None


@dataclass
class Report:
    """Everything a benchmark found. rows: one dict per line of the table, all with the same keys in the same order."""

    name: str
    title: str
    script: str = ""  # bench_<script>.py, where it is not bench_<name>.py
    settings: dict[str, object] = field(default_factory=dict)
    rows: list[dict[str, object]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, object]]] = field(default_factory=dict)  # further ones by title
    extra: dict[str, object] = field(default_factory=dict)  # further numbers, only in the JSON


class Flags(argparse.ArgumentParser):
    """Remembers what was given, as `given`: the command beside a number should be the one that measured it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        found.given = list(sys.argv[1:] if args is None else args)
        return found


def flags(description: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    parser = Flags(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: tries the script, measures nothing")
    parser.add_argument("--device", help="any PyTorch device (default: CUDA if there is one)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU (default: its own choice)")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results; --quick: scratch)")
    return parser


def begin(arguments: argparse.Namespace) -> torch.device:
    """Set threads and give the device."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return device_from(None, arguments.device)


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on; no names of hosts, users or folders."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(_meminfo("MemTotal") / GIGA, 1),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_before": round(os.getloadavg()[0], 2),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gb"] = round(torch.cuda.mem_get_info(device)[1] / GIGA, 1)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _meminfo(name: str) -> int:
    """Bytes of one line of /proc/meminfo; 0 where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    return _meminfo("MemAvailable")


def software() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    wanted = ("gene_dml", "commit", "python", "torch", "numpy", "cuda")
    found = versions()
    return {name: found[name] for name in wanted if name in found} | {
        name: importlib.metadata.version(name) for name in ("pandas", "scipy", "h5py", "timm")
    }


# --- time ---------------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    function: Callable[[], object], device: torch.device, *, repeats: int = 3, warm_up: int = 1, calls: int = 1
) -> float:
    """Median wall time of a call, the device's work included."""
    return seconds_in_turn([function], device, rounds=repeats, warm_up=warm_up, calls=calls)[0]


def seconds_in_turn(
    functions: Sequence[Callable[[], object]], device: torch.device, *, rounds: int, warm_up: int = 1, calls: int = 1
) -> list[float]:
    """Median wall time of each call, the calls taking turns: what is compared has then seen the same machine.

    calls: how many calls follow each other before the device is waited for; more than one where the host prepares the
    next while the device still works, as in a training.
    """
    times: list[list[float]] = [[] for _ in functions]
    for number in range(warm_up + rounds):
        for function, found in zip(functions, times):
            synchronise(device)
            started = time.perf_counter()
            for _ in range(calls):
                function()
            synchronise(device)
            if number >= warm_up:
                found.append((time.perf_counter() - started) / calls)
    return [statistics.median(found) for found in times]


def matmul_ceiling(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP/s of a large square matrix product: what no step can exceed on this machine."""
    side = side or (8192 if device.type == "cuda" else 1536)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    fastest = min(seconds_of(lambda: left @ right, device, repeats=5, warm_up=2) for _ in range(6))
    return 2 * side**3 / fastest


# --- memory -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChildResult:
    """value: what the function returned; base_bytes, peak_bytes: resident memory before it and at most; seconds."""

    value: object
    base_bytes: int
    peak_bytes: int
    seconds: float

    @property
    def taken_bytes(self) -> int:
        return self.peak_bytes - self.base_bytes


def in_child(function: Callable, *arguments: object, start: str = "forkserver") -> ChildResult:
    """Run a function of a module in a fresh process and watch its memory.

    A fresh process, because a process never gives back its peak; forked from one that has imported the module and done
    nothing else, or with start "fork", for a trial, from this one. What the function returns must hold no tensors: they would
    be sent as shared memory, which ends with the process. Raises RuntimeError with what the child said if it failed or was
    killed (out of memory).
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["__main__", function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, torch.get_num_threads(), function, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} was killed with status {process.exitcode} (memory?)") from None
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{function.__name__} failed in its process: {answer}")
    return answer


def watched(function: Callable, *arguments: object, apart: bool = True) -> ChildResult:
    """`in_child`, or for a trial (`apart` False) in this process, where the memory found is that of everything so far."""
    if apart:
        return in_child(function, *arguments)
    base, started = _status("VmRSS"), time.perf_counter()
    value = function(*arguments)
    return ChildResult(value, base, _status("VmHWM"), time.perf_counter() - started)


def _work(sender, threads: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        base = _status("VmRSS")
        started = time.perf_counter()
        value = function(*arguments)
        seconds = time.perf_counter() - started
        sender.send(ChildResult(value, base, _status("VmHWM"), seconds))
    except Exception as error:  # told to the parent, which raises it
        sender.send(f"{type(error).__name__}: {error}")
        raise


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status. Unlike ru_maxrss, VmHWM does not start at the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for fabricated files, removed afterwards; beside the repository's files, as /tmp may be memory."""
    SCRATCH.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=SCRATCH) as folder:
        yield Path(folder)


# --- results ------------------------------------------------------------------------------------------------------------


def finish(report: Report, arguments: argparse.Namespace, device: torch.device, started_on: dict) -> Path:
    """Print the tables and write `<out>/<name>.json`; returns its path. started_on: `machine` at the start.

    What was measured on another device than the CPU has a name of its own.
    """
    folder = arguments.out or (SCRATCH if arguments.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    name = report.name if device.type == "cpu" else f"{report.name}_{device.type}"
    given = list(arguments.given)
    if arguments.out:  # where the results go is no part of what was measured
        at = next(i for i, flag in enumerate(given) if flag.split("=")[0] == "--out")
        del given[at : at + (1 if "=" in given[at] else 2)]
    if device.type == "cuda" and arguments.device is None:
        given += ["--device", "cuda"]
    command = " ".join([f"python benchmarks/bench_{report.script or report.name}.py", *given])
    content = {
        "command": command,
        "is_quick": arguments.quick,
        "machine": started_on,
        "versions": software(),
        **asdict(report),
    }
    write_json(folder / f"{name}.json", content)
    print(described([content]))
    return folder / f"{name}.json"


def described(results: list[dict]) -> str:
    """Show the content of JSON files as Markdown: all goals in one table, then every benchmark's own tables."""
    goals = [
        goal_row(goal) | {"command": f"`{content['command']}`"} for content in results for goal in content["goals"]
    ]
    parts = ["### What was asked for", table(goals)] if goals else []
    for content in results:
        machine, versions = content["machine"], content["versions"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        conditions = (
            f"{where}; {machine['torch_threads']} threads, load {machine['load_before']} at the start; "
            f"torch {versions['torch']}, commit {versions['commit']}"
        )
        settings = ", ".join(f"{key} {value}" for key, value in content["settings"].items())
        parts += [f"### {content['title']}", f"`{content['command']}`: {settings}.", f"({conditions})"]
        parts.append(table(content["rows"]))
        for title, rows in content.get("tables", {}).items():
            parts += [f"{title}:", table(rows)]
        parts.append("\n".join(f"- {note}" for note in content["notes"]))
    return "\n\n".join(part for part in parts if part)


def goal_row(goal: dict) -> dict[str, str]:
    """One goal as a line of a table."""
    verdict = {True: "yes", False: "**no**", None: "not told here"}[goal["is_met"]]
    return {
        "goal": goal["what"],
        "published code": goal["published"],
        "asked for": goal["goal"],
        "here": goal["measured"],
        "met": verdict,
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Rows of equal keys as a Markdown table with aligned columns."""
    if not rows:
        return ""
    header = list(rows[0])
    lines = [header, *[[_cell(row.get(key)) for key in header] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", " ")
    return str(value)
