"""--mode import_reference: a checkpoint of the published code becomes one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.field_of_view import field_of_view
from datasets.layout import Layout
from models.import_reference import import_reference
from models.patch_encoders.build import PatchEncoderSpec, patch_encoder_spec
from modes.prediction.model import make_model
from modes.training.compose import open_layout
from modes.training.plan import find_folds
from utils.checkpoint import load_weights, save_checkpoint
from utils.cli import say
from utils.config import Config, save_config, with_overrides
from utils.files import check_writable, load_names, write_text
from utils.runs import write_json
from utils.trained_fold import PatchEncoderRecord, Progress, SplitRecord, TrainedFold
from utils.untrusted.tensors import load_tensors


@dataclass(frozen=True)
class Source:
    """A published checkpoint and what it does not say about itself."""

    path: str
    config_name: str
    fold: int


def convert(config: Config, source: Source, out: str) -> Path:
    """Write our checkpoint of a published state dict: its weights, the panel of the data folder, the fold it was for.

    out: a file `.pt`, or a run folder: then the checkpoint is <out>/fold_<fold>/best.pt and all folds of a run can be
        brought into one folder, tested and summarised together.
    The protocol is the paper's, which is how these weights were chosen. The training mean is unknown and stays NaN, so a
    test shows a dash in its place. Raises ValueError when names or shapes do not fit the configuration, its encoder or
    the panel, and when `out` is there already.
    """
    # The published code trains on all other patients; it holds none out to choose the epoch.
    config = with_overrides(config, ["EVALUATION.protocol=paper"])
    path = _new_file(Path(out), source.fold)
    content = load_tensors(source.path)
    weights = import_reference(_state_dict(content, source.path))
    layout = open_layout(config, source.config_name)
    genes = load_names(layout.panel_path)
    spec = patch_encoder_spec(config.DATA.encoder)
    _check_sizes(weights, spec, genes, source.path, layout)
    model = make_model(config, feature_dim=spec.pooled_dim, token_dim=spec.dim, num_genes=len(genes))
    load_weights(model, weights, source.path)
    (planned,), _ = find_folds(config, layout, layout.patients_on_disk(), [source.fold])
    split = replace(planned, selection="test")
    trained = TrainedFold(
        weights=weights,
        epoch=0,
        progress=Progress(),
        config=config,
        config_name=source.config_name,
        genes=genes,
        encoder=PatchEncoderRecord(spec.name, "unknown", spec.pooled_dim, spec.dim),
        split=split,
        training_mean=torch.full((2, len(genes)), torch.nan),
        gene_lists={},
        field_of_view_um=field_of_view(layout, dict.fromkeys(split.train_slides)),
        finished=True,
    )
    save_checkpoint(path, trained)
    if path != Path(out):
        _write_run_files(path.parent, config, split, genes)
    say(
        f"{source.path}: {len(weights)} arrays imported as fold {split.fold} ({split.name}) of {config.DATA.type}: "
        f"{path}\nTest it: python main.py --mode test --model_path {path} --fold {split.fold}"
    )
    return path


def _new_file(out: Path, fold: int) -> Path:
    """The checkpoint that `out` means; ValueError if it would replace one."""
    path = out if out.suffix == ".pt" else out / f"fold_{fold}" / "best.pt"
    if path.exists():
        raise ValueError(f"{path} is there already. Give another --out, or move it away.")
    check_writable(path)
    return path


def _check_sizes(
    weights: Mapping[str, Tensor], spec: PatchEncoderSpec, genes: list[str], path: str, layout: Layout
) -> None:
    """The two sizes that come from outside the configuration: the encoder's width and the panel's length."""
    width, num_genes = weights["projection.weight"].shape[1], weights["gene_encoder.projection.weight"].shape[1]
    problems = []
    if width != spec.dim:
        problems.append(
            f"it was trained on features of width {width}, the encoder {spec.name} gives {spec.dim}; name its encoder with "
            "--encoder or --model_size large"
        )
    if num_genes != len(genes):
        problems.append(
            f"it predicts {num_genes} genes, {layout.panel_path} lists {len(genes)}; put the panel it was trained with there"
        )
    if problems:
        raise ValueError(f"{path} does not fit: {'; '.join(problems)}.")


def _write_run_files(folder: Path, config: Config, split: SplitRecord, genes: list[str]) -> None:
    """What stands beside a trained fold, so that test and compare treat the folder as a run."""
    notes = ["The weights are a published checkpoint: its epoch, training mean and gene lists are not known."]
    write_json(folder / "split.json", replace(split, notes=notes).to_dict())
    write_text(folder / "genes.txt", "".join(f"{gene}\n" for gene in genes))
    save_config(config, folder.parent / "config.yaml")


def _state_dict(content: object, path: str) -> Mapping[str, Tensor]:
    """The mapping of names to tensors in a checkpoint, also when it is wrapped in {"state_dict": ...} and the like."""
    for key in ("state_dict", "model_state_dict", "model", None):
        found = content.get(key) if isinstance(content, Mapping) and key else content
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return found
    raise ValueError(
        f"{path} holds no state dict (names -> tensors), neither at the top nor under 'state_dict' or 'model'. Give the "
        "file of weights that the published code has written."
    )
