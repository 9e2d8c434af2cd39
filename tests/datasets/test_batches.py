"""Batches against a slow, obvious version: right rows, whole slides, sizes that hold k clusters."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch._subclasses import FakeTensorMode

from datasets import batches as batches_module
from datasets import tokens as tokens_module
from datasets.batches import BatchMaker, TrainingBatches, check_batch_sizes, epoch_rows, goes_to_device, split_rows
from datasets.spots import EncoderIdentity, SlideRecord, SpotStore
from datasets.targets import slide_targets, store_targets
from datasets.tokens import CutPatches

CPU = torch.device("cpu")
SIZES = (5, 9, 7)


@pytest.fixture
def store() -> SpotStore:
    """Three slides; every number of a spot tells its row."""
    slides, start = [], 0
    for number, size in enumerate(SIZES):
        counts = np.arange(start, start + size)[:, None] * np.ones((1, 4)) + np.arange(4)
        table = AnnData(counts, obs=pd.DataFrame(index=[f"{i}x0" for i in range(size)]))
        table.var_names = ["G0", "G1", "G2", "G3"]
        table.obsm["grid"] = np.stack([np.arange(size), np.zeros(size, dtype=int)], axis=1)
        table.uns |= {"slide": f"S{number}", "patient": "AB"[number % 2]}
        slides.append(SlideRecord(table, start, start + size, (100, 100)))
        start += size
    rows = torch.arange(start, dtype=torch.float32)
    return SpotStore(
        slides=slides,
        encoder=EncoderIdentity("uni", "x"),
        target_features=rows[:, None].repeat(1, 3),
        neighbor_features=rows[:, None, None].repeat(1, 9, 3).half(),
        neighbor_is_valid=torch.ones(start, 9, dtype=torch.bool),
        grid_xy=torch.cat([torch.from_numpy(slide.table.obsm["grid"]) for slide in slides]),
        slide_of_row=torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES)),
    )


class Tokens:
    """A source whose tokens tell row and view."""

    num_views, gives_tokens, dim = 8, True, 2

    def get(self, rows, views):
        return torch.stack([rows.float(), views.float()], dim=1)[:, None]


def test_every_number_of_a_batch_belongs_to_its_spot(store):
    rows = torch.tensor([20, 3, 6, 0, 13])
    expression = torch.arange(21.0)[:, None]
    batch = BatchMaker(store, Tokens(), CPU).spots(rows, torch.tensor([1, 2, 3, 4, 5]), expression, with_slides=True)
    for tensor in (
        batch.target_features[:, 0],
        batch.neighbor_features[:, 4, 0],
        batch.expression[:, 0],
        batch.target_tokens[:, 0, 0],
    ):
        assert tensor.tolist() == rows.tolist()
    assert batch.target_tokens[:, 0, 1].tolist() == [1, 2, 3, 4, 5]
    assert batch.neighbor_features.dtype == torch.float32
    assert batch.slide_features[batch.slide_rows, 0].tolist() == rows.tolist()
    assert list(batch.lengths) == [5, 9, 7] and len(batch) == 5


def test_only_the_slides_of_a_batch_are_taken_whole(store):
    batch = BatchMaker(store, Tokens(), CPU).spots(torch.tensor([20, 1]), torch.zeros(2, dtype=torch.long), None, True)
    assert list(batch.lengths) == [5, 7]
    assert batch.slide_features[:, 0].tolist() == [*range(5), *range(14, 21)]
    assert batch.slide_features[batch.slide_rows, 0].tolist() == [20, 1]


def test_a_slide_comes_in_order_and_unturned(store):
    slide = BatchMaker(store, Tokens(), CPU).slide(store.slides[1])
    chunks = list(slide.chunks(4))
    assert [len(chunk) for chunk in chunks] == [4, 4, 1]
    assert torch.cat([chunk.target_tokens[:, 0] for chunk in chunks]).tolist() == [[row, 0] for row in range(5, 14)]
    assert slide.slide_features[:, 0].tolist() == list(range(5, 14))


@pytest.mark.parametrize("slides_per_batch", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [4, 6, 50])
def test_an_epoch_holds_every_row_once_in_batches_that_are_large_enough(store, slides_per_batch, batch_size):
    rows = torch.arange(21)
    arguments = {"batch_size": batch_size, "minimum": 4, "slides_per_batch": slides_per_batch}
    batches = epoch_rows(store.slide_of_row, rows, **arguments, generator=torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(21))
    assert min(map(len, batches)) >= 4
    again = epoch_rows(store.slide_of_row, rows, **arguments, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(batches, again))
    other = epoch_rows(store.slide_of_row, rows, **arguments, generator=torch.Generator().manual_seed(1))
    assert not all(torch.equal(a, b) for a, b in zip(batches, other))


def test_slides_per_batch_limits_the_slides_of_a_batch(store):
    batches = epoch_rows(
        store.slide_of_row,
        torch.arange(21),
        batch_size=3,
        minimum=1,
        slides_per_batch=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert all(len(torch.unique(store.slide_of_row[batch])) == 1 for batch in batches)


def test_the_last_incomplete_batch_joins_the_one_before_it():
    assert [len(b) for b in split_rows(torch.arange(10), 4, minimum=2)] == [4, 4, 2]
    assert [len(b) for b in split_rows(torch.arange(10), 4, minimum=3)] == [4, 6]
    assert [len(b) for b in split_rows(torch.arange(3), 4, minimum=4)] == [3]


def test_k_is_compared_with_the_smallest_batch():
    check_batch_sizes([4, 6], 4, "A")
    with pytest.raises(
        ValueError, match=r"k = 5 clusters, but the smallest batch of fold A has 4 spots \(10 training spots in 2"
    ):
        check_batch_sizes([4, 6], 5, "A")


def test_views_are_drawn_uniformly_and_reproducibly(store):
    maker, batches = BatchMaker(store, Tokens(), CPU), [torch.arange(21)] * 40
    seen = []
    for _ in range(2):
        loader = TrainingBatches(maker, batches, torch.zeros(21, 1), torch.Generator().manual_seed(3))
        seen.append(torch.cat([batch.target_tokens[:, 0, 1] for batch in loader]))
    assert torch.equal(seen[0], seen[1])
    counts = torch.bincount(seen[0].long(), minlength=8)
    assert counts.min() > 60 and counts.max() < 150  # 840 draws, 105 expected of each


def test_targets_are_those_of_the_slides_asked_for_and_nothing_else(store):
    targets = store_targets(store, ["S0", "S2"], ["G2", "G1"])
    assert torch.isnan(targets[5:14]).all() and not torch.isnan(targets[:5]).any()
    assert np.allclose(targets[14:21].numpy(), slide_targets(store.slides[2].table, ["G2", "G1"]))
    with pytest.raises(ValueError, match=r"slide S1 has no counts for 1 of the 2 panel genes \(ERBB2\)"):
        slide_targets(store.slides[1].table, ["G1", "ERBB2"])

    with pytest.raises(ValueError, match="slide S1"):  # a third of the panel: other names, not zeros
        slide_targets(store.slides[1].table, ["G1", "G2", "ERBB2"], absent_is_zero=True)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("gigabytes", "reserve", "residence", "expected"),
    [
        (10, 0, "auto", True),
        (15, 0, "auto", False),
        (10, 6, "auto", False),
        (9, 6, "auto", True),
        (15, 6, "device", True),
        (1, 0, "host", False),
    ],
)
def test_arrays_go_to_the_device_where_the_step_still_fits_beside_them(
    gigabytes, reserve, residence, expected, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (16 * 10**9, 24 * 10**9))
    assert goes_to_device("tokens", gigabytes * 10**9, CUDA, residence, reserve * 10**9) is expected
    told = capsys.readouterr().out
    assert f"{'device' if expected else 'host'} memory (16.0 GB free on cuda, {reserve}.0 GB of them kept" in told
    with pytest.raises(ValueError, match=r"tokens take 17\.0 GB, 16\.0 GB are free"):
        goes_to_device("tokens", 17 * 10**9, CUDA, "device")


def test_a_device_without_an_index_is_the_device_its_arrays_lie_on(monkeypatch):
    """torch.device("cuda") is not equal to torch.device("cuda:0"), where arrays sent to it lie."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10**9, 10**9))

    def send(tensor, device):
        assert not tensor.is_cuda, "sent to the device a second time"
        return tensor.to(device)

    for module in (batches_module, tokens_module):
        monkeypatch.setattr(module, "to_device", send)
    with FakeTensorMode():  # tensors without numbers may lie on a device that is not there
        rows = torch.zeros(2, dtype=torch.long)
        patches = CutPatches(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), CUDA, "auto")
        assert patches.get(rows, rows).is_cuda


@pytest.mark.gpu
def test_batches_on_cuda_are_those_of_the_cpu_wherever_the_features_lie(store):
    batches = [torch.tensor([20, 1, 7]), torch.tensor([3, 12]), torch.arange(21)]
    for residence in ("device", "host"):
        found = []
        for device in (CPU, CUDA):

            class OnDevice(Tokens):
                def get(self, rows, views, device=device):
                    return super().get(rows, views).to(device)

            maker = BatchMaker(store, OnDevice(), device, residence)
            expression = torch.arange(21.0, device=device)[:, None]
            found.append(list(TrainingBatches(maker, batches, expression, torch.Generator().manual_seed(3))))
        for on_cpu, on_cuda in zip(*found, strict=True):
            for name, value in vars(on_cpu).items():
                other = vars(on_cuda)[name]
                assert torch.equal(value, other.cpu()) if isinstance(value, torch.Tensor) else value == other
