"""A trained fold as a type: what a checkpoint holds, and the one place that names the keys of its file."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from utils.config import Config, config_from_dict
from utils.text import brief, checked_names

_KINDS = {
    "model": dict,
    "epoch": int,
    "progress": dict,
    "config": dict,
    "config_name": str,
    "genes": list,
    "encoder": dict,
    "fold": dict,
    "training_mean": Tensor,
}
ALL_PATIENTS = -1  # in place of its index: the fold that trains on every patient and tests on none
ALL_PATIENTS_FOLDER = "all_patients"
FOLD_FOLDER = re.compile(r"fold_(\d+)")
COPIED_FOLD = "A fold that was copied into a run counts twice or is of another training: move it away."
NO_SCORE = "trained on all patients, so no patient is held out and it has no score of its own"
_KIND_OF = {"int": int, "str": str, "list": list, "dict": dict}  # of the entries of a split, by how they are declared
_LATER = ("digests", "panel")  # entries that earlier versions did not write
TESTED_RUNS = "ensemble.json"  # in the folder of several runs that were tested together: which they are

Record = TypeVar("Record", "Progress", "SplitRecord", "PatchEncoderRecord", "OptimizationState")


def made_again(
    path: Path, without: str = "Restore it, or move the folder elsewhere and train the fold again (--resume)."
) -> str:
    """Say what makes a file of a fold again that was scored: a test of its checkpoint; without one there is none.

    without: what to do then.
    """
    if (path.parent.parent / TESTED_RUNS).is_file():
        return "A test of its runs together makes it again: python main.py --mode test --model_path RUN RUN"
    if not (path.parent / "best.pt").is_file():
        return without
    return f"A test makes it again: python main.py --mode test --model_path {shlex.quote(str(path.parent))}"


Digests = Mapping[str, Mapping[str, str]]  # {slide: {part: digest}}, as `datasets.digests.digests_of`


def changed_parts(before: Digests, now: Digests, parts: Sequence[str]) -> dict[str, list[str]]:
    """Find which of these parts of a slide has another digest, {slide: parts}, sorted; what one side alone knows has not."""
    found = {}
    for slide in sorted(set(before) & set(now)):
        known = [part for part in parts if part in before[slide] and part in now[slide]]
        if changed := [part for part in known if before[slide][part] != now[slide][part]]:
            found[slide] = changed
    return found


@dataclass
class Progress:
    """Where a training stands; all of it goes into the checkpoint, so that it can go on from there."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best_score: float = -math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, record: dict[str, float], score_name: str | None) -> bool:
        """Count an epoch with its record; returns whether it is the best so far.

        score_name: the entry that chooses the epoch, the larger the better; None: the last epoch is the best.
        """
        score = float(record["epoch"]) if score_name is None else record[score_name]
        is_better = not self.history or score > self.best_score
        self.epoch += 1
        self.history.append(record)
        if is_better:
            self.best_epoch, self.best_score = self.epoch, score if math.isfinite(score) else -math.inf
        return is_better

    def is_finished(self, config: Config, score_name: str | None) -> bool:
        """Whether all epochs are done, or patience ran out where a score chooses the epoch."""
        epochs = config.EVALUATION.fixed_epochs or config.TRAINING.epochs
        waited = self.epoch - self.best_epoch
        return self.epoch >= epochs or (score_name is not None and waited >= config.TRAINING.patience)


@dataclass(frozen=True)
class SplitRecord:
    """Who a fold trains on, chooses its epoch on and is tested on; also the content of `split.json`."""

    fold: int
    name: str
    protocol: str  # clean | paper
    test_patients: list[str]
    train_patients: list[str]
    validation_patients: list[str]
    test_slides: list[str]
    train_slides: list[str]
    validation_slides: list[str]
    selection: str  # validation | test | fixed | none (a closed form has no epochs)
    features: dict[str, Any] = field(default_factory=dict)  # what the patches and their encoder were; {}: not known
    notes: list[str] = field(default_factory=list)  # for the summary
    panel: str = ""  # where its genes are from: given | file | training patients; "" in earlier versions
    # By slide, as `datasets.digests.digests_of` gives them; {}: of a version that did not record them.
    digests: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        """Whether it is the model on all patients, which has no held-out score."""
        return self.fold == ALL_PATIENTS

    @property
    def folder(self) -> str:
        """The name of its folder in the run."""
        return ALL_PATIENTS_FOLDER if self.is_final else f"fold_{self.fold}"

    @property
    def title(self) -> str:
        """How messages call the fold."""
        return "The model on all patients" if self.is_final else f"Fold {self.fold} ({self.name})"

    @property
    def score_name(self) -> str | None:
        """The entry of an epoch's record that chooses the epoch; None where the number of epochs is fixed."""
        return f"{self.selection}/pcc_all" if self.selection in ("validation", "test") else None

    @property
    def fitted_patients(self) -> list[str]:
        """The patients that had a part in the training, as training or as validation patients."""
        return [*self.train_patients, *self.validation_patients]

    @property
    def fitted_slides(self) -> list[str]:
        """The slides of those patients."""
        return [*self.train_slides, *self.validation_slides]

    def slide_of_image(self, fingerprint: str | None) -> str | None:
        """Find the slide with this image; None if it has none, or did not record its images."""
        return next((slide for slide, known in self.digests.items() if known.get("image", "") == fingerprint), None)

    def to_dict(self) -> dict[str, Any]:
        """Give the entries as files have them."""
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> SplitRecord:
        """Read what `to_dict` gave; ValueError names what `source` lacks."""
        record = _record(cls, content, source)
        for entry in fields(cls):
            value, kind = getattr(record, entry.name), _KIND_OF[str(entry.type).partition("[")[0]]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{source}: {entry.name} should be a {kind.__name__}, found {brief(value)}.")
            if entry.name.endswith(("_patients", "_slides")):
                checked_names(getattr(record, entry.name), entry.name.replace("_", " "), source)
        return record


@dataclass(frozen=True)
class PatchEncoderRecord:
    """The patch encoder whose features a fold was trained on."""

    name: str
    sha256: str  # of its weights; "unknown" for published features
    dim: int  # width of its pooled features
    token_dim: int
    token_pool: int = 1  # by how much the grid of patch tokens was pooled

    def has_weights(self, sha256: str) -> bool:
        """Whether weights with this hash can be those of the training; what is unknown contradicts nothing."""
        return sha256 == self.sha256 or "unknown" in (sha256, self.sha256)


@dataclass(frozen=True)
class OptimizationState:
    """The state dicts of optimiser, schedule and gradient scaler, with which a training goes on."""

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """Spots that stand for those of a training: features (n, D) float16, and how far each is from the others, sorted (n,)."""

    features: Tensor
    distances: Tensor

    @classmethod
    def from_dict(cls, content: object, width: int, source: str) -> TrainingSample:
        """Read the two tensors of a file; ValueError for anything else."""
        parts = [content.get(name) for name in ("features", "distances")] if isinstance(content, dict) else [None, None]
        features, distances = parts
        if not (
            isinstance(features, Tensor)
            and isinstance(distances, Tensor)
            and (features.is_floating_point() and distances.is_floating_point())
            and (features.ndim, features.shape[-1:], distances.shape) == (2, (width,), features.shape[:1])
            and len(features)
            and features.isfinite().all()
            and distances.isfinite().all()
        ):
            raise ValueError(
                f"{source}: training_sample should hold features (n, {width}) and n distances, all finite."
            )
        return cls(features, distances.float().sort().values)


@dataclass(frozen=True)
class TrainedFold:
    """Everything that a test, a prediction or a continuation needs; of the frozen patch encoder only name and hash.

    training_mean (2, G): of the smoothed and of the unsmoothed training targets; NaN where it is not known.
    """

    weights: dict[str, Tensor]
    epoch: int  # that the weights are of; 0 where there are no epochs
    progress: Progress
    config: Config
    config_name: str
    genes: list[str]
    encoder: PatchEncoderRecord
    split: SplitRecord
    training_mean: Tensor
    gene_lists: dict[str, list[str]]
    field_of_view_um: float | None  # width of a training patch
    finished: bool | None = None  # whether the training has ended; None: written before training marked its end
    sample: TrainingSample | None = None  # None: of an earlier version, or imported
    optimization: OptimizationState | None = None  # in last.pt, from which --resume goes on

    def to_dict(self) -> dict[str, Any]:
        """Give the entries of the file: tensors, numbers, strings, lists and dicts only, for PyTorch's safe loader."""
        return {
            "model": self.weights,
            "epoch": self.epoch,
            **({} if self.finished is None else {"finished": self.finished}),
            "progress": asdict(self.progress),
            "config": self.config.to_dict(),
            "config_name": self.config_name,
            "genes": self.genes,
            "encoder": asdict(self.encoder),
            "fold": self.split.to_dict(),
            "training_mean": self.training_mean,
            "gene_lists": self.gene_lists,
            "field_of_view_um": self.field_of_view_um,
            **({} if self.sample is None else {"training_sample": vars(self.sample)}),
            **({} if self.optimization is None else vars(self.optimization)),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> TrainedFold:
        """Read what `to_dict` gave, now or in an earlier version; ValueError names what `source` lacks."""
        required = ("model", "config", "genes", "encoder", "fold", "epoch", "progress", "config_name", "training_mean")
        _require(content, required, source)
        _check_kinds(content, source)
        encoder = _record(PatchEncoderRecord, content["encoder"], source)
        sample = content.get("training_sample")
        return cls(
            weights=content["model"],
            epoch=content["epoch"],
            progress=_record(Progress, content["progress"], source),
            config=config_from_dict(content["config"], source),
            config_name=content["config_name"],
            genes=content["genes"],
            encoder=encoder,
            split=SplitRecord.from_dict(content["fold"], source),
            training_mean=content["training_mean"],
            gene_lists=content.get("gene_lists", {}),
            field_of_view_um=content.get("field_of_view_um"),
            finished=content.get("finished"),
            sample=None if sample is None else TrainingSample.from_dict(sample, encoder.dim, source),
            optimization=_record(OptimizationState, content, source) if "optimizer" in content else None,
        )

    def without_weights(self) -> TrainedFold:
        """Leave out what is large, and let go of the file, which may be replaced meanwhile."""
        sample = self.sample and TrainingSample(self.sample.features.clone(), self.sample.distances.clone())
        return replace(self, weights={}, optimization=None, training_mean=self.training_mean.clone(), sample=sample)


def _check_kinds(content: Mapping[str, Any], source: str) -> None:
    """Whether the entries are of their kinds, so that nothing later stumbles over them; ValueError names the first."""
    for name, kind in _KINDS.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ValueError(f"{source}: {name} should be a {kind.__name__}, found {brief(content[name])}.")
    for name, kind in (("model", Tensor), ("genes", str)):
        entries = content[name].values() if isinstance(content[name], dict) else content[name]
        if wrong := [entry for entry in entries if not isinstance(entry, kind)]:
            raise ValueError(f"{source}: {name} should hold {kind.__name__}s only, found {brief(wrong[0])}.")


def _require(content: Mapping[str, Any], names: list[str] | tuple[str, ...], source: str) -> None:
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; it is not a complete checkpoint.")


def _record(kind: type[Record], content: Mapping[str, Any], source: str) -> Record:
    """The dataclass filled from the entries of its names; ValueError if one without a default is not there."""
    has_default = {entry.name for entry in fields(kind) if (entry.default, entry.default_factory) != (MISSING, MISSING)}
    _require(content, [entry.name for entry in fields(kind) if entry.name not in has_default], source)
    return kind(**{entry.name: content[entry.name] for entry in fields(kind) if entry.name in content})
