"""The store gives exactly the rows asked for, in the order asked for, and reads nothing else."""

from __future__ import annotations

import dataclasses
import os
import resource

import numpy as np
import pytest
import torch

from datasets.features.block_store import BlockStore
from datasets.features.cache import write_cache
from tests.caches import TOKENS_OF_UNI, as_earlier

TOKENS, DIM = 5, 12


def _write(path, rows: int, seed: int, **changed) -> np.ndarray:
    identity = dataclasses.replace(TOKENS_OF_UNI, **changed)
    values = np.random.default_rng(seed).normal(size=(rows, identity.views, TOKENS, DIM)).astype(identity.dtype)
    ids = [f"{row}x1" for row in range(rows)]
    write_cache(path, identity, ids, np.zeros((rows, 2), dtype=int), np.array_split(values, 3))
    return values


@pytest.fixture(params=["float16", "float32"])
def store_and_values(request, tmp_path):
    """Three slides; the true tokens one after the other."""
    paths = [tmp_path / f"{name}.h5" for name in "ABC"]
    values = [_write(path, rows, seed, dtype=request.param) for seed, (path, rows) in enumerate(zip(paths, (7, 1, 11)))]
    with BlockStore(paths, "token", num_threads=3) as store:
        yield store, np.concatenate(values)


def test_random_rows_and_views(store_and_values):
    store, values = store_and_values
    random = np.random.default_rng(5)
    for size in (1, 2, 40):
        rows, views = random.integers(0, 19, size), random.integers(0, 8, size)
        got = store.read(torch.from_numpy(rows), torch.from_numpy(views))
        slow = np.stack([values[row, view] for row, view in zip(rows, views)])
        assert np.array_equal(got.numpy(), slow)
    assert store.read([], []).shape == (0, TOKENS, DIM)


def test_random_rows_of_neighbor_features(tmp_path):
    """One view; a slide that an earlier version wrote among them."""
    paths, values = [tmp_path / f"{name}.h5" for name in "ABC"], []
    for path, rows in zip(paths, (7, 1, 11), strict=True):
        identity = dataclasses.replace(TOKENS_OF_UNI, kind="neighbor", views=1, num_neighbors=3)
        values.append(np.random.default_rng(rows).normal(size=(rows, 9, DIM)).astype("float16"))
        write_cache(path, identity, [f"{row}x1" for row in range(rows)], np.zeros((rows, 2), dtype=int), [values[-1]])
    as_earlier(paths[2])
    with BlockStore(paths, "neighbor", num_threads=2) as store:
        rows = np.random.default_rng(5).integers(0, 19, 40)
        assert np.array_equal(store.read(rows, np.zeros_like(rows)).numpy(), np.concatenate(values)[rows])
        assert (store.num_rows, store.num_views, store.num_tokens, store.dim) == (19, 1, 9, DIM)
    with pytest.raises(ValueError, match=r"A\.h5 is a cache of kind 'neighbor'; expected 'token'"):
        BlockStore(paths, "token")


def test_more_files_than_the_process_may_open(tmp_path):
    """The limit of the process is raised, as far as that of the system lets it."""
    _write(tmp_path / "A.h5", 1, 0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, before[1]))
    try:
        with BlockStore([tmp_path / "A.h5"] * 40, "token") as store:
            assert len(store.read(np.arange(40), np.zeros(40, dtype=int))) == 40
        assert open_now + 20 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_it_describes_itself(store_and_values):
    store, values = store_and_values
    assert (store.num_rows, store.num_views, store.num_tokens, store.dim) == values.shape
    assert store.nbytes == values.nbytes and store.identity.encoder == "uni"
    assert store.dtype == (torch.float16 if values.dtype == np.float16 else torch.float32)


def test_it_fills_a_given_buffer(store_and_values):
    store, values = store_and_values
    out = torch.zeros(3, TOKENS, DIM, dtype=store.dtype)
    assert store.read(np.array([18, 0, 7]), np.array([1, 7, 0]), out=out) is out
    assert np.array_equal(out.numpy(), np.stack([values[18, 1], values[0, 7], values[7, 0]]))


def test_reads_in_the_order_of_the_disk_and_only_what_is_asked(store_and_values, monkeypatch):
    store, _ = store_and_values
    seen, true_preadv = [], os.preadv

    def noting(descriptor, buffers, offset):
        count = true_preadv(descriptor, buffers, offset)
        seen.append((descriptor, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", noting)
    store._num_threads = 1
    rows = np.random.default_rng(2).permutation(19)
    store.read(rows, np.arange(19) % 8)
    assert seen == sorted(seen, key=lambda read: (store._descriptors.index(read[0]), read[1]))
    assert sum(count for *_, count in seen) == 19 * TOKENS * DIM * store.dtype.itemsize


def test_requests_that_cannot_be_met(tmp_path):
    _write(tmp_path / "A.h5", 4, 0, views=2)
    with BlockStore([tmp_path / "A.h5"], "token") as store:
        with pytest.raises(ValueError, match=r"View 5 was asked for, the token caches hold 2 of the 8.*--views 8"):
            store.read([0], [5])
        with pytest.raises(ValueError, match="Rows 1 to 4 were asked for, the caches hold 4"):
            store.read([1, 4], [0, 0])


def test_caches_that_differ_are_refused_together(tmp_path):
    paths = [tmp_path / f"{name}.h5" for name in "ABC"]
    _write(paths[0], 3, 0)
    _write(paths[1], 3, 0, encoder_sha256="ff", views=2)
    _write(paths[2], 3, 0, dtype="float32")
    with pytest.raises(
        ValueError, match=r"(?s)B\.h5: encoder sha256 ff instead of ab12, views 2 instead of 8.*C\.h5: dtype"
    ) as caught:
        BlockStore(paths, "token")
    # the first is what they are compared with; those that differ may be whole, and what is right nobody knows here
    assert "Keep those listed elsewhere and extract their slides with the same --encoder" in str(caught.value)
    assert str(caught.value).endswith("--extract_mode token --slides B,C")
    patches = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    identity = dataclasses.replace(TOKENS_OF_UNI, kind="patch", dtype="uint8", patch_size=8)
    write_cache(paths[1], identity, ["0x1", "1x1", "2x1"], np.zeros((3, 2), dtype=int), [patches])
    with pytest.raises(ValueError, match=r"B\.h5 is a cache of kind 'patch'; expected 'token'"):
        BlockStore(paths[:2], "token")


def test_a_file_cut_while_in_use(tmp_path):
    _write(tmp_path / "A.h5", 4, 0)
    with BlockStore([tmp_path / "A.h5"], "token") as store:
        os.truncate(tmp_path / "A.h5", int(store._offsets[3, 7]) + 10)
        with pytest.raises(
            ValueError, match=r"A\.h5 ends in the middle of its numbers.*Keep it elsewhere.*\n.*--slides A"
        ):
            store.read([0, 3], [0, 7])
    with pytest.raises(ValueError, match=r"A\.h5 is truncated"):
        BlockStore([tmp_path / "A.h5"], "token")
