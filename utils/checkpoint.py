"""Checkpoints: saved whole, read by PyTorch's safe loader, and found from whatever path the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from utils.files import load_tensors, write_atomically

SCHEMA = 1
_REQUIRED = ("schema", "model", "config", "genes", "encoder", "fold", "epoch")


def save_checkpoint(path: str | Path, content: Mapping) -> None:
    """Write `content` (tensors, numbers, strings, lists, dicts) atomically; the schema number is added."""
    write_atomically(path, lambda temporary: torch.save({"schema": SCHEMA, **content}, temporary))


def load_checkpoint(path: str | Path, *, memory_map: bool = False) -> dict:
    """Read a checkpoint of this project; ValueError when it is something else or of another schema.

    memory_map: for who needs what stands beside the weights.
    """
    content = load_tensors(path, memory_map=memory_map)
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError(
            f"{path} is not a checkpoint of this program (no 'schema' entry). A checkpoint of the published code is "
            "converted with: python main.py --mode import_reference --model_path FILE --config_name ... --out FILE"
        )
    if content["schema"] != SCHEMA:
        raise ValueError(f"{path} has checkpoint schema {content['schema']}, this program reads {SCHEMA}.")
    missing = [name for name in _REQUIRED if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is not a complete checkpoint.")
    return content


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Fill `model` strictly; ValueError names the first differences of the architecture."""
    expected, found = model.state_dict(), dict(weights)
    differences = [f"lacks {name}" for name in expected if name not in found]
    differences += [f"has unknown {name}" for name in found if name not in expected]
    differences += [
        f"{name} is {tuple(found[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape and not _sized_at_load(model, name)
    ]
    if differences:
        listed = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(
            f"{source} does not fit the model of its configuration ({len(differences)} differences): {listed}"
        )
    model.load_state_dict(found)


def _sized_at_load(model: nn.Module, name: str) -> bool:
    """Closed-form baselines hold buffers whose size depends on the training data."""
    return name in getattr(model, "sized_at_load", ())


def find_checkpoint(path: str | Path, fold: int | None = None) -> Path:
    """The best checkpoint meant by `path`: a run folder (with `fold`), a fold folder or a checkpoint file."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"--model_path {path} does not exist; give a run folder, a fold folder or a checkpoint."
        )
    if (path / "best.pt").is_file():
        return path / "best.pt"
    found = fold_checkpoints(path)
    if fold is None and len(found) == 1:
        return next(iter(found.values()))
    if fold in found:
        return found[fold]
    raise FileNotFoundError(
        f"{path} holds no checkpoint{'' if fold is None else f' of fold {fold}'} (fold_<n>/best.pt); folds with one: "
        f"{', '.join(map(str, found)) or 'none'}. Train first with --mode train, or choose one with --fold."
    )


def fold_checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """{fold: path of best.pt} of a run folder, in the order of the folds."""
    found = {}
    for path in Path(run_dir).glob("fold_*/best.pt"):
        number = path.parent.name.removeprefix("fold_")
        if number.isdigit():
            found[int(number)] = path
    return dict(sorted(found.items()))
