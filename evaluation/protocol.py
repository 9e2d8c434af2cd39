"""Scores of a fold under the two protocols: what is scored, and in which order it is averaged.

paper   per gene within one slide -> mean over genes -> over the slides of the fold -> over folds. PCC(H): genes ranked
        by PCC in every fold, ranks averaged over folds, first 50. The epoch with the best PCC(A) *on the test fold*.
clean   per gene within one slide -> mean over the slides of a patient -> over patients. PCC(H): one list fixed from
        training data of a reference model, shared by every method. The epoch is chosen on an inner held-out patient,
        or fixed beforehand.

PCC(A) is over all genes. The lists are made in `evaluation.gene_lists`, the means over folds in `evaluation.summary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluation import aggregation
from evaluation.fold_files import FoldScores
from evaluation.gene_lists import ranked_on_test_list
from evaluation.metrics import mae, mse, pearson
from evaluation.slide_result import TRAINING_MEAN, SlideResult
from evaluation.slide_scores import notes_on_undefined, score_slide, score_training_mean
from utils.text import some

PROTOCOLS = ("paper", "clean")
PCC_H_NOTES = {
    "paper": (
        "the genes are ranked on the test predictions of this fold alone, which are then scored: biased upward, more so "
        "than with ranks averaged over folds"
    ),
    "clean": "the genes were fixed from training data of a reference model",
}

# Of a fold; where no fold of a run has such a list, the first sentences of its summary say why.
NO_LIST = "No highly predictive list was fixed from training data: pcc_h is undefined."


def score_fold(
    results: Sequence[SlideResult],
    *,
    training_mean: np.ndarray,
    training_mean_unsmoothed: np.ndarray | None = None,
    gene_lists: Mapping[str, Sequence[str]],
    protocol: str = "clean",
) -> FoldScores:
    """Score the test slides of one fold.

    training_mean: (G,) mean target over the training spots; training_mean_unsmoothed: the same of the unsmoothed one.
    gene_lists: name -> genes, fixed before the predictions were seen: "highly_predictive", "highly_variable". The
        list "ranked_on_test" (paper, from this fold alone) is added; over several folds `summarise` makes its own.

    summary: protocol, num_slides, num_spots, num_genes, slides {slide: spots}, patients, pcc_all, pcc_h, mse, mae
    (fused, smoothed), pcc_h_note, training_mean and training_mean_unsmoothed {mse, mae},
    scores {truth: {scale: {metric: value}}}, gene_lists {name: genes}, gene_list_sizes, undefined_pearson, notes.
    Undefined values are NaN.
    Raises ValueError for no slide, a slide given twice, slides of other panels, lists with unknown genes.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; expected one of {PROTOCOLS}.")
    genes = _shared_panel(results)
    if unknown := sorted({gene for names in gene_lists.values() for gene in names} - set(genes)):
        raise ValueError(f"gene lists name {len(unknown)} genes outside the panel ({some(unknown)}).")
    means = {"smoothed": training_mean, "unsmoothed": training_mean_unsmoothed}
    tables = []
    for result in results:
        tables += [score_slide(result), score_training_mean(result, means)]
    per_gene_slide = pd.concat(tables, ignore_index=True)
    lists = {name: list(names) for name, names in gene_lists.items()}
    lists["ranked_on_test"] = ranked_on_test_list([aggregation.fused_gene_pcc(per_gene_slide)])
    with_headline = aggregation.with_headline_list(lists, protocol)
    per_slide = aggregation.slide_table(per_gene_slide, with_headline)
    per_patient = aggregation.patient_table(per_gene_slide, with_headline)
    summary = _fold_summary(results, aggregation.fold_table(per_slide, per_patient, protocol), protocol)
    summary |= {
        "gene_lists": lists,
        "gene_list_sizes": {name: len(names) for name, names in lists.items()},
        "notes": _fold_notes(results, per_gene_slide, lists, protocol),
    }
    num_spots = {result.slide: len(result.spot_ids) for result in results}
    per_slide.insert(2, "num_spots", per_slide["slide"].map(num_spots))
    return FoldScores(
        protocol=protocol,
        genes=genes,
        gene_lists=lists,
        per_gene_slide=per_gene_slide,
        per_gene=aggregation.gene_table(per_gene_slide, protocol),
        per_slide=per_slide,
        per_patient=per_patient,
        summary=summary,
    )


def epoch_scores(results: Sequence[SlideResult], protocol: str = "clean") -> dict[str, float]:
    """Score an epoch, cheaply: pcc_all, mse, mae of the fused prediction, and <name>_<scale> of each scale.

    Against the smoothed target; averaged in the order of the protocol. Undefined values are NaN.
    """
    group_of_slide = [result.slide if protocol == "paper" else result.patient for result in results]
    scores = {}
    for scale in results[0].predictions:
        suffix = "" if scale == "fused" else f"_{scale}"
        for name, metric in (("pcc_all", pearson), ("mse", mse), ("mae", mae)):
            by_slide = pd.DataFrame([metric(result.measured, result.predictions[scale]) for result in results])
            by_group = by_slide.groupby(group_of_slide, sort=False).mean()
            scores[f"{name}{suffix}"] = float(by_group.mean(axis=1).mean())
    return scores


def _shared_panel(results: Sequence[SlideResult]) -> list[str]:
    if not results:
        raise ValueError("there is no test slide to score; expected at least one.")
    slides = [result.slide for result in results]
    if len(set(slides)) != len(slides):
        raise ValueError(f"a slide is given twice among {slides}; expected each once.")
    for result in results[1:]:
        if list(result.genes) != list(results[0].genes):
            raise ValueError(
                f"slides {results[0].slide} ({len(results[0].genes)} genes) and {result.slide} ({len(result.genes)} "
                "genes) have different panels; expected one panel, in one order, within a fold."
            )
    return list(results[0].genes)


def _fold_summary(results: Sequence[SlideResult], table: pd.DataFrame, protocol: str) -> dict[str, Any]:
    """The numbers of the summary, from the `fold_table`."""
    columns = [*aggregation.value_columns(table), "undefined_pearson"]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for row in table.to_dict("records"):
        scores.setdefault(row["truth"], {})[row["scale"]] = {name: float(row[name]) for name in columns}
    errors = {truth: by_scale.pop(TRAINING_MEAN, None) for truth, by_scale in scores.items()}
    means = {truth: {name: row[name] for name in ("mse", "mae")} for truth, row in errors.items() if row}
    fused = scores["smoothed"]["fused"]
    return {
        "protocol": protocol,
        "num_slides": len(results),
        "num_spots": sum(len(result.spot_ids) for result in results),
        "num_genes": len(results[0].genes),
        "slides": {result.slide: len(result.spot_ids) for result in results},
        "patients": list(dict.fromkeys(result.patient for result in results)),
        **{name: fused[name] for name in ("pcc_all", "pcc_h", "mse", "mae")},
        "pcc_h_note": PCC_H_NOTES[protocol],
        "undefined_pearson": int(fused["undefined_pearson"]),
        "training_mean": means["smoothed"],
        "training_mean_unsmoothed": means.get("unsmoothed"),
        "scores": scores,
    }


def _fold_notes(
    results: Sequence[SlideResult], per_gene_slide: pd.DataFrame, lists: dict[str, list[str]], protocol: str
) -> list[str]:
    notes = []
    if protocol == "clean" and not lists.get("highly_predictive"):
        notes.append(NO_LIST)
    num_spots = {result.slide: len(result.spot_ids) for result in results}
    notes += notes_on_undefined(aggregation.select(per_gene_slide), num_spots)
    for result in results:
        if not np.any(result.measured):
            notes.append(
                f"Slide {result.slide}: no count of any gene of the panel in its {len(result.spot_ids)} spots; it is scored "
                "as if nothing were expressed there."
            )
    return notes
