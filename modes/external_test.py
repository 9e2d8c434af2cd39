"""--mode external_test: the folds of a run on slides of another origin, each and as the mean of their predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.features.encoding import default_workers
from datasets.features.reader import read_rows
from datasets.images.slides import open_slide
from datasets.spots import SlideRecord
from datasets.targets import slide_targets
from evaluation.external import (
    MEAN,
    Predictor,
    combined_list,
    external_summary,
    list_note,
    summary_table,
    write_external,
)
from evaluation.slide_scores import SlideResult
from modes.prediction.checkpoint import write_slide
from modes.prediction.encode import Part, encoded_parts, plan_for, spot_batches
from modes.prediction.ensemble import (
    CHUNK_SIZE,
    Member,
    columns_of,
    describe_peak,
    load_members,
    peak_memory,
    provenance_of,
    put_rows,
    run_folder,
    stream_predictions,
)
from modes.prediction.external_data import ExternalTest, external_layout, open_test, warnings_of
from utils.checkpoint import chosen_checkpoints
from utils.cli import progress, say
from utils.files import reading
from utils.text import UNIT


def external_test(
    model_path: str | Path, test_name: str, fold: int | None, overrides: Sequence[str], device: torch.device
) -> Path:
    """Test a run on <data_dir>/test/<test_name>; returns the folder with the results, <run>/external/<test_name>."""
    checkpoints, fold_notes = chosen_checkpoints(model_path, fold)
    members = load_members(checkpoints, overrides, device)
    layout = external_layout(members[0], test_name)
    test = open_test(members, layout, device, fold_notes)
    folder = run_folder(members, model_path, fold) / "external" / layout.name
    notes = warnings_of(test)
    for note in notes:
        say(note)
    predictors, list_notes = make_predictors(test)
    score_slides(test, predictors, folder / "predictions")
    peak = peak_memory()
    summary, tables = external_summary(predictors, about(test, [*notes, *list_notes], peak))
    write_external(folder, summary, tables)
    say(summary_table(summary).to_text())
    for note in summary["notes"][len(notes) :]:
        say(f"Note: {note}")
    say(f"Unit of every error: {UNIT}. {describe_peak(peak)} Written to {folder}")
    return folder


def make_predictors(test: ExternalTest) -> tuple[list[Predictor], list[str]]:
    """The folds and, last, their mean, each with the gene lists that training fixed; and what PCC(H) is over."""
    genes, scored = test.genes, set(test.genes)
    lists_of_folds = [highly_predictive_of(member) for member in test.members]
    means = [member.fold.training_mean.numpy()[:, columns_of(member, genes)] for member in test.members]
    variable = [member.fold.gene_lists.get("highly_variable", []) for member in test.members]
    predictors = [
        Predictor(
            member.name,
            mean,
            {"h": [g for g in listed if g in scored], "highly_variable": [g for g in hvg if g in scored]},
        )
        for member, mean, listed, hvg in zip(test.members, means, lists_of_folds, variable)
    ]
    if len(predictors) > 1:
        lists = {"h": combined_list(lists_of_folds, genes), "highly_variable": combined_list(variable, genes)}
        predictors.append(Predictor(MEAN, np.mean(means, axis=0), lists))
    is_paper = test.members[0].fold.split.protocol == "paper"
    origin = "the list that the run's folds were scored on" if is_paper else "the lists fixed from training data"
    if not any(lists_of_folds):
        origin = "no list of the training run is at hand (summary.json of the run, or a checkpoint with its lists)"
    listed = max(len(names) for names in lists_of_folds)
    return predictors, [list_note(predictors[-1].gene_lists["h"], listed, origin)]


def highly_predictive_of(member: Member) -> list[str]:
    """The genes of PCC(H) as the training run has fixed them: in the checkpoint (clean), in its summary (paper)."""
    if member.fold.split.protocol != "paper":
        return member.fold.gene_lists.get("highly_predictive", [])
    path = member.path.parent.parent / "summary.json"
    if not path.is_file():
        return []
    with reading(path, "the summary of a run", remedy="Make it again: --mode test --model_path RUN"):
        genes = json.loads(path.read_text(encoding="utf-8"))["pcc_h"]["paper"]["genes"]
        return [str(gene) for gene in genes]


def score_slides(test: ExternalTest, predictors: Sequence[Predictor], folder: Path) -> None:
    """Predict the slides by every fold, score each and their mean, write the predictions of the mean into `folder`.

    What is cached is read once for each fold, and one model is held at a time, however many folds there are. Where the
    encoder runs, which costs far more than the models, it runs once and all folds are held together. Of the predictions
    one sum over the folds is held, not those of every fold.
    """
    pairs, slides = list(zip(test.members, predictors)), test.store.slides
    sums: list[dict[str, np.ndarray]] = [{} for _ in slides]
    for together in [pairs] if test.encoder is not None else [[pair] for pair in pairs]:
        members = [member for member, _ in together]
        name = members[0].name if len(members) == 1 else f"{len(members)} folds"
        for record, total in zip(progress(slides, description=f"{test.layout.name}, {name}", unit="slide"), sums):
            for (_, predictor), prediction in zip(together, _predictions(test, record, members)):
                predictor.add(_result(test, record, prediction))
                for scale, values in prediction.items():
                    total[scale] = np.add(total[scale], values, out=total[scale]) if scale in total else values
        for member in members:
            member.release()
    for record, total in zip(slides, sums):
        result = _result(test, record, {scale: values / len(pairs) for scale, values in total.items()})
        if len(pairs) > 1:
            predictors[-1].add(result)
        provenance = provenance_of(test.members, test.fold_notes)
        write_slide(test.layout, record, result, folder / f"{record.name}.h5ad", provenance)


def _result(test: ExternalTest, record: SlideRecord, prediction: dict[str, np.ndarray]) -> SlideResult:
    return SlideResult(
        slide=record.name,
        patient=record.patient,
        spot_ids=list(record.table.obs_names),
        grid_xy=record.table.obsm["grid"],
        genes=test.genes,
        measured=slide_targets(record.table, test.genes),
        measured_unsmoothed=slide_targets(record.table, test.genes, smoothing=False),
        predictions=prediction,
    )


def _predictions(test: ExternalTest, record: SlideRecord, members: Sequence[Member]) -> list[dict[str, np.ndarray]]:
    """{scale: (N, G)} of each fold, for the genes that are scored; the spots stream through the folds together."""
    columns = [columns_of(member, test.genes) for member in members]
    features = test.store.target_features[record.start : record.stop].float()
    whole = features.to(test.device), torch.from_numpy(record.table.obsm["grid"])
    is_valid = test.store.neighbor_is_valid[record.start : record.stop].numpy()
    batches = spot_batches(parts_of(test, record), features, is_valid, test.device)
    predictions: list[dict[str, np.ndarray]] = [{} for _ in members]
    for rows, found in stream_predictions(members, *whole, batches):
        for held, prediction, chosen in zip(predictions, found, columns):
            put_rows(held, rows, {scale: values[:, chosen] for scale, values in prediction.items()}, len(features))
    return predictions


def parts_of(test: ExternalTest, record: SlideRecord) -> Iterator[Part]:
    """Tokens and neighbor features of consecutive spots, from the caches or, without token caches, encoded now."""
    size = min(CHUNK_SIZE, test.config.EVALUATION.chunk_size)

    def neighbors(rows: slice) -> np.ndarray | None:
        return read_rows(test.layout, "neighbor", record, rows) if test.members[0].needs.neighbors else None

    if test.encoder is not None:
        plan = plan_for(test.members[0], ("token",))
        with open_slide(record.image or test.layout.image_path(record.name)) as slide:
            centers = record.table.obsm["center"]
            for rows, tokens, _ in encoded_parts(slide, centers, test.encoder, plan, default_workers(), size):
                yield rows, tokens, neighbors(rows)
        return
    for start in range(0, record.table.n_obs, size):
        rows = slice(start, min(start + size, record.table.n_obs))
        in_store = record.rows[rows]
        tokens = None if test.tokens is None else test.tokens.get(in_store, torch.zeros_like(in_store))
        yield rows, tokens, neighbors(rows)


def about(test: ExternalTest, notes: list[str], peak: dict[str, float]) -> dict[str, object]:
    """Everything of the summary that is no score."""
    return {
        "run": test.members[0].run_name,
        "test_name": test.layout.name,
        "training_type": test.config.DATA.type,
        "protocol": test.members[0].fold.split.protocol,
        "slides": {record.name: record.table.n_obs for record in test.store.slides},
        "genes": test.genes,
        "missing_genes": test.missing,
        "checkpoints": [f"{member.path.parent.name}/{member.path.name}" for member in test.members],
        "unit": UNIT,
        "peak_memory": peak,
        "notes": notes,
    }
