"""Batches on the device: any spots for training (SpotBatch), one whole slide for evaluation (SlideBatch)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from datasets.spots import SlideRecord, SpotStore, take_rows
from utils.cli import say
from utils.devices import to_device

USED_SHARE = 0.9  # of the device memory that is left for arrays; the rest is lost between its blocks


class TargetSource(Protocol):
    """Where the target patches' tokens come from (datasets/tokens.py)."""

    num_views: int
    gives_tokens: bool  # False: it gives patches, and the step runs the frozen encoder on them

    def get(self, rows: Tensor, views: Tensor) -> Tensor:
        """Tokens (B, T, D) or turned uint8 patches (B, 3, P, P) of spot `rows` in dihedral `views`, on the device."""
        ...


@dataclass(frozen=True)
class SpotBatch:
    """B spots with everything the model may ask for; R rows are all spots of the S slides they lie on.

    rows (B,) places in the SpotStore (CPU); target_tokens (B, T, D) in float32 or in the type of their cache, or patches
    (B, 3, P, P) uint8, already turned;
    target_features (B, D) pooled; neighbor_features (B, M, D), neighbor_is_valid (B, M); expression (B, G) or None;
    slide_features (R, D), grid_xy (R, 2), lengths: S numbers adding up to R, slide_rows (B,) places in the R rows;
    grid_xy and slide_rows lie on the host, where the global encoder makes its index tables without waiting for a device.
    """

    rows: Tensor
    target_tokens: Tensor | None
    patches: Tensor | None
    target_features: Tensor
    neighbor_features: Tensor | None
    neighbor_is_valid: Tensor
    expression: Tensor | None
    slide_features: Tensor | None = None
    grid_xy: Tensor | None = None
    lengths: Sequence[int] = ()
    slide_rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SlidesOfBatch:
    """The slides that spots lie on: the fields of a `SpotBatch` with the same names."""

    slide_features: Tensor
    grid_xy: Tensor
    lengths: Sequence[int]
    slide_rows: Tensor


@dataclass(frozen=True)
class SlideBatch:
    """One whole slide: all its rows for the global encoder, and its spots in chunks for everything else."""

    slide_features: Tensor  # (N, D)
    grid_xy: Tensor  # (N, 2), on the host
    chunks: Callable[[int], Iterator[SpotBatch]]  # chunks(size) -> SpotBatch of at most `size` spots, in order

    def __len__(self) -> int:
        return len(self.slide_features)


class BatchMaker:
    """Gathers batches from a SpotStore on one device.

    Small arrays go to the device once; the neighbor features too if they fit (residence "auto"), otherwise they stay in
    host memory, or in their files, and the rows of a batch are copied. The choice is printed. reserve: see `goes_to_device`.
    """

    def __init__(
        self,
        store: SpotStore,
        source: TargetSource | None,
        device: torch.device,
        residence: str = "auto",
        reserve: int = 0,
    ):
        self.store, self.source, self.device = store, source, device
        # One for all epochs: PyTorch keeps freed memory apart for each stream.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.target_features = store.target_features.to(device)
        self.neighbor_is_valid = store.neighbor_is_valid.to(device)
        self._neighbors_on_device = None
        if isinstance(held := store.neighbor_features, Tensor) and goes_to_device(
            "neighbor features", held.nbytes, device, residence, reserve
        ):
            self._neighbors_on_device = held.to(device)
        self._starts = torch.tensor([slide.start for slide in store.slides])
        self._lengths = [slide.stop - slide.start for slide in store.slides]

    def spots(self, rows: Tensor, views: Tensor, expression: Tensor | None, with_slides: bool) -> SpotBatch:
        """Gather the batch of `rows` (CPU, any order) with the target patch in `views`; expression (R, G) on the device."""
        on_device = to_device(rows, self.device)
        given = self.source.get(rows, views) if self.source else None
        tokens, patches = (given, None) if self.source and self.source.gives_tokens else (None, given)
        batch = SpotBatch(
            rows=rows,
            target_tokens=tokens,
            patches=patches,
            target_features=self.target_features[on_device].float(),
            neighbor_features=self._neighbors(rows, on_device),
            neighbor_is_valid=self.neighbor_is_valid[on_device],
            expression=None if expression is None else expression[on_device],
        )
        return replace(batch, **vars(self.slides_of(rows))) if with_slides else batch

    def _neighbors(self, rows: Tensor, on_device: Tensor) -> Tensor | None:
        if self._neighbors_on_device is not None:
            return take_rows(self._neighbors_on_device, on_device).float()
        found = self.store.neighbors_of(rows)
        return None if found is None else to_device(found, self.device).float()

    def slides_of(self, rows: Tensor) -> SlidesOfBatch:
        """Gather all spots of the slides that `rows` touch, one slide after the other, and where the rows lie in them."""
        slides, slide_of_spot = torch.unique(self.store.slide_of_row[rows], return_inverse=True)
        lengths = [self._lengths[i] for i in slides.tolist()]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # of each slide within the R rows
        all_rows = torch.cat([self.store.slides[i].rows for i in slides.tolist()])
        return SlidesOfBatch(
            slide_features=take_rows(self.target_features, to_device(all_rows, self.device)).float(),
            grid_xy=self.store.grid_xy[all_rows],
            lengths=lengths,
            slide_rows=starts[slide_of_spot] + rows - self._starts[slides][slide_of_spot],
        )

    def slide(self, record: SlideRecord) -> SlideBatch:
        """Gather one slide for evaluation: patches unturned (view 0), spots in the order of its table."""

        def chunks(size: int) -> Iterator[SpotBatch]:
            for rows in record.rows.split(size):
                yield self.spots(rows, torch.zeros_like(rows), expression=None, with_slides=False)

        whole = slice(record.start, record.stop)
        return SlideBatch(self.target_features[whole].float(), self.store.grid_xy[whole], chunks)


def goes_to_device(what: str, nbytes: int, device: torch.device, residence: str, reserve: int = 0) -> bool:
    """Whether an array is held in device memory: by `residence`, or where it fits beside everything else.

    reserve: bytes that must stay free for what comes later (model, optimiser, a training step).
    """
    if device.type != "cuda":
        return True  # device memory is host memory
    if residence == "disk":
        return False
    free = torch.cuda.mem_get_info(device)[0]
    fits = nbytes <= USED_SHARE * (free - reserve)
    if residence == "device" and nbytes > free:
        raise ValueError(
            f"DATA.residence=device: the {what} take {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}. "
            "Use DATA.residence=auto."
        )
    on_device = residence == "device" or (residence == "auto" and fits)
    say(
        f"{what}: {nbytes / 1e9:.2f} GB in {'device' if on_device else 'host'} memory ({free / 1e9:.1f} GB free on {device}, "
        f"{reserve / 1e9:.1f} GB of them kept for the model and its step)"
    )
    return on_device


def split_rows(rows: Tensor, batch_size: int, minimum: int) -> list[Tensor]:
    """Cut an epoch's rows into batches; a last one smaller than `minimum` joins the one before it."""
    batches = list(rows.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < minimum:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def check_batch_sizes(sizes: Sequence[int], k: int, fold: str) -> None:
    """k clusters need k spots in every batch; ValueError with both numbers and the remedy, before the first epoch."""
    if k > min(sizes):
        raise ValueError(
            f"k = {k} clusters, but the smallest batch of fold {fold} has {min(sizes)} spots ({sum(sizes)} training spots in "
            f"{len(sizes)} batches). Choose --k {min(sizes)} or less, or a larger --batch_size."
        )


def join_small(batches: list[Tensor], minimum: int) -> list[Tensor]:
    """Batches below `minimum` rows (groups of small slides) joined to one, or to the last one that is large enough."""
    large = [batch for batch in batches if len(batch) >= minimum]
    small = [batch for batch in batches if len(batch) < minimum]
    if small and large and sum(map(len, small)) < minimum:
        small.append(large.pop())
    return [*large, torch.cat(small)] if small else large


def epoch_rows(
    slide_of_row: Tensor,
    rows: Tensor,
    *,
    batch_size: int,
    minimum: int,
    slides_per_batch: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Draw the batches of one epoch: every row once, shuffled.

    slide_of_row: (R,) of the store; rows: those of the training slides.
    slides_per_batch = 0: spots of all slides are mixed (the paper). N > 0: every batch is drawn from N slides, so that
    the global encoder runs over N slides only; a named change of the sampling.
    """
    if slides_per_batch == 0:
        return split_rows(rows[torch.randperm(len(rows), generator=generator)], batch_size, minimum)
    slide_of_row = slide_of_row[rows]
    slides = torch.unique(slide_of_row)
    slides = slides[torch.randperm(len(slides), generator=generator)]
    batches = []
    for group in slides.split(slides_per_batch):
        members = rows[torch.isin(slide_of_row, group)]
        members = members[torch.randperm(len(members), generator=generator)]
        batches += split_rows(members, batch_size, minimum)
    batches = join_small(batches, minimum)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def whole_batch(maker: BatchMaker, rows: Tensor, views: Tensor, expression: Tensor) -> SpotBatch:
    """Gather all of a batch, with its slides."""
    return maker.spots(rows, views, expression, with_slides=True)


class TrainingBatches:
    """The batches of one epoch, gathered ahead of the step by a thread where that overlaps with it (CUDA)."""

    def __init__(
        self,
        maker: BatchMaker,
        batches: list[Tensor],
        expression: Tensor,
        generator: torch.Generator,
        gather: Callable[[BatchMaker, Tensor, Tensor, Tensor], SpotBatch] = whole_batch,
    ):
        """gather: what is made of the rows and views of a batch, (maker, rows, views, expression) -> batch."""
        self._gather = gather
        num_views = maker.source.num_views if maker.source else 1
        self._views = [torch.randint(num_views, (len(rows),), generator=generator) for rows in batches]
        self._maker, self._batches, self._expression = maker, batches, expression

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[SpotBatch]:
        made = (
            self._gather(self._maker, rows, views, self._expression) for rows, views in zip(self._batches, self._views)
        )
        stream = self._maker.stream
        return made if stream is None else ahead_on_stream(made, self._maker.device, stream)


def ahead_on_stream(
    batches: Iterator[SpotBatch], device: torch.device, stream: torch.cuda.Stream, depth: int = 2
) -> Iterator[SpotBatch]:
    """Make batches in a thread on a CUDA stream of its own; the step waits for a batch's copies, never for its files."""
    made: queue.Queue[tuple[SpotBatch | BaseException | None, torch.cuda.Event | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    stream.wait_stream(
        torch.cuda.current_stream(device)
    )  # which may still be filling the arrays that batches come from

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for batch in batches:
                    made.put((batch, stream.record_event()))
                    if stop.is_set():
                        return
            made.put((None, None))
        except BaseException as error:  # handed to the consumer, which raises it
            made.put((error, None))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            batch, ready = made.get()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            assert ready is not None, "every batch comes with the event of its copies"
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for value in vars(batch).values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)
            yield batch
    finally:
        stop.set()
        while thread.is_alive():  # free a worker that waits for room in the queue
            with_room = made.empty()
            if not with_room:
                made.get()
            thread.join(timeout=0.01)
