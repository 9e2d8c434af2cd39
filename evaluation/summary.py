"""The summary of a run: its folds together, in the order of its protocol, with every bias named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import aggregation
from evaluation.fold_files import FoldRecord, read_run
from evaluation.intervals import bootstrap_interval
from evaluation.protocol import NO_LIST
from utils.runs import plain

HEADLINE = ("pcc_all", "pcc_h", "mse", "mae")
DESCRIPTIONS = {
    "paper": (
        "paper protocol: PCC per gene within a slide, mean over genes, slides of the fold, folds; PCC(H) on genes "
        "ranked by test PCC over the folds"
    ),
    "clean": (
        "clean protocol: PCC per gene within a slide, mean over slides of a patient, patients; PCC(H) on a list fixed "
        "from training data"
    ),
}
CHOICES = {  # by what `split.json` says under "selection"
    "test": "epoch chosen on the test fold",
    "validation": "epoch chosen on an inner held-out patient",
    "fixed": "number of epochs fixed beforehand",
    "none": "fitted without epochs",
    "mixed": "epoch of each model chosen as in its own run",
}
OPTIMISTIC = "The epoch is chosen on the test fold, as in the published code: all scores are optimistic."
PAPER_NOTE = (
    "PCC(H): the genes are ranked on the same test predictions that are scored. It is biased upward (random "
    "predictions score above zero), and every model is scored on its own list."
)
PAPER_PANEL = "The gene panel is chosen from all slides, those of the test patients included."


def summarise(
    run_dir: str | Path,
    notes: Sequence[str] = (),
    read: tuple[Sequence[FoldRecord], Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Summarise what the folds of a run wrote. Plain values; None where a value is undefined.

    notes: sentences the run itself cannot know, e.g. which folds were skipped for want of slides.
    read: what `fold_files.read_run` gives, where it is at hand.

    The dictionary, in this order:
    protocol, protocol_description, run
    num_folds, num_patients, num_slides, num_spots, num_genes
    headline            {pcc_all, pcc_h, mse, mae, training_mean_mse, training_mean_mae: {mean, std}} fused against the
                        smoothed target. mean: over folds (paper) or patients (clean); std: over folds, divisor n - 1
    folds               rows: fold, name, test_patients, num_slides, num_spots, num_genes, selection, epoch, pcc_all,
                        pcc_h, pcc_highly_variable ..., mse, mae, the other metrics, training_mean_mse,
                        training_mean_mae, undefined_pearson
    patients            rows: patient, fold, num_slides, num_spots and the same scores (PCC per gene within each slide
                        -> mean over the patient's slides -> over genes, whatever the protocol)
    intervals           {pcc_all, pcc_h, pcc_<list>, mse, mse_centered, mae: {mean, low, high, num_patients}}: bootstrap
                        95 % interval of the mean over patients
    scales              rows: truth, scale, then mean and <name>_std of every score; scale "training_mean" included
    both_protocols      {"paper": .., "clean": ..}: {pcc_all, pcc_h, mse, mae: {mean, std}} of the same predictions, averaged
                        and listed as each protocol does it; epoch and panel are those of the run's own
    pcc_h               {"paper": .., "clean": ..}: PCC(H) under both lists, {mean, std, size, genes}; genes is a list
                        (paper) or {fold: list} (clean)
    gene_list_sizes     {list: [size in each fold]}
    selection_price     what choosing the epoch on the test fold would have gained: {mean, folds: rows of fold,
                        chosen_epoch, chosen, best_epoch, best, price}; None when no fold recorded "test/pcc_all"
    notes               sentences: biases, skipped folds, undefined genes

    `modes.prediction.summary` puts "verdict" before it, the sentences of `comparison.verdict.judge`.

    Raises ValueError or FileNotFoundError as `fold_files.read_run`.
    """
    records, found_notes = read or read_run(run_dir)
    protocol = records[0].protocol
    lists, list_notes = aggregation.lists_of_run(records)
    of_protocols, per_patient = _tables(records, lists)
    per_fold = of_protocols[protocol]
    scales = _scale_rows(per_fold, per_fold if protocol == "paper" else per_patient)
    price = selection_price(records)
    fused = next(row for row in scales if (row["truth"], row["scale"]) == ("smoothed", "fused"))
    summary = {
        "protocol": protocol,
        "protocol_description": f"{DESCRIPTIONS[protocol]}; {choice_of_epoch(records)}",
        "run": Path(run_dir).resolve().name,
        "num_folds": len(records),
        "num_patients": int(per_patient["patient"].nunique()),
        "num_slides": sum(record.result["num_slides"] for record in records),
        "num_spots": sum(record.result["num_spots"] for record in records),
        "num_genes": max(len(record.genes) for record in records),
        "headline": _headline(scales),
        "folds": [_fold_row(record, per_fold) for record in records],
        "patients": _patient_rows(records, per_patient),
        "intervals": _intervals(aggregation.select(per_patient)),
        "scales": scales,
        "both_protocols": _both_protocols(of_protocols, per_patient),
        "pcc_h": _both_lists(scales, records, lists),
        "gene_list_sizes": _list_sizes(lists),
        "selection_price": price,
        "notes": _notes(records, protocol, [*notes, *found_notes, *list_notes], price, fused),
    }
    return plain(summary)


def choice_of_epoch(records: Sequence[FoldRecord]) -> str:
    """Say how the epochs of the folds were chosen; folds may differ (one training patient leaves none to hold out)."""
    found = dict.fromkeys(str(record.split.get("selection")) for record in records)
    return " / ".join(CHOICES.get(name, "choice of the epoch unknown") for name in found)


def selection_price(records: Sequence[FoldRecord]) -> dict[str, Any] | None:
    """Compare the best test PCC(A) of any epoch with that of the chosen one, in every fold that recorded "test/pcc_all".

    returns: see "selection_price" of `summarise`; None when no fold recorded it.
    """
    rows = []
    for record in records:
        if "test/pcc_all" not in record.epochs or record.result.get("epoch") is None:
            continue
        scores = pd.to_numeric(record.epochs.drop_duplicates("epoch", keep="last").set_index("epoch")["test/pcc_all"])
        epoch = record.result["epoch"]
        if epoch not in scores.index or scores.isna().all():
            continue
        chosen, best = float(scores[epoch]), float(scores.max())
        rows.append(
            {
                "fold": record.index,
                "chosen_epoch": epoch,
                "chosen": chosen,
                "best_epoch": int(scores.idxmax()),
                "best": best,
                "price": best - chosen,
            }
        )
    return {"mean": float(np.mean([row["price"] for row in rows])), "folds": rows} if rows else None


def _tables(
    records: Sequence[FoldRecord], lists: Sequence[dict[str, list[str]]]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """`fold_table` in the order of either protocol {protocol: table}, and `patient_table`; all with a column "fold"."""
    folds: dict[str, list[pd.DataFrame]] = {protocol: [] for protocol in aggregation.HEADLINE_LIST}
    patients = []
    for record, fold_lists in zip(records, lists):
        by_slide = aggregation.slide_table(record.per_gene_slide, fold_lists)
        by_patient = aggregation.patient_table(record.per_gene_slide, fold_lists)
        for protocol, tables in folds.items():
            tables.append(aggregation.fold_table(by_slide, by_patient, protocol).assign(fold=record.index))
        patients.append(by_patient.assign(fold=record.index))
    whole = {protocol: pd.concat(tables, ignore_index=True) for protocol, tables in folds.items()}
    return whole, pd.concat(patients, ignore_index=True)


def _scale_rows(per_fold: pd.DataFrame, averaged: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per truth and scale: mean over the rows of `averaged`, standard deviation over folds."""
    columns = aggregation.value_columns(per_fold)
    means = averaged.groupby(["truth", "scale"], sort=False)[columns].mean().to_dict("index")
    deviations = per_fold.groupby(["truth", "scale"], sort=False)[columns].std(ddof=1).to_dict("index")
    rows = []
    for (truth, scale), mean in means.items():
        row = {"truth": truth, "scale": scale}
        for name in columns:
            row |= {name: mean[name], f"{name}_std": deviations[truth, scale][name]}
        rows.append(row)
    return rows


def _headline(scales: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    rows = {row["scale"]: row for row in scales if row["truth"] == "smoothed"}
    headline = {name: {"mean": rows["fused"][name], "std": rows["fused"][f"{name}_std"]} for name in HEADLINE}
    for name in ("mse", "mae"):
        mean = rows["training_mean"]
        headline[f"training_mean_{name}"] = {"mean": mean[name], "std": mean[f"{name}_std"]}
    return headline


def _both_protocols(
    of_protocols: dict[str, pd.DataFrame], per_patient: pd.DataFrame
) -> dict[str, dict[str, dict[str, float]]]:
    """The headline in the order of averages and with the PCC(H) list of either protocol."""
    both = {}
    for protocol, listed in aggregation.HEADLINE_LIST.items():
        per_fold = of_protocols[protocol]
        row = next(
            row
            for row in _scale_rows(per_fold, per_fold if protocol == "paper" else per_patient)
            if (row["truth"], row["scale"]) == ("smoothed", "fused")
        )
        names = {"pcc_all": "pcc_all", "pcc_h": f"pcc_{listed}", "mse": "mse", "mae": "mae"}
        both[protocol] = {
            name: {"mean": row.get(source, np.nan), "std": row.get(f"{source}_std", np.nan)}
            for name, source in names.items()
        }
    return both


def _fold_row(record: FoldRecord, per_fold: pd.DataFrame) -> dict[str, Any]:
    table = per_fold[per_fold["fold"] == record.index]
    fused, mean = (aggregation.select(table, scale).iloc[0] for scale in ("fused", "training_mean"))
    return {
        "fold": record.index,
        "name": record.name,
        "test_patients": record.split["test_patients"],
        "num_slides": record.result["num_slides"],
        "num_spots": record.result["num_spots"],
        "num_genes": len(record.genes),
        "selection": record.split.get("selection"),
        "epoch": record.result.get("epoch"),
        **{name: fused[name] for name in aggregation.value_columns(per_fold)},
        "training_mean_mse": mean["mse"],
        "training_mean_mae": mean["mae"],
        "undefined_pearson": int(fused["undefined_pearson"]),
    }


def _patient_rows(records: Sequence[FoldRecord], per_patient: pd.DataFrame) -> list[dict[str, Any]]:
    counts: dict[str, list[int]] = {}
    for record in records:
        slides = aggregation.select(record.per_gene_slide)[["slide", "patient"]].drop_duplicates()
        for slide, patient in slides.itertuples(index=False):
            counts.setdefault(patient, []).append(record.result["slides"][slide])
    fused = aggregation.select(per_patient)
    means = aggregation.select(per_patient, "training_mean").set_index("patient")
    rows = []
    for row in fused.to_dict("records"):
        spots = counts[row["patient"]]
        scores = {name: row[name] for name in aggregation.value_columns(fused)}
        errors = {f"training_mean_{name}": means.loc[row["patient"], name] for name in ("mse", "mae")}
        keys = {"patient": row["patient"], "fold": row["fold"], "num_slides": len(spots), "num_spots": sum(spots)}
        rows.append({**keys, **scores, **errors, "undefined_pearson": int(row["undefined_pearson"])})
    return rows


def _intervals(fused: pd.DataFrame) -> dict[str, dict[str, float]]:
    intervals = {}
    for name in aggregation.value_columns(fused):
        if not (name.startswith("pcc_") or name in ("mse", "mse_centered", "mae")):
            continue
        values = fused[name].dropna().to_numpy()
        low, high = bootstrap_interval(values)
        mean = values.mean() if len(values) else np.nan
        intervals[name] = {"mean": mean, "low": low, "high": high, "num_patients": len(values)}
    return intervals


def _list_sizes(lists: Sequence[dict[str, list[str]]]) -> dict[str, list[int]]:
    names = dict.fromkeys(name for fold_lists in lists for name in fold_lists if name != "h")
    return {name: [len(fold_lists.get(name, [])) for fold_lists in lists] for name in names}


def _both_lists(
    scales: list[dict[str, Any]], records: Sequence[FoldRecord], lists: Sequence[dict[str, list[str]]]
) -> dict[str, Any]:
    fused = next(row for row in scales if row["scale"] == "fused" and row["truth"] == "smoothed")
    both = {}
    for protocol, name in aggregation.HEADLINE_LIST.items():
        by_fold = {record.index: fold_lists.get(name, []) for record, fold_lists in zip(records, lists)}
        both[protocol] = {
            "mean": fused.get(f"pcc_{name}", np.nan),
            "std": fused.get(f"pcc_{name}_std", np.nan),
            "size": max(len(genes) for genes in by_fold.values()),
            "genes": next(iter(by_fold.values())) if protocol == "paper" else by_fold,
        }
    return both


def _offset_note(fused: dict[str, Any]) -> str | None:
    """What of the error is a constant per gene and slide."""
    mse, centered = fused["mse"], fused["mse_centered"]
    if not np.isfinite([mse, centered]).all() or mse == 0:
        return None
    return (
        f"{1 - centered / mse:.0%} of the MSE is one constant per gene and slide (without it: {centered:.4f}): the levels of "
        "genes differ between patients. Compare spots of a slide; do not read absolute values."
    )


def _notes(
    records: Sequence[FoldRecord],
    protocol: str,
    found: Sequence[str],
    price: dict[str, Any] | None,
    fused: dict[str, Any],
) -> list[str]:
    on_test = any(record.split.get("selection") == "test" for record in records)
    is_given = all(record.split.get("panel") == "given" for record in records)
    notes = [OPTIMISTIC] if protocol == "paper" and on_test else []
    if protocol == "paper":
        notes += [PAPER_NOTE, *([] if is_given else [PAPER_PANEL])]
    if protocol == "clean" and on_test:
        notes.append("The split says that the epoch was chosen on the test fold: these scores are not clean.")
    if price is not None and protocol == "clean":
        notes.append(
            f"Choosing the epoch on the test fold instead would have raised PCC(A) by {price['mean']:.4f} on average."
        )
    if offset := _offset_note(fused):
        notes.append(offset)
    if len(records) == 1:
        notes.append("One fold only: no standard deviation over folds.")
    notes += found
    are_without_list = all(NO_LIST in record.result["notes"] for record in records)
    for record in records:
        extra = [*record.split.get("notes", []), *record.result["notes"]]
        notes += [f"Fold {record.name}: {note}" for note in extra if not (are_without_list and note == NO_LIST)]
    return list(dict.fromkeys(notes))
