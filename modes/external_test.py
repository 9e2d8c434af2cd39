"""--mode external_test: the folds of a run on slides of another origin, each and as the mean of their predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.batches import SlideBatch
from datasets.features.encoding import default_workers
from datasets.images.slides import open_slide
from datasets.spots import SlideRecord
from datasets.targets import slide_targets
from evaluation.external import (
    Predictor,
    combined_list,
    external_summary,
    list_note,
    summary_table,
    write_external,
)
from evaluation.report.explorer import write_explorer
from evaluation.report.external import write_external_report
from evaluation.slide_result import MEAN
from modes.prediction.encode import Chunk, bare_chunks, encoded_chunks, plan_for, whole_slide
from modes.prediction.ensemble import (
    CHUNK_SIZE,
    Member,
    columns_of,
    describe_peak,
    load_members,
    of_genes,
    peak_memory,
    provenance_of,
    run_folder,
    width_to_match,
)
from modes.prediction.external_data import ExternalTest, external_layout, open_test, warnings_of
from modes.prediction.slide import Scales, predict_slide, slide_result
from modes.prediction.write import write_slide
from utils.checkpoint import chosen_checkpoints
from utils.cli import progress, say
from utils.files import check_writable, reading
from utils.text import UNIT, check_genes, checked_names

_BYTES_A_NUMBER = 4


def external_test(
    model_path: str | Path,
    test_name: str,
    fold: int | None,
    overrides: Sequence[str],
    device: torch.device,
    match_mpp: bool = False,
    with_report: bool = True,
    genes: Sequence[str] = (),
) -> Path:
    """Test a run on <data_dir>/test/<test_name>; returns the folder with the results, <run>/external/<test_name>[/match_mpp].

    fold: of the run, None for all finished ones.  overrides: see `restored_config`.
    match_mpp: read features of patches as wide in micrometres as those of the training, instead of as many pixels.
    with_report: figures, report.html and explorer.html beside the tables.  genes: drawn on every slide in the report.
    Raises ValueError / FileNotFoundError for whatever cannot be used, before anything is predicted.
    """
    checkpoints, fold_notes = chosen_checkpoints(model_path, fold)
    members = load_members(checkpoints, overrides, device)
    layout = external_layout(members[0], test_name, round(width_to_match(members), 1) if match_mpp else None)
    test = open_test(members, layout, device, fold_notes)
    check_genes(genes, test.genes, f"the run predicts and {layout.name} has measured")
    folder = run_folder(members, model_path, fold) / "external" / layout.name / ("match_mpp" if match_mpp else "")
    numbers = test.store.slides[-1].stop * len(test.genes)
    check_writable(folder / "predictions" / "slide.h5ad", needed=_BYTES_A_NUMBER * numbers)
    notes = warnings_of(test)
    for note in notes:
        say(note)
    predictors, list_notes = make_predictors(test)
    score_slides(test, predictors, folder / "predictions")
    peak = peak_memory()
    summary, tables = external_summary(predictors, about(test, [*notes, *list_notes], peak))
    write_external(folder, summary, tables)
    if with_report:
        write_external_report(folder, summary, predictors[-1], genes)
        predictions = [folder / "predictions" / f"{record.name}.h5ad" for record in test.store.slides]
        write_explorer(folder / "explorer.html", predictions, title=f"Genes of {layout.name}")
    say("\n".join([*summary["verdict"], ""]))
    say(summary_table(summary).to_text())
    for note in summary["notes"][len(notes) :]:
        say(f"Note: {note}")
    say(f"Unit of every error: {UNIT}. {describe_peak(peak)} Written to {folder}")
    return folder


def make_predictors(test: ExternalTest) -> tuple[list[Predictor], list[str]]:
    """Prepare the scoring of each fold and, last, of the mean of all, for the genes of the test.

    returns: the predictors, each with its training mean (2, G) and the gene lists that training fixed, restricted to genes
    that are scored; and the sentences that say over which genes PCC(H) is.
    Raises ValueError for a summary of the run that cannot be read.
    """
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
    """Find the genes of PCC(H) as training has fixed them: in the checkpoint (clean), in the summary of the run (paper).

    Empty where they are not known. Raises ValueError for a summary that cannot be read.
    """
    if member.fold.split.protocol != "paper":
        return member.fold.gene_lists.get("highly_predictive", [])
    path = member.run_folder / "summary.json"
    if not path.is_file():
        return []
    with reading(path, "the summary of a run", remedy="Make it again: --mode test --model_path RUN"):
        genes = json.loads(path.read_text(encoding="utf-8"))["pcc_h"]["paper"]["genes"]
        return checked_names(genes, "genes", path)


def score_slides(test: ExternalTest, predictors: Sequence[Predictor], folder: Path) -> None:
    """Predict the slides by every fold, score each and their mean, write the predictions of the mean into `folder`.

    What is cached is read once for each fold, and one model is held at a time, however many folds there are. Where the
    encoder runs, which costs far more than the models, it runs once and all folds are held together. Of the predictions
    one sum over the folds is held, not those of every fold.
    """
    pairs, slides = list(zip(test.members, predictors)), test.store.slides
    measured = [
        [slide_targets(record.table, test.genes, smoothing) for smoothing in (True, False)] for record in slides
    ]
    sums: list[Scales] = [{} for _ in slides]
    for together in [pairs] if test.encoder is not None else [[pair] for pair in pairs]:
        members = [member for member, _ in together]
        name = members[0].name if len(members) == 1 else f"{len(members)} folds"
        shown = progress(slides, description=f"{test.layout.name}, {name}", unit="slide")
        for record, targets, total in zip(shown, measured, sums):
            predictions = predict_slide(
                [member.load() for member in members],
                slide_of(test, record),
                members[0].precision,
                chunk_size=min(CHUNK_SIZE, test.config.EVALUATION.chunk_size),
                keep=of_genes(members, test.genes),
            )
            for (_, predictor), prediction in zip(together, predictions):
                predictor.add(slide_result(record, test.genes, prediction, *targets))
                for scale, values in prediction.items():
                    total[scale] = np.add(total[scale], values, out=total[scale]) if scale in total else values
        for member in members:
            member.release()
    provenance = provenance_of(test.members, test.fold_notes)
    for record, targets, total in zip(slides, measured, sums):
        mean = {scale: values / len(pairs) for scale, values in total.items()}
        result = slide_result(record, test.genes, mean, *targets)
        if len(pairs) > 1:
            predictors[-1].add(result)
        path = folder / f"{record.name}.h5ad"
        write_slide(path, record, result, patch_size=test.layout.patch_size, provenance=provenance)


def slide_of(test: ExternalTest, record: SlideRecord) -> SlideBatch:
    """Put a slide together from the caches or, without token caches, from its image as it is encoded."""
    spots = slice(record.start, record.stop)
    return whole_slide(
        test.store.target_features[spots].float(),
        record.table.obsm["grid"],
        test.store.neighbor_is_valid[spots].numpy(),
        partial(chunks_of, test, record),
        test.device,
    )


def chunks_of(test: ExternalTest, record: SlideRecord, size: int) -> Iterator[Chunk]:
    """Read, or encode, tokens and neighbor features of about `size` spots at a time."""

    def neighbors(rows: slice) -> Tensor | None:
        return test.store.neighbors_of(record.rows[rows])

    if test.encoder is not None:
        plan = plan_for(test.members[0], ("token",), record.covered_px)
        with open_slide(record.image or test.layout.image_path(record.name)) as slide:
            centers = record.table.obsm["center"]
            for chunk in encoded_chunks(slide, centers, test.encoder, plan, default_workers(), size):
                yield replace(chunk, neighbors=neighbors(chunk.rows))
        return
    for chunk in bare_chunks(record.table.n_obs, size):
        in_store = record.rows[chunk.rows]
        tokens = None if test.tokens is None else test.tokens.get(in_store, torch.zeros_like(in_store))
        yield replace(chunk, tokens=tokens, neighbors=neighbors(chunk.rows))


def about(test: ExternalTest, notes: list[str], peak: dict[str, float]) -> dict[str, object]:
    """Collect everything of the summary that is no score."""
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
