"""Intervals, the paired test and the comparison of runs: against scipy, by hand, and what they refuse."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from evaluation.comparison.runs import compare_methods, compare_runs
from evaluation.fold_files import write_fold
from evaluation.intervals import bootstrap_interval, gene_effect, paired_wilcoxon
from evaluation.protocol import score_fold
from evaluation.slide_result import SlideResult
from modes.compare import compare
from utils.checkpoint import chosen_checkpoints, runs_of, seed_runs

# --- bootstrap ---


def test_bootstrap_of_four_patients_by_hand():
    """Of 0, 0, 0, 1 the resampled mean is 0, 1/4, 1/2, 3/4, 1 with probability .316, .422, .211, .047, .004."""
    assert bootstrap_interval([0.0, 0.0, 0.0, 1.0], confidence=0.95) == (0.0, 0.75)
    assert bootstrap_interval({"A": 0.0, "B": 0.0, "C": 0.0, "D": 1.0}, confidence=0.4) == (0.0, 0.25)


def test_bootstrap_equals_scipy():
    values = np.random.default_rng(0).normal(size=8)
    low, high = bootstrap_interval(values, resamples=20_000, seed=1)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert low < values.mean() < high


def test_bootstrap_is_seeded_and_takes_other_statistics():
    values = np.random.default_rng(0).normal(size=8)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    low, high = bootstrap_interval(values, np.median)
    assert set(np.round([low, high], 12)) <= set(np.round((values[:, None] + values) / 2, 12).ravel())


def test_bootstrap_knows_what_it_cannot_know():
    for count in range(4):
        assert all(math.isnan(value) for value in bootstrap_interval(np.arange(count)))
    with pytest.raises(ValueError, match="1 of 3 patients have no finite value"):
        bootstrap_interval([0.4, math.nan, 0.1])


# --- Wilcoxon ---


@pytest.mark.parametrize("num_pairs", [4, 6, 8, 13, 16, 23])
def test_wilcoxon_equals_scipy_without_ties(num_pairs):
    first, second = np.random.default_rng(num_pairs).normal(size=(2, num_pairs))
    expected = scipy.stats.wilcoxon(first, second + 0.4, method="exact")
    test = paired_wilcoxon(first, second + 0.4)
    assert (test.p, test.statistic) == pytest.approx((expected.pvalue, expected.statistic))
    assert test.num_pairs == num_pairs


def test_wilcoxon_by_hand_with_ties():
    """Differences 1, -1, 2, -2: rank sums 5 and 5, no less extreme pattern exists, p = 1.
    Differences 1, 1, 2, -4: ranks 1.5, 1.5, 3, 4; four of the sixteen sign patterns have smaller sums of 4.5, p = 3/4.
    Differences 1, 1, 2, 3: sums 10 and 0; two of the sixteen are as extreme."""
    assert paired_wilcoxon([0, 0, 0, 0], [1, -1, 2, -2]).p == 1.0
    assert paired_wilcoxon([0, 0, 0, 4], [1, 1, 2, 0]).p == 0.75
    test = paired_wilcoxon([0, 0, 0, 0], [1, 1, 2, 3])
    assert (test.p, test.statistic) == (0.125, 0.0)


def test_fewer_than_four_pairs_are_not_tested():
    test = paired_wilcoxon([0, 0, 0, math.nan], [1, 2, 3, 1])
    assert math.isnan(test.p) and test.note == "1 undefined pairs left out; 3 pairs are too few for a test"


def test_wilcoxon_says_when_there_are_too_few_pairs():
    better = paired_wilcoxon([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8])
    assert better.p == 0.125
    assert "4 pairs cannot give p < 0.05 (the least is 0.125)" in better.note
    assert "cannot" in paired_wilcoxon(range(5), [1, 3, 5, 7, 9]).note  # 0.0625
    six = paired_wilcoxon(np.zeros(6), np.arange(1, 7))
    assert six.p == pytest.approx(0.03125) and six.note == ""


def test_wilcoxon_leaves_out_zeros_and_undefined_pairs():
    test = paired_wilcoxon([0, 0, 5, math.nan, 1, 1, 1, 1], [1, 2, 5, 3, 4, 5, 6, math.nan])
    assert test.num_pairs == 5
    assert "2 undefined pairs left out" in test.note and "1 pairs without a difference" in test.note
    same = paired_wilcoxon([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])
    assert same.p == 1.0 and same.num_pairs == 0
    assert math.isnan(paired_wilcoxon([math.nan], [1.0]).p)
    with pytest.raises(ValueError, match="as many values on both sides"):
        paired_wilcoxon([1, 2], [1, 2, 3])


# --- effect per gene ---


def test_gene_effect_by_hand():
    index = pd.MultiIndex.from_product([["A", "B"], ["a", "b", "c", "d"]], names=["patient", "gene"])
    first = pd.Series([0.1, 0.2, 0.3, math.nan, 0.3, 0.2, 0.1, 0.4], index)
    second = pd.Series([0.3, 0.1, 0.3, 0.9, 0.3, 0.2, 0.5, 0.4], index)
    effect = gene_effect(first, second)
    # a (.2 + 0)/2, b (-.1 + 0)/2, c (0 + .4)/2, d only of B: 0
    assert effect.differences.to_dict() == pytest.approx({"a": 0.1, "b": -0.05, "c": 0.2, "d": 0.0})
    assert effect.share_improved == 0.5
    assert effect.median == pytest.approx(0.05)
    assert gene_effect(first, second, greater_is_better=False).share_improved == 0.25
    nothing = gene_effect(first, second.rename({"A": "X", "B": "Y"}))
    assert math.isnan(nothing.share_improved) and math.isnan(nothing.median)


# --- runs ---

GENES = [f"g{i}" for i in range(6)]
_HADAMARD = np.array([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=float)
LISTS = {"highly_predictive": ["g0", "g1"], "highly_variable": ["g2"]}


FEATURES = {
    "encoder": "uni",
    "encoder_sha256": "a",
    "patch_size": 224,
    "num_neighbors": 5,
    "tokens": {"source": "cache", "views": 8, "token_pool": 1},
}


def write_run(run_dir, correlations, *, protocol="clean", genes=GENES, lists=LISTS, spots=8, **more):
    """correlations: {patient: PCC of every gene}, one patient per fold, one slide each. more: entries of split.json."""
    for index, (patient, values) in enumerate(correlations.items()):
        if values is None:
            continue
        values = np.asarray(values, dtype=float)
        pattern = _HADAMARD[:spots]
        predicted = pattern[:, [1]] * values + pattern[:, [2]] * np.sqrt(1 - values**2)
        result = SlideResult(
            slide=f"{patient}1",
            patient=patient,
            spot_ids=[f"{i}x0" for i in range(spots)],
            grid_xy=None,
            genes=list(genes),
            measured=np.tile(pattern[:, [1]], (1, len(genes))),
            measured_unsmoothed=None,
            predictions={"fused": predicted},
        )
        folder = run_dir / f"fold_{index}"
        folder.mkdir(parents=True)
        split = {"fold": index, "name": patient, "protocol": protocol, "test_patients": [patient]}
        split |= {"selection": "validation", "features": FEATURES, "train_slides": ["T1"], **more}
        (folder / "split.json").write_text(json.dumps(split))
        write_fold(
            score_fold([result], training_mean=np.zeros(len(genes)), gene_lists=lists, protocol=protocol), folder
        )
    return run_dir


BASE = {
    "A": [0.1, 0.2, 0.3, 0.4, 0.5, 0.3],
    "B": [0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
    "C": [0.5, 0.5, 0.1, 0.1, 0.3, 0.3],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "base", BASE)


def changed(by):
    """BASE plus a change per patient (all genes) or per gene."""
    return {patient: np.asarray(values) + by[patient] for patient, values in BASE.items()}


def row(table, metric, method):
    return table[(table["metric"] == metric) & (table["method"] == method)].iloc[0]


def test_comparison_by_hand(tmp_path, base):
    better = write_run(tmp_path / "better", changed({"A": 0.1, "B": 0.2, "C": [0.3, 0.3, 0.3, 0.3, 0.3, -0.6]}))
    table = compare_runs([base, better])
    assert table["metric"].drop_duplicates().tolist() == ["pcc_all", "pcc_h", "mse", "mae"]
    first, second = row(table, "pcc_all", "base"), row(table, "pcc_all", "better")
    # A .3, B .2, C .3; then A .4, B .4, C .45
    assert first["mean"] == pytest.approx(0.8 / 3) and second["mean"] == pytest.approx(1.25 / 3)
    assert second["difference"] == pytest.approx(0.15)
    # three patients: their values, no interval and no test
    assert np.isnan([second[name] for name in ("low", "high", "difference_low", "difference_high", "wilcoxon_p")]).all()
    assert second["wilcoxon_note"] == "3 pairs are too few for a test"
    assert second["by_patient"] == pytest.approx({"A": 0.4, "B": 0.4, "C": 0.45})
    # g0..g4 gain (.1 + .2 + .3)/3 = .2 each, g5 (.1 + .2 - .6)/3 = -.1
    assert second["genes_improved"] == pytest.approx(5 / 6)
    assert second["gene_difference_median"] == pytest.approx(0.2)
    assert np.isnan(first["difference"]) and np.isnan(first["wilcoxon_p"])
    # the fixed list g0, g1: A .15, B .2, C .5; each gains its patient's change
    listed = row(table, "pcc_h", "better")
    assert row(table, "pcc_h", "base")["mean"] == pytest.approx(0.85 / 3)
    assert listed["difference"] == pytest.approx(0.2) and listed["genes_improved"] == 1.0
    # MSE is 2 - 2 r: lower is better and counts as improved
    errors = row(table, "mse", "better")
    assert errors["difference"] == pytest.approx(-0.3) and errors["genes_improved"] == pytest.approx(5 / 6)
    assert table["num_patients"].eq(3).all() and table["num_seeds"].eq(1).all()


def test_seeds_are_averaged_within_the_patient_first(tmp_path, base):
    write_run(tmp_path / "method" / "seed_0", changed({"A": 0.0, "B": 0.1, "C": 0.1}))
    write_run(tmp_path / "method" / "seed_10", changed({"A": 0.2, "B": 0.1, "C": 0.3}))
    assert [path.name for path in seed_runs(tmp_path / "method")] == ["seed_0", "seed_10"]
    assert seed_runs(base) == [base]
    shutil.copytree(base / "fold_0", tmp_path / "mixed" / "fold_0")
    shutil.copytree(base, tmp_path / "mixed" / "seed_0")
    for find in (seed_runs, runs_of, chosen_checkpoints, lambda mixed: compare([base, mixed], None, False)):
        with pytest.raises(ValueError, match=r"mixed holds both folds \(fold_0\) and runs of seeds \(seed_0\)"):
            find(tmp_path / "mixed")
    table = compare_methods({"base": [base], "method": seed_runs(tmp_path / "method")}, metrics=["pcc_all"])
    second = row(table, "pcc_all", "method")
    # per patient +.1, +.1, +.2
    assert second["difference"] == pytest.approx(0.4 / 3)
    assert second["num_patients"] == 3 and second["num_seeds"] == 2
    # the seeds' means differ by .4/3
    assert second["seed_std"] == pytest.approx(0.4 / 3 / math.sqrt(2))
    assert np.isnan(row(table, "pcc_all", "base")["seed_std"])
    assert compare_runs([base, tmp_path / "method"], metrics=["pcc_all"])["num_seeds"].tolist() == [1, 2]


def test_runs_that_answer_other_questions_are_refused(tmp_path, base):
    other = write_run(tmp_path / "other", {"A": BASE["A"], "B": BASE["B"], "X": BASE["C"]})
    with pytest.raises(
        ValueError, match=r"differ from base.*\n  other: fold 2 tests patients \['X'\], expected \['C'\]"
    ):
        compare_runs([base, other], intersect=True)
    paper = write_run(tmp_path / "paper", BASE, protocol="paper")
    with pytest.raises(ValueError, match="protocol 'paper', expected 'clean'"):
        compare_runs([base, paper], intersect=True)
    spots = write_run(tmp_path / "spots", BASE, spots=6)
    with pytest.raises(ValueError, match=r"fold 0 scores slides \(spots\) \{'A1': 6\}, expected \{'A1': 8\}"):
        compare_runs([base, spots])
    lists = write_run(tmp_path / "lists", BASE, lists={**LISTS, "highly_predictive": ["g3"]})
    with pytest.raises(ValueError, match="fold 0 has another list 'highly_predictive'"):
        compare_runs([base, lists])
    with pytest.raises(ValueError, match="metric 'pcc' is unknown; expected one of pcc_all"):
        compare_runs([base], metrics=["pcc"])
    with pytest.raises(ValueError, match="a run is given twice"):
        compare_runs([base, base])
    with pytest.raises(ValueError, match="one distinct name"):
        compare_runs([base, other], names=["x", "x"])
    with pytest.raises(ValueError, match="no scores of the scale 'target'"):
        compare_runs([base], scale="target")


def test_other_features_are_compared_only_when_told(tmp_path, base):
    lists = {**LISTS, "highly_predictive": ["g3"]}  # which follow the features
    features = {**FEATURES, "encoder": "virchow2", "encoder_sha256": "b"}
    other = write_run(tmp_path / "other", BASE, lists=lists, features=features)
    with pytest.raises(ValueError, match=r"other: fold 0 has encoder virchow2, expected uni(.|\n)*--intersect"):
        compare_runs([base, other])
    table = compare_runs([base, other], intersect=True)
    assert any("encoder virchow2, expected uni" in note for note in table.attrs["notes"])
    assert row(table, "pcc_h", "other")["difference"] == 0, "the list of the first run is taken for both"
    pooled = write_run(tmp_path / "pooled", BASE, features={**FEATURES, "tokens": {"source": "cache", "token_pool": 2}})
    with pytest.raises(ValueError, match="tokens: token pool 2, expected 1"):
        compare_runs([base, pooled])
    without = write_run(
        tmp_path / "without", BASE, features={**FEATURES, "encoder_sha256": "unknown", "tokens": {"source": "none"}}
    )
    assert compare_runs([base, without]).attrs["notes"] == []


def test_other_images_are_compared_only_when_told(tmp_path):
    original, again, stained = ({"T1": {"counts": "c", "image": name}} for name in ("i", "i", "j"))
    lists = {**LISTS, "highly_predictive": ["g3"]}
    first = write_run(tmp_path / "first", BASE, digests=original)
    same = write_run(tmp_path / "same", BASE, digests=again)
    other = write_run(tmp_path / "other", BASE, digests=stained, lists=lists)
    assert compare_runs([first, same]).attrs["notes"] == []
    with pytest.raises(ValueError, match=r"other: fold 0 has other images of the slides T1(.|\n)*--intersect"):
        compare_runs([first, other])
    table = compare_runs([first, other], intersect=True)
    assert any("other images of the slides T1" in note for note in table.attrs["notes"])
    assert row(table, "pcc_h", "other")["difference"] == 0, "the list of the first run is taken for both"


def test_other_features_of_a_training_slide_explain_other_lists_of_genes(tmp_path):
    def run(name: str, features: dict[str, str], **changes):
        digests = {slide: {"counts": "c", "tokens": name, "target": digest} for slide, digest in features.items()}
        return write_run(tmp_path / name, BASE, digests=digests, **changes)

    lists = {**LISTS, "highly_predictive": ["g3"]}
    first = run("first", {"T1": "t", "A1": "a"})
    assert compare_runs([first, run("digits", {"T1": "u", "A1": "a"})]).attrs["notes"] == []
    for same in (
        run("same", {"T1": "t", "A1": "a"}, lists=lists),
        run("of_a_test", {"T1": "t", "A1": "b"}, lists=lists),
    ):
        with pytest.raises(ValueError, match="another list 'highly_predictive'"):
            compare_runs([first, same], intersect=True)
    other = run("other", {"T1": "u", "A1": "a"}, lists=lists)
    with pytest.raises(ValueError, match=r"the features of the slides T1 are other numbers(.|\n)*--intersect"):
        compare_runs([first, other])
    table = compare_runs([first, other], intersect=True)
    assert row(table, "pcc_h", "other")["difference"] == 0, "the list of the first run is taken for both"


def test_other_training_data_are_refused_and_other_choices_of_the_epoch_told(tmp_path, base):
    other = write_run(tmp_path / "other", BASE, train_slides=["T1", "T2"])
    with pytest.raises(ValueError, match=r"fold 0 was trained on other slides \(T2 not in both\)"):
        compare_runs([base, other], intersect=True)
    moved = write_run(tmp_path / "moved", BASE, train_slides=[], validation_slides=["T1"])
    assert compare_runs([base, moved]).attrs["notes"] == [], "the same patients, one of them to choose the epoch"
    ridge = write_run(tmp_path / "ridge", BASE, selection="none")
    (note,) = compare_runs([base, ridge]).attrs["notes"]
    assert note.startswith("ridge: fitted without epochs; the first method: epoch chosen on an inner held-out patient")
    assert "one patient less to learn from" in note


def test_intersection_only_when_told(tmp_path, base):
    # Fold 1 missing, another gene instead of g5.
    values = {"A": [0.2, 0.3, 0.4, 0.5, 0.6, 0.9], "B": None, "C": [0.5, 0.5, 0.1, 0.1, 0.3, 0.9]}
    partial = write_run(tmp_path / "partial", values, genes=[*GENES[:5], "z"])
    with pytest.raises(ValueError, match=r"cannot be compared") as error:
        compare_runs([base, partial])
    message = str(error.value)
    assert "folds [0, 2], expected [0, 1, 2] (not in both: [1])" in message
    assert "fold 0 has 6 genes, expected 6; 2 not in both" in message and "--intersect" in message
    table = compare_runs([base, partial], intersect=True)
    second = row(table, "pcc_all", "partial")
    # genes g0..g4 of A and C: A +.1, C +0
    assert row(table, "pcc_all", "base")["mean"] == pytest.approx((1.5 / 5 + 1.5 / 5) / 2)
    assert second["difference"] == pytest.approx(0.05) and second["num_patients"] == 2
    assert any("not in both: [1]" in note for note in table.attrs["notes"])


def test_paper_lists_are_said_to_differ(tmp_path):
    runs = [write_run(tmp_path / name, BASE, protocol="paper") for name in ("one", "two")]
    table = compare_runs(runs)
    assert any("its own list" in note for note in table.attrs["notes"])
    same = row(table, "pcc_all", "two")
    assert same["difference"] == 0 and same["genes_improved"] == 0.0


def test_names_tell_runs_apart(tmp_path):
    runs = [write_run(tmp_path / name / "run", BASE) for name in ("one", "two")]
    assert compare_runs(runs, metrics=["mse"])["method"].tolist() == ["one/run", "two/run"]


# --- the mode ---


def test_the_mode_says_what_its_files_say_and_leaves_out_what_is_not_finished(
    make_run, tmp_path, capsys, _takes_shortcuts
):
    runs = [make_run(tmp_path / name, signal=signal, predictions=False) for name, signal in (("a", 0.6), ("b", 0.3))]
    halfway = shutil.copytree(runs[0], tmp_path / "c")
    (halfway / "fold_2" / "result.json").unlink()
    (tmp_path / "d" / "fold_0").mkdir(parents=True)
    compare([str(path) for path in sorted(tmp_path.iterdir())], None, intersect=False)
    said = capsys.readouterr().out
    written = (tmp_path / "comparison" / "comparison.md").read_text()
    for line in written.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert [cell.strip() for cell in line.strip("| ").split(" | ")] in [
                [cell.strip() for cell in re.split(r"\s{2,}", shown.strip())] for shown in said.splitlines()
            ]
    for heading in re.findall(r"^## (.*)$", written, flags=re.MULTILINE)[:4]:
        assert heading in said
    assert "wilcoxon_p" not in said and "All tests: 3 pairs are too few for a test." in said
    assert f"{tmp_path / 'c'}: Not complete, left out: fold 2." in said
    assert f"{tmp_path / 'd'}: holds 1 fold folders and none is complete" in said
    compare([str(runs[0]), str(halfway)], None, intersect=True)
    assert "Left out" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"needs two finished runs, found 1:\n.*d: holds 1 fold folders"):
        compare([str(runs[0]), str(tmp_path / "d")], None, intersect=False)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        compare([str(runs[0]), str(tmp_path / "nowhere")], None, intersect=False)
