"""Gene panels on disk: the array of names, and beside it how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.files import load_names, write_atomically, write_text

PANEL_METHODS = {
    "mean": "highest mean of log(1 + counts per 10 000 of all genes of the spot) over all spots of the slides",
    "mean_raw": "highest mean raw count over all spots of the slides",
    "hvg": "highly variable genes of scanpy (flavor seurat, batch = slide) on log(1 + counts per 10 000)",
    "hmhvg": "genes whose worse rank of the two, by mean and by variability, is best",
}


def write_panel(path: Path, genes: Sequence[str], *, overwrite: bool, method: str, **how: object) -> str:
    """Write a panel: a plain `.npy` array of strings, with how it was made beside it as `.json`.

    An existing panel is never replaced without --overwrite: it may be the published one, or one chosen on purpose.
    returns: what was done, one sentence.
    """
    if path.exists() and not overwrite:
        there = load_names(path)
        if there == list(genes):
            return f"{path} is kept: it holds this panel."
        changed = len(set(genes) - set(there))
        return (
            f"{path} is kept: it holds {len(there)} genes, {changed} of the {len(genes)} genes chosen now are not among "
            f"them. To have these, keep it and {path.stem}.json elsewhere and repeat."
        )
    write_atomically(path, lambda temporary: np.save(temporary, np.array(list(genes))))
    record = {"method": method, "meaning": PANEL_METHODS[method], "num_genes": len(genes), **how, "genes": list(genes)}
    write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return f"{path}: {len(genes)} genes, {PANEL_METHODS[method]}."
