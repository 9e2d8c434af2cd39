"""Comparison of runs over the same patients: means with intervals, paired tests, effect per gene.

A comparison is only one if both sides were asked the same question: runs whose protocol, folds, patients, slides (of the
test and of the training), spots, genes, images, features or fixed gene lists differ are refused with the differences.
Seeds of one method are averaged per patient first, so that the patients stay the sample. The tests themselves are in
`evaluation.intervals`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation import aggregation
from evaluation.fold_files import FoldRecord, read_run
from evaluation.intervals import bootstrap_interval, gene_effect, paired_wilcoxon
from evaluation.summary import CHOICES
from utils.checkpoint import seed_runs
from utils.text import some
from utils.trained_fold import changed_parts

COMPARED = ("pcc_all", "pcc_h", "mse", "mae")
_PER_GENE = {"pcc_all": "pearson", "pcc_h": "pearson"}  # else the metric has one name in both tables
_LOWER_IS_BETTER = ("mse", "mse_centered", "mae", "rvd")


def compare_runs(
    run_dirs: Sequence[str | Path], *, names: Sequence[str] | None = None, intersect: bool = False, **options
) -> pd.DataFrame:
    """Compare the methods in `run_dirs`, one a folder (with its seeds inside, if any), as `compare_methods` does.

    names: of the methods; default: as much of the paths as tells them apart. options: of `compare_methods`.
    Raises ValueError also for a run given twice and for names that are not one distinct name for each.
    """
    paths = [Path(path) for path in run_dirs]
    names = list(names) if names is not None else _distinct_names(paths)
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ValueError(f"{len(paths)} runs have the names {names}; expected one distinct name for each.")
    methods = {name: seed_runs(path) for name, path in zip(names, paths)}
    return compare_methods(methods, intersect=intersect, **options)


def compare_methods(
    methods: Mapping[str, Sequence[str | Path]],
    *,
    metrics: Sequence[str] = COMPARED,
    scale: str = "fused",
    truth: str = "smoothed",
    intersect: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare methods, each given as the runs of its seeds, with the first of them.

    returns: one row per metric and method, and `table.attrs["notes"]`, which a reader must know. Columns:
        metric, method, num_seeds, num_patients
        mean, low, high             over patients, with the bootstrap 95 % interval
        by_patient                  {patient: value}, seeds averaged
        seed_std                    of the mean; NaN for one seed
        difference, difference_low, difference_high     method - first, paired over patients
        wilcoxon_p, wilcoxon_note   of the same pairs
        genes_improved              share of the genes that are better than with the first method
        gene_difference_median      median over genes of method - first
    What compares with the first method is NaN in its own rows. The value of a patient is the mean over the genes of the
    mean over the patient's slides.
    metrics: pcc_all, pcc_h, pcc_<list> or a metric of `evaluation.metrics`. scale, truth: of the rows that are compared.
    intersect: compare what the runs share (folds, genes) instead of refusing, and accept other features (encoder, patch
    size, neighbors, token variant, images, numbers). Protocols, patients, slides and spots of a shared fold must agree in
    any case.
    Raises ValueError with every difference between the runs.
    """
    runs = {name: [read_run(path)[0] for path in paths] for name, paths in methods.items()}
    if not runs or not all(runs.values()):
        raise ValueError(f"nothing to compare among {list(methods)}; expected at least one run for each method.")
    labels = {}
    for name, seeds in runs.items():
        for path, run in zip(methods[name], seeds):
            labels[name if len(seeds) == 1 else f"{name}/{Path(path).name}"] = run
    notes = _check(labels, intersect)
    if intersect:
        runs = _restricted(runs)
    values_of = {name: [_Values.of(run, scale, truth) for run in seeds] for name, seeds in runs.items()}
    if runs[next(iter(runs))][0][0].protocol == "paper" and "pcc_h" in metrics:
        notes.append("pcc_h: every run is scored on its own list, ranked on its test predictions; not comparable.")
    rows = []
    for metric in metrics:
        reference = None
        for name, by_seed in values_of.items():
            row, values = _row(metric, by_seed, reference, resamples, seed)
            rows.append({"metric": metric, "method": name, **row})
            reference = reference or values
    table = pd.DataFrame(rows)
    table.attrs["notes"] = list(dict.fromkeys(notes))
    return table


@dataclasses.dataclass(frozen=True, eq=False)
class _Values:
    """One run: patients (index patient), genes (index patient, gene), and the genes of every list by patient."""

    patients: pd.DataFrame
    genes: pd.DataFrame
    listed: dict[str, set[tuple[str, str]]]

    @classmethod
    def of(cls, run: Sequence[FoldRecord], scale: str, truth: str) -> _Values:
        lists, _ = aggregation.lists_of_run(run)
        patients, genes = [], []
        listed: dict[str, set[tuple[str, str]]] = {}
        for record, fold_lists in zip(run, lists):
            chosen = aggregation.select(record.per_gene_slide, scale, truth)
            if chosen.empty:
                raise ValueError(f"{record.path} has no scores of the scale {scale!r} against the {truth} truth.")
            patients.append(aggregation.patient_table(chosen, fold_lists))
            genes.append(aggregation.patient_gene_table(chosen))
            for name, names in fold_lists.items():
                pairs = {(patient, gene) for patient in patients[-1]["patient"] for gene in names}
                listed.setdefault(name, set()).update(pairs)
        gene_values = pd.concat(genes).set_index(["patient", "gene"])
        return cls(pd.concat(patients).set_index("patient"), gene_values, listed)

    def per_gene(self, metric: str) -> pd.Series:
        """(patient, gene) -> value; only the genes of the list when the metric is the PCC over a list."""
        if metric == "pcc_all" or not metric.startswith("pcc_"):
            return self.genes[_PER_GENE.get(metric, metric)]
        return self.genes["pearson"][self.genes.index.isin(self.listed[metric.removeprefix("pcc_")])]


def _row(
    metric: str,
    seeds: Sequence[_Values],
    reference: tuple[pd.Series, pd.Series] | None,
    resamples: int,
    seed: int,
) -> tuple[dict[str, object], tuple[pd.Series, pd.Series]]:
    if metric not in seeds[0].patients:
        known = ", ".join(aggregation.value_columns(seeds[0].patients))
        raise ValueError(f"metric {metric!r} is unknown; expected one of {known}.")
    by_seed = pd.concat([values.patients[metric] for values in seeds], axis=1)
    patients = by_seed.mean(axis=1)
    genes = pd.concat([values.per_gene(metric) for values in seeds], axis=1).mean(axis=1)
    defined = patients.dropna()
    low, high = bootstrap_interval(defined.to_numpy(), resamples=resamples, seed=seed)
    row = {
        "num_seeds": len(seeds),
        "num_patients": len(defined),
        "mean": defined.mean(),
        "low": low,
        "high": high,
        "by_patient": defined.to_dict(),
        "seed_std": by_seed.mean(axis=0).std(ddof=1),
        **dict.fromkeys(("difference", "difference_low", "difference_high", "wilcoxon_p"), np.nan),
        "wilcoxon_note": "",
        **dict.fromkeys(("genes_improved", "gene_difference_median"), np.nan),
    }
    if reference is not None:
        differences = (patients - reference[0]).dropna()
        low, high = bootstrap_interval(differences.to_numpy(), resamples=resamples, seed=seed)
        test = paired_wilcoxon(reference[0].reindex(patients.index), patients)
        effect = gene_effect(reference[1], genes, greater_is_better=metric not in _LOWER_IS_BETTER)
        row |= {"difference": differences.mean(), "difference_low": low, "difference_high": high}
        row |= {"wilcoxon_p": test.p, "wilcoxon_note": test.note}
        row |= {"genes_improved": effect.share_improved, "gene_difference_median": effect.median}
    return row, (patients, genes)


def _check(runs: Mapping[str, Sequence[FoldRecord]], intersect: bool) -> list[str]:
    """Notes when the runs may be compared; ValueError with every difference from the first when not."""
    (first_name, first), *others = runs.items()
    fatal, mendable, notes = [], [], []
    for name, other in others:
        found = _differences(first, other)
        fatal += [f"{name}: {text}" for text in found.fatal]
        mendable += [f"{name}: {text}" for text in found.mendable]
        notes += [f"{name}: {text}" for text in _training_differences(first, other)]
    if fatal or (mendable and not intersect):
        hint = " What they share can be compared with --intersect." if not fatal else ""
        raise ValueError(
            f"these runs differ from {first_name} and cannot be compared:\n  "
            + "\n  ".join(fatal + mendable)
            + (f"\n{hint.strip()}" if hint else "")
        )
    return [f"Compared on what is shared. {text}" for text in mendable] + notes


@dataclasses.dataclass(frozen=True)
class _Differences:
    """fatal: what forbids a comparison.  mendable: what is left out, or taken as it is, with `intersect`."""

    fatal: list[str]
    mendable: list[str]


def _differences(first: Sequence[FoldRecord], other: Sequence[FoldRecord]) -> _Differences:
    if first[0].protocol != other[0].protocol:
        return _Differences([f"protocol {other[0].protocol!r}, expected {first[0].protocol!r}"], [])
    fatal, mendable = [], []
    folds, other_folds = ({record.index: record for record in run} for run in (first, other))
    if absent := sorted(set(folds) ^ set(other_folds)):
        mendable.append(f"folds {sorted(other_folds)}, expected {sorted(folds)} (not in both: {absent})")
    for index in sorted(set(folds) & set(other_folds)):
        a, b = folds[index], other_folds[index]
        if sorted(a.split["test_patients"]) != sorted(b.split["test_patients"]):
            fatal.append(f"fold {index} tests patients {b.split['test_patients']}, expected {a.split['test_patients']}")
        elif a.result["slides"] != b.result["slides"]:
            fatal.append(f"fold {index} scores slides (spots) {b.result['slides']}, expected {a.result['slides']}")
        elif changed := sorted(set(_changed(a, b, "counts", "spots")) & set(a.split.get("test_slides", []))):
            fatal.append(f"fold {index} was tested on other counts of the slides {', '.join(changed)}")
        elif gone := set(a.genes) ^ set(b.genes):
            mendable.append(f"fold {index} has {len(b.genes)} genes, expected {len(a.genes)}; {len(gone)} not in both")
        elif features := _feature_differences(a, b):
            # Lists fixed from training data depend on the features; those of the first run are then taken for all.
            mendable += [f"fold {index} has {text}" for text in features] + _list_differences(a, b)
        elif changed := sorted(set(_changed(a, b, "target")) & _seen_in_training(a)):
            # Other last digits, of another device, are no difference unless the lists of genes become others.
            lists = _list_differences(a, b)
            mendable += [f"{text}; the features of the slides {some(changed)} are other numbers" for text in lists]
        else:
            fatal += _list_differences(a, b)
        if slides := _seen_in_training(a) ^ _seen_in_training(b):
            fatal.append(f"fold {index} was trained on other slides ({', '.join(sorted(slides))} not in both)")
    if not set(folds) & set(other_folds):
        fatal.append("no fold in common")
    return _Differences(fatal, mendable)


def _changed(first: FoldRecord, other: FoldRecord, *parts: str) -> list[str]:
    """Slides, of the training or the test, of which one of these parts has another digest, where both folds know it."""
    return list(changed_parts(first.split.get("digests", {}), other.split.get("digests", {}), parts))


def _seen_in_training(record: FoldRecord) -> set[str]:
    """Slides whose counts the fold has used, to learn or to choose the epoch."""
    return {slide for part in ("train_slides", "validation_slides") for slide in record.split.get(part, [])}


def _feature_differences(first: FoldRecord, other: FoldRecord) -> list[str]:
    """In what the images, their patches and the encoder differ. Folds that do not say are taken to be alike."""
    a, b = (dict(record.split.get("features", {})) for record in (first, other))
    tokens = [features.pop("tokens", {}) for features in (a, b)]
    # Models without tokens have none to differ, and the pooled feature as the only one is a method, not a feature.
    if all(variant.get("source", "none") not in ("none", "pooled") for variant in tokens):
        a, b = (
            features | {f"tokens: {name}": variant.get(name) for name in ("views", "token_pool")}
            for features, variant in zip((a, b), tokens)
        )
    differences = [
        f"{name.replace('_', ' ')} {b[name]}, expected {a[name]}"
        for name in a
        if name in b and a[name] != b[name] and "unknown" not in (a[name], b[name])
    ]
    if changed := _changed(first, other, "image"):
        differences.append(f"other images of the slides {some(changed)}")
    return differences


def _training_differences(first: Sequence[FoldRecord], other: Sequence[FoldRecord]) -> list[str]:
    """What a reader must know of how the two came to their weights, and of what the other saw of a patch."""
    folds = {record.index: record for record in first}
    choices: dict[tuple[str, str], list[int]] = {}
    for record in other:
        if record.index in folds:
            mine, its = (each.split.get("selection") for each in (record, folds[record.index]))
            if mine and its and mine != its:
                choices.setdefault((mine, its), []).append(record.index)
    pooled = [_is_pooled(run[0]) for run in (first, other)]
    note = f"the target is {'one token, the pooled feature' if pooled[1] else 'all tokens'} (DATA.tokens); of the first method"
    notes = [f"{note} {'one token' if pooled[0] else 'all tokens'}."] if pooled[0] != pooled[1] else []
    return notes + [
        f"{CHOICES.get(mine, mine)}; the first method: {CHOICES.get(its, its)} (folds {', '.join(map(str, indices))}). "
        "A patient held out to choose the epoch is one patient less to learn from."
        for (mine, its), indices in choices.items()
        if "validation" in (mine, its)
    ]


def _is_pooled(record: FoldRecord) -> bool:
    """Whether the pooled feature was the one token of a patch."""
    return record.split.get("features", {}).get("tokens", {}).get("source") == "pooled"


def _list_differences(first: FoldRecord, other: FoldRecord) -> list[str]:
    # Lists ranked on test predictions differ between models by their nature; the fixed ones must not.
    fixed = sorted((set(first.gene_lists) | set(other.gene_lists)) - {"ranked_on_test"})
    return [
        f"fold {first.index} has another list {name!r} ({len(other.gene_lists.get(name, []))} genes)"
        for name in fixed
        if set(first.gene_lists.get(name, [])) != set(other.gene_lists.get(name, []))
    ]


def _restricted(runs: Mapping[str, Sequence[Sequence[FoldRecord]]]) -> dict[str, list[list[FoldRecord]]]:
    """The runs with the folds that all have, each with the genes that all have in it, and the first run's lists."""
    everything = [{record.index: record for record in run} for seeds in runs.values() for run in seeds]
    shared = {}
    for index in sorted(set.intersection(*map(set, everything))):
        genes = set.intersection(*(set(run[index].genes) for run in everything))
        if not genes:
            raise ValueError(f"the runs share no gene in fold {index}; there is nothing to compare.")
        shared[index] = genes
    if not shared:
        raise ValueError("there is no fold that all runs have; there is nothing to compare.")
    lists = {index: everything[0][index].gene_lists for index in shared}

    def restrict(record: FoldRecord) -> FoldRecord:
        genes, table = shared[record.index], record.per_gene_slide
        kept = {name: [gene for gene in names if gene in genes] for name, names in lists[record.index].items()}
        return dataclasses.replace(
            record,
            genes=[gene for gene in record.genes if gene in genes],
            result={**record.result, "gene_lists": kept},
            per_gene_slide=table[table["gene"].isin(genes)],
        )

    return {
        name: [[restrict(record) for record in run if record.index in shared] for run in seeds]
        for name, seeds in runs.items()
    }


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run is given twice among {[str(path) for path in paths]}; expected distinct runs.")
