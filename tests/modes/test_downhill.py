"""Data go downhill: what has been read is not asked of the disk again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from modes.external_test import make_predictors, score_slides
from modes.prediction.ensemble import load_members
from modes.prediction.external_data import external_layout, open_test, warnings_of
from modes.train import TrainOptions, train
from preprocess.extract_features_uni import main as extract
from utils.config import load_config, with_overrides

CPU = torch.device("cpu")
_watching: list[list[tuple[str, str]]] = []  # of the watch under way; a hook cannot be taken off again


def _note(event: str, arguments: tuple) -> None:
    if _watching and event in ("os.listdir", "os.scandir", "open"):
        _watching[-1].append((event, str(arguments[0])))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """The events (name, path) of listing a folder or opening a file, of this process, while it is open."""
    events: list[tuple[str, str]] = []
    _watching.append(events)
    try:
        yield events
    finally:
        _watching.pop()


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(_note)


def listings(events: list[tuple[str, str]], folder: Path) -> list[str]:
    return [path for name, path in events if name != "open" and Path(path).is_relative_to(folder)]


def settings(tiny_run, tmp_path: Path):
    shared = [f"DATA.data_dir={tiny_run.data_dir}", f"GENERAL.log_path={tmp_path}", "TRAINING.epochs=1"]
    return load_config(tiny_run.config_name, shared)


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_lists_the_data_folder_before_its_store_is_open_and_then_no_more(tiny_run, tmp_path, resume):
    config = settings(tiny_run, tmp_path)
    if resume:
        run = shutil.copytree(tiny_run.path, tmp_path / "tiny" / "run")
        (run / "fold_1" / "result.json").unlink()
        config = with_overrides(config, ["TRAINING.epochs=2"])
    with watched() as events:
        run = train(config, TrainOptions("tiny", "run", CPU, None, resume, 60.0, with_report=False))
    assert len(list(run.glob("fold_*/result.json"))) == 3
    # What is opened first once the store is there: whatever of a new run, the split of the unfinished fold of one that goes on.
    first = "fold_1/split.json" if resume else f"{tmp_path}/tiny/run/.config."
    opened = next(place for place, (name, path) in enumerate(events) if name == "open" and first in path)
    assert listings(events[:opened], tiny_run.data_dir)
    assert listings(events[opened:], tiny_run.data_dir) == []


def test_an_external_test_lists_its_folder_before_its_store_is_open_and_then_no_more(tiny_run, tmp_path):
    data_dir = Path(shutil.copytree(tiny_run.data_dir, tmp_path / "data"))
    flags = ["--config", tiny_run.config_name, "--mode", "external", "--test_name", "demo_external", "--device", "cpu"]
    for kind in ("target", "neighbor"):  # no tokens: the encoder runs on the image
        extract([*flags, "--extract_mode", kind, "--data_dir", str(data_dir), "--num_workers", "1"])
    members = load_members([tiny_run.path / "fold_0" / "best.pt"], [f"DATA.data_dir={data_dir}"], CPU)
    with watched() as before:
        test = open_test(members, external_layout(members[0], "demo_external"), CPU, [])
    assert listings(before, data_dir)
    with watched() as after:
        assert warnings_of(test)
        score_slides(test, make_predictors(test)[0], tmp_path / "predictions")
    assert (tmp_path / "predictions" / "X1.h5ad").is_file() and after
    assert listings(after, data_dir) == []


def test_nothing_reads_the_configuration_again(tiny_run, tmp_path, monkeypatch):
    """But the command that the summary advises, which looks up what the command line had changed."""
    monkeypatch.setattr("modes.prediction.summary._ridge_command", lambda *_: "")
    config = settings(tiny_run, tmp_path)
    options = TrainOptions("tiny", "again", CPU, [0], False, 0.0, with_report=False, config_file=tiny_run.config_name)
    with watched() as events:
        load_config(tiny_run.config_name)
    assert ("open", tiny_run.config_name) in events
    with watched() as events:
        train(config, options)
    opened = {path for name, path in events if name == "open"}
    assert opened and tiny_run.config_name not in opened
