"""Trained folds applied together to one slide, its spots streaming through all of them."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.field_of_view import TOLERANCE
from evaluation.slide_result import MEAN
from models.contract import FUSED, ExpressionModel, Needs
from modes.prediction.model import has_pooled_target, needs_of, restored_config, restored_model
from modes.prediction.slide import Scales
from utils.checkpoint import check_fold_folders, fold_folders, load_checkpoint, result_folder
from utils.config import Config
from utils.devices import Precision
from utils.files import reading, write_text
from utils.text import LONGEST_NAME
from utils.trained_fold import NO_SCORE, TESTED_RUNS, TrainedFold
from utils.untrusted.tensors import digest_of

# Spots that pass the models at a time: their tokens and the activations of the fusion take about 4 MB a spot.
CHUNK_SIZE = 256


@dataclass
class Member:
    """One trained fold without its weights, and while it predicts its model."""

    path: Path
    fold: TrainedFold
    config: Config
    device: torch.device
    precision: Precision
    _model: ExpressionModel | None = None

    @property
    def name(self) -> str:
        """Name of its folder, "fold_<index>" or "all_patients"."""
        return self.fold.split.folder

    @property
    def run_name(self) -> str:
        """Name of the run folder, or of the folder that a checkpoint outside any run lies in."""
        return self.run_folder.name

    @property
    def run_folder(self) -> Path:
        """The run folder, or the folder that a checkpoint outside any run lies in.

        A link to a fold's folder or file is of the run that it lies in, not of the one that it leads to.
        """
        folder = Path(os.path.abspath(self.path)).parent
        return (folder.parent if folder.name == self.name else folder).resolve()

    @property
    def genes(self) -> list[str]:
        """The panel that it predicts, in order."""
        return self.fold.genes

    @property
    def needs(self) -> Needs:
        """Which inputs its model reads."""
        return needs_of(self.config)

    def load(self) -> ExpressionModel:
        """Give the model with its weights on the device, read from the checkpoint unless it is held."""
        if self._model is None:
            fold = load_checkpoint(self.path, memory_map=True)
            self._model = restored_model(fold, self.path, self.device).eval()
        return self._model

    def release(self) -> None:
        """Let the model go; the next `load` reads it again."""
        self._model = None


def load_members(checkpoints: Sequence[Path], overrides: Sequence[str], device: torch.device) -> list[Member]:
    """Read the folds of checkpoints (`utils.checkpoint.chosen_checkpoints`); no model of them is loaded yet.

    overrides: "SECTION.key=value" of what this machine does differently; see `restored_config`.
    Raises ValueError for another override, for a file that is no checkpoint, for folders of folds that are no run together
    (`check_fold_folders`), for two files of one fold, and for folds of which one was trained on other features (patch encoder,
    pooling of tokens, patch size, field of view, neighbors) or another data set than the first.
    """
    check_fold_folders(checkpoints)
    members = []
    first: dict[tuple[Path, str], Member] = {}
    for checkpoint in checkpoints:
        fold = load_checkpoint(checkpoint, memory_map=True).without_weights()
        config = restored_config(fold, checkpoint, overrides)
        member = Member(checkpoint, fold, config, device, Precision(config.TRAINING.precision, device))
        if (other := first.setdefault((member.run_folder, member.name), member)) is not member:
            raise ValueError(
                f"--model_path gives two files of {member.name.replace('_', ' ')} of {member.run_folder}: {other.path} and "
                f"{checkpoint}. A mean takes one file of each fold of a run; give one of them. Files of other runs: move them "
                "into a folder for each run."
            )
        members.append(member)
    _check_alike(members)
    return members


def needs_of_all(members: Sequence[Member]) -> Needs:
    """Say which inputs one of the models reads."""
    each = [vars(member.needs) for member in members]
    return Needs(**{name: any(needs[name] for needs in each) for name in each[0]})


def ensemble_folder(runs: Sequence[Path]) -> Path:
    """Choose where the results of several runs together go: beside the first, named after all."""
    name = f"ensemble_{'+'.join(run.name for run in runs)}"
    is_long = len(name.encode()) > LONGEST_NAME
    return runs[0].parent / (f"ensemble_of_{len(runs)}_{runs[0].name}" if is_long else name)


def write_tested_runs(folder: Path, runs: Sequence[Path]) -> None:
    """Write into the folder of several runs together which runs they are."""
    write_text(folder / TESTED_RUNS, json.dumps({"runs": _relative(folder, runs)}, indent=2) + "\n")


def is_test_of(folder: Path, runs: Sequence[Path]) -> bool:
    """Whether a folder holds the test of these very runs: others of the same names get the same folder.

    Raises ValueError for a record that cannot be read.
    """
    path = folder / TESTED_RUNS
    if not path.is_file():
        return False
    with reading(path, "the record of which runs were tested together"):
        return json.loads(path.read_text(encoding="utf-8")).get("runs") == _relative(folder, runs)


def models_of(checkpoints: Sequence[Path]) -> list[str]:
    """Compute what is recorded of the models that a fold of several runs was tested with: a digest of each file."""
    return [digest_of(checkpoint) if checkpoint.is_file() else "" for checkpoint in checkpoints]


def outdated_folds(folder: Path, runs: Sequence[Path]) -> list[str]:
    """Name the scored folds in the folder of several runs that were not tested with the models that the runs hold now.

    Earlier versions recorded no models; a record that cannot be read is of others.
    """
    found = []
    for fold in fold_folders(folder).values():
        if not (fold / "result.json").is_file():
            continue
        try:
            with reading(fold / "split.json", "the record of a fold"):
                tested = json.loads((fold / "split.json").read_text(encoding="utf-8")).get("models")
        except (ValueError, OSError):
            tested = []
        if tested is not None and tested != models_of([run / fold.name / "best.pt" for run in runs]):
            found.append(fold.name)
    return found


def _relative(folder: Path, runs: Sequence[Path]) -> list[str]:
    return [os.path.relpath(run, folder) for run in runs]


def _reads_pooled(member: Member) -> bool:
    return has_pooled_target(member.config)


def _check_alike(members: Sequence[Member]) -> None:
    def what_it_reads(member: Member) -> dict[str, object]:
        encoder, data = member.fold.encoder, member.config.DATA
        return {
            "encoder": (encoder.name, encoder.sha256, encoder.token_pool),
            "patch size": data.patch_size,
            "patch width (um)": data.patch_um,
            "number of neighbors": data.num_neighbors,
            "data set": data.type,
        }

    def width_of(member: Member) -> float | None:
        return field_of_view_of([other for other in members if other.run_folder == member.run_folder])

    pooled, full = ([m for m in members if reads(m)] for reads in (_reads_pooled, lambda m: m.needs.tokens))
    if pooled and full:  # the tokens that are read for one would reach the other
        raise ValueError(
            f"{pooled[0].path} and {full[0].path} cannot be averaged: DATA.tokens=pooled in one of them, all tokens in the "
            "other. Give one of them with --model_path."
        )
    first, width = what_it_reads(members[0]), width_of(members[0])
    for member in members[1:]:
        differences = [
            f"{name} {value} instead of {first[name]}"
            for name, value in what_it_reads(member).items()
            if value != first[name]
        ]
        other = width_of(member)
        if width and other and abs(other / width - 1) > TOLERANCE:
            differences.append(f"patches {other:.0f} um wide instead of {width:.0f}")
        if differences:
            raise ValueError(
                f"{member.path} and {members[0].path} cannot be averaged: {'; '.join(differences)}. Give one of them with "
                "--model_path."
            )


def run_folder(members: Sequence[Member], model_path: str | Path, fold: int | None) -> Path:
    """Choose where results go: the run folder where all of its folds are meant, a fold's own folder where one was asked for."""
    of_all = fold is None and Path(model_path).is_dir() and not (Path(model_path) / "best.pt").is_file()
    return Path(model_path) if of_all else result_folder(members[0].path)


def shared_genes(members: Sequence[Member]) -> list[str]:
    """Find the genes that every fold predicts, in the order of the first (in the clean protocol panels differ).

    Raises ValueError if there is none.
    """
    shared = set.intersection(*(set(member.genes) for member in members))
    genes = [gene for gene in members[0].genes if gene in shared]
    if not genes:
        raise ValueError(
            f"The panels of {len(members)} folds share no gene, so their predictions have no mean. Choose one with --fold."
        )
    return genes


def columns_of(member: Member, genes: Sequence[str]) -> np.ndarray:
    """Find the places (G,) of the genes in the fold's panel, which must have them all."""
    place = {gene: index for index, gene in enumerate(member.genes)}
    return np.array([place[gene] for gene in genes], dtype=np.int64)


def of_genes(members: Sequence[Member], genes: Sequence[str]) -> Callable[[list[Scales]], list[Scales]]:
    """Make the function that keeps, of the predictions of each fold, those of some genes in their order."""
    columns = [columns_of(member, genes) for member in members]

    def keep(found: list[Scales]) -> list[Scales]:
        # Not [:, chosen], which would turn rows into columns in memory, and with them the order of later sums.
        return [
            {scale: np.take(values, chosen, axis=1) for scale, values in prediction.items()}
            for prediction, chosen in zip(found, columns)
        ]

    return keep


def mean_prediction(predictions: Sequence[Scales], runs: Sequence[object]) -> Scales:
    """Average over the folds of each run, then over the runs: {scale: (b, G) float32} of the scales that all have.

    runs: of which run each prediction is.
    """
    of_run = [[found for found, its in zip(predictions, runs) if its == run] for run in dict.fromkeys(runs)]
    shared = [scale for scale in predictions[0] if all(scale in found for found in predictions)]
    means = {scale: [np.mean([found[scale] for found in group], axis=0) for group in of_run] for scale in shared}
    return {scale: each[0] if len(each) == 1 else np.mean(each, axis=0) for scale, each in means.items()}


def deviation(predictions: Sequence[Scales]) -> np.ndarray:
    """Compute the standard deviation (b, G) float32 of the fused predictions over all folds and runs, divisor n - 1."""
    return np.std([found[FUSED] for found in predictions], axis=0, ddof=1)


def field_of_view_of(members: Sequence[Member]) -> float | None:
    """Average the width of a training patch in micrometres over the folds; None where no fold knows it."""
    known = [size for member in members if (size := member.fold.field_of_view_um) is not None]
    return float(np.mean(known)) if known else None


def width_to_match(members: Sequence[Member]) -> float:
    """Find the width of a training patch in micrometres. Raises ValueError where the run does not know it."""
    width = field_of_view_of(members)
    if width is None:
        raise ValueError(
            "--match_mpp: the size of a pixel of the training slides is not known to this run (microns_per_pixel of the data "
            "set), so there is no field of view to match. Leave the flag out."
        )
    return width


def peak_memory() -> dict[str, float]:
    """Measure the greatest memory of this process so far, in GB: of the host and, if there is one, of the CUDA device."""
    peak = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}  # KiB on Linux
    if torch.cuda.is_available():
        peak["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return peak


def describe_peak(peak: dict[str, float]) -> str:
    """Say the peak of `peak_memory` in a sentence."""
    device = f", {peak['device_gb']:.2f} GB of the device" if "device_gb" in peak else ""
    return f"Peak memory: {peak['host_gb']:.2f} GB of the host{device}."


def provenance_of(members: Sequence[Member], notes: Sequence[str]) -> dict[str, object]:
    """Say which models made a prediction. notes: on folds that were left out, or taken although they are not finished."""
    made = members[0].fold.encoder
    runs = list(dict.fromkeys(member.run_folder for member in members))
    return {
        **({"folds": " ".join(notes)} if notes else {}),
        "checkpoints": [f"{member.path.parent.name}/{member.path.name}" for member in members],
        **({"runs": [member.run_name for member in members]} if len(runs) > 1 else {}),
        "epochs": [int(member.fold.epoch) for member in members],
        "prediction": MEAN if len(members) > 1 else members[0].name,
        "held_out": f"The model was {NO_SCORE}." if members[0].fold.split.is_final else None,
        "training_type": members[0].config.DATA.type,
        "protocol": members[0].fold.split.protocol,
        "encoder": made.name,
        "encoder_sha256": made.sha256,
        "patch_size": members[0].config.DATA.patch_size,
        "smoothing": "mean over the 3x3 array neighborhood",
        "log_base": 10,
    }
