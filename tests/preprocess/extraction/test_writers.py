"""Several caches written at once: a signal while their writers start ends those that have begun."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from datasets.features.encoding import EncodedSpots
from preprocess.extraction.writers import CacheWriters
from tests.caches import TOKENS_OF_UNI
from utils import files


def test_a_signal_while_the_writers_start_leaves_no_file_and_no_thread_that_waits(tmp_path, monkeypatch):
    paths = {kind: tmp_path / kind / "A1.h5" for kind in ("target", "neighbor")}
    identities = {kind: replace(TOKENS_OF_UNI, kind=kind, dtype="float32") for kind in paths}
    submit = ThreadPoolExecutor.submit

    def submit_and_interrupt(pool, *work):
        submit(pool, *work)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        CacheWriters(paths, identities, ["a", "b"], np.zeros((2, 2))),
    ):
        pytest.fail("the block was entered")
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("cache-writer")]:
        thread.join(timeout=60)
        assert not thread.is_alive(), "it waits for blocks that nobody gives"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("where", ["numbers", "disk"])
def test_the_caches_of_a_slide_appear_together_or_not_at_all(tmp_path, monkeypatch, where):
    """Also where a disk says only at the end that it has no room."""
    paths = {kind: tmp_path / kind / "A1.h5" for kind in ("target", "neighbor")}
    identities = {kind: replace(TOKENS_OF_UNI, kind=kind, dtype="float32") for kind in paths}
    spots = EncodedSpots(slice(0, 2), target=np.zeros((2, 4), "f4"), neighbor=np.zeros((2, 25, 4), "f4"))
    if where == "numbers":
        spots.neighbor[1, 24, 3] = np.nan

    def flush_or_fail(path):
        if where == "disk" and path.parent.name == "neighbor":
            raise OSError(errno.EDQUOT, "")

    monkeypatch.setattr(files, "flush", flush_or_fail)
    message = "is not written: its features .* not finite" if where == "numbers" else "cannot be written: the quota"
    with pytest.raises((ValueError, OSError), match=rf"neighbor/A1.h5 {message}"):
        with CacheWriters(paths, identities, ["a", "b"], np.zeros((2, 2))) as writers:
            writers.put(spots)
        writers.wait()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
