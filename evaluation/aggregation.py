"""Means from genes to slides, patients, folds and the run, in the order that tells the protocols apart.

All functions take the long table of `score_slide` (columns slide, patient, scale, truth, gene and one per metric).

paper: per gene within one slide -> mean over genes -> mean over the slides of the fold -> mean over folds
clean: per gene within one slide -> mean over the slides of a patient -> (mean over genes) -> mean over patients

Undefined values are skipped by every mean and counted (`undefined_pearson`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from evaluation.fold_files import FoldRecord
from evaluation.gene_lists import ranked_on_test_list
from evaluation.metrics import METRIC_NAMES

SLIDE_KEYS = ["slide", "patient", "scale", "truth"]
PATIENT_KEYS = ["patient", "scale", "truth"]
FOLD_KEYS = ["scale", "truth"]

# The list behind "pcc_h", PCC(H), in each protocol.
HEADLINE_LIST = {"paper": "ranked_on_test", "clean": "highly_predictive"}


def with_headline_list(gene_lists: Mapping[str, Sequence[str]], protocol: str) -> dict[str, list[str]]:
    """Add "h", the list behind PCC(H), to the lists; it is empty (PCC(H) undefined) where the protocol's list is missing."""
    return {"h": list(gene_lists.get(HEADLINE_LIST[protocol], [])), **{k: list(v) for k, v in gene_lists.items()}}


def mean_over_genes(
    per_gene: pd.DataFrame, keys: Sequence[str], gene_lists: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Average over genes: pcc_all, pcc_<list> of every list, the other metrics, undefined_pearson, num_genes per `keys`.

    per_gene: a long table with the columns `keys`, gene and METRIC_NAMES.
    """
    keys = list(keys)
    pearson = per_gene["pearson"]
    # A gene outside a list is NaN in the column of the list, and means skip NaN.
    listed = {f"pcc_{name}": pearson.where(per_gene["gene"].isin(list(genes))) for name, genes in gene_lists.items()}
    values = per_gene[[*keys, *METRIC_NAMES]].assign(**listed, undefined_pearson=pearson.isna())
    groups = values.groupby(keys, sort=False)
    table = groups[[*METRIC_NAMES, *listed]].mean().rename(columns={"pearson": "pcc_all"})
    # Named before the other metrics: these are what a reader looks for.
    table = table[["pcc_all", *listed, *METRIC_NAMES[1:]]]
    return table.assign(undefined_pearson=groups["undefined_pearson"].sum(), num_genes=groups.size()).reset_index()


def slide_table(per_gene_slide: pd.DataFrame, gene_lists: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Average over the genes of each slide: one row per slide, scale and truth."""
    return mean_over_genes(per_gene_slide, SLIDE_KEYS, gene_lists)


def patient_gene_table(per_gene_slide: pd.DataFrame) -> pd.DataFrame:
    """Average over the slides of each patient: one row per patient, scale, truth and gene."""
    keys = [*PATIENT_KEYS, "gene"]
    return per_gene_slide.groupby(keys, sort=False)[list(METRIC_NAMES)].mean().reset_index()


def patient_table(per_gene_slide: pd.DataFrame, gene_lists: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Average over slides, then genes: one row per patient, scale and truth.

    undefined_pearson counts the genes that are undefined on every slide of the patient.
    """
    return mean_over_genes(patient_gene_table(per_gene_slide), PATIENT_KEYS, gene_lists)


def gene_table(per_gene_slide: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Average over slides (paper), or over slides and then patients (clean): one row per scale, truth and gene."""
    values = per_gene_slide if protocol == "paper" else patient_gene_table(per_gene_slide)
    return values.groupby([*FOLD_KEYS, "gene"], sort=False)[list(METRIC_NAMES)].mean().reset_index()


def fold_table(slides: pd.DataFrame, patients: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Average over the slides (paper) or the patients (clean) of a fold: one row per scale and truth.

    slides, patients: `slide_table` and `patient_table` of the fold. undefined_pearson is the number of (slide, gene)
    pairs without a PCC.
    """
    rows = slides if protocol == "paper" else patients
    groups = rows.groupby(FOLD_KEYS, sort=False)
    table = groups[value_columns(rows)].mean()
    table["undefined_pearson"] = slides.groupby(FOLD_KEYS, sort=False)["undefined_pearson"].sum()
    table["num_genes"] = groups["num_genes"].max()
    return table.reset_index()


def fused_gene_pcc(per_gene_slide: pd.DataFrame) -> pd.Series:
    """Average the PCC of the fused prediction against the smoothed target over the slides of the fold: gene -> PCC."""
    table = gene_table(select(per_gene_slide), "paper")
    return table.set_index("gene")["pearson"]


def select(table: pd.DataFrame, scale: str = "fused", truth: str = "smoothed") -> pd.DataFrame:
    """Select the rows of one scale and one truth."""
    return table[(table["scale"] == scale) & (table["truth"] == truth)]


def value_columns(table: pd.DataFrame) -> list[str]:
    """Name the columns that hold scores and may be averaged."""
    counts = {"undefined_pearson", "num_genes", "num_spots"}
    return [name for name in table.columns if name not in (*SLIDE_KEYS, "gene", "fold") and name not in counts]


def lists_of_run(records: Sequence[FoldRecord]) -> tuple[list[dict[str, list[str]]], list[str]]:
    """Give every fold its gene lists as the whole run has them.

    records: the folds of a run, at least one.
    returns: for each fold {name: genes}, and sentences for the reader about panels that differ between the folds.
        The lists are those of the fold, but "ranked_on_test" is ranked over all folds and the same in each; "h" is the
        one of them that PCC(H) of the run's protocol looks at.
    """
    notes = []
    common = set.intersection(*(set(record.genes) for record in records))
    if common:
        ranked = ranked_on_test_list([fused_gene_pcc(record.per_gene_slide) for record in records])
        if any(set(record.genes) != common for record in records):
            notes.append(
                f"The folds have panels of their own; {len(common)} genes are in every one, and only those can be "
                "ranked over folds for the paper's PCC(H)."
            )
    else:
        ranked = []
        notes.append("The panels of the folds share no gene: the paper's PCC(H) is undefined.")
    lists = [{**record.gene_lists, "ranked_on_test": ranked} for record in records]
    return [with_headline_list(fold_lists, records[0].protocol) for fold_lists in lists], notes
