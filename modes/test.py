"""--mode test: evaluate trained folds again, on the patients they were not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.digests import changed_slides
from datasets.targets import store_targets
from evaluation.fold_files import check_together, mend_fold
from modes.parallel.folds import held_folds, in_turn
from modes.prediction.model import restored_config
from modes.prediction.summary import finish_run
from modes.training.compose import open_layout
from modes.training.ensemble import test_together
from modes.training.run_data import RunData, open_run_data
from modes.training.score import score_checkpoint
from utils.checkpoint import (
    check_fold_folders,
    checkpoints_of_runs,
    fold_folders,
    has_ended,
    load_checkpoint,
    result_folder,
    runs_of,
)
from utils.cli import say
from utils.files import check_writable
from utils.parallel.team import ALONE
from utils.text import check_genes
from utils.trained_fold import FOLD_FOLDER, NO_SCORE, TrainedFold


def test(
    model_path: str | Path | Sequence[str | Path],
    fold: int | None,
    overrides: Sequence[str],
    device: torch.device,
    data_type: str | None = None,
    with_report: bool = True,
    genes: Sequence[str] = (),
) -> None:
    """Test one fold, or all finished folds of a run folder, and write tables and predictions beside the checkpoint.

    Scores of a file other than a fold's best.pt go into a folder of their own, `test_<name>` beside it; the result of the
    fold and the summary of the run stay as they are. A fold whose training has not ended is refused.
    Of several runs (or of a run over several seeds) the mean of the predictions is tested, see `test_together`.
    data_type: DATA.type of the configuration given on the command line, if any; must be the checkpoint's.
    with_report: figures, report.html and explorer.html of the run folder; the tables are written in any case.
    genes: drawn on every test slide in report.html, beside the best and the worst.
    """
    checkpoints, notes = checkpoints_of_runs(model_path, fold)
    is_official = all(result_folder(checkpoint) == checkpoint.parent for checkpoint in checkpoints)
    for checkpoint in checkpoints:
        _check_has_score(checkpoint, is_official)
    if genes:
        panels = [load_checkpoint(checkpoint, memory_map=True).genes for checkpoint in checkpoints]
        check_genes(genes, {gene for panel in panels for gene in panel}, "the run predicts")
    for note in notes:
        say(note)
    if len(runs_of(model_path)) > 1:
        test_together(
            checkpoints,
            notes,
            overrides,
            device,
            lambda member: _open_tested(member.fold, member.path, overrides, device, data_type),
            with_report,
            genes,
        )
        return
    check_fold_folders(checkpoints)
    for checkpoint in checkpoints:
        check_writable(result_folder(checkpoint) / "predictions" / "slide.h5ad")
    run_dir = checkpoints[0].parent.parent
    has_summary = is_official and (run_dir / "config.yaml").is_file()
    folders = [checkpoint.parent for checkpoint in checkpoints] if is_official else []
    with held_folds(folder for folder in folders if FOLD_FOLDER.fullmatch(folder.name)):
        if is_official:
            for checkpoint in checkpoints:
                _mend_record(checkpoint)
        if has_summary:  # what cannot be summarised is refused before a fold is scored again
            in_run = fold_folders(run_dir).values()
            check_together([f for f in in_run if f / "best.pt" in checkpoints or (f / "result.json").is_file()])
        for checkpoint in checkpoints:
            _test_checkpoint(checkpoint, fold, overrides, device, data_type)
    if has_summary:
        say(in_turn(run_dir, ALONE, lambda: finish_run(run_dir, with_report, genes)))


def _check_has_score(checkpoint: Path, is_official: bool) -> None:
    """Refuse, by ValueError, a model on all patients and one whose training has not ended."""
    if load_checkpoint(checkpoint, memory_map=True).split.is_final:
        raise ValueError(
            f"{checkpoint} was {NO_SCORE}. How its method does on new patients is what the cross-validation says that it "
            "followed (held_out.json of the run, var['pcc_cv'] of a prediction); slides of other data sets: --mode "
            "external_test."
        )
    if is_official and not has_ended(checkpoint):
        raise ValueError(
            f"{checkpoint} is of a training that has not ended, so it has no result yet. Go on with it: the command of "
            "the training, with --resume; a test follows by itself. A copy under another name can be tested apart."
        )


def _mend_record(checkpoint: Path) -> None:
    """Write again what the folder of a checkpoint has lost of its record, or what cannot be read of it."""
    fold = load_checkpoint(checkpoint, memory_map=True)
    more = {"model": fold.config.MODEL.name, "tokens": fold.split.features.get("tokens", {})}
    mend_fold(checkpoint.parent, {**fold.split.to_dict(), **more}, fold.genes, fold.progress.history)


def _test_checkpoint(
    checkpoint: Path, fold: int | None, overrides: Sequence[str], device: torch.device, data_type: str | None
) -> None:
    trained = load_checkpoint(checkpoint, memory_map=True)
    split = trained.split
    if fold is not None and split.fold != fold:
        raise ValueError(
            f"--fold {fold}: {checkpoint} was trained for fold {split.fold} (test patients "
            f"{', '.join(split.test_patients)}); on another fold it would be tested on its own training patients."
        )
    run_data = _open_tested(trained, checkpoint, overrides, device, data_type)
    folder = result_folder(checkpoint)
    is_clean = split.protocol == "clean"
    targets = store_targets(run_data.store, split.test_slides, trained.genes, absent_is_zero=is_clean)
    summary = score_checkpoint(run_data, checkpoint, folder, targets)
    say(
        f"Fold {split.fold} ({split.name}): PCC(A) {summary['pcc_all']:.4f}, MSE {summary['mse']:.4f} "
        f"(training mean {_known(summary['training_mean']['mse'])}); written to {folder}"
    )


def _open_tested(
    trained: TrainedFold, checkpoint: Path, overrides: Sequence[str], device: torch.device, data_type: str | None
) -> RunData:
    """Read the test slides of a fold; ValueError or FileNotFoundError unless they are those that it was started with."""
    split = trained.split
    config = restored_config(trained, checkpoint, overrides)
    if data_type is not None and data_type != config.DATA.type:
        raise ValueError(
            f"the configuration is for {data_type}, {checkpoint} was trained on {config.DATA.type}. Give the configuration "
            f"of the run, or leave --config_name out. Slides of other data sets: --mode external_test."
        )
    layout = open_layout(config, trained.config_name)
    missing = sorted(set(split.test_slides) - set(layout.slides_on_disk()))
    if missing:
        raise FileNotFoundError(
            f"test slides {', '.join(missing)} of {checkpoint} are not in {layout.root}. Prepare them, or give --data_dir."
        )
    run_data = open_run_data(config, trained.config_name, layout, split.test_slides, device, genes=trained.genes)
    tested = {slide: split.digests[slide] for slide in split.test_slides if slide in split.digests}
    if changed := changed_slides(tested, run_data.digests):
        listed = "\n  ".join(changed)
        raise ValueError(
            f"the data in {layout.root} are not those that {checkpoint} was started with:\n  {listed}\n"
            "Restore them as they were, or give their folder with --data_dir; other data: --mode external_test."
        )
    return run_data


def _known(value: float) -> str:
    """A score, or that there is none: an imported checkpoint does not say what its training spots were like on average."""
    return "unknown" if math.isnan(value) else f"{value:.4f}"
