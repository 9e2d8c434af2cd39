"""The genes that PCC(H) and the HVG score are about, and what each list was allowed to see.

A list has 20 % of the panel, at most 50 genes (`list_size`): the 50 of 250 of the literature, in proportion for the
smaller panels of the demo and of external sets. The size is recorded with every list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from evaluation.metrics import mean_defined, pearson

# Ridge penalties tried, as multiples of the mean variance (sum of squares) of the principal components.
RELATIVE_PENALTIES = 10.0 ** np.arange(-4, 5)


def list_size(num_genes: int, size: int | None = None) -> int:
    """Number of genes of a list: `size` if given, else min(50, 20 % of the panel rounded up)."""
    if size is None:
        return min(50, math.ceil(num_genes / 5))
    if not 1 <= size <= num_genes:
        raise ValueError(f"a list of {size} genes was asked of a panel of {num_genes}; expected 1 to {num_genes}.")
    return size


def highly_predictive_list(
    features: np.ndarray,
    expression: np.ndarray,
    patients: Sequence[str],
    genes: Sequence[str],
    size: int | None = None,
    *,
    slides: Sequence[str] | None = None,
    components: int = 256,
) -> list[str]:
    """Genes that one reference model predicts best within the training patients, best first (clean protocol).

    The reference is a ridge regression with intercept on the first `components` principal components of the target
    feature. Each training patient is held out in turn; a gene's score is its PCC within each slide of the held-out
    patient, mean over the slides, then over the patients. The penalty is the one of RELATIVE_PENALTIES with the best
    mean PCC over genes. No model under comparison and no test patient has a say, so one list serves every method.

    features (N, D), expression (N, G): spots of the *training* patients; patients, slides: N names; without `slides`
    the PCC is taken within the patient. genes: G names. size: see `list_size`.
    Raises ValueError for fewer than two patients, arrays that do not fit, constant features, or no defined PCC.
    """
    scores = _reference_scores(
        np.asarray(features, dtype=np.float64),
        np.asarray(expression, dtype=np.float64),
        np.asarray(patients),
        np.asarray(patients if slides is None else slides),
        num_genes=len(genes),
        components=components,
    )
    if np.isnan(scores).all():
        raise ValueError(
            f"no gene of {len(genes)} has a defined PCC in the reference model: every gene, or every prediction, is "
            "constant within every slide of the training patients. Check the counts and the target features."
        )
    return _best(scores, genes, list_size(len(genes), size))


def highly_variable_list(expression: np.ndarray, genes: Sequence[str], size: int | None = None) -> list[str]:
    """Genes of greatest variance over all spots of the training patients' targets, greatest first.

    expression: (N, G) targets in log10(1 + counts per 10 000 of the panel); ties keep the order of the panel.
    """
    expression = np.asarray(expression, dtype=np.float64)
    if expression.ndim != 2 or expression.shape[1] != len(genes) or len(expression) == 0:
        raise ValueError(f"expression has shape {expression.shape}; expected (spots, {len(genes)} genes).")
    return _best(expression.var(axis=0), genes, list_size(len(genes), size))


def pcc_ranks(gene_pcc: pd.Series) -> pd.Series:
    """Ranks of the genes of one fold: 1 = highest PCC, ties share the average, an undefined PCC ranks last."""
    values = gene_pcc.to_numpy(dtype=np.float64)
    return pd.Series(scipy.stats.rankdata(-np.where(np.isnan(values), -np.inf, values)), index=gene_pcc.index)


def ranked_on_test_list(fold_gene_pcc: Sequence[pd.Series], size: int | None = None) -> list[str]:
    """The list of PCC(H) in the paper protocol: ranks by PCC in every fold, averaged over the folds, the first `size`.

    fold_gene_pcc: for each fold gene -> PCC of the test predictions. Only genes of every fold's panel can be ranked.
    Ties of the average keep the order of the first fold's panel.
    **Biased upward**: the genes are picked on the very predictions that are then scored; random predictions score
    above zero, and every model is scored on its own list.
    """
    common = [gene for gene in fold_gene_pcc[0].index if all(gene in pcc.index for pcc in fold_gene_pcc)]
    if not common:
        raise ValueError(f"the panels of {len(fold_gene_pcc)} folds share no gene; PCC(H) by ranks needs shared genes.")
    ranks = np.mean([pcc_ranks(pcc).loc[common].to_numpy() for pcc in fold_gene_pcc], axis=0)
    return _best(-ranks, common, list_size(len(common), size))


def _best(scores: np.ndarray, genes: Sequence[str], size: int) -> list[str]:
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    return [str(genes[index]) for index in order[:size]]


def _reference_scores(
    features: np.ndarray,
    expression: np.ndarray,
    patients: np.ndarray,
    slides: np.ndarray,
    *,
    num_genes: int,
    components: int,
) -> np.ndarray:
    """(G,) PCC of the reference model on held-out training patients, at its best penalty; NaN where undefined."""
    num_spots = len(features)
    if expression.shape != (num_spots, num_genes) or len(patients) != num_spots or len(slides) != num_spots:
        raise ValueError(
            f"features have {num_spots} spots, expression {expression.shape}, patients {len(patients)}, slides "
            f"{len(slides)}; expected as many spots in each and {num_genes} genes."
        )
    held_out = sorted(set(patients.tolist()))
    if len(held_out) < 2:
        raise ValueError(
            f"the highly predictive list holds out one training patient after the other and found only {held_out}; "
            "expected at least two training patients. Use a data set with more patients, or the protocol 'paper'."
        )
    features = features - features.mean(axis=0)  # keeps the sums of squares below free of cancellation
    moments = {
        patient: _moments(features[patients == patient], expression[patients == patient]) for patient in held_out
    }
    by_patient = []  # each (penalties, G)
    for patient in held_out:
        test = patients == patient
        others = [moments[other] for other in held_out if other != patient]
        predictions = _ridge_path(_Moments(*map(sum, zip(*others))), features[test], components)
        by_patient.append([_mean_pcc(expression[test], prediction, slides[test]) for prediction in predictions])
    scores = _column_means(np.asarray(by_patient))
    overall = np.array([mean_defined(gene_scores) for gene_scores in scores])
    return scores[np.argmax(np.where(np.isnan(overall), -np.inf, overall))]


def _mean_pcc(measured: np.ndarray, predicted: np.ndarray, slides: np.ndarray) -> np.ndarray:
    within = [pearson(measured[slides == slide], predicted[slides == slide]) for slide in sorted(set(slides.tolist()))]
    return _column_means(np.asarray(within))


def _column_means(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    total, count = np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


class _Moments(NamedTuple):
    """All that ridge needs to know of some spots; sums over the spots, so that patients can be added up."""

    count: int
    features: np.ndarray  # (D,)
    expression: np.ndarray  # (G,)
    squares: np.ndarray  # (D, D)
    products: np.ndarray  # (D, G)


def _moments(features: np.ndarray, expression: np.ndarray) -> _Moments:
    return _Moments(
        len(features), features.sum(axis=0), expression.sum(axis=0), features.T @ features, features.T @ expression
    )


def _ridge_path(training: _Moments, new_features: np.ndarray, components: int) -> list[np.ndarray]:
    """Predictions for `new_features` under every penalty. In the basis of the components ridge is one division each."""
    count = training.count
    center, intercept = training.features / count, training.expression / count
    variance, basis = np.linalg.eigh(training.squares - count * np.outer(center, center))
    kept = slice(max(0, len(variance) - min(components, count - 1)), None)  # eigh sorts upwards
    variance, basis = np.maximum(variance[kept], 0), basis[:, kept]
    if not variance.sum() > 0:
        raise ValueError("the target features are the same for every training spot; extract the features again.")
    cross = basis.T @ (training.products - count * np.outer(center, intercept))
    scores = (new_features - center) @ basis
    penalties = RELATIVE_PENALTIES * variance.mean()
    return [scores @ (cross / (variance + penalty)[:, None]) + intercept for penalty in penalties]
