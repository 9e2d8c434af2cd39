"""The training of one fold: weights, optimiser, progress, and their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from datasets.batches import TrainingBatches, epoch_rows
from datasets.field_of_view import field_of_view
from engine import evaluate, train_one_epoch
from evaluation.protocol import SlideResult, epoch_scores
from models.baselines.spot_model import ClosedForm
from models.contract import ExpressionModel, ModelInputs
from modes.training.compose import (
    Optimization,
    batch_clusters,
    groups_spots,
    is_closed_form,
    make_model,
    make_predict,
    make_step,
)
from modes.training.run_data import RunData
from modes.training.split import Split
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.cli import say
from utils.files import write_atomically, write_text
from utils.runs import Board, generator_for, seed_everything, write_epochs, write_json
from utils.trained_fold import PatchEncoderRecord, Progress, TrainedFold

CHECKPOINT_SECONDS = 60.0  # a large model's checkpoint takes seconds, an epoch may take less


@dataclass
class FoldRun:
    """Training of one fold: weights, optimiser, progress, and their files."""

    run_data: RunData
    split: Split
    folder: Path
    model: ExpressionModel
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def train(self) -> None:
        """Train, or go on from `last.pt`, until the epoch is chosen; `best.pt` holds the chosen weights."""
        config = self.run_data.config
        self.optimization = Optimization.of(self.model, config, self.run_data.precision)
        self._best, self._best_is_written, self._last_saved = None, True, time.monotonic()
        state = self._restore()
        self.predict = make_predict(self.model, config, self.run_data.encode, self.optimization.precision)
        self.step = make_step(self.model, config, self.run_data.encode)
        self.expression = self.split.targets.to(self.run_data.device)
        board = Board(self.folder / "tensorboard", state.epoch + 1)
        score_name = self.split.record.score_name
        try:
            while not state.is_finished(config, score_name):
                record = self._run_epoch(state.epoch + 1)
                is_better = state.add(record, score_name)
                board.add(record)
                self._save(state, is_better, state.is_finished(config, score_name))
        except (KeyboardInterrupt, ValueError):
            self._keep(state)
            raise
        finally:
            board.close()
        self._write_clusters()
        self._say_result(state, score_name)

    def _run_epoch(self, epoch: int) -> dict[str, float]:
        config, store = self.run_data.config, self.run_data.store
        # Seeded by epoch: what is drawn in an epoch depends on (seed, fold, epoch) alone, so a continued training draws
        # what an undisturbed one would, on whatever device, and no generator's state needs to be stored.
        keys = (config.GENERAL.seed, self.split.record.fold, epoch)
        seed_everything(*keys)
        generator = generator_for(*keys, "batches")
        batches = epoch_rows(
            store.slide_of_row,
            store.rows_of(self.split.record.train_slides),
            batch_size=config.TRAINING.batch_size,
            minimum=config.LOSS.k,
            slides_per_batch=config.TRAINING.slides_per_batch,
            generator=generator,
        )
        self.model.train()
        name = f"fold {self.split.record.fold} ({self.split.record.name}) epoch {epoch}"
        loader = TrainingBatches(self.run_data.maker, batches, self.expression, generator)
        optimization = self.optimization
        terms = train_one_epoch(loader, self.step, optimization.optimizer, optimization.precision, name)
        record: dict[str, float] = {"epoch": epoch, **{f"train/{term}": value for term, value in terms.items()}}
        record["learning_rate"] = optimization.scheduler.get_last_lr()[0]
        optimization.scheduler.step()
        record_of_split = self.split.record
        for part, slides in (("validation", record_of_split.validation_slides), ("test", record_of_split.test_slides)):
            if slides:
                record |= {f"{part}/{key}": value for key, value in self._scores(slides).items()}
        return record

    def _scores(self, slides: list[str]) -> dict[str, float]:
        records = self.run_data.store.named(slides)
        predictions = evaluate([self.run_data.maker.slide(record) for record in records], self.predict, "evaluation")
        results = [
            SlideResult(
                slide=record.name,
                patient=record.patient,
                spot_ids=list(record.table.obs_names),
                grid_xy=None,
                genes=self.split.genes,
                measured=self.split.targets[record.start : record.stop].numpy(),
                measured_unsmoothed=None,
                predictions={scale: values.numpy() for scale, values in prediction.items()},
            )
            for record, prediction in zip(records, predictions)
        ]
        return epoch_scores(results, self.run_data.config.EVALUATION.protocol)

    def _restore(self) -> Progress:
        last = self.folder / "last.pt"
        if not last.exists():
            return Progress()
        trained = load_checkpoint(last)
        load_weights(self.model, trained.weights, last)
        assert trained.optimization is not None, "last.pt holds the optimiser"
        self.optimization.load_state(trained.optimization)
        say(f"Fold {self.split.record.fold} ({self.split.record.name}): goes on after epoch {trained.epoch}.")
        return trained.progress

    def _save(self, progress: Progress, is_better: bool, is_last: bool) -> None:
        """Keep the best weights in memory and write both checkpoints at most every `checkpoint_seconds`.

        best.pt is written before last.pt, which speaks of it: after a crash in between, the epochs since the older last.pt
        are trained again, with the same result.
        """
        if is_better:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = weights, replace(progress, history=list(progress.history))
            self._best_is_written = False
        write_epochs(self.folder / "metrics.jsonl", progress.history)
        if not is_last and time.monotonic() - self._last_saved < self.checkpoint_seconds:
            return
        if is_last or not self._best_is_written:
            best = self._best[0] if self._best else load_checkpoint(self.folder / "best.pt").weights
            self.save_best(best, progress, finished=is_last)
            self._best_is_written = True
        trained = trained_fold(self.run_data, self.split, self.model.state_dict(), progress, finished=is_last)
        save_checkpoint(self.folder / "last.pt", replace(trained, optimization=self.optimization.state()))
        self._last_saved = time.monotonic()

    def _keep(self, state: Progress) -> None:
        """Stopped inside an epoch: write the best weights, which are a copy, and say where --resume will go on.

        last.pt stays as it is: the model and the optimiser are in the middle of an epoch.
        """
        if not self._best_is_written:
            self.save_best(*self._best, finished=False)
        last = self.folder / "last.pt"
        saved = load_checkpoint(last, memory_map=True).epoch if last.exists() else None
        goes_on = f"goes on after epoch {saved}" if saved else "starts this fold anew"
        say(
            f"Fold {self.split.record.fold} ({self.split.record.name}): stopped, epochs done: {state.epoch}; --resume "
            f"{goes_on} (--checkpoint_seconds: {self.checkpoint_seconds:g} s between two checkpoints) and comes to the same."
        )

    def save_best(self, weights: dict[str, Tensor], progress: Progress, *, finished: bool) -> None:
        """Write `best.pt`: what testing and predicting need, and the epoch it is from.

        finished: the training has ended; a test and the other modes take these weights for those of the fold.
        """
        trained = trained_fold(self.run_data, self.split, weights, progress, finished=finished)
        save_checkpoint(self.folder / "best.pt", replace(trained, epoch=progress.best_epoch))

    def _write_clusters(self) -> None:
        """clusters.csv: how the first batch of an epoch is grouped by its image and by its gene vectors (the figure)."""
        config, store = self.run_data.config, self.run_data.store
        if not groups_spots(config):
            return
        generator = generator_for(config.GENERAL.seed, self.split.record.fold, "clusters")
        rows = store.rows_of(self.split.record.train_slides)
        rows = rows[torch.randperm(len(rows), generator=generator)][: config.TRAINING.batch_size]
        batch = self.run_data.maker.spots(rows, torch.zeros_like(rows), self.expression, with_slides=True)
        self.model.eval()
        with torch.inference_mode(), self.optimization.precision.autocast():
            image, gene = batch_clusters(self.model, config, self.run_data.encode, batch)
        slides = [store.slides[i] for i in store.slide_of_row[rows].tolist()]
        table = pd.DataFrame(
            {
                "slide": [slide.name for slide in slides],
                "patient": [slide.patient for slide in slides],
                "image_cluster": image.tolist(),
                "gene_cluster": gene.tolist(),
            }
        )
        write_atomically(self.folder / "clusters.csv", lambda temporary: table.to_csv(temporary, index=False))

    def _say_result(self, state: Progress, score_name: str | None) -> None:
        chosen = state.history[state.best_epoch - 1]
        score = f"{score_name} {chosen[score_name]:.4f}" if score_name else "the number of epochs was fixed"
        name = f"Fold {self.split.record.fold} ({self.split.record.name})"
        say(f"{name}: epoch {state.best_epoch} of {state.epoch} chosen ({score}).")


def trained_fold(
    run_data: RunData, split: Split, weights: dict[str, Tensor], progress: Progress, *, finished: bool
) -> TrainedFold:
    """What is to be saved of a fold whose weights are those of the last epoch."""
    pixels = {slide.name: slide.table.obsm["spatial"] for slide in run_data.store.named(split.record.train_slides)}
    return TrainedFold(
        weights=weights,
        epoch=progress.epoch,
        progress=progress,
        config=run_data.config,
        config_name=run_data.config_name,
        genes=split.genes,
        encoder=PatchEncoderRecord(
            **asdict(run_data.store.encoder),
            dim=run_data.store.target_features.shape[1],
            token_dim=run_data.token_dim,
            token_pool=run_data.token_pool,
        ),
        split=split.record,
        training_mean=split.training_mean,
        gene_lists=split.gene_lists,
        field_of_view_um=field_of_view(run_data.layout, pixels),
        finished=finished,
    )


def new_model(run_data: RunData, split: Split) -> ExpressionModel:
    """The model with its initial weights drawn from (seed, fold)."""
    seed_everything(run_data.config.GENERAL.seed, split.record.fold, "weights")
    model = make_model(
        run_data.config,
        feature_dim=run_data.store.target_features.shape[1],
        token_dim=run_data.token_dim,
        num_genes=len(split.genes),
    )
    if run_data.config.TRAINING.start_at_mean and not is_closed_form(run_data.config):
        rows = run_data.store.rows_of(split.record.train_slides)
        model.start_at_mean(split.targets[rows].mean(dim=0))
    return model.to(run_data.device)


def start_folder(folder: Path, run_data: RunData, split: Split, notices: Sequence[str]) -> None:
    """Write the split and the panel before the first epoch, so that they stand beside whatever comes.

    notices: sentences about what was left out, for the summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # scores of an earlier epoch
    for leftover in folder.glob(".*.pt"):  # what a kill in the middle of a save left behind
        leftover.unlink()
    described = {
        **split.record.to_dict(),
        "tokens": run_data.token_source,
        "run_notes": list(notices),
    }
    write_json(folder / "split.json", described)
    write_text(folder / "genes.txt", "\n".join(split.genes) + "\n")


def fit_closed_form(run: FoldRun) -> None:
    """A baseline without a loop: fitted once on the outer training spots, tuned on inner patients by itself."""
    run_data, split = run.run_data, run.split
    slides = run_data.store.named(split.record.fitted_slides)
    rows = run_data.store.rows_of([slide.name for slide in slides])
    per_row: Callable[[str], list[str]] = lambda name: [  # noqa: E731
        getattr(slide, name) for slide in slides for _ in range(slide.start, slide.stop)
    ]
    neighbors = run_data.store.neighbor_features
    assert isinstance(run.model, ClosedForm)
    report = run.model.fit(
        ModelInputs(
            target_features=run_data.store.target_features[rows],
            neighbor_features=None if neighbors is None else neighbors[rows],
            neighbor_is_valid=run_data.store.neighbor_is_valid[rows],
        ),
        split.targets[rows],
        patients=per_row("patient"),
        slides=per_row("name"),
    )
    write_json(run.folder / "fit.json", report)
    write_epochs(run.folder / "metrics.jsonl", [])
    run.save_best(run.model.state_dict(), Progress(epoch=0, best_epoch=0), finished=True)
