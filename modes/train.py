"""--mode train: cross-validation over patients, one fold after the other, resumable at any moment."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datasets.batches import SpotBatch, TrainingBatches, epoch_rows, whole_batch
from datasets.shares import share_of
from datasets.spots import SlideRecord
from engine import train_one_epoch
from evaluation.held_out import write_held_out
from evaluation.protocol import epoch_scores
from evaluation.slide_result import SlideResult
from models.contract import ExpressionModel
from models.table import find_model
from modes.parallel.data import shared_step
from modes.parallel.folds import check_nobody_works_on, claimed_folds, finish, in_turn
from modes.prediction.slide import Encode, predict_slide, slide_result
from modes.prediction.summary import check_scored_folds
from modes.telling.board import Board, check_wandb
from modes.telling.epoch_line import EpochLine, word_on_test_scores
from modes.training.checkpoints import FoldCheckpoints
from modes.training.clusters import write_clusters
from modes.training.compose import Optimization, forward, groups_spots, is_closed_form, open_layout
from modes.training.final import (
    check_same_data,
    open_cross_validation,
    with_chosen_epochs,
)
from modes.training.fold import (
    fit_closed_form,
    new_model,
    remember_training_spots,
    start_folder,
    untrained_fold,
)
from modes.training.plan import find_folds
from modes.training.resume import check_continues, check_started_folds
from modes.training.run_data import RunData, open_run_data
from modes.training.score import score_checkpoint
from modes.training.split import Split, prepare_split
from utils.checkpoint import is_complete
from utils.cli import say, undisturbed
from utils.config import Config, with_overrides
from utils.devices import keep_freed_memory
from utils.parallel.team import ALONE, Team
from utils.runs import FinishedRun, check_run, generator_for, note_versions, open_run, seed_everything, write_epochs
from utils.trained_fold import ALL_PATIENTS_FOLDER, NO_SCORE


@dataclass(frozen=True)
class TrainOptions:
    """What a training is asked for beside its configuration. config_name: of the folder of its runs."""

    config_name: str
    run_name: str
    device: torch.device
    folds: Sequence[int] | None
    resume: bool
    checkpoint_seconds: float
    with_report: bool = True  # figures, report.html, explorer.html; the tables are written in any case
    all_patients: bool = False  # one model on every patient in place of the folds
    epochs_from: str | None = None  # the cross-validation whose epochs and scores it takes over
    team: Team = ALONE  # the processes that share each batch
    shares_folds: bool = False  # other processes train folds of the same run
    with_wandb: bool = False  # the numbers of TensorBoard also for Weights & Biases, offline unless WANDB_MODE is set
    config_file: str | None = None  # the configuration as it was given, for the commands in messages; else config_name


def train(config: Config, options: TrainOptions) -> Path:
    """Train and test the folds, write the summary; returns the run folder.

    Raises ValueError or FileNotFoundError for whatever the user can mend: before the first fold wherever it can be known.
    """
    team = options.team
    if options.with_wandb:
        check_wandb()
    if options.device.type == "cpu":
        keep_freed_memory()
    config_file = options.config_file or options.config_name
    source = open_cross_validation(options.epochs_from, config) if options.epochs_from else None
    if options.all_patients:
        config = with_chosen_epochs(config, source)
    layout = open_layout(config, config_file)
    run_dir = Path(config.GENERAL.log_path) / options.config_name / options.run_name
    resume = options.resume or options.shares_folds  # another process may have begun the run
    asked = [ALL_PATIENTS_FOLDER] if options.all_patients else [f"fold_{fold}" for fold in options.folds or ()]
    check_run(run_dir, config, resume, asked)
    patient_of_slide = layout.patients_on_disk()
    folds, notices = find_folds(config, layout, patient_of_slide, options.folds, all_patients=options.all_patients)
    if not options.shares_folds:
        team.by_first(lambda: check_nobody_works_on(run_dir, folds))
    if not options.all_patients:
        team.by_first(lambda: check_scored_folds(run_dir))
    # Every fold splits all patients on disk into training, validation and test.
    run_data = open_run_data(config, config_file, layout, list(patient_of_slide), options.device, folds, team)
    check_started_folds(run_dir, run_data)
    if source is not None:
        check_same_data(source, run_data)
    with claimed_folds(run_dir, folds, team, one_by_one=options.shares_folds) as own_folds:
        is_noted = in_turn(run_dir, team, lambda: open_run(run_dir, config, resume))
        if source is not None and team.is_first:
            write_held_out(run_dir, source.held_out)
        say(f"Run folder: {run_dir}")
        if not is_closed_form(config):
            say(f"Curves while it trains: tensorboard --logdir {shlex.quote(str(run_dir))}")
        if word := word_on_test_scores(folds):
            say(word)
        for record in own_folds:
            folder = run_dir / record.folder
            if is_complete(folder):
                say(f"{record.title}: complete, nothing to do.")
                continue
            split = prepare_split(run_data, record)
            check_continues(folder, split)
            if not is_noted:
                in_turn(run_dir, team, lambda: note_versions(run_dir))
                is_noted = True
            team.by_first(partial(start_folder, folder, run_data, split, notices))
            if is_closed_form(config):
                team.by_first(partial(fit_closed_form, run_data, split, folder))
            else:
                train_fold(run_data, split, folder, options.checkpoint_seconds, options.with_wandb)
            if not record.is_final:
                team.by_first(partial(score_checkpoint, run_data, folder / "best.pt", folder, split.targets))
        if options.all_patients:
            say(f"Note: the model was {NO_SCORE}.")
        else:
            say(in_turn(run_dir, team, lambda: finish(run_dir, folds, options.with_report)))
    return run_dir


def train_seeds(config: Config, options: TrainOptions, seeds: Sequence[int]) -> None:
    """Train the run once per seed, in `<run>/seed_<s>`; `--mode compare` takes the run folder and averages over seeds."""
    for seed in seeds:
        say(f"Seed {seed}")
        of_seed = with_overrides(config, [f"GENERAL.seed={seed}"])
        try:
            train(of_seed, replace(options, run_name=f"{options.run_name}/seed_{seed}"))
        except FinishedRun as finished:
            raise ValueError(f"{finished} With --resume it stays as it is, and the other seeds follow.") from finished


def train_fold(
    run_data: RunData, split: Split, folder: Path, checkpoint_seconds: float, with_wandb: bool = False
) -> None:
    """Train the model of a fold, or go on with it, until its epoch is chosen; best.pt holds the chosen weights.

    Raises ValueError when the loss is no longer finite; the best weights so far are kept then, as on Ctrl-C.
    """
    config, score_name, team = run_data.config, split.record.score_name, run_data.team
    model = new_model(run_data, split)
    optimization = Optimization.of(model, config, run_data.precision)
    optimizer, scheduler, precision = optimization.optimizer, optimization.scheduler, optimization.precision
    step = make_step(model, config, run_data.encode, team)
    expression = split.targets.to(run_data.device)
    checkpoints = FoldCheckpoints(folder, untrained_fold(run_data, split), checkpoint_seconds)
    checkpoints.check_room(model)
    progress = checkpoints.restore(model, optimization)
    team.same_start(model)
    board = Board(folder / "tensorboard", progress.epoch + 1, with_wandb) if team.is_first else None
    if board is not None and progress.history:
        write_epochs(folder / "metrics.jsonl", progress.history)  # whatever has become of it meanwhile
    line = EpochLine(config, split.record)
    try:
        while not progress.is_finished(config, score_name):
            epoch = progress.epoch + 1
            batches = epoch_batches(run_data, split, expression, epoch)
            model.train()
            terms = train_one_epoch(batches, step, optimizer, precision, f"{split.record.title} epoch {epoch}", team)
            record: dict[str, float] = {"epoch": epoch, **{f"train/{term}": value for term, value in terms.items()}}
            record["learning_rate"] = float(scheduler.get_last_lr()[0])
            scheduler.step()
            if model.needs.training_spots:
                remember_training_spots(model, run_data, split, expression)
            record = team.agreed(record | scores_of_epoch(run_data, split, model))
            is_better = progress.add(record, score_name)
            if board is not None:
                board.add(record)
                write_epochs(folder / "metrics.jsonl", progress.history)
                checkpoints.save(model, optimization, progress, is_better)
            say(line.of(progress))
    except (KeyboardInterrupt, ValueError, ConnectionError):
        with undisturbed():
            if team.is_first:
                checkpoints.keep(progress)
        raise
    finally:
        if board is not None:
            board.close()
    if groups_spots(config) and team.is_first:
        write_clusters(folder / "clusters.csv", run_data, split, model, expression)
    chosen = progress.history[progress.best_epoch - 1]
    score = f"{score_name} {chosen[score_name]:.4f}" if score_name else "the number of epochs was fixed"
    say(f"{split.record.title}: epoch {progress.best_epoch} of {progress.epoch} chosen ({score}).")


def make_step(
    model: ExpressionModel, config: Config, encode: Encode, team: Team = ALONE
) -> Callable[[SpotBatch], dict[str, Tensor]]:
    """Make the training step of model and loss: batch -> named loss terms, of which "total" is learned from."""
    make_loss = find_model(config.MODEL.name).loss
    assert make_loss is not None, "a closed form is fitted, not trained"
    loss = make_loss(config.LOSS)
    if team.size > 1:
        return shared_step(model, loss, encode, team)

    def step(batch: SpotBatch) -> dict[str, Tensor]:
        assert batch.expression is not None, "training needs measured expression"
        return loss(forward(model, encode, batch), batch.expression)

    return step


def epoch_batches(run_data: RunData, split: Split, expression: Tensor, epoch: int) -> TrainingBatches:
    """Draw the batches of an epoch and seed whatever else is drawn in it.

    Seeded by epoch: what is drawn in an epoch depends on (seed, fold, epoch) alone, so a continued training draws what an
    undisturbed one would, on whatever device, and no generator's state needs to be stored.
    """
    config, store = run_data.config, run_data.store
    keys = (config.GENERAL.seed, split.record.fold, epoch)
    team = run_data.team
    seed_everything(*keys, *([f"process {team.rank}"] if team.rank else []))  # each drops out its own
    generator = generator_for(*keys, "batches")
    rows = epoch_rows(
        store.slide_of_row,
        store.rows_of(split.record.train_slides),
        batch_size=config.TRAINING.batch_size,
        minimum=config.LOSS.k,
        slides_per_batch=config.TRAINING.slides_per_batch,
        generator=generator,
    )
    gather = whole_batch if team.size == 1 else partial(share_of, rank=team.rank, size=team.size)
    return TrainingBatches(run_data.maker, rows, expression, generator, gather)


def scores_of_epoch(run_data: RunData, split: Split, model: ExpressionModel) -> dict[str, float]:
    """Score the validation slides and the test slides as they are predicted now: {"validation/pcc_all": ..., ...}."""
    evaluation = run_data.config.EVALUATION

    def result_of(record: SlideRecord) -> SlideResult:
        (prediction,) = predict_slide(
            [model],
            run_data.maker.slide(record),
            run_data.precision,
            chunk_size=evaluation.chunk_size,
            encode=run_data.encode,
        )
        return slide_result(record, split.genes, prediction, split.targets[record.start : record.stop].numpy())

    found: dict[str, float] = {}
    for part, slides in (("validation", split.record.validation_slides), ("test", split.record.test_slides)):
        results = run_data.team.shared(result_of, run_data.store.named(slides), "evaluation", "slide")
        if results:
            scores = epoch_scores(results, evaluation.protocol)
            found |= {f"{part}/{name}": value for name, value in scores.items()}
    return found
