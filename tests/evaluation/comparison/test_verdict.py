"""The sentences that judge a run: one case for each thing they may have to say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.comparison.runs import compare_runs
from evaluation.comparison.verdict import (
    SINGLE_SPOTS,
    Beside,
    Circumstances,
    against_mean,
    judge,
    on_single_spots,
    ridge_beside,
)
from evaluation.report.write import format_table, write_report, write_summary
from evaluation.summary import summarise
from utils.config import Config, config_from_dict, save_config


def summary(
    pcc=(0.5, 0.4), mse=(0.1, 0.2), mean=(0.2, 0.3), *, epoch=3, selection="validation", pcc_h=0.6, interval=None
):
    """A summary with what the judgement reads of it: a fold a patient."""
    patients = [
        {"patient": f"P{i}", "pcc_all": p, "mse": m, "training_mean_mse": t} for i, (p, m, t) in enumerate(zip(pcc, mse, mean))
    ]  # fmt: skip
    defined = [value for value in pcc if value is not None]
    return {
        "protocol": "clean",
        "patients": patients,
        "folds": [{"fold": i, "epoch": epoch, "selection": selection} for i in range(len(pcc))],
        "headline": {
            "pcc_all": {"mean": sum(defined) / len(defined) if defined else None},
            "pcc_h": {"mean": pcc_h},
        },
        "intervals": {"pcc_all": interval or {"mean": 0.45, "low": None, "high": None}},
    }


def history(losses) -> list[dict[str, float]]:
    return [{"epoch": number, "train/total": loss} for number, loss in enumerate(losses, 1)]


def beside(own: dict[str, float], other: dict[str, float]) -> Beside:
    scores = ({"pcc_all": values, "mse": {"P0": mse}} for values, mse in ((own, 0.1), (other, 0.12)))
    return Beside("ridge_neighbor", "patch and neighbor mean", *scores)


@pytest.mark.parametrize(
    ("own", "other", "begins"),
    [
        ((0.5, 0.4), (0.4, 0.3), "Better than RIDGE, PCC(A) 0.450 against 0.350 (better for 2 of 2"),
        ((0.5, 0.4), (0.45, 0.6), "Worse than RIDGE, PCC(A) 0.450 against 0.525 (better for 1 of 2"),
        ((0.5, 0.4), (0.5, 0.402), "About as good as RIDGE, PCC(A) 0.450 against 0.451 (better for 0"),
    ],
)  # fmt: skip
def test_the_first_sentence_compares_with_ridge_and_with_the_mean(own, other, begins):
    ridge = beside(dict(zip(("P0", "P1"), own)), dict(zip(("P0", "P1"), other)))
    first = judge(summary(), Circumstances(model="gene_dml", ridge=ridge, to_make_one="never said"))[0]
    assert first.startswith(
        begins.replace("RIDGE", "ridge on the same features (ridge_neighbor: patch and neighbor mean)")
    )
    assert first.endswith(
        "MSE 0.100 against 0.120; better than the mean of the training spots, MSE 0.150 against 0.250 (better for 2 of 2 "
        "patients)."
    )


UNSMOOTHED = [
    {"truth": "smoothed", "scale": "fused", "pcc_all": 0.45},
    {"truth": "unsmoothed", "scale": "target", "pcc_all": 0.2},
    {"truth": "unsmoothed", "scale": "fused", "pcc_all": 0.31},
]


def test_smoothing_is_said_with_what_is_left_on_single_spots():
    alone = judge({**summary(), "scales": UNSMOOTHED}, Circumstances(to_make_one="python main.py"))
    assert alone[2] == "Targets are smoothed (means over 3 x 3 spots); on the counts of single spots PCC(A) is 0.310."
    ridge = beside({"P0": 0.5, "P1": 0.4}, {"P0": 0.4, "P1": 0.3})
    assert judge({**summary(), "scales": UNSMOOTHED}, Circumstances(ridge=ridge))[1] == alone[2], (
        "ridge was not scored so"
    )
    # Of the patients for whom both are defined.
    both = replace(
        ridge,
        own={**ridge.own, SINGLE_SPOTS: {"P0": 0.3, "P1": 0.9}},
        other={**ridge.other, SINGLE_SPOTS: {"P0": 0.25}},
    )
    assert judge({**summary(), "scales": UNSMOOTHED}, Circumstances(ridge=both))[1].endswith(
        "on the counts of single spots PCC(A) is 0.300, that of ridge 0.250."
    )
    assert on_single_spots(None) == "Targets are smoothed (means over 3 x 3 spots)."


def test_without_ridge_it_says_so_and_how_to_make_one():
    first, second, *_ = judge(
        summary(), Circumstances(model="gene_dml", to_make_one="python main.py --model ridge_neighbor")
    )
    assert first.startswith("Better than the mean of the training spots") and "no such run lies beside it" in first
    assert "whether it is better than ridge on the same features (patch and neighbor mean) is not known" in first
    assert second.endswith("--resume: python main.py --model ridge_neighbor")
    assert "main.py" not in " ".join(judge(summary(), Circumstances(model="gene_dml")))


def test_ridge_and_the_mean_themselves_are_not_told_to_make_a_ridge():
    assert "no such run" not in " ".join(judge(summary(), Circumstances(model="ridge")))
    undefined = summary(pcc=(None, None), mse=(0.2, 0.3), pcc_h=None)
    said = judge(undefined, Circumstances(model="mean"))
    assert said[0].startswith("This is the mean of the training spots itself") and len(said) == 3


def test_a_run_worse_than_the_mean_is_called_so_and_what_can_still_be_read():
    rows = summary(mse=(0.4, 0.2), mean=(0.2, 0.3))["patients"]
    assert against_mean(rows) == (
        "worse than the mean of the training spots, MSE 0.300 against 0.250 (better for 1 of 2 patients), so read patterns "
        "within a slide, no values"
    )
    assert "patterns" not in against_mean(summary(pcc=(0.0, 0.01), mse=(0.4, 0.4))["patients"])
    assert "is not known" in against_mean(summary(mean=(None, None))["patients"])
    assert "better for the only patient" in against_mean(summary(pcc=(0.3,), mse=(0.1,), mean=(0.2,))["patients"])


def test_no_pattern_at_all_is_said():
    assert any("about zero" in text for text in judge(summary(pcc=(0.01, 0.02)), Circumstances()))
    assert not any("about zero" in text for text in judge(summary(), Circumstances()))


FALLING = range(10, 0, -1)


@pytest.mark.parametrize(
    ("epoch", "selection", "losses", "asked", "words"),
    [
        (10, "validation", FALLING, 10, "Still learning when it ended: the best epoch is at the end in fold 0 (10 of 10), "),
        (10, "validation", FALLING, 10, "Train longer: --epochs 20."),
        (1, "validation", FALLING, 10, "The best epoch is the first in fold 0 (1 of 10), 1 (1 of 10): what came after made"),
        (1, "validation", FALLING, 10, "(--set TRAINING.learning_rate=2e-05)"),
        (4, "validation", FALLING, 10, "It had learned what it could: the best epoch lies before the end in fold 0 (4"),
        (10, "validation", FALLING, 200, "It had learned what it could"),  # patience ended it
        (10, "fixed", [9, 8, 7, 6, 5, 4, 3, 2, 1, 1], 10, "was still falling over the last fifth of them in fold 0 (60%)"),
    ],
)  # fmt: skip
def test_what_the_chosen_epoch_says_of_the_training(epoch, selection, losses, asked, words):
    about = Circumstances(epochs=asked, learning_rate=1e-4, histories={0: history(losses), 1: history(losses)})
    assert words in " ".join(judge(summary(epoch=epoch, selection=selection), about))


def test_a_flat_loss_a_closed_form_and_a_training_of_one_epoch_say_nothing_of_learning():
    for about, epoch, selection in (
        (Circumstances(epochs=10, histories={0: history([2.0] * 10)}), 10, "fixed"),
        (Circumstances(histories={0: []}), None, "none"),
        (Circumstances(epochs=1, histories={0: history([2.0])}), 1, "fixed"),
    ):
        said = " ".join(judge(summary(epoch=epoch, selection=selection), about))
        assert "epoch" not in said and "learn" not in said.replace("learning_rate", "")


def test_few_patients_stand_as_values_and_more_with_an_interval():
    said = " ".join(judge(summary(), Circumstances()))
    assert "2 patients stand behind this (PCC(A): P0 0.500, P1 0.400): too few for an interval or a test" in said
    many = summary((0.5,) * 5, (0.1,) * 5, (0.2,) * 5, interval={"mean": 0.5, "low": 0.41, "high": 0.62})
    assert "5 patients stand behind this: PCC(A) 0.500, 95 % interval 0.410 to 0.620" in " ".join(
        judge(many, Circumstances())
    )
    assert "One patient stands" in " ".join(judge(summary((0.5,), (0.1,), (0.2,)), Circumstances()))


def test_an_undefined_list_has_its_reason_and_a_way_out():
    assert not any("PCC(H)" in text for text in judge(summary(), Circumstances()))
    clean = judge(summary(pcc_h=None), Circumstances())[-1]
    assert "takes two training patients in a fold. Add patients, or read PCC(HVG)" in clean
    assert "share none" in judge({**summary(pcc_h=None), "protocol": "paper"}, Circumstances())[-1]


def config_of(model: str) -> Config:
    return config_from_dict({"DATA": {"type": "demo"}, "MODEL": {"name": model}}, "here")


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory) -> Path:
    """exp_0, a run whose folds hold what a comparison asks for, and beside it two ridges and what must be passed over."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "exp_0", predictions=False, signal=0.6)
    for name, model, signal in (("patch", "ridge", 0.2), ("both", "ridge_neighbor", 0.4), ("other", "mlp", 0.9)):
        run = make_run(folder / name, predictions=False, signal=signal)
        save_config(config_of(model), run / "config.yaml")
    (folder / "unfinished").mkdir()
    save_config(config_of("ridge_neighbor"), folder / "unfinished" / "config.yaml")
    (folder / "notes.txt").write_text("no run")
    return folder


@pytest.fixture
def neighbors(runs, tmp_path) -> Path:
    """The run of a copy of `runs`, to be changed."""
    return shutil.copytree(runs, tmp_path / "runs") / "exp_0"


def test_the_ridge_beside_a_run_is_found_the_stronger_first(neighbors):
    found = ridge_beside(neighbors, "gene_dml")
    assert found is not None and (found.name, found.sees) == ("both", "patch and neighbor mean")
    patients = {row["patient"]: row for row in summarise(neighbors)["patients"]}
    assert found.own["pcc_all"] == pytest.approx({name: row["pcc_all"] for name, row in patients.items()})
    unsmoothed = compare_runs([neighbors, neighbors.parent / "both"], truth="unsmoothed", metrics=("pcc_all",))
    assert [found.own[SINGLE_SPOTS], found.other[SINGLE_SPOTS]] == list(unsmoothed["by_patient"])
    assert max(found.other["pcc_all"].values()) < min(found.own["pcc_all"].values())
    shutil.rmtree(neighbors.parent / "both")
    assert ridge_beside(neighbors, "gene_dml").sees == "patch alone"
    assert ridge_beside(neighbors, "ridge_neighbor") is None


def test_a_ridge_of_other_folds_is_passed_over_and_seeds_look_beside_their_folder(neighbors, tmp_path):
    for name in ("patch", "both"):
        split = neighbors.parent / name / "fold_0" / "split.json"
        split.write_text(json.dumps(json.loads(split.read_text()) | {"test_patients": ["Z"]}))
    assert ridge_beside(neighbors, "gene_dml") is None
    seed = shutil.copytree(neighbors, tmp_path / "seeds" / "mine" / "seed_0")
    shutil.copytree(neighbors, tmp_path / "seeds" / "both" / "seed_0")
    save_config(config_of("ridge_neighbor"), tmp_path / "seeds" / "both" / "seed_0" / "config.yaml")
    assert ridge_beside(seed, "gene_dml").name == "both"


def test_the_sentences_stand_first_wherever_a_run_is_shown(neighbors, _takes_shortcuts):
    scores = summarise(neighbors)
    said = judge(scores, Circumstances(model="gene_dml", ridge=ridge_beside(neighbors, "gene_dml")))
    judged = {"verdict": said, **scores}
    assert format_table(judged).splitlines()[: len(said) + 1] == [*said, ""]
    write_summary(neighbors, judged)
    assert json.loads((neighbors / "summary.json").read_text())["verdict"] == said
    assert (neighbors / "summary.md").read_text().startswith(f"**{said[0]}**")
    page = write_report(neighbors).read_text()
    main = page[page.index("<main>") :]
    assert (
        main.index("Better than ridge")
        < main.index("Targets are smoothed")
        < main.index("Protocol and caveats")
        < main.index("<table")
    )
    assert "R2: 1 - squared error" in page and "R2: 1 - squared error" in (neighbors / "summary.md").read_text()
