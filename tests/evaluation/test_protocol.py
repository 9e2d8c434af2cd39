"""Every line of both protocols on numbers worked out by hand, and the biases the protocols are about."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from evaluation import aggregation
from evaluation.external import Predictor, external_summary
from evaluation.fold_files import find_folds, read_fold, read_run, write_fold
from evaluation.gene_lists import (
    highly_variable_list,
    list_size,
    pcc_ranks,
    ranked_on_test_list,
)
from evaluation.metrics import METRIC_NAMES
from evaluation.protocol import NO_LIST, epoch_scores, score_fold
from evaluation.slide_result import SlideResult
from evaluation.slide_scores import score_slide
from evaluation.summary import summarise
from utils.checkpoint import fold_checkpoints

GENES = ["a", "b", "c", "d", "e", "f"]
# Six orthogonal patterns over eight spots: mixtures of them have correlations that can be read off.
_HADAMARD = np.array([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=float)
PATTERN, NOISE = _HADAMARD[1], _HADAMARD[2]
GRID = np.array([[i // 4, i % 4] for i in range(8)])


def with_correlation(values):
    """A prediction whose PCC with PATTERN is exactly `values`, one per gene; NaN: a constant prediction."""
    columns = [
        np.zeros(8) if math.isnan(value) else value * PATTERN + math.sqrt(1 - value**2) * NOISE for value in values
    ]
    return np.stack(columns, axis=1)


def slide(name, correlations, *, genes=GENES, patient=None, offset=0.0, **more):
    measured = np.tile(PATTERN[:, None], (1, len(genes))) + 2
    return SlideResult(
        slide=name,
        patient=patient or name[0],
        spot_ids=[f"{x}x{y}" for x, y in GRID],
        grid_xy=GRID,
        genes=list(genes),
        measured=measured,
        measured_unsmoothed=more.pop("measured_unsmoothed", None),
        predictions={"fused": with_correlation(correlations) + 2 + offset, **more},
    )


def score(results, protocol="clean", gene_lists=None, **more):
    lists = {"highly_predictive": ["a", "b"], "highly_variable": ["c"]} if gene_lists is None else gene_lists
    genes = len(results[0].genes)
    more.setdefault("training_mean", np.full(genes, 2.0))
    return score_fold(results, gene_lists=lists, protocol=protocol, **more)


# --- one slide, one fold ---


def test_score_slide_is_one_row_per_scale_truth_and_gene():
    raw = np.tile(PATTERN[:, None], (1, 6)) * 3
    result = slide(
        "A1",
        [0.6] * 6,
        measured_unsmoothed=raw,
        target=with_correlation([0.28] * 6),
        **{"global": with_correlation([0] * 6)},
    )
    table = score_slide(result)
    assert list(table.columns) == ["slide", "patient", "scale", "truth", "gene", *METRIC_NAMES]
    assert len(table) == 3 * 2 * 6
    assert set(table["slide"]) == {"A1"} and set(table["patient"]) == {"A"}
    means = table.groupby(["truth", "scale"])["pearson"].mean()
    for truth in ("smoothed", "unsmoothed"):
        assert means[truth, "fused"] == pytest.approx(0.6)
        assert means[truth, "target"] == pytest.approx(0.28)
        assert means[truth, "global"] == pytest.approx(0, abs=1e-12)
    # PATTERN and NOISE have variance 1: fused errors against the smoothed truth 2 - 2 * 0.6; against 3 * PATTERN
    # (mean 0, the prediction's mean is 2): 9 + 1 - 2 * 3 * 0.6 + 4.
    errors = table[table["scale"] == "fused"].groupby("truth")["mse"].mean()
    assert errors["smoothed"] == pytest.approx(0.8)
    assert errors["unsmoothed"] == pytest.approx(10.4)


def test_slide_result_names_all_that_does_not_fit():
    with pytest.raises(ValueError, match=r"slide A1: grid_xy has shape \(7, 2\).*measured has shape \(8, 5\)") as error:
        SlideResult("A1", "A", ["s"] * 8, GRID[:7], GENES, np.zeros((8, 5)), None, {"fused": np.zeros((8, 6))})
    assert "fused" not in str(error.value)
    with pytest.raises(ValueError, match=r"predictions are \['target'\]; expected 'fused'"):
        SlideResult("A1", "A", ["s"] * 8, GRID, GENES, np.zeros((8, 6)), None, {"target": np.zeros((8, 6))})


def two_patients():
    """Patient A with two slides, B with one: the mean over slides and over patients differ."""
    return [
        slide("A1", [0.8, 0.9, 0.1, 0.2, 0.0, 0.4]),
        slide("A2", [0.7, 0.6, 0.3, 0.0, 0.2, 0.0]),
        slide("B1", [0.2, 0.4, 0.8, 0.6, 0.4, 0.6]),
    ]


def test_paper_is_the_mean_over_slides():
    scores = score(two_patients(), "paper")
    # slides: 2.4/6 = .4, 1.8/6 = .3, 3.0/6 = .5
    assert scores.per_slide.query("scale == 'fused'")["pcc_all"].tolist() == pytest.approx([0.4, 0.3, 0.5])
    assert scores.summary["pcc_all"] == pytest.approx(0.4)
    # gene a: (.8 + .7 + .2)/3
    genes = scores.per_gene.query("scale == 'fused'").set_index("gene")["pearson"]
    assert genes.tolist() == pytest.approx([1.7 / 3, 1.9 / 3, 0.4, 0.8 / 3, 0.2, 1 / 3])
    # errors 2 - 2 r: mean 2 - 2 * .4
    assert scores.summary["mse"] == pytest.approx(1.2)
    # six genes: a list of 2 (20 %, rounded up); b and a rank first on these predictions
    assert scores.summary["gene_lists"]["ranked_on_test"] == ["b", "a"]
    assert scores.summary["gene_list_sizes"] == {"highly_predictive": 2, "highly_variable": 1, "ranked_on_test": 2}
    assert scores.summary["pcc_h"] == pytest.approx(0.6)
    assert "biased upward" in scores.summary["pcc_h_note"]


def test_clean_is_the_mean_over_patients():
    scores = score(two_patients(), "clean", {"highly_predictive": ["a", "c"], "highly_variable": ["d"]})
    # A: (.4 + .3)/2 = .35; B: .5
    assert scores.per_patient.query("scale == 'fused'")["pcc_all"].tolist() == pytest.approx([0.35, 0.5])
    assert scores.summary["pcc_all"] == pytest.approx(0.425)
    # gene a: A (.8 + .7)/2 = .75, B .2 -> .475
    genes = scores.per_gene.query("scale == 'fused'").set_index("gene")["pearson"]
    assert genes.tolist() == pytest.approx([0.475, 0.575, 0.5, 0.35, 0.25, 0.4])
    # the fixed list a, c: A (.75 + .2)/2 = .475, B (.2 + .8)/2 = .5
    assert scores.summary["pcc_h"] == pytest.approx(0.4875)
    # d: A (.2 + 0)/2 = .1, B .6
    assert scores.summary["scores"]["smoothed"]["fused"]["pcc_highly_variable"] == pytest.approx(0.35)
    assert scores.summary["num_slides"] == 3 and scores.summary["num_spots"] == 24
    assert scores.summary["slides"] == {"A1": 8, "A2": 8, "B1": 8}
    assert scores.summary["patients"] == ["A", "B"]


def test_training_mean_is_scored_like_a_prediction():
    raw = np.tile(PATTERN[:, None], (1, 6)) * 3
    result = slide("A1", [0.5] * 6, measured_unsmoothed=raw)
    scores = score([result], training_mean=np.full(6, 2.5), training_mean_unsmoothed=np.full(6, 1.0))
    # truth 1 and 3 against 2.5: errors 1.5 and .5; truth -3 and 3 against 1: 4 and 2
    assert scores.summary["training_mean"] == pytest.approx({"mse": 1.25, "mae": 1.0})
    assert scores.summary["training_mean_unsmoothed"] == pytest.approx({"mse": 10.0, "mae": 3.0})
    assert "training_mean" not in scores.summary["scores"]["smoothed"]
    rows = scores.per_gene_slide.query("scale == 'training_mean'")
    assert rows["pearson"].isna().all() and len(rows) == 12
    alone = score([result])
    assert alone.summary["training_mean_unsmoothed"] is None
    with pytest.raises(ValueError, match=r"training mean \(smoothed\) has shape \(5,\); expected \(6,\)"):
        score([result], training_mean=np.zeros(5))


def test_undefined_genes_are_skipped_and_counted():
    results = [slide("A1", [math.nan, 0.5, 0.3, 0.1, 0.3, 0.3]), slide("A2", [0.7] + [math.nan] * 5)]
    scores = score(results, "paper")
    # A1: 1.5/5 = .3 (not /6), A2: .7
    assert scores.per_slide.query("scale == 'fused'")["pcc_all"].tolist() == pytest.approx([0.3, 0.7])
    assert scores.per_slide.query("scale == 'fused'")["undefined_pearson"].tolist() == [1, 5]
    assert scores.summary["pcc_all"] == pytest.approx(0.5)
    assert scores.summary["undefined_pearson"] == 6
    assert any("PCC undefined for 6 of 12 (slide, gene) pairs" in note for note in scores.summary["notes"])
    # clean: genes first: .7, .5, .3, .1, .3, .3 -> 2.2/6
    assert score(results, "clean").summary["pcc_all"] == pytest.approx(2.2 / 6)
    everything = score([slide("A1", [math.nan] * 6)])
    assert math.isnan(everything.summary["pcc_all"]) and math.isnan(everything.summary["pcc_h"])
    assert everything.summary["mse"] == pytest.approx(1.0)


def test_a_slide_of_one_spot_is_called_so():
    """Not constant: that would send the reader to look for genes that do not vary."""
    whole, values = slide("A1", [0.5] * 6), np.full((1, 6), 2.0)
    lone = SlideResult("A2", "A", ["1x1"], GRID[:1], whole.genes, values, None, {"fused": values})
    notes = score([whole, lone]).summary["notes"]
    assert "PCC undefined for every gene of slides that have 1 spot: A2; means skip them." in notes
    assert not any("constant" in note for note in notes)
    predictor = Predictor("fold 0", np.full((2, 6), 2.0), {"h": ["a"]})
    predictor.add(whole)
    predictor.add(lone)
    about = {"genes": whole.genes, "slides": {"A1": 8, "A2": 1}}
    notes = external_summary([predictor], about)[0]["notes"]
    assert any("slides that have 1 spot: A2" in note for note in notes) and not any(
        "constant" in note for note in notes
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_no_result(bad):
    """Otherwise a slide would drop out of the means without a word."""
    result = slide("A1", [0.5] * 6)
    for name in ("fused", "measured"):
        values = (result.predictions["fused"] if name == "fused" else result.measured).copy()
        values[3, 2] = bad
        changes = {"predictions": {"fused": values}} if name == "fused" else {"measured": values}
        with pytest.raises(
            ValueError, match=rf"slide A1: 1 numbers of {name} are not finite, first of spot .*, gene c"
        ):
            dataclasses.replace(result, **changes)


def test_a_slide_without_counts_is_said():
    result = dataclasses.replace(slide("A1", [0.5] * 6), measured=np.zeros((8, 6)))
    notes = score([result, slide("A2", [0.5] * 6)]).summary["notes"]
    assert [note for note in notes if "no count of any gene" in note] == [
        "Slide A1: no count of any gene of the panel in its 8 spots; it is scored as if nothing were expressed there."
    ]


def test_score_fold_refuses():
    with pytest.raises(ValueError, match="no test slide"):
        score_fold([], training_mean=np.zeros(6), gene_lists={})
    with pytest.raises(ValueError, match="a slide is given twice"):
        score([slide("A1", [0.5] * 6)] * 2)
    with pytest.raises(ValueError, match=r"slides A1 \(6 genes\) and A2 \(5 genes\) have different panels"):
        score([slide("A1", [0.5] * 6), slide("A2", [0.5] * 5, genes=GENES[:5])])
    with pytest.raises(ValueError, match=r"gene lists name 1 genes outside the panel \(z\)"):
        score([slide("A1", [0.5] * 6)], gene_lists={"highly_predictive": ["a", "z"]})
    with pytest.raises(ValueError, match="'best' is unknown"):
        score([slide("A1", [0.5] * 6)], "best")


def test_without_a_fixed_list_the_clean_pcc_h_is_undefined_and_says_so():
    scores = score([slide("A1", [0.5] * 6)], "clean", {})
    assert math.isnan(scores.summary["pcc_h"])
    assert any("No highly predictive list" in note for note in scores.summary["notes"])


# --- which number chooses the epoch ---


def test_epoch_scores_are_those_of_the_fold():
    results = [
        slide("A1", [0.9, 0.8, 0.1, 0.2, 0.0, 0.4], target=with_correlation([0.1] * 6) + 2),
        slide("A2", [0.5, math.nan, 0.3, 0.1, 0.7, 0.4], target=with_correlation([0.2] * 6) + 1),
        slide("B1", [0.2, 0.4, 0.8, math.nan, 0.4, 0.6], target=with_correlation([0.3] * 6) + 2),
    ]
    for protocol in ("paper", "clean"):
        full = score(results, protocol).summary["scores"]["smoothed"]
        quick = epoch_scores(results, protocol)
        assert set(quick) == {"pcc_all", "mse", "mae", "pcc_all_target", "mse_target", "mae_target"}
        for name in ("pcc_all", "mse", "mae"):
            assert quick[name] == pytest.approx(full["fused"][name])
            assert quick[f"{name}_target"] == pytest.approx(full["target"][name])


# --- gene lists ---


def test_list_size_is_a_fifth_of_the_panel_and_at_most_fifty():
    assert [list_size(n) for n in (250, 1000, 249, 60, 24, 3)] == [50, 50, 50, 12, 5, 1]
    assert list_size(60, 50) == 50
    with pytest.raises(ValueError, match="a list of 50 genes was asked of a panel of 40"):
        list_size(40, 50)


def test_ranks_by_hand():
    ranks = pcc_ranks(pd.Series([0.1, 0.9, math.nan, 0.5, 0.5], index=list("abcde")))
    assert ranks.to_dict() == {"a": 4, "b": 1, "c": 5, "d": 2.5, "e": 2.5}


def test_rank_list_averages_ranks_not_correlations():
    """Fold 1 ranks b a c d, fold 2 a c b d, fold 3 a d c b: averages a 4/3, b 8/3, c 8/3, d 11/3."""
    folds = [
        pd.Series({"a": 0.2, "b": 0.99, "c": 0.1, "d": 0.0}),
        pd.Series({"a": 0.4, "b": 0.2, "c": 0.3, "d": 0.1}),
        pd.Series({"a": 0.4, "b": 0.1, "c": 0.2, "d": 0.3}),
    ]
    assert ranked_on_test_list(folds, 1) == ["a"]  # by mean PCC it would be b (.43 against .33)
    assert ranked_on_test_list(folds, 3) == ["a", "b", "c"]  # the tie keeps the order of the panel
    assert ranked_on_test_list(folds, 4) == ["a", "b", "c", "d"]
    other_panel = pd.Series({"c": 0.9, "a": 0.8, "z": 1.0})
    assert ranked_on_test_list([folds[0], other_panel], 2) == ["a", "c"]  # ranks a 2 + 3, c 3 + 2; z is not shared
    with pytest.raises(ValueError, match="share no gene"):
        ranked_on_test_list([folds[0], pd.Series({"z": 1.0})])


def test_highly_variable_list_by_hand():
    expression = np.array([[0.0, 5.0, 1.0, 2.0], [0.0, 5.0, 3.0, 0.0], [3.0, 5.0, 1.0, 2.0]])
    # variances 2, 0, 8/9, 8/9
    assert highly_variable_list(expression, list("abcd"), 4) == ["a", "c", "d", "b"]
    assert highly_variable_list(expression, list("abcd")) == ["a"]
    with pytest.raises(ValueError, match=r"shape \(3, 4\); expected \(spots, 2 genes\)"):
        highly_variable_list(expression, ["a", "b"])


# --- the fold on disk ---


def write_run(run_dir, folds, protocol="clean", *, lists=None, epochs=None, **split):
    """folds: {index: results}. Writes what main and write_fold write."""
    for index, results in folds.items():
        folder = run_dir / f"fold_{index}"
        folder.mkdir(parents=True, exist_ok=True)
        patients = sorted({result.patient for result in results})
        content = {"fold": index, "name": patients[0], "protocol": protocol, "test_patients": patients, **split}
        (folder / "split.json").write_text(json.dumps(content))
        if epochs:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs[index]))
        chosen = lists[index] if lists else None
        write_fold(score(results, protocol, chosen), folder, {"epoch": 1} if epochs else None)
    return run_dir


def test_fold_survives_the_disk(tmp_path):
    results = [
        slide("NA1", [math.nan, 0.5, 0.3, 0.1, 0.3, 0.3], genes=["NA", "nan", "None", "1", "x,y", "f"], patient="NA")
    ]
    lists = {"highly_predictive": ["NA"], "highly_variable": ["x,y"]}
    scores = score(results, gene_lists=lists)
    (tmp_path / "split.json").write_text(
        json.dumps({"fold": 3, "name": "NA", "protocol": "clean", "test_patients": ["NA"]})
    )
    write_fold(scores, tmp_path, {"epoch": 7, "notes": ["said by the caller"]})
    record = read_fold(tmp_path)
    assert (record.index, record.name, record.protocol) == (3, "NA", "clean")
    assert record.genes == scores.genes and record.gene_lists == scores.gene_lists
    assert record.result["epoch"] == 7 and record.result["notes"][-1] == "said by the caller"
    assert record.result["pcc_h"] is None  # NaN, the only listed gene is constant
    assert record.epochs.empty
    pd.testing.assert_frame_equal(record.per_gene_slide, scores.per_gene_slide, rtol=1e-9)
    for name in ("per_gene", "per_slide", "per_patient"):
        assert (tmp_path / f"{name}.csv").is_file()


def test_result_is_written_last_and_never_stale(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", {0: [slide("A1", [0.5] * 6)]})
    result = run / "fold_0" / "result.json"
    assert result.is_file()
    scores = score([slide("A1", [0.1] * 6)])
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_a, **_k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_fold(scores, run / "fold_0")
    assert not result.exists()
    with pytest.raises(ValueError, match=r"none is complete \(no result.json\).*--resume"):
        find_folds(run)


def test_fold_files_refuse(tmp_path):
    run = write_run(tmp_path / "run", {0: [slide("A1", [0.5] * 6)]})
    folder = run / "fold_0"
    with pytest.raises(ValueError, match="lists another panel than the 5 genes"):
        write_fold(score([slide("A1", [0.5] * 5, genes=GENES[:5])]), folder)
    with pytest.raises(ValueError, match=r"extra values \['mse'\]"):
        write_fold(score([slide("A1", [0.5] * 6)]), folder, {"mse": 0})
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_fold(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "split.json").write_text('{"fold": 0, "name": "A", "protocol": "paper", "test_patients": ["A"]}')
    with pytest.raises(ValueError, match=r"split.json was made for the protocol 'paper', result.json for 'clean'"):
        read_fold(folder)
    (folder / "split.json").write_text('{"fold": 0}')
    with pytest.raises(ValueError, match=r"lacks \['name', 'protocol', 'test_patients'\]"):
        read_fold(folder)
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        read_run(tmp_path / "nothing")


def test_copied_folds_are_refused(tmp_path):
    run = write_run(tmp_path / "run", {0: [slide("A1", [0.5] * 6)], 1: [slide("B1", [0.5] * 6)]})
    assert len(read_run(run)[0]) == 2
    shutil.copytree(run / "fold_0", run / "fold_4")
    with pytest.raises(
        ValueError, match=r"fold_4: split.json is of fold 0; expected fold 4, .*\. A fold that was copied"
    ):
        read_run(run)
    split = json.loads((run / "fold_4" / "split.json").read_text())
    (run / "fold_4" / "split.json").write_text(json.dumps({**split, "fold": 4}))
    with pytest.raises(ValueError, match="fold_0 and fold_4 both test patient A; expected each patient in one fold"):
        read_run(run)
    (run / "fold_4").rename(run / "fold_01")
    for find in (find_folds, fold_checkpoints):
        with pytest.raises(
            ValueError, match=r"fold_01: the folder of fold 1 is called fold_1. Rename it, or move it away"
        ):
            find(run)


# --- the run ---


def test_summary_of_the_paper_protocol_by_hand(tmp_path):
    """Two folds. Fold 0 (A1, A2; B1): mean over slides .4. Fold 1 (C1): .2. Run: .3, std |.4 - .2|/sqrt 2."""
    run = write_run(
        tmp_path / "run",
        {0: two_patients(), 1: [slide("C1", [0.05, 0.1, 0.5, 0.4, 0.2, -0.05])]},
        "paper",
        epochs={
            0: [{"epoch": 0, "test/pcc_all": 0.35}, {"epoch": 1, "test/pcc_all": 0.4}],
            1: [{"epoch": 0, "test/pcc_all": None}, {"epoch": 1, "test/pcc_all": 0.2}],
        },
        selection="test",
    )
    summary = summarise(run)
    assert next(iter(summary)) == "protocol" and summary["protocol"] == "paper"
    assert summary["headline"]["pcc_all"] == pytest.approx({"mean": 0.3, "std": 0.2 / math.sqrt(2)})
    # ranks fold 0: b 1, a 2, c 3, f 4, d 5, e 6. fold 1: c 1, d 2, e 3, b 4, a 5, f 6.
    # averages: a 3.5, b 2.5, c 2, d 3.5, e 4.5, f 5 -> c, b. Fold 0: (.4 + 1.9/3)/2 = 3.1/6; fold 1: (.5 + .1)/2 = .3
    assert summary["pcc_h"]["paper"]["genes"] == ["c", "b"] and summary["pcc_h"]["paper"]["size"] == 2
    assert [row["pcc_h"] for row in summary["folds"]] == pytest.approx([3.1 / 6, 0.3])
    assert summary["headline"]["pcc_h"]["mean"] == pytest.approx(4.9 / 12)
    # the fixed list a, b beside it: fold 0 .6, fold 1 .075
    assert summary["pcc_h"]["clean"]["mean"] == pytest.approx(0.3375)
    # the same averaged over patients (A .35, B .5, C .2)
    both = summary["both_protocols"]
    assert both["paper"]["pcc_all"] == pytest.approx(summary["headline"]["pcc_all"])
    assert both["clean"]["pcc_all"] == pytest.approx({"mean": 0.35, "std": 0.225 / math.sqrt(2)})
    # errors 2 - 2 r on average
    assert summary["headline"]["mse"]["mean"] == pytest.approx(1.4)
    assert summary["headline"]["training_mean_mse"]["mean"] == pytest.approx(1.0)
    assert [row["epoch"] for row in summary["folds"]] == [1, 1]
    assert summary["selection_price"]["mean"] == pytest.approx(0.0)
    assert (summary["num_folds"], summary["num_patients"], summary["num_slides"], summary["num_spots"]) == (2, 3, 4, 32)
    text = " ".join(summary["notes"])
    for bias in ("chosen on the test fold", "biased upward", "gene panel is chosen from all slides"):
        assert bias in text
    json.dumps(summary, allow_nan=False)


def test_summary_of_the_clean_protocol_by_hand(tmp_path):
    """Patients A .35, B .5 (fold 0), C .2 (fold 1): mean .35, although the folds have .425 and .2."""
    lists = {
        0: {"highly_predictive": ["a", "c"], "highly_variable": ["d"]},
        1: {"highly_predictive": ["c", "d"], "highly_variable": ["a"]},
    }
    run = write_run(
        tmp_path / "run",
        {0: two_patients(), 1: [slide("C1", [0.05, 0.1, 0.5, 0.4, 0.2, -0.05])]},
        lists=lists,
        epochs={
            0: [{"epoch": e, "validation/pcc_all": 0.1, "test/pcc_all": v} for e, v in enumerate([0.3, 0.42, 0.46])],
            1: [{"epoch": e, "validation/pcc_all": 0.1, "test/pcc_all": v} for e, v in enumerate([0.22, 0.20, 0.1])],
        },
        selection="validation",
    )
    summary = summarise(run, notes=["fold 2 skipped: patient D has no slide"])
    assert summary["headline"]["pcc_all"]["mean"] == pytest.approx(0.35)
    assert summary["headline"]["pcc_all"]["std"] == pytest.approx(0.225 / math.sqrt(2))
    assert [row["pcc_all"] for row in summary["folds"]] == pytest.approx([0.425, 0.2])
    patients = {row["patient"]: row for row in summary["patients"]}
    assert [patients[p]["pcc_all"] for p in "ABC"] == pytest.approx([0.35, 0.5, 0.2])
    assert [patients[p]["num_slides"] for p in "ABC"] == [2, 1, 1]
    # PCC(H): every fold has its own fixed list: A .475, B .5, C (.5 + .4)/2
    assert [patients[p]["pcc_h"] for p in "ABC"] == pytest.approx([0.475, 0.5, 0.45])
    assert summary["headline"]["pcc_h"]["mean"] == pytest.approx(1.425 / 3)
    assert summary["pcc_h"]["clean"]["genes"] == {"0": ["a", "c"], "1": ["c", "d"]}
    # the same in the order and with the list of the paper
    both = summary["both_protocols"]
    assert both["clean"]["pcc_h"]["mean"] == pytest.approx(1.425 / 3)
    assert both["paper"]["pcc_all"]["mean"] == pytest.approx(0.3)
    assert both["paper"]["pcc_h"]["mean"] == pytest.approx(4.9 / 12)
    assert summary["protocol_description"].endswith("; epoch chosen on an inner held-out patient")
    interval = summary["intervals"]["pcc_all"]
    assert interval["mean"] == pytest.approx(0.35) and interval["num_patients"] == 3
    assert interval["low"] is interval["high"] is None, "three patients"
    # chosen epoch 1: .42 of .46, .20 of .22
    assert summary["selection_price"]["mean"] == pytest.approx(0.03)
    assert [row["best_epoch"] for row in summary["selection_price"]["folds"]] == [2, 0]
    assert any("0.0300 on average" in note for note in summary["notes"])
    assert "fold 2 skipped: patient D has no slide" in summary["notes"]


def test_what_was_not_chosen_on_the_test_fold_is_not_said_to_be(tmp_path):
    run = write_run(tmp_path / "run", {0: two_patients()}, "paper", selection="fixed")
    summary = summarise(run)
    assert summary["protocol_description"].endswith("; number of epochs fixed beforehand")
    assert not any("optimistic" in note for note in summary["notes"])
    assert any("gene panel is chosen from all slides" in note for note in summary["notes"])


def test_summary_has_every_scale_and_truth(tmp_path):
    raw = np.tile(PATTERN[:, None], (1, 6)) * 3
    results = [slide("A1", [0.6] * 6, measured_unsmoothed=raw, neighbor=with_correlation([0.28] * 6))]
    run = write_run(tmp_path / "run", {0: results})
    rows = {(row["truth"], row["scale"]): row for row in summarise(run)["scales"]}
    assert set(rows) == {
        ("smoothed", "fused"),
        ("smoothed", "neighbor"),
        ("smoothed", "training_mean"),
        ("unsmoothed", "fused"),
        ("unsmoothed", "neighbor"),
    }
    assert rows["unsmoothed", "neighbor"]["pcc_all"] == pytest.approx(0.28)
    assert rows["smoothed", "training_mean"]["pcc_all"] is None
    assert rows["smoothed", "fused"]["pcc_all_std"] is None  # one fold has no deviation


def test_summary_names_what_is_missing(tmp_path):
    run = write_run(tmp_path / "run", {1: [slide("A1", [0.5] * 6)], 3: [slide("C1", [0.5] * 6)]})
    (run / "fold_2").mkdir()
    summary = summarise(run)
    assert [row["fold"] for row in summary["folds"]] == [1, 3]
    text = " ".join(summary["notes"])
    assert "Not complete, left out: fold 2" in text
    assert "Not in this run (skipped or not asked for): fold 0" in text
    assert summary["selection_price"] is None


def test_that_no_fold_has_a_list_is_left_to_the_verdict_and_one_that_lacks_it_is_named(tmp_path):
    folds = {0: [slide("A1", [0.5] * 6)], 1: [slide("B1", [0.5] * 6)]}
    none = summarise(write_run(tmp_path / "none", folds, lists={0: {}, 1: {}}))
    assert none["headline"]["pcc_h"]["mean"] is None
    assert not any("No highly predictive list" in note for note in none["notes"])
    one = summarise(write_run(tmp_path / "one", folds, lists={0: {}, 1: {"highly_predictive": ["b"]}}))
    name = read_run(tmp_path / "one")[0][0].name
    assert [note for note in one["notes"] if "No highly predictive list" in note] == [f"Fold {name}: {NO_LIST}"]


def test_summary_with_a_panel_per_fold(tmp_path):
    """The clean protocol picks the panel in every fold; ranks over folds are taken of the shared genes."""
    folds = {
        0: [slide("A1", [0.1, 0.5, 0.3], genes=["a", "b", "c"])],
        1: [slide("B1", [0.9, 0.2, 0.4], genes=["z", "c", "b"])],
    }
    lists = {0: {"highly_predictive": ["b"]}, 1: {"highly_predictive": ["z"]}}
    summary = summarise(write_run(tmp_path / "run", folds, lists=lists))
    assert summary["headline"]["pcc_all"]["mean"] == pytest.approx(0.4)
    assert summary["headline"]["pcc_h"]["mean"] == pytest.approx(0.7)
    assert summary["pcc_h"]["paper"]["genes"] == ["b"]
    assert any("2 genes are in every one" in note for note in summary["notes"])


def test_a_run_has_one_protocol(tmp_path):
    run = write_run(tmp_path / "run", {0: [slide("A1", [0.5] * 6)]}, "paper")
    write_run(run, {1: [slide("B1", [0.5] * 6)]}, "clean")
    with pytest.raises(ValueError, match="mixes protocols: fold_1 is clean, fold_0 is paper"):
        summarise(run)


def test_a_run_has_one_model(tmp_path):
    """Copied without their checkpoints, folds still say which model they are of; those of earlier versions do not."""
    run = write_run(tmp_path / "run", {index: [slide(f"{index}1", [0.5] * 6)] for index in range(3)})
    for index, model in ((0, "gene_dml"), (2, "ridge_target")):
        summarise(run)
        path = run / f"fold_{index}" / "split.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model": model}))
    with pytest.raises(ValueError, match="mixes models: fold_0 is gene_dml, fold_2 is ridge_target"):
        summarise(run)


# --- what the biases amount to ---


def test_random_predictions_score_on_a_list_picked_on_the_test_and_not_on_a_fixed_one(tmp_path):
    """Neither measurement nor prediction holds any signal: only the choice of the genes can make a score."""
    generator = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(250)]
    fixed = {"highly_predictive": list(generator.choice(genes, 50, replace=False))}
    grid = np.stack(np.unravel_index(np.arange(120), (12, 10)), axis=1)

    def noise(patient):
        measured, predicted = generator.normal(size=(2, 120, 250))
        spots = [f"{x}x{y}" for x, y in grid]
        return SlideResult(f"{patient}1", patient, spots, grid, genes, measured, None, {"fused": predicted})

    folds = {index: [noise(patient)] for index, patient in enumerate("ABCD")}
    alone = score(folds[0], "paper", fixed).summary
    # The best fifth of 250 values with deviation 1/sqrt(119) has the mean 1.4/sqrt(119).
    assert alone["scores"]["smoothed"]["fused"]["pcc_ranked_on_test"] == pytest.approx(0.128, abs=0.03)
    summary = summarise(write_run(tmp_path / "run", folds, "paper", lists=dict.fromkeys(folds, fixed)))
    assert summary["pcc_h"]["paper"]["mean"] > 0.04
    assert abs(summary["pcc_h"]["clean"]["mean"]) < 0.02
    assert abs(summary["headline"]["pcc_all"]["mean"]) < 0.02


def test_aggregation_needs_no_order_of_rows():
    scores = score(two_patients())
    lists = aggregation.with_headline_list(scores.gene_lists, "clean")
    tables = []
    for table in (scores.per_gene_slide, scores.per_gene_slide.sample(frac=1, random_state=0)):
        slides, patients = aggregation.slide_table(table, lists), aggregation.patient_table(table, lists)
        fold = aggregation.fold_table(slides, patients, "clean")
        tables.append(fold.set_index(["scale", "truth"]).sort_index())
    pd.testing.assert_frame_equal(tables[0], tables[1])
