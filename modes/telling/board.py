"""The curves of a training: TensorBoard and, if asked for, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.files import writing

_PROJECT = "gene-dml"


class Board:
    """TensorBoard beside `metrics.jsonl`; epochs that are trained again after an interruption replace the old ones.

    with_wandb: the same numbers also go to Weights & Biases: into files in the folder of the fold, and nowhere else unless
    WANDB_MODE says so.
    Its methods raise OSError if the disk cannot take it.
    """

    def __init__(self, folder: Path, first_epoch: int, with_wandb: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first_epoch)
        self._wandb = _wandb_run(folder.parent) if with_wandb else None

    def add(self, record: Mapping[str, float]) -> None:
        """Show an epoch at once."""
        numbers = {name: value for name, value in record.items() if name != "epoch" and value is not None}
        with writing(self._folder):
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, int(record["epoch"]))
            self._writer.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(record["epoch"]))

    def close(self) -> None:
        """Close the files."""
        with writing(self._folder):
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb() -> None:
    """Raise ValueError if --wandb has no package to write with."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--wandb needs the package wandb, which is not installed: pip install wandb. Without the flag the same numbers "
            "are in metrics.jsonl and TensorBoard."
        )


def _wandb_run(fold_dir: Path) -> Any:
    """Open the run of a fold; the same one when its training goes on."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")  # wandb itself refuses other words
    place = str(fold_dir.resolve())
    return wandb.init(
        project=_PROJECT,
        group=fold_dir.parent.name,
        name=f"{fold_dir.parent.name}/{fold_dir.name}",
        id=hashlib.sha256(place.encode()).hexdigest()[:16],
        resume="allow",
        dir=fold_dir,
        mode=mode,
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, save_code=False),
    )
