"""Cross-validation: reproducible, resumable, blind to the test patient; on fabricated features. tests/soak kills it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import main
import modes.train
from datasets.known_sets import get_spec
from datasets.layout import Layout
from modes.train import train
from tests.checkpoints import edit
from tests.command_line import call_main
from tests.fabricated_run import TINY, options, with_
from utils.config import Config, load_config
from utils.runs import FinishedRun

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data_dir(fabricated_data, tmp_path_factory) -> Path:
    """`fabricated_data` with one slide a patient, but two of B. Read only."""
    folder = tmp_path_factory.mktemp("train") / "data"
    return Path(shutil.copytree(fabricated_data, folder, ignore=shutil.ignore_patterns("[ACD]2*", "*_external")))


def config_in(folder: Path, data_dir: Path) -> Config:
    """The configuration of a training for three epochs whose runs lie in `folder`; its file is tiny.yaml there."""
    (folder / "tiny.yaml").write_text(TINY.replace("epochs: 4", "epochs: 3"))
    return load_config(folder / "tiny.yaml", [f"DATA.data_dir={data_dir}", f"GENERAL.log_path={folder / 'logs'}"])


@pytest.fixture
def config(data_dir, tmp_path) -> Config:
    return config_in(tmp_path, data_dir)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory) -> Path:
    """An undisturbed run of folds 1 and 2, with its report. Read only."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    config = config_in(folder, data_dir)
    return train(config, options(folds=[1, 2], with_report=True, config_file=str(folder / "tiny.yaml")))


def moved(run: Path, config: Config) -> Path:
    """A copy of a run below the logs of a configuration, as if it had been trained there."""
    copy = Path(shutil.copytree(run, Path(config.GENERAL.log_path) / "tiny" / run.name))
    saved = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(saved.replace(str(run.parents[1]), config.GENERAL.log_path))
    return copy


def test_the_summary_gives_the_command_of_a_ridge_and_then_compares_with_it(config, whole):
    run, asked = moved(whole, config), options(folds=[1, 2], resume=True)
    train(config, asked)
    before = json.loads((run / "summary.json").read_text())["verdict"]
    assert "no such run lies beside it" in before[0]
    said, command = before[1].split(": python main.py ")
    assert said.endswith("repeat this training with --resume")
    main.main([*shlex.split(command), "--folds", "1,2", "--device", "cpu", "--no_report"])
    assert (run.parent / "ridge_neighbor" / "summary.json").is_file(), "it lies beside the run"
    train(config, asked)
    after = json.loads((run / "summary.json").read_text())["verdict"]
    words = "ridge on the same features (ridge_neighbor: patch and neighbor mean), PCC(A)"
    assert re.match(f"(Better than|Worse than|About as good as) {re.escape(words)}", after[0])
    assert not any("main.py" in sentence for sentence in after)


def log(run: Path, fold: int) -> str:
    return (run / f"fold_{fold}" / "metrics.jsonl").read_text()


def weights(run: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(run / f"fold_{fold}" / "best.pt", weights_only=True)["model"]


def test_a_run_leaves_everything_it_promises(whole):
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    expected = {"config.yaml", "versions.json", "summary.json", "summary.md", "report.html", "explorer.html"}
    for fold, slides in ((1, ("B1", "B2")), (2, ("C1",))):
        files = (
            "split.json",
            "genes.txt",
            "metrics.jsonl",
            "last.pt",
            "best.pt",
            "per_gene.csv",
            "per_slide.csv",
            "result.json",
        )
        expected |= {f"fold_{fold}/{name}" for name in files}
        expected |= {f"fold_{fold}/predictions/{slide}.h5ad" for slide in slides}
    assert expected <= names
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["protocol"] == "clean" and len(summary["folds"]) == 2
    split = json.loads((whole / "fold_2" / "split.json").read_text())
    assert (
        split["test_patients"] == ["C"] and len(split["validation_patients"]) == 1 and len(split["train_patients"]) == 2
    )
    everyone = split["test_patients"] + split["validation_patients"] + split["train_patients"]
    assert sorted(everyone) == ["A", "B", "C", "D"]
    records = [json.loads(line) for line in log(whole, 2).splitlines()]
    best = max(records, key=lambda record: record["validation/pcc_all"])
    assert json.loads((whole / "fold_2/result.json").read_text())["epoch"] == best["epoch"]


def test_the_way_from_the_command_to_the_optimiser_step_is_short(config, tmp_path, monkeypatch):
    """A reader follows it on one page: main, the folds, the epochs of a fold, the batches of an epoch."""
    ways = set()

    def is_ours(path: Path) -> bool:
        return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in (".venv", "tests")

    def remember(*_) -> None:
        names = [frame.name for frame in traceback.extract_stack() if is_ours(Path(frame.filename))]
        ways.add(tuple(names[names.index("main") :]))

    data, logs = f"--data_dir {config.DATA.data_dir}", f"--log_path {config.GENERAL.log_path}"
    flags = f"--mode train --config_name {tmp_path / 'tiny.yaml'} {data} {logs} --fold 0 --epochs 1 --device cpu --no_report"
    monkeypatch.setattr(sys, "argv", ["main.py", *flags.split()])
    hook = register_optimizer_step_pre_hook(remember)
    try:
        main.main()
    finally:
        hook.remove()
    (way,) = ways
    assert way == ("main", "train", "train_fold", "train_one_epoch")


def test_a_fold_alone_equals_the_fold_after_others(config, whole):
    alone = train(config, options(folds=[2], run_name="alone"))
    assert log(whole, 2) == log(alone, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole, 2).values(), weights(alone, 2).values()))


def test_a_process_whose_strings_have_other_hashes_ends_an_interrupted_run_like_an_undisturbed_one(
    config, whole, tmp_path, monkeypatch
):
    words = (
        *("--mode", "train", "--config_name", str(tmp_path / "tiny.yaml"), "--data_dir", config.DATA.data_dir),
        *("--log_path", config.GENERAL.log_path, "--device", "cpu", "--no_report", "--fold", "1", "--epochs", "3"),
        *("--checkpoint_seconds", "0"),
    )
    other = Path(config.GENERAL.log_path) / "tiny" / "other"
    calls, train_one_epoch = [], modes.train.train_one_epoch

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_one_epoch(*given, **named)

    monkeypatch.setattr(modes.train, "train_one_epoch", interrupted)
    assert call_main(*words, "--run_name", "other").status == 130
    assert len(log(other, 1).splitlines()) == 2 and not (other / "fold_1" / "result.json").exists()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "3"}
    command = [sys.executable, "main.py", *words, "--run_name", "other", "--resume"]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    assert log(whole, 1) == log(other, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole, 1).values(), weights(other, 1).values()))
    first, second = (pd.read_csv(run / "fold_1" / "per_gene.csv") for run in (whole, other))
    pd.testing.assert_frame_equal(first, second)
    assert not list(other.rglob(".*.pt")), "no temporary file is left in the end"


def test_in_the_clean_protocol_the_test_patient_changes_nothing(config, data_dir, whole, tmp_path):
    """Other counts for the test patient: same weights, same predictions, same panel and lists; other scores.

    Count tables of ST leave out genes without counts: a gene that only the test patient lacks stays in the panel.
    """
    changed = tmp_path / "changed"
    shutil.copytree(data_dir, changed)
    layout = Layout(changed, get_spec("demo", changed), patch_size=64, num_neighbors=3)
    genes = (whole / "fold_1/genes.txt").read_text().split()
    for slide, absent in (("B1", genes[:1]), ("B2", [])):
        path = layout.counts_path(slide)
        counts = pd.read_parquet(path)
        random = np.random.default_rng(0)
        other = pd.DataFrame(random.poisson(9, counts.shape), counts.index, counts.columns)
        other.drop(columns=absent).to_parquet(path)
    config = with_(config, DATA={"data_dir": str(changed)})
    second = train(config, options(folds=[1]))
    assert (second / "fold_1/genes.txt").read_text().split() == genes
    assert all(torch.equal(a, b) for a, b in zip(weights(whole, 1).values(), weights(second, 1).values()))
    results = [json.loads((run / "fold_1/result.json").read_text()) for run in (whole, second)]
    assert results[0]["epoch"] == results[1]["epoch"]
    assert results[0]["gene_lists"]["highly_predictive"] == results[1]["gene_lists"]["highly_predictive"]
    assert results[0]["mse"] != results[1]["mse"]
    import anndata

    for slide in ("B1", "B2"):
        one, two = (anndata.read_h5ad(run / f"fold_1/predictions/{slide}.h5ad") for run in (whole, second))
        assert np.array_equal(one.X, two.X)
        assert not np.array_equal(one.layers["measured"], two.layers["measured"])
    notes = json.loads((second / "summary.json").read_text())["notes"]
    assert any("1 of the 16 panel genes are not in the counts of B1" in note and genes[0] in note for note in notes)

    path = layout.counts_path("B1")
    pd.read_parquet(path).drop(columns=genes[1]).to_parquet(path)
    with pytest.raises(ValueError, match="slide B1 has no counts for 2 of the 16 panel genes"):
        train(config, options(folds=[1], run_name="other_names"))


def test_the_paper_protocol_takes_the_panel_file_and_the_test_fold(config):
    paper = with_(config, EVALUATION={"protocol": "paper"})
    run = train(paper, options(folds=[0]))
    split = json.loads((run / "fold_0/split.json").read_text())
    assert split["selection"] == "test" and split["validation_patients"] == []
    records = [json.loads(line) for line in log(run, 0).splitlines()]
    best = max(records, key=lambda record: record["test/pcc_all"])
    assert json.loads((run / "fold_0/result.json").read_text())["epoch"] == best["epoch"]
    from utils.files import load_names

    layout = Layout(config.DATA.data_dir, get_spec("demo", config.DATA.data_dir))
    assert (run / "fold_0/genes.txt").read_text().split() == load_names(layout.panel_path)


@pytest.mark.parametrize("model", ["mean", "ridge", "ridge_neighbor", "knn", "mlp", "bleep", "triplex"])
def test_every_baseline_goes_the_same_way(config, model):
    run = train(with_(config, MODEL={"name": model}, TRAINING={"epochs": 1}), options(folds=[0]))
    result = json.loads((run / "fold_0/result.json").read_text())
    split = json.loads((run / "fold_0/split.json").read_text())
    is_closed_form = model in ("mean", "ridge", "ridge_neighbor", "knn")
    assert (split["selection"], len(split["train_patients"])) == (("none", 3) if is_closed_form else ("validation", 2))
    assert np.isfinite(result["mse"])
    if model == "mean":
        assert result["mse"] == pytest.approx(result["training_mean"]["mse"], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"MODEL": {"use_neighbor": False}, "LOSS": {"group_weight": 0.0}},
        {"MODEL": {"use_global": False}, "LOSS": {"instance_weight": 0.0}},
        {"LOSS": {"use_kmeans": False}, "TRAINING": {"slides_per_batch": 2}},
        {"LOSS": {"normalize_fused": True}, "EVALUATION": {"fixed_epochs": 2}},
    ],
    ids=str,
)
def test_every_switch_trains_and_tests(config, changes):
    run = train(with_(config, TRAINING={"epochs": 1, **changes.get("TRAINING", {})}, **{
        name: values for name, values in changes.items() if name != "TRAINING"
    }), options(folds=[3]))  # fmt: skip
    record = json.loads(log(run, 3).splitlines()[-1])
    assert record["epoch"] == (2 if "EVALUATION" in changes else 1) and np.isfinite(record["train/total"])
    assert ("train/instance" in record) == ("instance_weight" not in changes.get("LOSS", {}))
    assert ("train/group" in record) == ("group_weight" not in changes.get("LOSS", {}))


def test_k_larger_than_a_batch_is_refused_before_the_first_epoch(config):
    with pytest.raises(
        ValueError, match=r"k = 500 clusters, but the smallest batch of fold A has \d+ spots.*--k \d+ or less"
    ):
        train(with_(config, LOSS={"k": 500}), options())


def test_an_existing_run_is_neither_overwritten_nor_mixed(config, whole):
    run = moved(whole, config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FinishedRun, match=r"already holds fold_1 of a run, finished: its summary is .*--run_name NAME"):
        train(config, options(folds=[1]))
    for folds in (None, [0, 1]):
        with pytest.raises(ValueError, match=r"already holds an unfinished run: --resume goes on") as caught:
            train(config, options(folds=folds))
        assert not isinstance(caught.value, FinishedRun)
    with pytest.raises(ValueError, match=r"LOSS\.k: the run has 4, asked for 3"):
        train(with_(config, LOSS={"k": 3}), options(folds=[1], resume=True))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_two_patients_train_a_fixed_number_of_epochs_and_say_so(config, data_dir, tmp_path, capsys):
    """As with the real sections at hand: no patient can be held out inside a fold."""
    few = tmp_path / "few"
    shutil.copytree(data_dir, few)
    for path in [*few.glob("demo/ST-cnts/[CD]*"), *few.glob("demo/ST-spotfiles/[CD]*")]:
        path.unlink()
    run = train(with_(config, DATA={"data_dir": str(few)}, TRAINING={"epochs": 2}), options())
    said = capsys.readouterr().out
    assert "with one training patient none can be held out" in said
    assert said.count("Test scores in the lines below are only shown") == 1
    assert said.index("Test scores in the lines") < said.index(" epoch 1/2 ")
    assert json.loads((run / "fold_0/split.json").read_text())["selection"] == "fixed"
    assert json.loads((run / "summary.json").read_text())["folds"][0]["epoch"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_whole_tiny_training_on_cuda(config, precision):
    run = train(with_(config, TRAINING={"precision": precision}), options(folds=[0], device=torch.device("cuda")))
    assert np.isfinite(json.loads((run / "fold_0/result.json").read_text())["mse"])


@pytest.mark.gpu
def test_training_on_cuda_has_the_losses_of_the_cpu(config):
    """The same batches, no dropout, float32; resident on the device or copied for each batch."""
    still = with_(
        config,
        MODEL={name: 0.0 for name in vars(config.MODEL) if name.endswith("dropout")},
        TRAINING={"precision": "float32", "epochs": 2},
    )
    records = []
    for place, device, residence in (("cpu", "cpu", "auto"), ("dev", "cuda", "device"), ("host", "cuda", "host")):
        logs = {"log_path": f"{config.GENERAL.log_path}_{place}"}
        run = train(
            with_(still, GENERAL=logs, DATA={"residence": residence}), options(folds=[0], device=torch.device(device))
        )
        records.append([json.loads(line) for line in log(run, 0).splitlines()])
    for on_cpu, *on_cuda in zip(*records, strict=True):
        for other in on_cuda:
            for name, value in on_cpu.items():
                if name.startswith("train/"):
                    assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_continues_on_the_other_device(config, first, second):
    run = train(with_(config, TRAINING={"epochs": 2}), options(folds=[0], device=torch.device(first)))
    (run / "fold_0" / "result.json").unlink()
    edit(run / "fold_0" / "best.pt", lambda content: content["config"]["TRAINING"].update(epochs=3))
    saved = (run / "config.yaml").read_text().replace("epochs: 2", "epochs: 3")
    (run / "config.yaml").write_text(saved)
    train(config, options(folds=[0], resume=True, device=torch.device(second)))
    assert [json.loads(line)["epoch"] for line in log(run, 0).splitlines()] == [1, 2, 3]


def test_a_fold_is_tested_again_with_the_flags_it_was_trained_with(config, whole):
    """The same flags are fine; one that would make another model is refused with both values."""
    from modes.test import test as run_test

    run = moved(whole, config)
    before = (run / "fold_1/per_gene.csv").read_text()
    same = ["LOSS.k=4", f"GENERAL.log_path={config.GENERAL.log_path}", f"DATA.data_dir={config.DATA.data_dir}"]
    run_test(str(run), 1, same, torch.device("cpu"), with_report=False)
    assert (run / "fold_1/per_gene.csv").read_text() == before
    with pytest.raises(ValueError, match=r"(?s)other settings.*MODEL\.projection_dim: the run has 16, asked for 8"):
        run_test(str(run), 1, ["MODEL.projection_dim=8"], torch.device("cpu"), with_report=False)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of fold 0.*folds with one: 1, 2"):
        run_test(str(run), 0, [], torch.device("cpu"), with_report=False)
