"""The folder of a run: seeds, versions, the epoch log."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import random
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint import check_seed_of, config_of_run, is_complete, is_of_seed, seed_runs
from utils.cli import say
from utils.config import MAY_CHANGE, Config, differences, read_config, save_config
from utils.files import check_writable, reading, set_aside, write_text
from utils.locks import sweep
from utils.text import brief, some
from utils.trained_fold import ALL_PATIENTS_FOLDER, SplitRecord, made_again

VERSION = "1.0.0"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pandas", "anndata", "scanpy", "scikit-learn", "h5py", "pillow")


def seed_for(*keys: object) -> int:
    """Derive a 63-bit seed that depends on the keys alone: the same in every process, on every machine."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*keys: object) -> None:
    """Seed Python, NumPy and PyTorch (all devices) from the keys, for instance (seed, fold, epoch)."""
    seed = seed_for(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_for(*keys: object) -> torch.Generator:
    """Make an explicit CPU generator seeded from the keys."""
    return torch.Generator().manual_seed(seed_for(*keys))


def open_run(folder: Path, config: Config, resume: bool) -> bool:
    """Make the run folder with its versions and its resolved configuration, or check that it may be continued.

    What a process that has ended left half written there is removed. The configuration comes last: with it the run has begun.
    Returns whether the versions of this process are noted; a continuation notes them (`note_versions`) when it begins to work.
    Raises ValueError as `check_run`.
    """
    check_run(folder, config, resume)
    for place in (folder, folder / "figures"):
        sweep(place)
    is_new = not (folder / "config.yaml").exists()
    if is_new:
        (folder / "versions.json").unlink(missing_ok=True)  # of a start that was killed before the run had begun
        note_versions(folder)
        save_config(config, folder / "config.yaml")
    return is_new


class FinishedRun(ValueError):
    """A run is asked for that has been trained to its end; the message is complete."""


def check_run(folder: Path, config: Config, resume: bool, asked: Sequence[str] = ()) -> None:
    """Whether a run may start or go on in the folder; nothing is written.

    A folder that holds a run is continued only on request and only with the configuration it was started with; one in which
    nothing was begun, as a kill in the first moments leaves it, is started in any case.
    asked: folders of the folds that are asked for; none for a whole cross-validation.
    Raises ValueError for that, of it `FinishedRun` where nothing is left to train, OSError where nothing can be written.
    """
    saved = folder / "config.yaml"
    check_writable(saved)
    is_in_run = is_of_seed(folder) and (folder.parent / "config.yaml").exists()
    if is_in_run or seed_runs(folder) != [folder]:
        raise ValueError(
            f"{folder.parent if is_in_run else folder} holds {'a run' if is_in_run else 'the runs of several seeds'}, so "
            f"{'runs of several seeds' if is_in_run else 'a run'} cannot lie in it, too: choose another --run_name, or move "
            "the seeds into a folder of their own."
        )
    if not saved.exists():
        if is_of_seed(folder) and (expected := config_of_run(first := seed_runs(folder.parent)[0])) is not None:
            check_seed_of(first, expected, folder, config)
        if resume and _has_begun(folder):
            raise ValueError(
                f"--resume: {folder} holds no config.yaml, so no run was started there, but other files. "
                "Choose the folder of the run, or start another with --run_name NAME."
            )
        return
    if not resume:
        another = "for another run: --run_name NAME (or --exp_id N)"
        if result := result_of(folder, asked):
            raise FinishedRun(f"{folder} already holds {_as_finished(result, asked)}; {another}.")
        raise ValueError(f"{folder} already holds an unfinished run: --resume goes on with it; {another}.")
    changed = differences(read_config(saved), config, but_for=MAY_CHANGE)
    if changed:
        listed = "\n  ".join(changed)
        raise ValueError(
            f"--resume: {saved} differs from what is asked for:\n  {listed}\n"
            "Repeat the command of the run as it was, or start another run with --run_name NAME."
        )


def result_of(folder: Path, asked: Sequence[str] = ()) -> Path | None:
    """Find the summary of a run, or the model on all patients, if what is asked for is finished; else None.

    asked: as for `check_run`.  A whole cross-validation is finished when each of its patients has been tested.
    """
    summary, model = folder / "summary.md", folder / ALL_PATIENTS_FOLDER / "best.pt"
    folds = [folder / name for name in asked] or sorted(folder.glob("fold_*"))
    is_final = folds == [model.parent] or (not folds and model.is_file())
    with suppress(ValueError, OSError):  # what is damaged is told by whoever goes on with it
        if is_final:
            return model if is_complete(model.parent) else None
        if summary.is_file() and all(map(is_complete, folds)) and (asked or _tests_everybody(folds)):
            return summary
    return None


def _as_finished(result: Path, asked: Sequence[str]) -> str:
    if result.name == "best.pt":
        return f"a finished model: {result}"
    return f"{f'{some(asked)} of a run, finished' if asked else 'a finished run'}: its summary is {result}"


def _tests_everybody(folds: Sequence[Path]) -> bool:
    paths = [fold / "split.json" for fold in folds]
    splits = [SplitRecord.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path)) for path in paths]
    tested = {patient for split in splits for patient in split.test_patients}
    return all(tested.issuperset(split.fitted_patients) for split in splits)


def _has_begun(folder: Path) -> bool:
    """Whether a folder holds anything that a run would not make before its configuration."""
    return any(
        path.is_file() and path.name != "versions.json" and not path.name.startswith(".") for path in folder.rglob("*")
    )


def note_versions(folder: Path) -> None:
    """Add a start to `versions.json`: when, and its versions; of a start that went on, those that differ from the first.

    No result depends on the file: one that cannot be read is kept beside the new one, which is said.
    """
    path, now = folder / "versions.json", versions()
    starts = []
    try:
        starts = read_versions(path) if path.is_file() else []
    except ValueError as error:
        say(f"Note: {error} It is kept as {set_aside(path)}, and {path.name} begins anew.")
    differing = {name: value for name, value in now.items() if not starts or starts[0].get(name) != value}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, [*starts, {"started": started, **differing}])


def read_versions(path: Path) -> list[dict[str, str]]:
    """Read the versions of every start, the first one first. Raises ValueError for a file that is none."""
    with reading(path, "the versions of the starts of a run"):
        found = json.loads(path.read_text(encoding="utf-8"))
        starts = found if isinstance(found, list) else [found]  # one, in earlier versions
        for start in starts:
            if not isinstance(start, dict) or not all(isinstance(version, str) for version in start.values()):
                raise ValueError(f"expected names and versions of every start, found {brief(start)}")
        return starts


def versions() -> dict[str, str]:
    """Versions of the program, its commit where it is a git checkout, the packages and the device."""
    found = {
        "gene_dml": VERSION,
        "commit": _own_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    found |= {name: _version_of(name) for name in _PACKAGES}
    found["cuda"] = torch.version.cuda or "none"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


@cache  # of the code that was loaded, whatever happens to the files
def _own_commit() -> str:
    return commit_of(Path(__file__).resolve().parents[1])


@cache
def _version_of(package: str) -> str:
    return importlib.metadata.version(package)


def commit_of(root: str | Path) -> str:
    """Commit of a checkout, with "-dirty" where what the program reads was changed since; "unknown" outside a checkout.

    Texts and the results of benchmarks, which a benchmark writes while the next one still has to run, change no program.
    """
    git = ["git", "-C", str(root)]
    tracked = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results"]
    try:
        name = subprocess.run([*git, "describe", "--always", "--abbrev=12"], capture_output=True, text=True)
        changed = subprocess.run([*tracked, ":(exclude,top)*.md"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    commit = name.stdout.strip()
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if changed.stdout.strip() else commit


def write_json(path: str | Path, content: object) -> None:
    """Write JSON atomically; NaN becomes null, so that every reader can read it."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Bring a value into the form that JSON has: dicts, lists, text and finite numbers; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # numbers and arrays of NumPy, columns of pandas
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_epochs(path: Path, records: Iterable[Mapping[str, float]]) -> None:
    """Write `metrics.jsonl`, one line an epoch, whole: a crash can never leave half a line or an epoch too many."""
    write_text(path, "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records))


def read_epochs(path: Path) -> list[dict[str, float]]:
    """Read the records of `metrics.jsonl` in order; ValueError names the file, the line that is none, and what mends it."""
    records, remedy = [], made_again(path, "Move it elsewhere: nothing but the curves of this training is lost.")
    with reading(path, "the log of the epochs", remedy):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error.msg}). {remedy}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected an epoch, found {brief(record)}. {remedy}")
            records.append(record)
    return records
