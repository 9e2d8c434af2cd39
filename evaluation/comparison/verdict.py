"""What the scores of a run amount to, in words: the sentences that stand before the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.comparison.runs import compare_runs
from evaluation.intervals import LEAST_PATIENTS
from utils.checkpoint import config_of_run, seed_runs
from utils.text import capitalised

# What every model of images is measured by, the stronger first, and what each sees of the features; Gene-DML sees tokens of
# the patch and whole slides besides.
RIDGES = {"ridge_neighbor": "patch and neighbor mean", "ridge": "patch alone"}
STRONGER = next(iter(RIDGES))
SINGLE_SPOTS = "pcc_all, unsmoothed"
_ALIKE = 0.005  # of PCC: a smaller difference is called none
_FALLING = 0.02  # share of the training loss in the last fifth of the epochs


@dataclass(frozen=True)
class Beside:
    """A ridge that a run is held against. name: of its folder; sees: what of the features it learns from.

    own, other: scores of the run and of the ridge, {metric: {patient: value}}; SINGLE_SPOTS among them where it is known.
    """

    name: str
    sees: str
    own: Mapping[str, Mapping[str, float]]
    other: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Circumstances:
    """What a summary does not hold. model: MODEL.name, "" where it is not known.  epochs: how many were asked for, if known.

    histories: {fold: records of its epochs}, as metrics.jsonl has them.  ridge: the run of ridge beside it, if any;
    to_make_one: the command that trains one.
    """

    model: str = ""
    epochs: int | None = None
    learning_rate: float | None = None
    histories: Mapping[int, Sequence[Mapping[str, float]]] | None = None
    ridge: Beside | None = None
    to_make_one: str = ""


def judge(summary: Mapping[str, Any], about: Circumstances) -> list[str]:
    """Judge a run in sentences, the most important first: what it beats, whether it has learned enough, what stands behind it.

    summary: as `evaluation.summary.summarise` makes it, undefined values as None.
    The first sentence compares with ridge on the same features and with the mean of the training spots; a run of ridge itself,
    or of the mean, with the mean alone. The next one that is not about making a ridge says that targets are smoothed.
    """
    patients = summary["patients"]
    of_mean = against_mean(patients)
    if about.model == "mean":
        sentences = ["This is the mean of the training spots itself, the least that any model has to beat."]
    elif about.model in RIDGES:
        sentences = [f"{capitalised(of_mean)}. This is a ridge that other methods are measured by."]
    elif about.ridge is not None:
        sentences = [f"{capitalised(_against_ridge(about.ridge))}; {of_mean}."]
    else:
        sentences = [
            f"{capitalised(of_mean)}; whether it is better than ridge on the same features ({RIDGES[STRONGER]}) is not known, "
            "no such run lies beside it."
        ]
        if about.to_make_one:
            sentences.append(f"To know, make one, then repeat this training with --resume: {about.to_make_one}")
    sentences.append(_smoothing(summary, about.ridge))
    pcc = summary["headline"]["pcc_all"]["mean"]
    if pcc is not None and pcc < 0.05:
        sentences.append(f"PCC(A) is {pcc:.3f}, about zero: within a slide the predictions do not follow the tissue.")
    sentences += _learning(summary["folds"], about)
    sentences.append(support(patients, (summary.get("intervals") or {}).get("pcc_all")))
    if summary["headline"]["pcc_h"]["mean"] is None and pcc is not None:
        sentences.append(_why_no_list(summary))
    return sentences


def against_mean(patients: Sequence[Mapping[str, Any]]) -> str:
    """Compare the errors of patients with those of the mean of the training spots, as part of a sentence.

    patients: rows with mse, training_mean_mse and pcc_all; None where undefined.
    """
    known = [row for row in patients if row["mse"] is not None and row["training_mean_mse"] is not None]
    if not known:
        return "how it compares with the mean of the training spots is not known, the checkpoint does not hold it"
    own, mean = (sum(row[name] for row in known) / len(known) for name in ("mse", "training_mean_mse"))
    wins = sum(row["mse"] < row["training_mean_mse"] for row in known)
    word = "better" if own < mean else "worse" if own > mean else "no better"
    text = f"{word} than the mean of the training spots, MSE {own:.3f} against {mean:.3f} (better for {_of(wins, len(known))})"
    if own >= mean and any((row["pcc_all"] or 0) > 0.05 for row in known):
        text += ", so read patterns within a slide, no values"
    return text


def ridge_beside(run_dir: Path, model: str) -> Beside | None:
    """Find a run of ridge beside a run (or beside the folder of its seeds) on the same folds, features and genes.

    model: MODEL.name of the run; a ridge has none. Runs that are not finished or cannot be compared are passed over.
    """
    run_dir = run_dir.resolve()
    group = run_dir.parent if run_dir.name.startswith("seed_") else run_dir
    found: dict[str, list[Path]] = {}
    for path in sorted(group.parent.iterdir()) if model not in (*RIDGES, "mean") else []:
        try:
            run = seed_runs(path)[0] if path.is_dir() and path != group else path
        except ValueError:  # of both seeds and folds
            continue
        if (config := config_of_run(run)) is not None and config.MODEL.name in RIDGES:
            found.setdefault(config.MODEL.name, []).append(run)
    for run, sees in ((run, sees) for kind, sees in RIDGES.items() for run in found.get(kind, [])):
        try:
            ridge, own = _scores([run, run_dir])
        except (ValueError, FileNotFoundError):  # of other folds or features, or not finished
            continue
        return Beside(run.parent.name if run.name.startswith("seed_") else run.name, sees, own, ridge)
    return None


def _scores(runs: Sequence[Path]) -> list[dict[str, dict[str, float]]]:
    """What `Beside` holds of each run; raises what `compare_runs` does."""
    scores: list[dict[str, dict[str, float]]] = [{} for _ in runs]
    names = [str(number) for number in range(len(runs))]
    for truth, metrics in (("smoothed", ("pcc_all", "mse")), ("unsmoothed", ("pcc_all",))):
        table = compare_runs(runs, names=names, metrics=metrics, truth=truth, resamples=10)
        for method, metric, values in table[["method", "metric", "by_patient"]].itertuples(index=False):
            scores[int(method)][metric if truth == "smoothed" else SINGLE_SPOTS] = values
    return scores


def _against_ridge(ridge: Beside) -> str:
    name = f"ridge on the same features ({ridge.name}: {ridge.sees})"
    both = _of_both(ridge, "pcc_all")
    if not both:
        return f"not comparable with {name}, whose PCC(A) or own is undefined"
    mine, its = _means(both)
    wins = sum(own > other for own, other in both)
    word = "about as good as" if abs(mine - its) < _ALIKE else "better than" if mine > its else "worse than"
    errors = [sum(values["mse"].values()) / len(values["mse"]) for values in (ridge.own, ridge.other)]
    return (
        f"{word} {name}, PCC(A) {mine:.3f} against {its:.3f} (better for {_of(wins, len(both))}), "
        f"MSE {errors[0]:.3f} against {errors[1]:.3f}"
    )


def _of_both(ridge: Beside, metric: str) -> list[tuple[float, float]]:
    """A score of the run and of the ridge, of each patient for whom both are defined."""
    own, other = (scores.get(metric, {}) for scores in (ridge.own, ridge.other))
    return [(own[patient], other[patient]) for patient in own if patient in other]


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    own, other = zip(*pairs)
    return sum(own) / len(pairs), sum(other) / len(pairs)


def _smoothing(summary: Mapping[str, Any], ridge: Beside | None) -> str:
    if ridge is not None and (both := _of_both(ridge, SINGLE_SPOTS)):
        return on_single_spots(*_means(both))
    of_fused = (row for row in summary.get("scales") or [] if (row["truth"], row["scale"]) == ("unsmoothed", "fused"))
    return on_single_spots(next((row["pcc_all"] for row in of_fused), None))


def on_single_spots(own: float | None, ridge: float | None = None) -> str:
    """Say what the targets are, and what PCC(A) is without smoothing, where it is defined: own, and of ridge."""
    text = "Targets are smoothed (means over 3 x 3 spots)"
    if own is not None:
        text += f"; on the counts of single spots PCC(A) is {own:.3f}"
        text += f", that of ridge {ridge:.3f}" if ridge is not None else ""
    return f"{text}."


def _learning(folds: Sequence[Mapping[str, Any]], about: Circumstances) -> list[str]:
    """Whether the chosen epochs say that a training was too short, too long or too fast."""
    last, first, falling, settled = [], [], [], []
    for fold in folds:
        history = (about.histories or {}).get(fold["fold"], [])
        if not history or fold["epoch"] is None:
            continue
        where = f"{fold['fold']} ({fold['epoch']} of {len(history)})"
        if fold["selection"] == "fixed":
            share = _still_falling(history)
            falling += [f"{fold['fold']} ({share:.0%})"] if share > _FALLING else []
        elif len(history) > 1 and fold["epoch"] == 1:
            first.append(where)
        elif fold["epoch"] > 0.9 * len(history) and len(history) >= (about.epochs or len(history)):
            last.append(where)
        else:
            settled.append(where)
    sentences = []
    if last:
        longer = f": --epochs {2 * about.epochs}" if about.epochs else ""
        sentences.append(
            f"Still learning when it ended: the best epoch is at the end in fold {', '.join(last)}. Train longer{longer}."
        )
    if first:
        rate = f" (--set TRAINING.learning_rate={about.learning_rate / 5:g})" if about.learning_rate else ""
        sentences.append(
            f"The best epoch is the first in fold {', '.join(first)}: what came after made it worse. Try a smaller learning "
            f"rate{rate}."
        )
    if falling:
        sentences.append(
            f"The number of epochs was fixed, and the training loss was still falling over the last fifth of them in fold "
            f"{', '.join(falling)}: more may help, or only fit these patients; a third patient, held out, would tell."
        )
    if settled and not (last or first):
        sentences.append(
            f"It had learned what it could: the best epoch lies before the end in fold {', '.join(settled)}."
        )
    return sentences


def _still_falling(history: Sequence[Mapping[str, float]]) -> float:
    """By what share the training loss fell between the last two fifths of the epochs; 0 with fewer than five."""
    losses = [float(record.get("train/total") or math.nan) for record in history]
    fifth = len(losses) // 5
    if not fifth or not all(map(math.isfinite, losses[-2 * fifth :])):
        return 0.0
    before, after = sum(losses[-2 * fifth : -fifth]), sum(losses[-fifth:])
    return (before - after) / before if before > 0 else 0.0


def support(patients: Sequence[Mapping[str, Any]], interval: Mapping[str, Any] | None) -> str:
    """Say how many patients stand behind the means, and what can be said of others.

    patients: rows with patient and pcc_all.  interval: {mean, low, high} of PCC(A), where there is one.
    """
    count = len(patients)
    stand = f"{count} patients stand" if count != 1 else "One patient stands"
    if count < LEAST_PATIENTS:
        values = ", ".join(f"{row['patient']} {row['pcc_all']:.3f}" for row in patients if row["pcc_all"] is not None)
        shown = f" (PCC(A): {values})" if values else ""
        return f"{stand} behind this{shown}: too few for an interval or a test, and for a claim about other patients."
    if not interval or interval.get("low") is None:
        return f"{stand} behind this."
    return (
        f"{stand} behind this: PCC(A) {interval['mean']:.3f}, 95 % interval {interval['low']:.3f} to {interval['high']:.3f}; "
        "with few patients such an interval is rather too narrow."
    )


def _why_no_list(summary: Mapping[str, Any]) -> str:
    if summary["protocol"] == "paper":
        return "PCC(H) is undefined: its genes are ranked over all folds, and the panels of the folds share none."
    return (
        "PCC(H) is undefined: its genes are chosen by predicting each training patient from the others, which takes two "
        "training patients in a fold. Add patients, or read PCC(HVG), over the most variable genes, which needs one."
    )


def _of(wins: int, count: int) -> str:
    return f"{wins} of {count} patients" if count != 1 else ("the only patient" if wins else "no patient")
