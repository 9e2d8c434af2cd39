"""A run that another process works on, or that a kill left before anything was in it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modes.test import test as run_test
from modes.train import TrainOptions, train, train_seeds
from utils.config import Config, load_config

ROOT = Path(__file__).resolve().parents[3]


def closed_form(tiny_run, tmp_path, **changes: object) -> tuple[Config, TrainOptions]:
    """A training that takes a moment: the mean of the training spots."""
    overrides = [f"DATA.data_dir={tiny_run.data_dir}", f"GENERAL.log_path={tmp_path}", "MODEL.name=mean"]
    options = TrainOptions("tiny", "run", torch.device("cpu"), [0], False, 0.0, with_report=False)
    return load_config(tiny_run.config_name, overrides), replace(options, **changes)


def test_seeds_go_on_where_a_kill_left_an_empty_folder(tiny_run, tmp_path):
    config, options = closed_form(tiny_run, tmp_path)
    train_seeds(config, options, [0])
    (tmp_path / "tiny" / "run" / "seed_1").mkdir()
    train_seeds(config, replace(options, resume=True), [0, 1])
    for seed in (0, 1):
        assert (tmp_path / "tiny" / "run" / f"seed_{seed}" / "fold_0" / "result.json").is_file()


def test_who_comes_second_to_a_fold_is_refused_and_the_other_folds_are_free(tiny_run, tmp_path):
    config, options = closed_form(tiny_run, tmp_path, resume=True)
    run = train(config, replace(options, folds=[1]))
    hold = "import sys; from pathlib import Path; from utils.locks import lock\n"
    hold += (
        "with lock(Path(sys.argv[1]), 'x', ''), lock(Path(sys.argv[2]), 'x', ''):\n print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(run / ".fold_0.lock"), str(run / ".fold_1.lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match=rf"Fold 0 .* is being trained or tested by process {other.pid} on"):
            train(config, options)
        assert not (run / "fold_0" / "result.json").exists()
        train(config, replace(options, folds=[2]))
        (run / "fold_1" / "genes.txt").unlink()  # a test would write it again
        with pytest.raises(ValueError, match=rf"run/fold_1 is being trained or tested by process {other.pid} on"):
            run_test(run, 1, [], options.device)
        assert not (run / "fold_1" / "genes.txt").exists()
        other.kill()
    run_test(run, 1, [], options.device, with_report=False)
    train(config, options)
    assert [(run / f"fold_{fold}" / "result.json").is_file() for fold in (0, 1, 2)] == [True] * 3
