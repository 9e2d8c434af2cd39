"""The accuracy table of the README, made of a tiny data set; the same command continues it."""

import json
import shutil

import pandas as pd
import pytest

from benchmarks import accuracy_search, learning_curve, table
from benchmarks.accuracy import DATA_SETS, ENSEMBLES, METHODS, DataSet, main, searched
from benchmarks.learning_curve import TESTED, link_set, scores_of
from datasets.known_sets import get_spec
from datasets.layout import Layout
from utils.config import load_config


@pytest.fixture(scope="module")
def work(tiny_run, tmp_path_factory):
    """A folder with two patients of the tiny data set, which is known as `tiny`, and what the search found for it."""
    folder = tmp_path_factory.mktemp("accuracy")
    shutil.copytree(tiny_run.data_dir, folder / "data", ignore=shutil.ignore_patterns("C*"))
    choice = {"learning_rate": "1e-3", "weight_decay": "0", "epochs": 2}
    (folder / "search.json").write_text(json.dumps({"methods": {"gene_dml": choice}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_SETS, "tiny", tiny(tiny_run))
        yield folder


def tiny(tiny_run) -> DataSet:
    return DataSet("tiny", tiny_run.config_name, lambda _raw, _data: None, views=1)


def arguments_of(work, methods: str) -> list[str]:
    return [
        *("--data", "tiny", "--work", str(work), "--search", str(work / "search.json"), "--device", "cpu"),
        *("--out", str(work / "results" / "accuracy" / "tiny"), "--methods", methods, "--seeds", "0,1"),
    ]


def test_methods_are_trained_compared_and_shown(work, capsys):
    """First two of them, then with the same command for others what is missing, and the mean of two."""
    path = main(arguments_of(work, "gene_dml,ridge"))
    text = path.read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert list(rows)[2:] == [METHODS["gene_dml"][0], METHODS["ridge"][0]]
    assert "(2)" in rows[METHODS["gene_dml"][0]] and "(1)" in rows[METHODS["ridge"][0]], "seeds of each"
    assert (
        "the seeds 0, 1" in text
        and "`python benchmarks/accuracy.py --data tiny --device cpu --methods gene_dml" in text
    )
    assert "too few for an interval or a test" in text
    assert {"A", "B"} < {cell.strip() for cell in text.splitlines()[0].split("|")}
    content = json.loads((path.parent / "accuracy.json").read_text())
    assert content["settings"] == {
        "gene_dml": ["TRAINING.learning_rate=1e-3", "TRAINING.weight_decay=0", "EVALUATION.fixed_epochs=2"]
    }
    found = {(row["metric"], row["method"]): row for row in content["rows"]}
    assert f"{found['pcc_all', 'ridge']['mean']:.3f}" in rows[METHODS["ridge"][0]]
    assert f"{found['pcc_all', 'gene_dml']['by_patient']['B']:.3f}" in rows[METHODS["gene_dml"][0]]
    assert f"{found['mse', 'gene_dml']['mean']:.4f}" in rows[METHODS["gene_dml"][0]]
    assert (path.parent / "comparison.html").is_file()

    capsys.readouterr()
    main(arguments_of(work, "gene_dml,ridge,ridge_neighbor"))
    said = capsys.readouterr().out
    assert said.count("complete, nothing to do") == 3 * 2, "two seeds of Gene-DML and one of ridge, two folds each"
    assert METHODS["gene_dml"][0] in path.read_text()
    content = json.loads((path.parent / "accuracy.json").read_text())
    found = {row["method"]: row for row in content["rows"] if row["metric"] == "pcc_all"}
    assert ENSEMBLES["gene_dml_and_ridge"][0] in path.read_text()
    averaged = found["gene_dml_and_ridge"]
    assert averaged["num_seeds"] == 2 and averaged["by_patient"].keys() == {"A", "B"}
    pages_are_filled(work, path)


def pages_are_filled(work, path):
    """All methods go to the page of evaluation, the real data sets side by side into the README, ablations left out."""
    pages = {name: work / f"{name}.md" for name in ("page", "evaluation", "readme")}
    for place in pages.values():
        place.write_text(f"Before.\n{table.BEGIN}\nold numbers\n{table.END}\nAfter.\n")
    content = json.loads((path.parent / "accuracy.json").read_text())
    for row in [row for row in content["rows"] if row["method"] == "gene_dml"]:
        content["rows"].append(row | {"method": "no_global"})
    for name in table.REAL:
        shutil.copytree(path.parent, path.parents[1] / name)
        (path.parents[1] / name / "accuracy.json").write_text(json.dumps(content))
    results = path.parents[2]
    (results / "kmeans.json").write_text((table.RESULTS / "kmeans.json").read_text())
    table.main(
        ["--results", str(results)] + [part for name, place in pages.items() for part in (f"--{name}", str(place))]
    )
    for place in pages.values():
        text = place.read_text()
        assert "old numbers" not in text and text.startswith("Before.") and text.endswith("After.\n")
    readme = pages["readme"].read_text()
    assert METHODS["ridge_neighbor"][0] in readme and METHODS["no_global"][0] not in readme
    assert "### her2st" in pages["evaluation"].read_text()
    assert METHODS["ridge_neighbor"][0] not in pages["page"].read_text()


def test_a_method_takes_what_was_searched_for_it_and_an_ablation_what_was_for_gene_dml():
    choices = {name: {"learning_rate": name, "weight_decay": 0, "epochs": 9} for name in ("gene_dml", "mlp")}
    assert [searched(name, choices)[0].split("=")[1] for name in ("mlp", "no_global")] == ["mlp", "gene_dml"]


def test_the_search_keeps_the_curve_of_every_epoch_on_inner_patients(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "demo", tiny(tiny_run))
    monkeypatch.setitem(accuracy_search.DECAYS, "mlp", ("10",))
    shutil.copytree(tiny_run.data_dir, tmp_path / "data")
    out = ["--out", str(tmp_path / "found.json")]
    accuracy_search.main(["--work", str(tmp_path), "--methods", "mlp", "--rates", "1e-2", "--epochs", "4", *out])
    found = json.loads((tmp_path / "found.json").read_text())["methods"]["mlp"]
    (curve,) = found["curves"].values()
    assert len(curve) == 4 and found["epochs"] == accuracy_search.best_epoch(curve)[0]
    (log, *_) = tmp_path.rglob("fold_*/metrics.jsonl")
    assert len(log.read_text().splitlines()) == 4, "patience ends none"


def test_the_search_takes_the_best_rate_and_decay(tmp_path, monkeypatch):
    """Each training leaves the curves of two folds that a table says; their mean is best for 1e-2 and 10, at the end."""
    heights = {(1e-3, 0): 0.1, (1e-3, 10): 0.2, (1e-2, 0): 0.3, (1e-2, 10): 0.4}

    def train(config, name, *_):
        height = heights[config.TRAINING.learning_rate, config.TRAINING.weight_decay]
        for fold in (0, 1):
            (tmp_path / name / f"fold_{fold}").mkdir(parents=True)
            rows = pd.DataFrame({"validation/pcc_all": [height * share + fold for share in (0.5, 0.6, 0.8, 1)]})
            rows.to_json(tmp_path / name / f"fold_{fold}" / "metrics.jsonl", orient="records", lines=True)
        return [tmp_path / name]

    monkeypatch.setattr(accuracy_search, "train_method", train)
    found = accuracy_search.search_method("mlp", ("1e-3", "1e-2"), 4, [])
    assert (found["learning_rate"], found["weight_decay"], found["epochs"]) == ("1e-2", "10", 3)
    assert found["curves"]["1e-3, 10"] == pytest.approx([0.6, 0.62, 0.66, 0.7]) and len(found["curves"]) == 4
    assert found["validation_pcc"] == pytest.approx(0.82)


def test_the_middle_of_the_best_neighboring_epochs_is_taken():
    assert accuracy_search.best_epoch([0.0, 0.9, 0.0, 0.4, 0.5, 0.45, 0.1]) == (5, pytest.approx(0.45))


def test_every_method_is_a_valid_configuration():
    """Settings are checked where they are read, and no two methods are the same."""
    configs = [load_config("demo/dml", list(settings)) for _, settings in METHODS.values()]
    assert len({repr(config) for config in configs}) == len(METHODS)


@pytest.mark.parametrize(("methods", "message"), [("mlp", "name two at least"), ("mlp,ridge_", "ridge_ unknown")])
def test_what_cannot_be_compared_is_refused(work, methods, message):
    with pytest.raises(ValueError, match=message):
        main(arguments_of(work, methods))


def test_the_learning_curve_tests_the_same_patients_whatever_trains(tiny_data, tmp_path):
    """Links make a data set of some patients; the test patients are one, so that one fold tests them."""
    link_set(tiny_data / "demo", tmp_path / "data", train="AB", test="CD")
    layout = Layout(tmp_path / "data", get_spec("demo", tmp_path / "data"), patch_size=64, num_neighbors=3)
    assert layout.patients_on_disk() == {
        **{"A1": "A", "A2": "A", "B1": "B", "B2": "B"},
        **{slide: TESTED for slide in ("C1", "C2", "D1", "D2")},
    }
    assert layout.image_path("C1").is_file()


def test_the_scores_of_a_patient_are_means_over_slides(tmp_path):
    keys = {"patient": TESTED, "truth": "smoothed", "gene": "g"}
    rows = [
        {**keys, "slide": slide, "scale": scale, "pearson": pearson + (scale == "target"), "mse": 10 * pearson}
        for slide, pearson in (("Q1", 0.1), ("Q2", 0.3), ("R1", 0.6))
        for scale in ("fused", "target")
    ]
    (tmp_path / "fold_2").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "fold_2" / "per_gene_slide.csv", index=False)
    found = scores_of(tmp_path)
    assert found["pcc_all"] == pytest.approx({"Q": 0.2, "R": 0.6}) and found["mse"] == pytest.approx({"Q": 2, "R": 6})


def curve_run(method: str, patients: int, seed: int, pcc: float, settings=()) -> dict:
    scores = {"pcc_all": {name: pcc for name in "QRST"}, "mse": {name: pcc / 10 for name in "QRST"}}
    return {"patients": patients, "method": method, "seed": seed, "settings": list(settings), "scores": scores}


def test_a_learning_curve_grows_by_what_is_measured_and_is_drawn_beside_the_page(tmp_path):
    """Means over seeds, of all runs with the same settings; the page shows the table and the figure."""
    curve, pages = tmp_path / "accuracy" / "learning_curve", tmp_path / "docs"
    measured = {"command": "python benchmarks/learning_curve.py --seeds 0"}
    runs = [
        curve_run(method, count, seed=0, pcc=start + count / 100)
        for method, start in (("gene_dml", 0.3), ("ridge_neighbor", 0.4))
        for count in (2, 4)
    ]
    learning_curve.write_curve(curve, runs, measured)
    again = {"command": "python benchmarks/learning_curve.py --seeds 1"}
    text = learning_curve.write_curve(curve, [curve_run("gene_dml", 2, seed=1, pcc=0.22)], again).read_text()

    def cells(method: str) -> list[str]:
        (line,) = [line for line in text.splitlines() if METHODS[method][0] in line and "PCC(A)" in line]
        return [cell.strip() for cell in line.split("|")[3:6]]

    assert cells("gene_dml") == ["0.270", "0.340", "1 to 2"] and cells("ridge_neighbor") == ["0.420", "0.440", "1"]
    stored = json.loads((curve / "learning_curve.json").read_text())["runs"]
    assert [run["command"][-1] for run in stored] == ["0"] * 4 + ["1"]
    (part,) = table.further_parts(tmp_path, pages / "images")
    assert text.strip() in part and "](images/learning_curve.svg)" in part
    assert "training patients" in (pages / "images" / "learning_curve.svg").read_text()

    repeated = curve_run("gene_dml", 2, seed=1, pcc=0.5, settings=["TRAINING.learning_rate=1"])
    text = learning_curve.write_curve(curve, [repeated], again).read_text()
    assert cells("gene_dml") == ["0.500", "–", "1"], "runs of other settings do not count with it"


def test_the_learning_curve_has_patients_of_its_own_for_the_test():
    assert not set(learning_curve.TRAIN) & set(learning_curve.TEST) and len(learning_curve.TRAIN) == 16
    with pytest.raises(ValueError, match="from 1 to 16"):
        learning_curve.main(["--counts", "2,17"])
