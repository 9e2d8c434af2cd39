"""The training data path: from random spots of many slides to a batch the model can take, at batch 512 and UNI size.

    python benchmarks/bench_data_path.py

Feature files of UNI's size are fabricated on disk (--slides sections of HER2ST's sizes, by default 8 of the 36, about
2.4 GB) and read through the project's loader. The slow version is what the published code does for every spot: open the
whole neighbor file of its slide for one row, keep that row (and with it the file) until the batch is stacked, read the
slide's features, crop the patch and turn it. It stands for 13 spots/s (4-13) and 14.7 GB at batch 512, 70-86 spots/s at
batch 32; the files lie in the page cache for both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    GIGA,
    ChildResult,
    Goal,
    Report,
    available_memory,
    begin,
    finish,
    flags,
    machine,
    scratch,
    synchronise,
    watched,
)
from benchmarks.fabricated import PITCH, Sizes, chosen_sections, fabricate, fabricated_layout, open_store
from datasets.batches import BatchMaker, TrainingBatches, epoch_rows
from datasets.features.cache import read_features
from datasets.layout import Layout
from datasets.tokens import open_tokens
from utils.cli import run

SEED = 2021
GENES = 250


@dataclass(frozen=True)
class Setting:
    """Where the fabricated files lie and how large everything is."""

    folder: Path
    slides: dict[str, int]
    sizes: Sizes
    patch_size: int
    batch_size: int

    @property
    def layout(self) -> Layout:
        return fabricated_layout(self.folder, self.sizes, self.patch_size)

    @property
    def rows(self) -> int:
        return sum(self.slides.values())

    @property
    def held_bytes(self) -> int:
        """Of the target and neighbor features, which the fast version holds in memory."""
        return 4 * self.rows * self.sizes.dim * (1 + self.sizes.neighbors**2)


# --- the slow version ---------------------------------------------------------------------------------------------------


class NaiveSpots(torch.utils.data.Dataset):
    """One spot at a time, everything read from its files when it is asked for."""

    def __init__(self, setting: Setting):
        self.folder, self.patch_size = setting.folder / "pt", setting.patch_size
        self.places = [(slide, row) for slide, count in setting.slides.items() for row in range(count)]
        # Pixels of one tissue for all slides: what a crop costs does not depend on what it shows.
        self.image = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        slide, row = self.places[index]
        neighbors = torch.load(self.folder / f"{slide}_neighbor.pt", weights_only=True)
        features = torch.load(self.folder / f"{slide}_target.pt", weights_only=True)
        return {
            "patch": self._patch(row),
            "neighbor": neighbors[row],  # a view: the whole file stays in memory with it
            "target": features[row],
            "slide": features,
            "index": torch.tensor(index),
        }

    def _patch(self, row: int) -> Tensor:
        """The crop of the spot, turned and normalised as transforms for pictures do it."""
        from torchvision.transforms import v2

        top, left = PITCH * (row % 8), PITCH * (row // 8 % 8)
        crop = torch.from_numpy(self.image[top : top + self.patch_size, left : left + self.patch_size]).permute(2, 0, 1)
        turned = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.RandomApply([v2.RandomRotation((90, 90))]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        return turned(crop)


def collate(items: list[dict[str, Tensor]]) -> dict[str, object]:
    """Stack what has one shape; slides have different ones."""
    names = ("patch", "neighbor", "target", "index")
    return {name: torch.stack([item[name] for item in items]) for name in names} | {
        "slide": [item["slide"] for item in items]
    }


def write_tensor_files(setting: Setting) -> None:
    """The same features as bare tensors, as the published code reads them."""
    (setting.folder / "pt").mkdir()
    for slide in setting.slides:
        for kind in ("target", "neighbor"):
            features = torch.from_numpy(read_features(setting.layout.cache_path(kind, slide)))
            torch.save(features, setting.folder / "pt" / f"{slide}_{kind}.pt")


def naive_path(setting: Setting, batch_size: int, batches: int) -> dict[str, object]:
    """Spots per second of the slow version, and checksums for the comparison."""
    order = torch.randperm(setting.rows, generator=torch.Generator().manual_seed(SEED))[: batches * batch_size]
    subset = torch.utils.data.Subset(NaiveSpots(setting), order.tolist())
    loader = torch.utils.data.DataLoader(subset, batch_size=batch_size, collate_fn=collate)
    subset[0]  # what the first item imports is not the loader's cost
    started, count, sums = time.perf_counter(), 0, []
    for batch in loader:
        count += len(batch["index"])
        sums.append(checksum(batch["index"], batch["neighbor"], batch["target"]))
    seconds = time.perf_counter() - started
    return {"spots_per_second": count / seconds, "sums": sums}


# --- the fast version ---------------------------------------------------------------------------------------------------


def fast_path(setting: Setting, choice: str, epochs: int, device_name: str) -> dict[str, object]:
    """Spots per second of the project's batches over whole epochs; choice: "cache" (tokens) or "online" (patches).

    The first epoch is measured too: nothing but its files' place in the page cache differs.
    """
    device = torch.device(device_name)
    layout = setting.layout
    store = open_store(layout, list(setting.slides))
    source = open_tokens(layout, store, device, choice=choice, residence="auto", num_workers=2)
    maker = BatchMaker(store, source, device)
    expression = torch.randn(setting.rows, GENES, device=device)
    generator = torch.Generator().manual_seed(SEED)
    count, sums, started = 0, [], time.perf_counter()
    for _ in range(epochs):
        rows = epoch_rows(
            store.slide_of_row,
            torch.arange(setting.rows),
            batch_size=setting.batch_size,
            minimum=18,
            slides_per_batch=0,
            generator=generator,
        )
        for batch in TrainingBatches(maker, rows, expression, generator):
            count += len(batch)
            few = slice(0, 64)
            sums.append(checksum(batch.rows[few], batch.neighbor_features[few], batch.target_features[few]))
    synchronise(device)
    return {"spots_per_second": count / (time.perf_counter() - started), "sums": sums}


def checksum(rows: Tensor, neighbors: Tensor, targets: Tensor) -> list[np.ndarray]:
    """Rows, and sums that identify their features; arrays, as tensors do not outlive the process that sends them."""
    sums = (rows, neighbors.double().sum(dim=(1, 2)), targets.double().sum(dim=1))
    return [values.cpu().numpy() for values in sums]


def same_numbers(slow: list, fast: list) -> bool:
    """Whether spots that both versions have read have the same neighbor and target features."""
    known = {int(row): (n, t) for rows, ns, ts in fast for row, n, t in zip(rows, ns, ts)}
    compared = 0
    for rows, neighbors, targets in slow:
        for row, *found in zip(rows.tolist(), neighbors, targets):
            if row in known:
                compared += 1
                if not np.allclose(known[row], found, rtol=1e-9):
                    return False
    assert compared > 0, "the two versions have no spot in common"
    return True


# --- the comparison -----------------------------------------------------------------------------------------------------


def naive_batch_that_fits(setting: Setting, wanted: int) -> int:
    """The batch size of the slow version, halved until the files that it holds fit into the memory that is free."""
    file_bytes = 4 * setting.rows / len(setting.slides) * setting.sizes.dim * (setting.sizes.neighbors**2 + 1)
    batch_size = wanted
    while batch_size > 8 and batch_size * file_bytes * 1.2 > 0.8 * available_memory():
        batch_size //= 2
    return batch_size


def row_of(version: str, batch_size: int, found: ChildResult, held: int) -> dict[str, object]:
    return {
        "version": version,
        "batch": batch_size,
        "spots/s": found.value["spots_per_second"],
        "peak memory (GB)": found.peak_bytes / GIGA,
        "over start and features (GB)": (found.taken_bytes - held) / GIGA,
    }


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--slides", type=int, default=8, help="sections to fabricate (default: 8)")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument(
        "--naive_batch", type=int, default=512, help="of the slow version; halved until memory suffices"
    )
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    sizes = Sizes(dim=16, tokens=5, neighbors=3) if arguments.quick else Sizes()
    slides = {"A1": 30, "B1": 20} if arguments.quick else chosen_sections(arguments.slides)
    with scratch() as folder:
        patch_size, batch_size = (32, 20) if arguments.quick else (224, arguments.batch_size)
        setting = Setting(folder, slides, sizes, patch_size, batch_size)
        fabricate(folder, slides, sizes, ("target", "neighbor", "token", "patch"), patch_size=patch_size)
        write_tensor_files(setting)
        # Neither version is charged for the disk: both read from the page cache.
        epochs, apart = (1, False) if arguments.quick else (3, True)
        tokens = watched(fast_path, setting, "cache", epochs, str(device), apart=apart)
        patches = watched(fast_path, setting, "online", epochs, str(device), apart=apart)
        batch = 20 if arguments.quick else naive_batch_that_fits(setting, arguments.naive_batch)
        slow = watched(naive_path, setting, batch, 1, apart=apart)
        small = watched(naive_path, setting, min(32, batch), 2, apart=apart)
    report = Report(
        name="data_path",
        title="Training data path",
        settings={
            "slides": len(slides),
            "spots": setting.rows,
            "features": f"{sizes.dim} wide, {sizes.neighbors**2} neighbors, {sizes.tokens} tokens in float16",
            "features held (GB)": round(setting.held_bytes / GIGA, 2),
        },
        rows=[
            row_of("naive: files per spot", min(32, batch), small, 0),
            row_of("naive: files per spot", batch, slow, 0),
            row_of("here, patches for the encoder", batch_size, patches, setting.held_bytes),
            row_of("here, token cache", batch_size, tokens, setting.held_bytes),
        ],
        extra={"same_numbers": same_numbers(slow.value["sums"], tokens.value["sums"])},
    )
    assert report.extra["same_numbers"], "the two versions read different features"
    report.goals = goals(report.rows, is_told=not arguments.quick and batch_size == 512)
    report.notes = [
        "The published code: 70-86 spots/s at batch 32; 4-13 spots/s and 14.7 GB at batch 512.",
        "A batch with tokens holds them in the type of the model: 0.4 GB at batch 512 in float32.",
        "Both versions give the same numbers for the spots that both have read.",
    ]
    return finish(report, arguments, device, started_on)


def goals(rows: list[dict], is_told: bool) -> list[Goal]:
    """Against the published figure and against the slow version of this run, whichever is the harder."""
    slow, fast = rows[1], rows[3]
    opponent = max(13.0, slow["spots/s"])
    times, over = fast["spots/s"] / opponent, fast["over start and features (GB)"]
    return [
        Goal("data path, tokens, batch 512", "13 spots/s", "200 times the spots/s",
             f"{fast['spots/s']:.0f} spots/s, {times:.0f} times (naive {slow['spots/s']:.1f})",
             times >= 200 if is_told else None),
        Goal("its memory over the features", "14 GB", "3 GB", f"{over:.2f} GB", over <= 3 if is_told else None),
    ]  # fmt: skip


if __name__ == "__main__":
    run(main)
