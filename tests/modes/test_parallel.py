"""A training on two processes is that of one: gradients, weights, scores, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import main
from datasets.batches import whole_batch
from datasets.shares import share_of
from modes.prediction.slide import tokens_of
from modes.train import TrainOptions, make_step, train
from modes.training.compose import open_layout
from modes.training.fold import new_model
from modes.training.plan import find_folds
from modes.training.run_data import RunData, open_run_data
from modes.training.split import Split, prepare_split
from tests.fabricated_run import TINY, options, with_
from tests.team import run_team
from utils.checkpoint import load_checkpoint
from utils.cli import run as run_program
from utils.config import Config, load_config
from utils.parallel.team import ALONE, Team, opened_team

CPU = torch.device("cpu")
NO_DROPOUT = [f"MODEL.{part}_dropout=0" for part in ("neighbor", "global", "fusion", "gene", "gene_mlp", "predictor")]


@pytest.fixture(scope="module")
def config(fabricated_data, tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "tiny.yaml").write_text(TINY)
    return load_config(
        folder / "tiny.yaml",
        [f"DATA.data_dir={fabricated_data}", f"GENERAL.log_path={folder / 'logs'}", *NO_DROPOUT, "TRAINING.epochs=2"],
    )


@pytest.fixture(scope="module")
def small(config, tmp_path_factory) -> Config:
    """With one slide of each of three patients: two steps an epoch."""
    folder = tmp_path_factory.mktemp("small") / "data"
    shutil.copytree(config.DATA.data_dir, folder, ignore=shutil.ignore_patterns("?2*", "D*"))
    return with_(config, DATA={"data_dir": str(folder)}, TRAINING={"batch_size": 16})


def open_fold(config: Config) -> tuple[RunData, Split]:
    layout = open_layout(config, "tiny")
    slides = layout.patients_on_disk()
    folds, _ = find_folds(config, layout, slides, [0], all_patients=False)
    run_data = open_run_data(config, "tiny", layout, list(slides), CPU, folds)
    return run_data, prepare_split(run_data, folds[0])


@dataclass(frozen=True)
class Case:
    """A step to compare. rows: of its batch, by the rows of the training spots in a random order and in the slides' order."""

    rows: Callable[[Tensor, Tensor], Tensor]
    model: str = "gene_dml"
    dtype: torch.dtype = torch.float64
    loss: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a process has of a step: terms of the whole batch, all gradients; spots of each process, slides it encoded."""

    terms: dict[str, float]
    gradients: dict[str, Tensor | None]
    sizes: list[int]
    encoded: list[int]


def uneven(shuffled: Tensor, _by_slide: Tensor) -> Tensor:
    return shuffled[:31]


CASES = {
    "gene_dml": Case(uneven),
    "single": Case(uneven, dtype=torch.float32),
    "spectral": Case(uneven, loss={"use_kmeans": False}),
    "triplex": Case(uneven, model="triplex"),
    "bleep": Case(uneven, model="bleep"),
    "mlp": Case(uneven, model="mlp"),
    "each its own slides": Case(lambda _, by_slide: torch.cat([by_slide[:13], by_slide[-12:]])),
    "one slide": Case(lambda _, by_slide: by_slide[:9]),
    # The second process holds one spot, again and again: all of them fall into one of the four clusters.
    "an empty cluster": Case(lambda shuffled, _: torch.cat([shuffled[:12], shuffled[20:21].repeat(11)])),
    "a process without spots": Case(lambda shuffled, _: shuffled[:1], loss={"k": 1}),
}


def one_step(run_data: RunData, split: Split, case: Case, team: Team) -> Step:
    config = with_(run_data.config, MODEL={"name": case.model}, LOSS=case.loss)
    run_data = replace(run_data, config=config)
    model = new_model(run_data, split).to(case.dtype).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    by_slide = run_data.store.rows_of(split.record.train_slides)
    rows = case.rows(by_slide[torch.randperm(len(by_slide), generator=torch.Generator().manual_seed(3))], by_slide)
    gather = whole_batch if team.size == 1 else partial(share_of, rank=team.rank, size=team.size)
    batch = gather(run_data.maker, rows, torch.zeros_like(rows), split.targets.to(case.dtype))
    assert len(batch) == len(rows)
    terms = make_step(model, config, tokens_of, team)(batch)
    terms["total"].backward()
    team.sum_gradients(torch.optim.SGD(model.parameters(), lr=1.0))
    return Step(
        {name: float(term.detach()) for name, term in terms.items()},
        {name: value.grad for name, value in model.named_parameters()},
        list(getattr(batch, "sizes", [])),
        list(batch.lengths),
    )


@pytest.fixture(scope="module")
def steps(config, tmp_path_factory) -> tuple[dict[str, Step], list[dict[str, Step]]]:
    """Every case by one process, and by both of a team."""
    run_data, split = open_fold(config)

    def all_steps(team: Team) -> dict[str, Step]:
        return {name: one_step(run_data, split, case, team) for name, case in CASES.items()}

    def in_team(_rank: int) -> dict[str, Step]:
        with opened_team("data", CPU) as team:
            return all_steps(team)

    ended = run_team(2, in_team, tmp_path_factory.mktemp("steps"))
    assert [one.status for one in ended] == [0, 0], "\n".join(one.output for one in ended)
    return all_steps(ALONE), [one.result for one in ended]


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_that_of_one(steps, name):
    whole, parts = steps[0][name], [part[name] for part in steps[1]]
    tolerance = 1e-10 if CASES[name].dtype == torch.float64 else 1e-6
    largest = max(float(value.abs().max()) for value in whole.gradients.values() if value is not None)
    assert largest > 1e-3
    for part in parts:
        assert part.terms == pytest.approx(whole.terms, rel=tolerance)
        for place, gradient in part.gradients.items():
            expected = whole.gradients[place]
            expected = torch.zeros_like(gradient) if expected is None else expected
            difference = float((gradient - expected).abs().max())
            assert difference <= tolerance * max(float(expected.abs().max()), 1e-2 * largest), place


def test_no_slide_is_encoded_twice_and_no_spot_left_out(steps):
    whole, parts = steps
    for name in ("gene_dml", "each its own slides", "one slide"):
        of_parts = [part[name] for part in parts]
        assert sorted([*of_parts[0].encoded, *of_parts[1].encoded]) == sorted(whole[name].encoded)
    assert parts[0]["gene_dml"].sizes == parts[1]["gene_dml"].sizes == [16, 15]
    assert len(parts[0]["gene_dml"].encoded) == len(parts[1]["gene_dml"].encoded) == 2
    assert parts[0]["a process without spots"].sizes == [1, 0]
    assert len(parts[0]["one slide"].encoded) + len(parts[1]["one slide"].encoded) == 1


def train_in_team(config: Config, run_options: TrainOptions, kill_at: tuple[int, int] | None = None):
    """What each process does. kill_at: (rank, steps of the optimiser after which that process kills itself)."""

    def work(rank: int) -> None:
        steps = count()

        def die(*_) -> None:
            if kill_at is not None and rank == kill_at[0] and next(steps) == kill_at[1]:
                os.kill(os.getpid(), signal.SIGKILL)

        register_optimizer_step_pre_hook(die)
        with opened_team("folds" if run_options.shares_folds else "data", CPU) as team:
            train(config, replace(run_options, team=team))

    return work


def metrics(run: Path, fold: int) -> str:
    return (run / f"fold_{fold}" / "metrics.jsonl").read_text()


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text()) | {"run": ""}


def weights(run: Path, fold: int) -> dict[str, Tensor]:
    return torch.load(run / f"fold_{fold}" / "best.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def serial(small) -> Path:
    return train(small, options(folds=[0, 1], run_name="serial"))


def test_processes_that_share_folds_make_the_run_of_one(small, serial, tmp_path):
    """They know nothing of each other; one is killed, and the rest is made by the same command again."""
    run_options = options(folds=[0, 1], run_name="shared", shares_folds=True)
    killed, left = run_team(2, train_in_team(small, run_options, kill_at=(0, 3)), tmp_path, with_torchrun=False)
    assert (killed.status, left.status) == (-signal.SIGKILL, 0), left.output
    run = serial.with_name("shared")
    # Whoever is left has taken the other fold over, too, if that was free before it ended.
    assert ("Still in work: Fold" in left.output) != (run / "summary.json").exists()
    first, second = run_team(2, train_in_team(small, run_options), tmp_path, with_torchrun=False)
    assert (first.status, second.status) == (0, 0), first.output + second.output
    for fold in (0, 1):
        assert metrics(run, fold) == metrics(serial, fold)
        assert all(torch.equal(a, b) for a, b in zip(weights(run, fold).values(), weights(serial, fold).values()))
    assert summary(run) == summary(serial)
    assert not list(run.rglob("*.lock")) and len(json.loads((run / "versions.json").read_text())) >= 2


def test_processes_that_share_batches_make_the_run_of_one(small, serial, tmp_path):
    """Weights and scores after two epochs, undisturbed, and when one was killed in the middle and all were started again."""
    run_options = options(folds=[0], run_name="data")
    run = serial.with_name("data")
    ended = run_team(2, train_in_team(small, run_options), tmp_path)
    assert [one.status for one in ended] == [0, 0], ended[0].output + ended[1].output
    for name, value in weights(serial, 0).items():
        torch.testing.assert_close(weights(run, 0)[name], value, rtol=1e-5, atol=1e-5)
    assert summary(run)["folds"][0]["pcc_all"] == pytest.approx(summary(serial)["folds"][0]["pcc_all"], abs=1e-4)

    killed = replace(run_options, run_name="killed", resume=True)
    writer, other = run_team(2, train_in_team(small, killed, kill_at=(0, 3)), tmp_path)
    assert (writer.status, other.status) == (-signal.SIGKILL, 1)
    assert "another process of this training has ended" in other.output
    ended = run_team(2, train_in_team(small, killed), tmp_path)
    assert [one.status for one in ended] == [0, 0], ended[0].output + ended[1].output
    assert "goes on after epoch 1" in ended[0].output and ended[1].output.count("epoch") == 0
    assert metrics(run, 0) == metrics(run.with_name("killed"), 0)
    assert summary(run) == summary(run.with_name("killed"))


def test_a_signal_to_torchrun_ends_all_processes_in_order(small, tmp_path):
    """SIGUSR1 in the middle of an epoch: the epochs before are saved, nothing is left half written or locked, one speaks.

    Its processes are forked, and need not import everything again.
    """
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = tmp_path / "tiny" / "run"
    words = [
        "--config_name", str(tmp_path / "tiny.yaml"), "--mode", "train", "--parallel", "data", "--device", "cpu",
        "--epochs", "5000", "--fixed_epochs", "5000", "--checkpoint_seconds", "0", "--data_dir", small.DATA.data_dir,
        "--log_path", str(tmp_path), "--run_name", "run", "--fold", "0",
    ]  # fmt: skip
    torchrun = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="one",
        start_method="fork", signals_to_handle="SIGTERM,SIGUSR1",
    )  # fmt: skip

    def work(_rank: int) -> None:
        Thread(target=send, daemon=True).start()
        elastic_launch(torchrun, lambda: run_program(lambda: main.main(words)))()

    def send() -> None:
        while not (run / "fold_0" / "last.pt").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    (ended,) = run_team(1, work, tmp_path, with_torchrun=False)
    assert ended.status != 0 and "SignalException" in ended.output, ended.output
    last = load_checkpoint(run / "fold_0" / "last.pt")
    assert last.epoch >= 1 and len(metrics(run, 0).splitlines()) >= last.epoch
    said = ended.output
    assert said.count("Run folder:") == 1 and said.count("goes on after epoch") == 1
    assert "interrupted: finished work is kept; repeat it with --resume." in said
    assert list(run.rglob(".*")) == []
