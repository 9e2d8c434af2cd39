"""Predictions that say what is known of them, and several runs together: predicted, tested as a run, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from datasets.novelty import novelty, sample_training_spots
from evaluation.fold_files import read_run
from evaluation.predictions import read_held_out
from modes.prediction.ensemble import load_members
from modes.prediction.predicted import evidence_of
from modes.training import ensemble
from tests.checkpoints import edit
from tests.command_line import Left, call_main
from utils.checkpoint import chosen_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def ridge(tiny_run, tmp_path_factory) -> Path:
    """Ridge with neighbors, trained on the folds of `tiny_run`."""
    logs = tmp_path_factory.mktemp("ridge")
    left = call_main(
        *("--mode", "train", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir, "--no_report"),
        *("--log_path", logs, "--model", "ridge_neighbor", "--folds", "0,1", "--run_name", "ridge", "--device", "cpu"),
    )
    assert left.status == 0, left.said
    return logs / "tiny" / "ridge"


@pytest.fixture
def runs(tiny_run, ridge, tmp_path) -> list[Path]:
    """Copies of both runs beside each other: dml, ridge."""
    sources = {"dml": tiny_run.path, "ridge": ridge}
    return [Path(shutil.copytree(source, tmp_path / "logs" / name)) for name, source in sources.items()]


def predict(tiny_run, out: Path, *arguments: object) -> Left:
    root, spots = tiny_run.data_dir / "test" / "demo_external", out.with_suffix(".tsv")
    all_spots = (root / "ST-spotfiles/X1_selection.tsv").read_text().splitlines(keepends=True)
    spots.write_text("".join(all_spots[:9]))
    return call_main(
        *("--mode", "predict", "--image", root / "ST-imgs/X/X1/X1.jpg", "--spots", spots),
        *("--out", out, "--device", "cpu", *arguments),
    )


def run_test(tiny_run, *arguments: object) -> Left:
    shared = ("--data_dir", tiny_run.data_dir, "--device", "cpu", "--num_workers", "1", "--no_report")
    return call_main("--mode", "test", *shared, *arguments)


@pytest.fixture(scope="module")
def predicted(tiny_run, tmp_path_factory) -> tuple[anndata.AnnData, str]:
    """What both folds of `tiny_run` predict together, and what was said."""
    out = tmp_path_factory.mktemp("predicted") / "x.h5ad"
    left = predict(tiny_run, out, "--model_path", tiny_run.path)
    assert left.status == 0, left.said
    return anndata.read_h5ad(out), left.said


def test_a_prediction_says_what_is_known_of_it(tiny_run, predicted, tmp_path):
    (found, said), held_out = predicted, read_held_out(tiny_run.path)
    assert "Intervals of 80 %" in said
    genes = list(found.var_names)
    tables = pd.concat([pd.read_csv(tiny_run.path / f"fold_{fold}" / "per_gene_slide.csv") for fold in (0, 1)])
    of_gene = tables[(tables["scale"] == "fused") & (tables["truth"] == "smoothed")].groupby("gene")["pearson"]
    np.testing.assert_allclose(found.var["pcc_cv"], of_gene.mean()[genes])  # one slide a patient
    np.testing.assert_allclose(found.var["pcc_cv_std"], of_gene.std(ddof=1)[genes])
    half = held_out.values_of("half_width", genes)
    np.testing.assert_allclose(found.layers["upper"] - found.X, np.broadcast_to(half, found.shape), atol=1e-5)
    np.testing.assert_allclose(found.layers["lower"], np.maximum(found.X - half, 0), atol=1e-5)
    for fold in (0, 1):
        assert predict(tiny_run, tmp_path / f"{fold}.h5ad", "--model_path", tiny_run.path, "--fold", fold).status == 0
    single = [anndata.read_h5ad(tmp_path / f"{fold}.h5ad")[:, genes] for fold in (0, 1)]
    np.testing.assert_allclose(found.layers["std"], np.std([one.X for one in single], axis=0, ddof=1), atol=1e-5)
    assert "std" not in single[0].layers and "pcc_cv" in single[0].var
    np.testing.assert_allclose(
        found.obs["novelty"], (single[0].obs["novelty"] + single[1].obs["novelty"]) / 2, atol=1e-6
    )
    assert found.obs["novelty"].between(0, 1).all()
    assert "Intervals of 80 %" in found.uns["gene_dml"]["trust"]
    assert any(
        "Intervals of 80 %" in note for note in json.loads((tiny_run.path / "summary.json").read_text())["notes"]
    )


def test_an_earlier_run_predicts_and_what_is_missing_is_said_once(tiny_run, tmp_path):
    run = tiny_run.copy(tmp_path)
    (run / "held_out.json").unlink()
    for fold in (0, 1):
        edit(run / f"fold_{fold}" / "best.pt", lambda content: content.pop("training_sample"))
    left = predict(tiny_run, tmp_path / "x.h5ad", "--model_path", run)
    assert left.status == 0 and left.said.count("no held_out.json") == 1 and left.said.count("No obs['novelty']") == 1
    found = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert set(found.layers) == {"target", "neighbor", "global", "std"} and "novelty" not in found.obs
    assert "pcc_cv" not in found.var
    assert run_test(tiny_run, "--model_path", run, "--fold", 0).status == 0 and (run / "held_out.json").is_file()


def test_several_runs_are_averaged_each_with_the_same_weight(tiny_run, runs, predicted, tmp_path):
    (runs[1] / "fold_1" / "best.pt").unlink()
    shutil.rmtree(runs[1] / "fold_1")
    for name, given in (("both", runs), ("ridge", runs[1:])):
        left = predict(tiny_run, tmp_path / f"{name}.h5ad", "--model_path", *given)
        assert left.status == 0, left.said
    both, ridge = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("both", "ridge"))
    dml, _ = predicted
    genes = list(both.var_names)
    np.testing.assert_allclose(both.X, (dml[:, genes].X + ridge[:, genes].X) / 2, atol=1e-5)
    assert set(both.layers) == {"std", "lower", "upper"}, "one of the models has no single scales"
    assert both.uns["gene_dml"]["runs"].tolist() == ["dml", "dml", "ridge"]


def test_several_runs_are_tested_like_a_run(tiny_run, runs, tmp_path):
    left = run_test(tiny_run, "--model_path", *runs)
    assert left.status == 0, left.said
    folder = runs[0].parent / "ensemble_dml+ridge"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_folds"] == 2 and any(
        "Mean of the predictions of 2 runs: dml, ridge" in n for n in summary["notes"]
    )
    assert "epoch of each model chosen as in its own run" in summary["protocol_description"]
    tested, *single = (anndata.read_h5ad(run / "fold_1" / "predictions" / "B1.h5ad") for run in (folder, *runs))
    np.testing.assert_allclose(tested.X, (single[0].X + single[1].X) / 2, atol=1e-5)
    assert run_test(tiny_run, "--model_path", *runs, "--fold", 1).status == 0, "again, into the same folder"
    members = load_members([run / "fold_1" / "best.pt" for run in runs], [], torch.device("cpu"))
    kept = (runs[1] / "fold_0" / "best.pt").read_bytes()
    edit(runs[1] / "fold_0" / "best.pt", lambda content: content.update(epoch=9))  # trained again
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    left = run_test(tiny_run, "--model_path", *runs, "--fold", 1)
    assert left.status and f"{folder} holds fold_0, tested with other models than the runs hold now" in left.said, (
        left.said
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert any(
        f"In {folder} are those of other models" in note for note in evidence_of(members, members[0].genes).notes
    )
    (runs[1] / "fold_0" / "best.pt").write_bytes(kept)
    compared = call_main("--mode", "compare", "--runs", runs[0], folder, "--out", tmp_path / "compared")
    assert compared.status == 0, compared.said
    assert predict(tiny_run, tmp_path / "x.h5ad", "--model_path", *runs).status == 0
    found, held_out = anndata.read_h5ad(tmp_path / "x.h5ad"), read_held_out(folder)
    np.testing.assert_allclose(found.var["pcc_cv"], held_out.values_of("pcc", list(found.var_names)))


def test_runs_that_have_no_score_together_are_refused(tiny_run, runs):
    shutil.rmtree(runs[1] / "fold_1")
    left = run_test(tiny_run, "--model_path", *runs)
    assert left.status and "ridge has folds 0, " in left.said and "has 0, 1" in left.said
    edit(runs[1] / "fold_0" / "best.pt", lambda content: content["fold"].update(test_patients=["B"]))
    left = run_test(tiny_run, "--model_path", *runs, "--fold", 0)
    assert left.status and "fold 0 of " in left.said and "another set of test patients" in left.said
    left = run_test(tiny_run, "--model_path", runs[0], runs[0])
    assert left.status and "names a run more than once" in left.said
    (runs[0].parent / "ensemble_dml+ridge").mkdir()
    edit(runs[1] / "fold_0" / "best.pt", lambda content: content["fold"].update(test_patients=["A"]))
    left = run_test(tiny_run, "--model_path", *runs, "--fold", 0)
    assert left.status and "holds something else than a test of these runs" in left.said
    left = call_main("--mode", "external_test", "--test_name", "demo_external", "--model_path", *runs)
    assert left.status and "--mode external_test takes one run" in left.said


def test_runs_of_other_test_data_are_refused(tiny_run, runs):
    def change(content: dict) -> None:
        digests = content["fold"]["digests"]
        digests["A1"]["spots"] = digests["B1"]["counts"] = digests["A1"]["features"] = "other"

    edit(runs[1] / "fold_0" / "best.pt", change)
    left = run_test(tiny_run, "--model_path", *runs, "--fold", 0)
    said = f"fold 0 of {runs[1]} was given other counts or spots of the test slides A1\n"
    assert left.status and said in left.said, left.said  # B1 is trained on, features are not what is scored
    assert not (runs[0].parent / "ensemble_dml+ridge").exists()


@pytest.mark.parametrize("part", ["spots", "counts"])
def test_other_spots_or_counts_are_refused_without_digests(runs, part):
    members = load_members([run / "fold_0" / "best.pt" for run in runs], [], torch.device("cpu"))
    for member in members:
        member.fold.split.digests.clear()
    opened = []

    def open_tested(member):
        ids = ["1x1", "1x2"] if opened and part == "spots" else ["1x1", "1x3"]
        digest = "b" if opened and part == "counts" else "a"
        opened.append(member)
        record = SimpleNamespace(name="A1", table=SimpleNamespace(obs_names=ids))
        return SimpleNamespace(store=SimpleNamespace(named=lambda _: [record]), digests={"A1": {"counts": digest}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "check_same_patch_encoder", lambda *_: None)
        patch.setattr(ensemble, "predict_record", lambda *_: {})
        with pytest.raises(
            ValueError, match=r"ridge/fold_0/best.pt is tested on other spots or counts of slide A1 \(2 sp"
        ):
            ensemble._test_fold(members, runs[0].parent / "x", [], open_tested)


def test_files_of_one_run_are_no_ensemble(tiny_run, runs):
    best, last = (runs[0] / "fold_0" / name for name in ("best.pt", "last.pt"))
    for given in ([best, last], [last, best], [best, last, runs[1] / "fold_0"]):
        left = run_test(tiny_run, "--model_path", *given)
        assert left.status and f"two files of fold 0 of {runs[0]}: " in left.said, left.said
    left = predict(tiny_run, runs[0].parent / "x.h5ad", "--model_path", best, last)
    assert left.status and f"two files of fold 0 of {runs[0]}: " in left.said, left.said
    left = run_test(tiny_run, "--model_path", runs[0] / "fold_0", runs[0] / "fold_1")
    assert left.status and f"is of one run, {runs[0]};" in left.said, left.said
    for command in (run_test, lambda *given: predict(tiny_run, runs[0].parent / "x.h5ad", *given[1:])):
        left = command(tiny_run, "--model_path", runs[0], runs[0] / "fold_0")
        assert left.status and "are the same file" in left.said and "Give each once" in left.said, left.said
    assert not list(runs[0].parent.glob("ensemble_*"))


def test_links_stay_in_the_run_that_they_lie_in(tiny_run, runs, predicted, tmp_path, monkeypatch):
    run, store = runs[0], tmp_path / "store"
    store.mkdir()
    (run / "fold_0").rename(store / "of_fold_0")
    (run / "fold_0").symlink_to(store / "of_fold_0")
    (run / "fold_1" / "best.pt").rename(store / "weights.pt")
    (run / "fold_1" / "best.pt").symlink_to(store / "weights.pt")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    for given in (run, tmp_path / "link", Path(".")):
        paths = [given / f"fold_{fold}" / "best.pt" for fold in (0, 1)]
        members = load_members(paths, [], torch.device("cpu"))
        assert [member.run_folder for member in members] == [run.resolve()] * 2
    monkeypatch.chdir(run / "fold_1")
    assert chosen_checkpoints(".")[0] == chosen_checkpoints("best.pt")[0] == [Path.cwd() / "best.pt"]
    assert load_members(chosen_checkpoints(".")[0], [], torch.device("cpu"))[0].run_folder == run.resolve()
    both = predict(tiny_run, tmp_path / "both.h5ad", "--model_path", *runs)
    alone = predict(tiny_run, tmp_path / "alone.h5ad", "--model_path", runs[1])
    assert both.status == 0 and "mean of 2 runs (dml, ridge) with 4 models" in both.said, both.said + alone.said
    found, ridge = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("both", "alone"))
    genes = list(found.var_names)
    np.testing.assert_allclose(found.X, (predicted[0][:, genes].X + ridge[:, genes].X) / 2, atol=1e-5)
    (runs[1] / "fold_0" / "best.pt").unlink()
    (runs[1] / "fold_0" / "best.pt").symlink_to(store / "of_fold_0" / "best.pt")
    left = predict(tiny_run, tmp_path / "x.h5ad", "--model_path", *runs)
    assert left.status and "are the same file" in left.said, left.said


def test_a_copied_fold_is_refused(tiny_run, tmp_path):
    run = tiny_run.copy(tmp_path)
    shutil.copytree(run / "fold_0", run / "fold_4")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for left in (
        run_test(tiny_run, "--model_path", run),
        predict(tiny_run, tmp_path / "x.h5ad", "--model_path", run),
        run_test(tiny_run, "--model_path", run / "fold_4"),
    ):
        assert left.status and "fold_4/best.pt was trained for fold_0, its folder is fold_4." in left.said, left.said
    edit(run / "fold_4" / "best.pt", lambda content: content["fold"].update(fold=4))
    for left in (
        run_test(tiny_run, "--model_path", run),
        predict(tiny_run, tmp_path / "x.h5ad", "--model_path", run),
    ):
        assert left.status and "fold_4 both hold out patient A; expected each patient in one fold" in left.said, (
            left.said
        )
    assert run_test(tiny_run, "--model_path", run, "--fold", 0).status, "its summary would hold the copy"
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run / "fold_4" / "best.pt"}
    assert after.items() <= before.items(), "nothing was scored again"


def test_runs_that_see_patches_of_other_widths_are_refused(runs):
    paths = [run / "fold_0" / "best.pt" for run in runs]
    edit(paths[0], lambda content: content.update(field_of_view_um=100.0))
    edit(paths[1], lambda content: content.update(field_of_view_um=125.0))
    with pytest.raises(ValueError, match=r"cannot be averaged: patches 125 um wide instead of 100\. Give one"):
        load_members(paths, [], torch.device("cpu"))
    edit(paths[1], lambda content: content.update(field_of_view_um=119.0))
    load_members(paths, [], torch.device("cpu"))
    edit(paths[1], lambda content: content["config"]["DATA"].update(patch_um=119.0))
    (runs[1] / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"patch width \(um\) 119.0 instead of None"):
        load_members(paths, [], torch.device("cpu"))


def test_a_fold_of_another_method_is_refused(tiny_run, runs, tmp_path):
    run = runs[0]
    shutil.rmtree(run / "fold_1")
    shutil.copytree(runs[1] / "fold_1", run / "fold_1")
    said = "MODEL.name: the run has 'gene_dml', fold_1 was trained with 'ridge_neighbor'"
    with pytest.raises(ValueError, match=r"fold_1/best.pt was trained with other settings than config.yaml of the run"):
        read_run(run)
    left = call_main("--mode", "compare", "--runs", runs[1], run, "--out", tmp_path / "compared")
    assert left.status and said in left.said, left.said
    for more in ((), ("--fold", 1)):
        for left in (
            run_test(tiny_run, "--model_path", run, *more),
            predict(tiny_run, tmp_path / "x.h5ad", "--model_path", run, *more),
        ):
            assert left.status and said in left.said, left.said
    (run / "config.yaml").unlink()
    left = run_test(tiny_run, "--model_path", run)
    assert left.status and said in left.said and "other settings than fold_0 of the run" in left.said, left.said


def test_a_test_of_other_runs_of_the_same_names_is_no_evidence(runs):
    folder = runs[0].parent / "ensemble_dml+ridge"
    members = load_members([run / "fold_0" / "best.pt" for run in runs], [], torch.device("cpu"))
    genes = members[0].genes
    shutil.copytree(runs[0], folder, ignore=shutil.ignore_patterns("fold_*"))
    theirs, alone = read_held_out(folder), [read_held_out(run) for run in runs]
    mean = np.mean([found.values_of("pcc", genes) for found in alone], axis=0)
    assert not np.allclose(theirs.values_of("pcc", genes), mean)
    for others in (["../../other/dml", "../ridge"], None):
        if others is not None:
            (folder / "ensemble.json").write_text(json.dumps({"runs": others}))
        evidence = evidence_of(members, genes)
        np.testing.assert_allclose(evidence.trust(genes, None, None).pcc_cv, mean)
        assert any(f"{folder.resolve()} is a test of other runs; move it" in note for note in evidence.notes)
    (folder / "ensemble.json").write_text(json.dumps({"runs": ["../dml", "../ridge"]}))
    evidence = evidence_of(members, genes)
    np.testing.assert_allclose(evidence.trust(genes, None, None).pcc_cv, theirs.values_of("pcc", genes))
    assert not any("alone" in note for note in evidence.notes)


def test_the_seeds_of_a_run_are_predicted_together(tiny_run, tmp_path):
    for seed in (0, 1):
        shutil.copytree(tiny_run.path, tmp_path / "run" / f"seed_{seed}")
    left = predict(tiny_run, tmp_path / "x.h5ad", "--model_path", tmp_path / "run")
    assert left.status == 0 and "mean of 2 runs (seed_0, seed_1) with 4 models" in left.said, left.said


def test_novelty_is_the_share_of_training_spots_that_are_more_usual():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=random)
    patients = ["A"] * 300 + ["B"] * 300
    sample = sample_training_spots(features, patients, patients, torch.Generator().manual_seed(1))
    assert torch.equal(sample.distances, sample.distances.sort().values) and len(sample.features) == 600
    own = novelty(torch.randn(400, 8, generator=random), sample)
    assert 0.35 < own.mean() < 0.6 and novelty(features + 20, sample).min() == 1
    distances = torch.cdist(features[:300], features[300:].half().float()).topk(5, largest=False).values.mean(1)
    other = torch.cdist(features[300:], features[:300].half().float()).topk(5, largest=False).values.mean(1)
    slow = torch.cat([distances, other]).sort().values
    np.testing.assert_allclose(sample.distances, slow, atol=5e-3)  # the sample is held in 16 bits
    alone = sample_training_spots(features[:5], ["A"] * 5, ["A1"] * 5, torch.Generator().manual_seed(1))
    assert (alone.distances > 0).all(), "one slide: each spot against the others"
    one = sample_training_spots(features[:1], ["A"], ["A1"], torch.Generator().manual_seed(1))
    assert novelty(features[1:3], one).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("broken", [{}, {"features": torch.zeros(3, 5), "distances": torch.zeros(3)}, 3, "nan"])
def test_a_checkpoint_with_another_sample_is_refused(tiny_run, tmp_path, broken):
    path = Path(shutil.copy(tiny_run.path / "fold_0" / "best.pt", tmp_path))

    def change(content: dict) -> None:
        if broken == "nan":
            content["training_sample"]["distances"][0] = torch.nan
        else:
            content["training_sample"] = broken

    edit(path, change)
    with pytest.raises(ValueError, match=r"best\.pt: training_sample should hold features \(n, \d+\) and n distances"):
        load_checkpoint(path)
