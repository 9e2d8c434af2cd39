"""Seeds that depend on their keys alone, run folders that are never mixed, logs that are whole."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.checkpoints import fabricated_fold
from utils.checkpoint import save_checkpoint, seed_runs
from utils.config import load_config
from utils.runs import (
    FinishedRun,
    check_run,
    commit_of,
    generator_for,
    open_run,
    read_epochs,
    result_of,
    seed_everything,
    seed_for,
    versions,
    write_epochs,
    write_json,
)


def test_seeds_are_the_same_everywhere_and_differ_by_key():
    assert seed_for(2021, 0, 1) == 1772032521250331310
    assert len({seed_for(2021, fold, epoch) for fold in range(10) for epoch in range(10)}) == 100
    seed_everything(1, "a")
    first = (torch.rand(3), np.random.rand(3))
    seed_everything(1, "a")
    assert torch.equal(first[0], torch.rand(3)) and np.array_equal(first[1], np.random.rand(3))
    assert torch.equal(torch.rand(2, generator=generator_for("x")), torch.rand(2, generator=generator_for("x")))


def test_a_run_folder_is_started_once_and_continued_on_request(tmp_path):
    config = load_config("demo/dml")
    open_run(tmp_path / "run", config, resume=False)
    (start,) = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert start["torch"] in torch.__version__
    with pytest.raises(
        ValueError, match="already holds an unfinished run: --resume goes on with it; for another run: --run"
    ):
        open_run(tmp_path / "run", config, resume=False)
    open_run(tmp_path / "run", config, resume=True)
    open_run(tmp_path / "run", load_config("demo/dml", ["DATA.data_dir=elsewhere"]), resume=True)
    open_run(tmp_path / "run", load_config("demo/dml", ["EVALUATION.chunk_size=256"]), resume=True)
    with pytest.raises(ValueError, match=r"LOSS\.k: the run has 8, asked for 9"):
        open_run(tmp_path / "run", load_config("demo/dml", ["LOSS.k=9"]), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="no run was started there"):
        open_run(tmp_path / "other", config, resume=True)


def test_seeds_and_folds_do_not_share_a_folder(tmp_path):
    config = load_config("demo/dml")
    open_run(tmp_path / "run", config, resume=False)
    with pytest.raises(
        ValueError, match=r"run holds a run, so runs of several seeds cannot lie in it, too: choose anoth"
    ):
        check_run(tmp_path / "run" / "seed_0", config, resume=False)
    open_run(tmp_path / "seeds" / "seed_3", config, resume=False)
    with pytest.raises(ValueError, match=r"seeds holds the runs of several seeds, so a run cannot lie in it, too"):
        check_run(tmp_path / "seeds", config, resume=False)
    check_run(tmp_path / "seeds" / "seed_4", config, resume=False)


def test_seeds_of_one_folder_differ_in_nothing_else(tmp_path):
    """Whether they were started there, or put there later."""
    config = load_config("demo/dml")
    open_run(tmp_path / "run" / "seed_0", config, resume=False)
    for overrides in (["GENERAL.seed=1", "GENERAL.log_path=elsewhere"], []):
        check_run(tmp_path / "run" / "seed_1", load_config("demo/dml", overrides), resume=False)
    longer = load_config("demo/dml", ["GENERAL.seed=1", "EVALUATION.fixed_epochs=9"])
    with pytest.raises(ValueError, match=r"not only the seed differs\.\n  EVALUATION.fixed_epochs: .* None, seed_1 9"):
        check_run(tmp_path / "run" / "seed_1", longer, resume=False)
    (tmp_path / "run" / "seed_0" / "all_patients").mkdir()
    check_run(tmp_path / "run" / "seed_1", longer, resume=False)
    other = load_config("demo/dml", ["GENERAL.seed=1", "MODEL.name=mean"])
    check_run(tmp_path / "run" / "seed_1_mean", other, resume=False)
    said = "seed_1 is no other seed of .*run/seed_0.*\n  MODEL.name: the run has 'gene_dml', seed_1 'mean'"
    with pytest.raises(ValueError, match=said):
        check_run(tmp_path / "run" / "seed_1", other, resume=False)
    open_run(tmp_path / "other", other, resume=False)
    (tmp_path / "other").rename(tmp_path / "run" / "seed_1")
    with pytest.raises(ValueError, match=said):
        seed_runs(tmp_path / "run")


def test_a_finished_run_is_told_from_one_that_can_go_on(tmp_path):
    """Finished is what has tested each of its patients, or the folds that are asked for."""
    config, run = load_config("demo/dml"), tmp_path / "run"
    open_run(run, config, resume=False)
    for fold, patient, other in ((0, "A", "B"), (1, "B", "A")):
        split = replace(fabricated_fold().split, fold=fold, test_patients=[patient], train_patients=[other])
        write_json(run / f"fold_{fold}" / "split.json", split.to_dict())
    (run / "fold_0" / "result.json").touch()
    (run / "summary.md").touch()
    for asked in ((), ("fold_0", "fold_1"), ("fold_1",), ("all_patients",)):
        with pytest.raises(ValueError, match="an unfinished run"):
            check_run(run, config, resume=False, asked=asked)
    with pytest.raises(
        FinishedRun, match=rf"{run} already holds fold_0 of a run, finished: its summary is {run}/summary.md"
    ):
        check_run(run, config, resume=False, asked=["fold_0"])
    (run / "fold_1" / "result.json").touch()
    with pytest.raises(
        FinishedRun, match=rf"{run} already holds a finished run: its summary is {run}/summary.md; for another"
    ):
        check_run(run, config, resume=False)
    shutil.rmtree(run / "fold_1")
    assert result_of(run) is None, "B was never tested"
    shutil.rmtree(run / "fold_0")
    save_checkpoint(run / "all_patients" / "best.pt", fabricated_fold(finished=True))
    with pytest.raises(
        FinishedRun, match=rf"already holds a finished model: {run}/all_patients/best.pt; for another run"
    ):
        check_run(run, config, resume=False)
    (run / "all_patients" / "best.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="an unfinished run"):
        check_run(run, config, resume=False)


def test_epochs_are_written_whole_and_without_nan(tmp_path):
    records = [{"epoch": 1, "test/pcc_all": math.nan}, {"epoch": 2, "test/pcc_all": np.float64(0.5)}]
    write_epochs(tmp_path / "metrics.jsonl", records)
    assert read_epochs(tmp_path / "metrics.jsonl") == [
        {"epoch": 1, "test/pcc_all": None},
        {"epoch": 2, "test/pcc_all": 0.5},
    ]
    write_json(tmp_path / "a.json", {"x": [math.inf, 1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1]}


def test_versions_name_the_program_and_its_packages():
    found = versions()
    assert {"gene_dml", "commit", "python", "torch", "timm", "numpy", "device"} <= set(found)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_dirty_by_programs_not_by_texts_and_results(tmp_path):
    files = {name: tmp_path / name for name in ("engine.py", "README.md", "benchmarks/results/step.json")}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    first = commit_of(tmp_path)
    assert len(first) == 12 and int(first, 16)
    (tmp_path / "untracked.py").write_text("new")
    for name in ("README.md", "benchmarks/results/step.json"):
        files[name].write_text("after")
    assert commit_of(tmp_path / "benchmarks") == first
    files["engine.py"].write_text("after")
    assert commit_of(tmp_path / "benchmarks") == f"{first}-dirty"


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) == "unknown"
