"""What a run was made of is known again: other data under the same names are another run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from datasets.features.block_store import BlockStore
from datasets.features.cache import write_cache
from tests.caches import TOKENS_OF_UNI


def _digest(path, values: np.ndarray, **changed) -> str | None:
    identity = dataclasses.replace(TOKENS_OF_UNI, **changed)
    ids = [f"{row}x1" for row in range(len(values))]
    write_cache(path, identity, ids, np.zeros((len(values), 2), dtype=int), [values])
    with BlockStore([path], "token") as store:
        return store.digest(0)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (6, 7, 4, 11)])
def test_one_other_number_of_the_tokens_is_another_digest(tmp_path, place):
    values = np.random.default_rng(0).normal(size=(7, 8, 5, 12)).astype("float16")
    before = _digest(tmp_path / "before.h5", values)
    assert before is not None and before == _digest(tmp_path / "again.h5", values, image_fingerprint="g")
    values[place] += 1
    assert _digest(tmp_path / "after.h5", values) != before
