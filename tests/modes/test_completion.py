"""What counts as a finished fold: marked by training, asked for by test, external_test and predict, kept by --resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from modes.external_test import external_test
from modes.predict import PredictOptions, predict
from modes.prediction import ensemble
from modes.test import test as run_test
from modes.train import TrainOptions, train
from modes.training.compose import open_layout
from modes.training.plan import find_folds
from preprocess.extract_features_uni import main as extract
from tests.checkpoints import edit
from tests.shortcuts import keep_spots
from utils.checkpoint import chosen_checkpoints, find_checkpoint, has_ended, load_checkpoint
from utils.config import load_config

CPU = torch.device("cpu")


def unfinish(run: Path, fold: int) -> Path:
    """Make a fold look like one whose training was stopped; returns its folder."""
    folder = run / f"fold_{fold}"
    edit(folder / "best.pt", lambda content: content.update(finished=False))
    (folder / "result.json").unlink()
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


class TestMark:
    def test_training_marks_its_end(self, tiny_run):
        assert load_checkpoint(tiny_run.path / "fold_0" / "best.pt").finished is True
        assert has_ended(tiny_run.path / "fold_1" / "best.pt")

    def test_of_older_runs_the_last_checkpoint_tells(self, tiny_run, tmp_path):
        folder = tiny_run.copy(tmp_path) / "fold_0"
        edit(folder / "best.pt", lambda content: content.pop("finished"))
        assert has_ended(folder / "best.pt")
        edit(folder / "last.pt", lambda content: content["progress"].update(epoch=1, best_epoch=1))
        assert not has_ended(folder / "best.pt")
        edit(folder / "last.pt", lambda content: content["config"]["TRAINING"].update(patience=1))
        edit(folder / "last.pt", lambda content: content["progress"].update(epoch=1, best_epoch=0))
        assert has_ended(folder / "best.pt") == (load_checkpoint(folder / "last.pt").split.selection != "fixed")
        (folder / "last.pt").unlink()
        assert has_ended(folder / "best.pt"), "a closed form and an imported checkpoint have no last.pt"

    def test_a_fold_with_scores_of_an_unfinished_training_is_trained_on(self, tiny_run, tmp_path):
        """One epoch and its scores, as a test of an older version left them; --resume trains the second epoch."""
        shared = [f"DATA.data_dir={tiny_run.data_dir}", f"GENERAL.log_path={tmp_path}"]
        config = load_config(tiny_run.config_name, shared)
        options = TrainOptions("tiny", "cut", CPU, [0], False, 0.0, with_report=False)
        cut = train(load_config(tiny_run.config_name, [*shared, "TRAINING.epochs=1"]), options)
        edit(cut / "fold_0" / "best.pt", lambda content: content.update(finished=False))
        for name in ("best.pt", "last.pt"):
            edit(cut / "fold_0" / name, lambda content: content["config"]["TRAINING"].update(epochs=2))
        (cut / "config.yaml").write_text((cut / "config.yaml").read_text().replace("epochs: 1\n", "epochs: 2\n"))
        train(config, replace(options, resume=True))
        assert len((cut / "fold_0" / "metrics.jsonl").read_text().splitlines()) == 2
        assert has_ended(cut / "fold_0" / "best.pt")
        for name in ("result.json", "metrics.jsonl"):
            assert (cut / "fold_0" / name).read_text() == (tiny_run.path / "fold_0" / name).read_text()
        found, expected = (load_checkpoint(run / "fold_0" / "best.pt").weights for run in (cut, tiny_run.path))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        written = (cut / "fold_0" / "best.pt").stat().st_mtime_ns
        train(config, replace(options, resume=True))
        assert (cut / "fold_0" / "best.pt").stat().st_mtime_ns == written, "a complete fold is left alone"


class TestTest:
    def test_an_unfinished_fold_is_refused_and_gets_no_result(self, tiny_run, tmp_path):
        run = tiny_run.copy(tmp_path)
        folder = unfinish(run, 1)
        for path, fold in ((run, 1), (folder, None), (folder / "best.pt", None)):
            with pytest.raises(ValueError, match=r"has not ended.*--resume"):
                run_test(str(path), fold, [], CPU)
        assert not (folder / "result.json").exists()

    def test_of_a_run_the_finished_folds_are_tested(self, tiny_run, tmp_path, capsys):
        run = tiny_run.copy(tmp_path)
        unfinish(run, 1)
        run_test(str(run), None, [], CPU, with_report=False)
        assert "Left out of run: fold_1, whose training has not ended" in capsys.readouterr().out
        assert [row["fold"] for row in read(run / "summary.json")["folds"]] == [0]
        unfinish(run, 0)
        with pytest.raises(ValueError, match=r"no fold has ended its training \(fold_0, fold_1\).*--resume"):
            run_test(str(run), None, [], CPU)

    def test_another_file_than_best_is_scored_apart(self, tiny_run, tmp_path):
        run = tiny_run.copy(tmp_path)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        run_test(str(run / "fold_0" / "last.pt"), None, [], CPU, with_report=False)
        assert {path: path.read_bytes() for path in before} == before
        apart = run / "fold_0" / "test_last"
        assert {path for path in run.rglob("*") if path.is_file()} - set(before) == {
            apart / name
            for name in (
                "result.json", "genes.txt", "per_gene.csv", "per_slide.csv", "per_patient.csv", "per_gene_slide.csv",
                "predictions/A1.h5ad",
            )
        }  # fmt: skip

    def test_tokens_pooled_otherwise_than_in_training_are_refused(self, tiny_run, tmp_path):
        run = tiny_run.copy(tmp_path)
        edit(run / "fold_0" / "best.pt", lambda content: content["encoder"].update(token_pool=4))
        with pytest.raises(ValueError, match=r"tokens pooled by 4, those at hand .* by 1 \(cache\).*--token_pool 4"):
            run_test(str(run), 0, [], CPU)
        with pytest.raises(ValueError, match=r"tokens pooled by 4, those at hand .* by 1 \(encoder\)"):
            run_test(str(run), 0, ["DATA.tokens=online"], CPU)


@pytest.fixture(scope="module")
def external_data(tiny_run, tmp_path_factory) -> Path:
    """A data folder with an extracted test/demo_external of a few spots."""
    torch.set_num_threads(1)
    data_dir = tmp_path_factory.mktemp("completion") / "data"
    shutil.copytree(tiny_run.data_dir / "test", data_dir / "test")
    keep_spots(data_dir / "test" / "demo_external")
    extract([
        "--config", tiny_run.config_name, "--mode", "external", "--test_name", "demo_external", "--extract_mode", "all",
        "--views", "1", "--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "1",
    ])  # fmt: skip
    return data_dir


class TestExternal:
    def test_only_finished_folds_are_averaged_and_the_others_named(self, tiny_run, external_data, tmp_path, capsys):
        run = tiny_run.copy(tmp_path)
        folder = unfinish(run, 1)
        overrides = [f"DATA.data_dir={external_data}"]
        summary = read(external_test(run, "demo_external", None, overrides, CPU, with_report=False) / "summary.json")
        assert [row["predictor"] for row in summary["predictors"]] == ["fold_0"]
        note = "Left out of run: fold_1, whose training has not ended"
        assert any(note in text for text in summary["notes"]) and note in capsys.readouterr().out
        about = anndata.read_h5ad(run / "external/demo_external/predictions/X1.h5ad").uns["gene_dml"]
        assert note in about["folds"] and list(about["checkpoints"]) == ["fold_0/best.pt"]
        with pytest.raises(ValueError, match=r"training of this fold has not ended.*--model_path .*best\.pt"):
            external_test(run, "demo_external", 1, overrides, CPU)
        named = external_test(folder / "best.pt", "demo_external", None, overrides, CPU, with_report=False)
        assert any(
            "has not ended" in text and "taken as named" in text for text in read(named / "summary.json")["notes"]
        )
        last = external_test(folder / "last.pt", "demo_external", None, overrides, CPU, with_report=False)
        assert last == folder / "test_last" / "external" / "demo_external", "the fold's own result stays"
        assert any("the last epoch that was saved (2)" in text for text in read(last / "summary.json")["notes"])

    def test_a_fold_alone_bears_the_name_of_its_run(self, tiny_run, external_data, tmp_path):
        run = tiny_run.copy(tmp_path)
        for path, fold in ((run, 0), (run / "fold_0", None), (run, None)):
            folder = external_test(
                path, "demo_external", fold, [f"DATA.data_dir={external_data}"], CPU, with_report=False
            )
            assert read(folder / "summary.json")["run"] == "run"
            assert (folder / "summary.md").read_text().startswith("# run on demo_external")

    def test_slides_that_lack_a_file_are_named(self, tiny_run, external_data, tmp_path):
        data_dir = Path(shutil.copytree(external_data, tmp_path / "data"))
        counts = data_dir / "test" / "demo_external" / "ST-cnts"
        shutil.copy(counts / "X1_sub.parquet", counts / "X2_sub.parquet")
        folder = external_test(
            tiny_run.copy(tmp_path), "demo_external", 0, [f"DATA.data_dir={data_dir}"], CPU, with_report=False
        )
        notes = read(folder / "summary.json")["notes"]
        assert any("1 slides cannot be used and are left out: X2. X2: no spot table" in note for note in notes)

    @pytest.mark.parametrize(("tokens", "held"), [("cache", 1), ("online", 4)])
    def test_one_model_at_a_time_is_held_where_features_are_cached(
        self, tiny_run, external_data, tmp_path, monkeypatch, tokens, held
    ):
        """Four folds, two of them copies: the mean is that of the two. Two slides: each model is loaded once."""
        run, data_dir = tiny_run.copy(tmp_path), Path(shutil.copytree(external_data, tmp_path / "data"))
        root = data_dir / "test" / "demo_external"
        for path in [path for path in root.rglob("X1*") if path.is_file()]:
            folder = path.parent.with_name("X2") if path.parent.name == "X1" else path.parent
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.name.replace("X1", "X2"))
        overrides = [f"DATA.data_dir={data_dir}", f"DATA.tokens={tokens}"]
        folder = external_test(run, "demo_external", None, overrides, CPU, with_report=False)
        of_two = anndata.read_h5ad(folder / "predictions" / "X1.h5ad")
        for fold in (0, 1):
            shutil.copytree(run / f"fold_{fold}", run / f"fold_{fold + 2}")
            changes = {"fold": fold + 2, "test_patients": [f"copy of {fold}"]}
            edit(run / f"fold_{fold + 2}" / "best.pt", lambda content, new=changes: content["fold"].update(new))
        alive: list[weakref.ref] = []
        greatest = 0
        restore = ensemble.restored_model

        def counted(*arguments):
            nonlocal greatest
            model = restore(*arguments)
            alive.append(weakref.ref(model))
            greatest = max(greatest, sum(reference() is not None for reference in alive))
            return model

        monkeypatch.setattr(ensemble, "restored_model", counted)
        folder = external_test(run, "demo_external", None, overrides, CPU, with_report=False)
        assert (greatest, len(alive)) == (held, 4)
        of_four = anndata.read_h5ad(folder / "predictions" / "X1.h5ad")
        assert list(of_four.var_names) == list(of_two.var_names)
        for layer in ("target", "neighbor", "global"):
            np.testing.assert_allclose(of_four.layers[layer], of_two.layers[layer], atol=1e-6)
        np.testing.assert_allclose(of_four.X, of_two.X, atol=1e-6)
        assert np.array_equal(anndata.read_h5ad(folder / "predictions" / "X2.h5ad").X, of_four.X)


def test_a_prediction_names_the_folds_that_were_left_out(tiny_run, external_data, tmp_path):
    run = tiny_run.copy(tmp_path)
    folder = unfinish(run, 1)
    root = external_data / "test" / "demo_external"
    options = PredictOptions(root / "ST-imgs/X/X1/X1.jpg", tmp_path / "x.h5ad", root / "ST-spotfiles/X1_selection.tsv")
    about = anndata.read_h5ad(predict(run, options, None, [], CPU)).uns["gene_dml"]
    assert "Left out of run: fold_1" in about["folds"] and about["prediction"] == "fold_0"
    options = replace(options, overwrite=True)
    assert "folds" not in anndata.read_h5ad(predict(run, options, 0, [], CPU)).uns["gene_dml"]
    unfinish(run, 0)
    with pytest.raises(ValueError, match=r"no fold has ended its training"):
        predict(run, options, None, [], CPU)
    named = predict(folder / "best.pt", options, None, [], CPU)
    assert "taken as named" in anndata.read_h5ad(named).uns["gene_dml"]["folds"]


class TestChosen:
    def test_folds_without_a_checkpoint_are_unfinished_too(self, tiny_run, tmp_path):
        run = tiny_run.copy(tmp_path)
        (run / "fold_2").mkdir()
        paths, notes = chosen_checkpoints(run)
        assert paths == [run / "fold_0" / "best.pt", run / "fold_1" / "best.pt"]
        assert len(notes) == 1 and "fold_2, whose training has not ended" in notes[0]
        assert chosen_checkpoints(run, 1) == ([run / "fold_1" / "best.pt"], [])
        assert chosen_checkpoints(run / "fold_1") == ([run / "fold_1" / "best.pt"], [])
        with pytest.raises(FileNotFoundError, match="does not exist"):
            chosen_checkpoints(tmp_path / "nowhere")

    def test_a_run_over_several_seeds_names_them(self, tiny_run, tmp_path):
        for seed in (0, 3):
            shutil.copytree(tiny_run.path, tmp_path / "run" / f"seed_{seed}")
        for find in (find_checkpoint, chosen_checkpoints):
            with pytest.raises(
                FileNotFoundError,
                match=r"over several seeds \(seed_0, seed_3\).*--model_path .*run/seed_0 .*--mode comp",
            ):
                find(tmp_path / "run")


def test_slides_that_lack_a_file_end_in_the_summary_of_a_training(tiny_run, tmp_path, capsys):
    data_dir = Path(shutil.copytree(tiny_run.data_dir, tmp_path / "data"))
    counts = data_dir / "demo" / "ST-cnts"
    shutil.copy(counts / "A1_sub.parquet", counts / "A2_sub.parquet")
    shared = [f"DATA.data_dir={data_dir}", f"GENERAL.log_path={tmp_path}", "MODEL.name=mean"]
    config = load_config(tiny_run.config_name, shared)
    note = "1 slides cannot be used and are left out: A2. A2: no spot table"
    layout = open_layout(config, tiny_run.config_name)
    assert [text for text in find_folds(config, layout, layout.patients_on_disk(), None)[1] if note in text]
    capsys.readouterr()
    run = train(config, TrainOptions("tiny", "mean", CPU, [0], False, 0.0, with_report=False))
    assert note in capsys.readouterr().out
    assert any(note in text for text in read(run / "summary.json")["notes"])
    assert has_ended(run / "fold_0" / "best.pt"), "a closed form has ended once it is written"
    run_test(str(run), None, [], CPU, with_report=False)
    assert any(note in text for text in read(run / "summary.json")["notes"])


@pytest.mark.parametrize("checkpoint_seconds", [600.0, 0.0])
def test_ctrl_c_keeps_the_best_epoch_and_says_from_where_it_goes_on(tiny_run, tmp_path, capsys, checkpoint_seconds):
    """Interrupted in the middle of an epoch, with and without a last.pt; what is said agrees with the files."""
    config = load_config(
        tiny_run.config_name,
        [
            f"DATA.data_dir={tiny_run.data_dir}",
            f"GENERAL.log_path={tmp_path}",
            "TRAINING.epochs=5000",
            "TRAINING.patience=4999",
        ],
    )
    folder = tmp_path / "tiny" / "cut" / "fold_0"

    ended = threading.Event()

    def interrupt() -> None:
        log = folder / "metrics.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            time.sleep(0.02)
        while (
            not ended.is_set()
        ):  # Python drops an interrupt that reaches it in a finaliser: whoever is at the keys repeats it
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt, daemon=True).start()
            train(config, TrainOptions("tiny", "cut", CPU, [0], False, checkpoint_seconds))
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = load_checkpoint(folder / "best.pt")
    assert best.finished is False and not (folder / "result.json").exists()
    scores = [record.get("validation/pcc_all", record["epoch"]) for record in records[: best.progress.epoch]]
    assert best.epoch == 1 + int(np.argmax(scores))
    if checkpoint_seconds:
        assert "--resume starts this fold anew" in said and not (folder / "last.pt").exists()
    else:
        assert (
            f"epochs done: {len(records)}; --resume goes on after epoch {load_checkpoint(folder / 'last.pt').epoch} "
            in said
        )


def test_a_loss_that_is_no_longer_finite_says_what_is_left(tiny_run, tmp_path, capsys):
    config = load_config(
        tiny_run.config_name,
        [f"DATA.data_dir={tiny_run.data_dir}", f"GENERAL.log_path={tmp_path}", "TRAINING.learning_rate=1e30"],
    )
    with pytest.raises(ValueError, match=r"not finite.*start another with a smaller TRAINING\.learning_rate"):
        train(config, TrainOptions("tiny", "broken", CPU, [0], False, 60.0, with_report=False))
    assert "stopped, epochs done: 0; --resume starts this fold anew" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "broken" / "fold_0" / "best.pt").exists(), "no epoch was scored"
