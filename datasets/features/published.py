"""Features of the published download: bare tensors, told apart by their number of rows only."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from utils.text import some
from utils.untrusted.tensors import load_tensors


def read_published(path: str | Path, num_spots: int) -> np.ndarray:
    """Features of the published download: a bare tensor (N, D) or (N, M, D) without identifiers, as float32.

    Its rows can only be told apart by their number, so a wrong number is refused with the likely cause.
    Raises ValueError for that, and for numbers that are not finite.
    """
    features = _published(Path(path), num_spots, memory_map=False).detach().float()
    if not (is_finite := torch.isfinite(features.flatten(1))).all():
        rows = torch.nonzero(~is_finite.all(dim=1)).flatten().tolist()
        raise ValueError(
            f"{path}: {int((~is_finite).sum())} numbers of {len(rows)} of its {num_spots} spots are not finite (rows "
            f"{some(rows)}). Download it again, or make features from the image:\n{_extraction(features, Path(path))}"
        )
    return features.numpy()


def verify_published(path: str | Path, num_spots: int) -> tuple[int, ...]:
    """Find the shape of published features, checked as in `read_published`, without reading the numbers."""
    return tuple(_published(Path(path), num_spots, memory_map=True).shape)


def map_published(path: str | Path, num_spots: int) -> torch.Tensor:
    """Find published features as `read_published`, their numbers left on disk until they are used.

    What these are worth is for whoever uses them to see.
    """
    return _published(Path(path), num_spots, memory_map=True).detach()


def _published(path: Path, num_spots: int, *, memory_map: bool) -> torch.Tensor:
    tensor = load_tensors(path, memory_map=memory_map)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() not in (2, 3) or not tensor.is_floating_point():
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{path} should hold one tensor of features, N x D or N x M x D; found {found}.")
    if len(tensor) != num_spots:
        raise ValueError(
            f"{path} holds {len(tensor)} rows but slide {path.stem} has {num_spots} spots. {_likely_cause(tensor, num_spots)} "
            f"Published features have no identifiers, so they cannot be matched. Use the counts and spot table of the same "
            f"download, or make features from the image:\n{_extraction(tensor, path)}"
        )
    return tensor


def _extraction(tensor: torch.Tensor, path: Path) -> str:
    kind = "target" if tensor.dim() == 2 else "neighbor"
    return (
        f"python preprocess/extract_features_uni.py --extract_mode {kind} --slides {path.stem} (with --config, or --mode "
        "external --test_name)"
    )


def _likely_cause(tensor: torch.Tensor, num_spots: int) -> str:
    rows = len(tensor)
    if (
        tensor.dim() == 2
        and num_spots
        and rows % num_spots == 0
        and math.isqrt(rows // num_spots) ** 2 == rows // num_spots
    ):
        return f"It looks like {rows // num_spots} neighbor tiles of each spot, flattened, in the folder of target features."
    if rows > num_spots:
        return "It was probably made from a longer table, for example all spots of the spot file, also those without counts."
    return (
        "It was probably made from a shorter table, for example only the spots marked as selected, or of another slide."
    )
