"""Lists of genes behind PCC(H) and the HVG score, and what each list was allowed to see.

A list has 20 % of the panel, at most 50 genes (`list_size`): the 50 of 250 of the literature, in proportion for the
smaller panels of the demo and of external sets. The size is recorded with every list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

from evaluation.metrics import mean_defined, pearson

_GENES_AT_ONCE = 32  # in float64, of all spots


def list_size(num_genes: int, size: int | None = None) -> int:
    """Return the number of genes of a list: `size` if given, else min(50, 20 % of the panel rounded up).

    Raises ValueError for a size beyond the panel.
    """
    if size is None:
        return min(50, math.ceil(num_genes / 5))
    if not 1 <= size <= num_genes:
        raise ValueError(f"a list of {size} genes was asked of a panel of {num_genes}; expected 1 to {num_genes}.")
    return size


@dataclass(frozen=True, eq=False)
class HeldOutPatient:
    """A training patient, or whole slides of one, predicted by a reference model that was fitted to the other patients.

    slides: the slide of each of the N spots; measured: (N, G) targets; predicted: (P, N, G), one for each of P penalties.
    """

    patient: str
    slides: Sequence[str]
    measured: np.ndarray
    predicted: np.ndarray


def highly_predictive_list(
    held_out: Iterable[HeldOutPatient], genes: Sequence[str], size: int | None = None
) -> list[str]:
    """List the genes that one reference model predicts best within the training patients, best first (clean protocol).

    held_out: each training patient in turn, or its slides in their order, taken one at a time. A gene's score is its PCC
    within each slide of the patient, mean over the slides, then over the patients; the penalty is the one with the best mean
    PCC over genes. No model under comparison and no test patient has a say, so one list serves every method.
    genes: G names. size: see `list_size`.
    Raises ValueError for fewer than two patients, arrays that do not fit, or no defined PCC.
    """
    scores = _reference_scores(held_out, len(genes))
    if np.isnan(scores).all():
        raise ValueError(
            f"no gene of {len(genes)} has a defined PCC in the reference model: every gene, or every prediction, is "
            "constant within every slide of the training patients. Check the counts and the target features."
        )
    return _best(scores, genes, list_size(len(genes), size))


def highly_variable_list(expression: np.ndarray, genes: Sequence[str], size: int | None = None) -> list[str]:
    """List the genes of greatest variance over all spots of the training patients' targets, greatest first.

    expression: (N, G) targets in log10(1 + counts per 10 000 of the panel); ties keep the order of the panel.
    Raises ValueError for another number of genes or no spots.
    """
    expression = np.asarray(expression)
    if expression.ndim != 2 or expression.shape[1] != len(genes) or len(expression) == 0:
        raise ValueError(f"expression has shape {expression.shape}; expected (spots, {len(genes)} genes).")
    some_genes = np.array_split(expression, math.ceil(len(genes) / _GENES_AT_ONCE), axis=1)
    variances = np.concatenate([values.astype(np.float64, order="C").var(axis=0) for values in some_genes])
    return _best(variances, genes, list_size(len(genes), size))


def pcc_ranks(gene_pcc: pd.Series) -> pd.Series:
    """Rank the genes of one fold: 1 = highest PCC, ties share the average, an undefined PCC ranks last."""
    values = gene_pcc.to_numpy(dtype=np.float64)
    return pd.Series(scipy.stats.rankdata(-np.where(np.isnan(values), -np.inf, values)), index=gene_pcc.index)


def ranked_on_test_list(fold_gene_pcc: Sequence[pd.Series], size: int | None = None) -> list[str]:
    """Make the list of PCC(H) in the paper protocol: ranks by PCC in every fold, averaged over the folds, the first `size`.

    fold_gene_pcc: for each fold gene -> PCC of the test predictions. Only genes of every fold's panel can be ranked.
    Ties of the average keep the order of the first fold's panel.
    **Biased upward**: the genes are picked on the very predictions that are then scored; random predictions score
    above zero, and every model is scored on its own list.
    Raises ValueError when the folds share no gene.
    """
    common = [gene for gene in fold_gene_pcc[0].index if all(gene in pcc.index for pcc in fold_gene_pcc)]
    if not common:
        raise ValueError(f"the panels of {len(fold_gene_pcc)} folds share no gene; PCC(H) by ranks needs shared genes.")
    ranks = np.mean([pcc_ranks(pcc).loc[common].to_numpy() for pcc in fold_gene_pcc], axis=0)
    return _best(-ranks, common, list_size(len(common), size))


def _best(scores: np.ndarray, genes: Sequence[str], size: int) -> list[str]:
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    return [str(genes[index]) for index in order[:size]]


def _reference_scores(held_out: Iterable[HeldOutPatient], num_genes: int) -> np.ndarray:
    """(G,) PCC of the reference model on held-out training patients, at its best penalty; NaN where undefined."""
    by_patient: dict[str, list[list[np.ndarray]]] = {}  # of each patient for each penalty the PCC (G,) on each slide
    for part in held_out:
        shape = (len(part.slides), num_genes)
        if part.measured.shape != shape or part.predicted.shape[1:] != shape:
            raise ValueError(
                f"patient {part.patient}: targets have shape {part.measured.shape}, predictions {part.predicted.shape}, "
                f"slides {len(part.slides)}; expected as many spots in each and {num_genes} genes."
            )
        slides = np.asarray(part.slides)
        found = by_patient.setdefault(part.patient, [[] for _ in part.predicted])
        for of_penalty, predicted in zip(found, part.predicted, strict=True):
            of_penalty += _slide_pcc(part.measured, predicted, slides)
    if len(by_patient) < 2:
        raise ValueError(
            f"the highly predictive list holds out one training patient after the other and found only {sorted(by_patient)}; "
            "expected at least two training patients. Use a data set with more patients, or the protocol 'paper'."
        )
    means = [[_column_means(np.asarray(of_slides)) for of_slides in found] for found in by_patient.values()]
    scores = _column_means(np.asarray(means))
    overall = np.array([mean_defined(gene_scores) for gene_scores in scores])
    return scores[np.argmax(np.where(np.isnan(overall), -np.inf, overall))]


def _slide_pcc(measured: np.ndarray, predicted: np.ndarray, slides: np.ndarray) -> list[np.ndarray]:
    return [pearson(measured[slides == slide], predicted[slides == slide]) for slide in sorted(set(slides.tolist()))]


def _column_means(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    total, count = np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
