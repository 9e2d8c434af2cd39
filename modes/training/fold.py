"""The training of one fold: weights, optimiser, progress, and their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from datasets.batches import TrainingBatches, epoch_rows
from datasets.field_of_view import field_of_view
from engine import Progress, evaluate, fit, train_one_epoch
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
from modes.training.run_data import Study
from modes.training.split import Split
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.cli import say
from utils.files import write_atomically, write_text
from utils.runs import Board, generator_for, seed_everything, write_epochs, write_json

CHECKPOINT_SECONDS = 60.0  # a large model's checkpoint takes seconds, an epoch may take less


@dataclass
class FoldRun:
    """Training of one fold: weights, optimiser, progress, and their files."""

    study: Study
    split: Split
    folder: Path
    model: ExpressionModel
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def train(self) -> None:
        """Train, or go on from `last.pt`, until the epoch is chosen; `best.pt` holds the chosen weights."""
        config = self.study.config
        self.optimization = Optimization.of(self.model, config, self.study.precision)
        self._best, self._best_is_written, self._last_saved = None, True, time.monotonic()
        state = self._restore()
        self.predict = make_predict(self.model, config, self.study.encode, self.optimization.precision)
        self.step = make_step(self.model, config, self.study.encode)
        self.expression = self.split.targets.to(self.study.device)
        board = Board(self.folder / "tensorboard", state.epoch + 1)
        epochs = config.EVALUATION.fixed_epochs or config.TRAINING.epochs
        score_name = {"validation": "validation/pcc_all", "test": "test/pcc_all", "fixed": None}[self.split.selection]

        def save(progress: Progress, is_better: bool) -> None:
            board.add(progress.history[-1])
            is_last = progress.is_finished(epochs, config.TRAINING.patience if score_name else None)
            self._save(progress, is_better, is_last)

        try:
            fit(
                state,
                epochs=epochs,
                patience=config.TRAINING.patience,
                run_epoch=self._run_epoch,
                score_name=score_name,
                save=save,
            )
        except (KeyboardInterrupt, ValueError):
            self._keep(state)
            raise
        finally:
            board.close()
        self._write_clusters()
        self._say_result(state, score_name)

    def _run_epoch(self, epoch: int) -> dict[str, float]:
        config, store = self.study.config, self.study.store
        # Seeded by epoch: what is drawn in an epoch depends on (seed, fold, epoch) alone, so a continued training draws
        # what an undisturbed one would, on whatever device, and no generator's state needs to be stored.
        keys = (config.GENERAL.seed, self.split.fold.index, epoch)
        seed_everything(*keys)
        generator = generator_for(*keys, "batches")
        batches = epoch_rows(
            store.slide_of_row,
            store.rows_of(self.split.train_slides),
            batch_size=config.TRAINING.batch_size,
            minimum=config.LOSS.k,
            slides_per_batch=config.TRAINING.slides_per_batch,
            generator=generator,
        )
        self.model.train()
        name = f"fold {self.split.fold.index} ({self.split.fold.name}) epoch {epoch}"
        loader = TrainingBatches(self.study.maker, batches, self.expression, generator)
        optimization = self.optimization
        terms = train_one_epoch(loader, self.step, optimization.optimizer, optimization.precision, name)
        record = {f"train/{term}": value for term, value in terms.items()}
        record["learning_rate"] = optimization.scheduler.get_last_lr()[0]
        optimization.scheduler.step()
        for part, slides in (("validation", self.split.validation_slides), ("test", self.split.test_slides)):
            if slides:
                record |= {f"{part}/{key}": value for key, value in self._scores(slides).items()}
        return record

    def _scores(self, slides: list[str]) -> dict[str, float]:
        records = self.study.store.named(slides)
        predictions = evaluate([self.study.maker.slide(record) for record in records], self.predict, "evaluation")
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
        return epoch_scores(results, self.study.config.EVALUATION.protocol)

    def _restore(self) -> Progress:
        last = self.folder / "last.pt"
        if not last.exists():
            return Progress()
        content = load_checkpoint(last)
        load_weights(self.model, content["model"], last)
        self.optimization.load_state_dict(content)
        say(f"Fold {self.split.fold.index} ({self.split.fold.name}): goes on after epoch {content['epoch']}.")
        return Progress(**content["progress"])

    def _save(self, progress: Progress, is_better: bool, is_last: bool) -> None:
        """Keep the best weights in memory and write both checkpoints at most every `checkpoint_seconds`.

        best.pt is written before last.pt, which speaks of it: after a crash in between, the epochs since the older last.pt
        are trained again, with the same result.
        """
        if is_better:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = weights, Progress(**progress.to_dict())
            self._best_is_written = False
        write_epochs(self.folder / "metrics.jsonl", progress.history)
        if not is_last and time.monotonic() - self._last_saved < self.checkpoint_seconds:
            return
        if is_last or not self._best_is_written:
            best = self._best[0] if self._best else load_checkpoint(self.folder / "best.pt")["model"]
            self.save_best(best, progress, finished=is_last)
            self._best_is_written = True
        content = checkpoint_content(self.study, self.split, self.model.state_dict(), progress, finished=is_last)
        save_checkpoint(self.folder / "last.pt", {**content, **self.optimization.state_dict()})
        self._last_saved = time.monotonic()

    def _keep(self, state: Progress) -> None:
        """Stopped inside an epoch: write the best weights, which are a copy, and say where --resume will go on.

        last.pt stays as it is: the model and the optimiser are in the middle of an epoch.
        """
        if not self._best_is_written:
            self.save_best(*self._best, finished=False)
        last = self.folder / "last.pt"
        saved = load_checkpoint(last, memory_map=True)["epoch"] if last.exists() else None
        goes_on = f"goes on after epoch {saved}" if saved else "starts this fold anew"
        say(
            f"Fold {self.split.fold.index} ({self.split.fold.name}): stopped, epochs done: {state.epoch}; --resume "
            f"{goes_on} (--checkpoint_seconds: {self.checkpoint_seconds:g} s between two checkpoints) and comes to the same."
        )

    def save_best(self, weights: dict[str, Tensor], progress: Progress, *, finished: bool) -> None:
        """Write `best.pt`: what testing and predicting need, and the epoch it is from.

        finished: the training has ended; a test and the other modes take these weights for those of the fold.
        """
        content = checkpoint_content(self.study, self.split, weights, progress, finished=finished)
        save_checkpoint(self.folder / "best.pt", {**content, "epoch": progress.best_epoch})

    def _write_clusters(self) -> None:
        """clusters.csv: how the first batch of an epoch is grouped by its image and by its gene vectors (the figure)."""
        config, store = self.study.config, self.study.store
        if not groups_spots(config):
            return
        generator = generator_for(config.GENERAL.seed, self.split.fold.index, "clusters")
        rows = store.rows_of(self.split.train_slides)
        rows = rows[torch.randperm(len(rows), generator=generator)][: config.TRAINING.batch_size]
        batch = self.study.maker.spots(rows, torch.zeros_like(rows), self.expression, with_slides=True)
        self.model.eval()
        with torch.inference_mode(), self.optimization.precision.autocast():
            image, gene = batch_clusters(self.model, config, self.study.encode, batch)
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
        name = f"Fold {self.split.fold.index} ({self.split.fold.name})"
        say(f"{name}: epoch {state.best_epoch} of {state.epoch} chosen ({score}).")


def checkpoint_content(
    study: Study, split: Split, weights: dict[str, Tensor], progress: Progress, *, finished: bool
) -> dict:
    """Everything a test, a prediction or a continuation needs; without the frozen encoder, of which name and hash stay."""
    pixels = {slide.name: slide.table.obsm["spatial"] for slide in study.store.named(split.train_slides)}
    return {
        "model": weights,
        "epoch": progress.epoch,
        "finished": finished,
        "progress": progress.to_dict(),
        "config": study.config.to_dict(),
        "config_name": study.config_name,
        "genes": split.genes,
        "encoder": {
            **asdict(study.store.encoder),
            "dim": study.store.target_features.shape[1],
            "token_dim": study.token_dim,
            "token_pool": study.token_pool,
        },
        "fold": split.to_dict(study.config.EVALUATION.protocol),
        "training_mean": split.training_mean,
        "gene_lists": split.gene_lists,
        "field_of_view_um": field_of_view(study.layout, pixels),
    }


def new_model(study: Study, split: Split) -> ExpressionModel:
    """The model with its initial weights drawn from (seed, fold)."""
    seed_everything(study.config.GENERAL.seed, split.fold.index, "weights")
    model = make_model(
        study.config,
        feature_dim=study.store.target_features.shape[1],
        token_dim=study.token_dim,
        num_genes=len(split.genes),
    )
    if study.config.TRAINING.start_at_mean and not is_closed_form(study.config):
        rows = study.store.rows_of(split.train_slides)
        model.start_at_mean(split.targets[rows].mean(dim=0))
    return model.to(study.device)


def start_folder(folder: Path, study: Study, split: Split, notices: Sequence[str]) -> None:
    """Write the split and the panel before the first epoch, so that they stand beside whatever comes.

    notices: sentences about what was left out, for the summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # scores of an earlier epoch
    for leftover in folder.glob(".*.pt"):  # what a kill in the middle of a save left behind
        leftover.unlink()
    described = {
        **split.to_dict(study.config.EVALUATION.protocol),
        "tokens": study.token_source,
        "run_notes": list(notices),
    }
    write_json(folder / "split.json", described)
    write_text(folder / "genes.txt", "\n".join(split.genes) + "\n")


def fit_closed_form(run: FoldRun) -> None:
    """A baseline without a loop: fitted once on the outer training spots, tuned on inner patients by itself."""
    study, split = run.study, run.split
    slides = study.store.named([*split.train_slides, *split.validation_slides])
    rows = study.store.rows_of([slide.name for slide in slides])
    per_row: Callable[[str], list[str]] = lambda name: [  # noqa: E731
        getattr(slide, name) for slide in slides for _ in range(slide.start, slide.stop)
    ]
    neighbors = study.store.neighbor_features
    assert isinstance(run.model, ClosedForm)
    report = run.model.fit(
        ModelInputs(
            target_features=study.store.target_features[rows],
            neighbor_features=None if neighbors is None else neighbors[rows],
            neighbor_is_valid=study.store.neighbor_is_valid[rows],
        ),
        split.targets[rows],
        patients=per_row("patient"),
        slides=per_row("name"),
    )
    write_json(run.folder / "fit.json", report)
    write_epochs(run.folder / "metrics.jsonl", [])
    run.save_best(run.model.state_dict(), Progress(epoch=0, best_epoch=0), finished=True)
