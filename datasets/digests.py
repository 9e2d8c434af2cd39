"""What a slide's data are, in a few digits: whether a run goes on, is tested and is compared on the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from torch import Tensor
from xxhash import xxh3_64

from datasets.features.block_store import BlockStore
from datasets.features.identity import UNKNOWN
from datasets.spots import SlideRecord, SpotStore
from utils.cli import progress
from utils.trained_fold import Digests, changed_parts

_ROWS_READ = 256
_PARTS = COUNTS, SPOTS, FEATURES, TOKENS, IMAGE = "counts", "spots", "features", "tokens", "image"
TARGET = "target"  # of the features those of the patches alone, by which a list of genes is chosen


def digests_of(store: SpotStore, slides: Sequence[str], tokens: BlockStore | None = None) -> dict[str, dict[str, str]]:
    """Digest counts, spots, features and cached tokens of the named slides.

    Of files only those of neighbor features are read that are not held in memory: all of them, once, and verified.
    tokens: the token caches of all slides of the store, in its order; None where the tokens are not cached.
    Returns {slide: {"counts": ..., "spots": ..., "target": ..., "features": ...}}, with "tokens" and "image" where they are
    known; "features" are those of the patches ("target") and, where they are read, of the neighbors.
    """
    digests = {
        record.name: {
            COUNTS: record.counts.digest,
            SPOTS: _spots(record.table),
            **_features(store, record),
        }
        for record in progress(store.named(slides), description="digests", unit="slide", leave=False)
    }
    for file, record in enumerate(store.slides):
        if record.name not in digests:
            continue
        if record.fingerprint and record.fingerprint != UNKNOWN:
            digests[record.name][IMAGE] = record.fingerprint
        if tokens is not None and (digest := tokens.digest(file)) is not None:
            digests[record.name][TOKENS] = digest
    return digests


def changed_slides(before: Digests, now: Digests) -> list[str]:
    """Name what has another digest, a sentence for each slide; what only one side knows contradicts nothing."""
    changed = changed_parts(before, now, _PARTS)
    return [f"slide {slide}: other {' and '.join(parts)} than then" for slide, parts in changed.items()]


def check_told_apart(records: Sequence[SlideRecord], digests: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ValueError that names slides of different patients with one image or the same counts: a patient on both sides.

    digests: of these slides, as `digests_of`.
    """
    first: dict[tuple[str, str], SlideRecord] = {}
    problems = []
    for record in records:
        known = {"image": record.fingerprint}
        if not record.counts.is_empty:  # nothing is the same nothing everywhere
            known["counts"] = digests[record.name][COUNTS]
        for what, digest in known.items():
            if not digest or digest == UNKNOWN:
                continue
            other = first.setdefault((what, digest), record)
            if other.patient != record.patient:
                problems.append(
                    f"slides {other.name} (patient {other.patient}) and {record.name} (patient {record.patient}) have the same "
                    f"{what}"
                )
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. A split by patient would train on what it tests. Keep the copies elsewhere, or correct "
            "the patients in dataset.yaml."
        )


def _spots(table: AnnData) -> str:
    """SHA-256 of the ids, the places in the array and the centres in the image."""
    digest = hashlib.sha256("\n".join(table.obs_names).encode())
    for name in ("grid", "center"):
        digest.update(np.ascontiguousarray(table.obsm[name], dtype="<f8").data)
    return digest.hexdigest()


def _features(store: SpotStore, record: SlideRecord) -> dict[str, str]:
    """XXH3, which is as fast as memory, of the features of a slide."""
    digest, neighbors = xxh3_64(), store.neighbor_features
    digest.update(_bytes(store.target_features[record.start : record.stop]))
    target = digest.hexdigest()
    if isinstance(neighbors, Tensor):
        digest.update(_bytes(neighbors[record.start : record.stop]))
    elif neighbors is not None:
        for rows in record.rows.split(_ROWS_READ):
            digest.update(_bytes(neighbors.read(rows)))
    return {TARGET: target, FEATURES: digest.hexdigest()}


def _bytes(values: Tensor) -> memoryview:
    return np.ascontiguousarray(values.numpy()).view(np.uint8).data
