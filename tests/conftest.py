"""Fixtures of all tests: golden arrays, a tiny data set in the true layout, the real slides where they exist."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
LONG = (  # those that take longest
    "test_train.py",
    "test_benchmarks.py",
    "test_soak.py",
    "test_doctor_parity.py",
    "test_from_raw.py",
    "test_accuracy_table.py",
    "test_external_test.py",
    "test_parallel.py",
    "test_first_run.py",
    "test_predict.py",
    "test_cuda_path.py",
    "test_readme.py",
    "test_write.py",
)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """golden(name): the recorded arrays of one piece, from GENE_DML_GOLDEN (default tests/golden)."""
    folder = Path(os.environ.get("GENE_DML_GOLDEN", ROOT / "tests" / "golden"))

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


def _folder_in(variable: str, what: str, which: str) -> Path:
    """The folder that an environment variable names; without it the test is skipped."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{what}: set {variable} to the folder of {which}")
    return Path(folder)


@pytest.fixture(scope="session")
def her2st_raw() -> Path:
    """The public HER2ST download (GENE_DML_HER2ST); tests on real slides skip without it."""
    return _folder_in("GENE_DML_HER2ST", "real slides", "the public HER2ST download")


@pytest.fixture(scope="session")
def mob_raw() -> Path:
    """Four sections of mouse olfactory bulb (GENE_DML_MOB), see docs/installation.md; tests on them skip without it."""
    return _folder_in("GENE_DML_MOB", "real slides", "the sections of mouse olfactory bulb")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Files that once ended or held up the program (GENE_DML_CASES); tests on them skip without it."""
    return _folder_in("GENE_DML_CASES", "real cases", "the files that once broke the program")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): a folder that the first process that asks for it makes for all of them. Read only."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        place, is_made = shared / name, shared / f"{name}.made"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                shutil.rmtree(place, ignore_errors=True)  # of a process that failed at it
                place.mkdir()
                make(place)
                is_made.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def tiny_data(made_once) -> Path:
    """A data folder with a tiny simulated set `demo`: 4 patients x 2 slides of about 30 spots, 24 genes. Read only."""
    from preprocess.simulate_demo import simulate

    size = {"patients": "ABCD", "slides_per_patient": 2, "grid": (6, 5), "patch_size": 64, "num_genes": 24}
    return made_once("tiny_data", lambda folder: simulate(folder / "data", **size)) / "data"


@pytest.fixture(scope="module")
def _takes_shortcuts():
    """For tests that look at no figure, no encoder and no overlay: see `tests/shortcuts.py`."""
    from tests.shortcuts import shortcuts

    with shortcuts():
        yield


@pytest.fixture(autouse=True, scope="session")
def _interrupts_arrive():
    """A suite that a script starts in the background inherits that interrupts are ignored; ours are about them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _nobody_waits_for_the_disk():
    """No test pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _few_threads():
    """Tests are small: more threads only fight each other."""
    import torch  # not where pytest only hands tests out

    torch.set_num_threads(1)


def pytest_sessionstart():
    """What is imported stays, so the collector of garbage need not look at it: a twentieth of the time of all tests."""
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Long files first, so that at the end no process works on one while the others wait; GPU tests need a GPU."""
    import torch

    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
