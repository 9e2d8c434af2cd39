"""An epoch of training, with the token cache and with the frozen encoder in every step.

    python benchmarks/bench_epoch.py                     the demo's size: simulated slides, EfficientNet-lite0, both ways
    python benchmarks/bench_epoch.py --device cuda       HER2ST's size: 11 555 spots of 30 sections (one fold), UNI size

The slow version is the epoch that runs the encoder, as the published code does (119 GFLOP a spot at UNI size).
On the CPU both run through the whole program on the same files, and their losses are compared.
On CUDA the features are random numbers in device memory; the encoder has random weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import GIGA, Goal, Report, begin, finish, flags, machine, scratch, synchronise
from benchmarks.fabricated import SECTION_SIZES, random_validity, round_section
from datasets.batches import BatchMaker, TargetSource, TrainingBatches, epoch_rows
from datasets.images.geometry import NUM_VIEWS
from datasets.spots import EncoderIdentity, SlideRecord, SpotStore, slide_of_row
from datasets.targets import store_targets
from datasets.tokens import CutPatches
from engine import train_one_epoch
from models.patch_encoders.build import build_patch_encoder
from modes.prediction.model import make_model
from modes.prediction.slide import Encode
from modes.train import make_step
from modes.training.compose import Optimization, make_encode, open_layout
from modes.training.run_data import open_run_data
from preprocess.extract_features_uni import main as extract
from preprocess.simulate_demo import simulate
from utils.cli import run
from utils.config import Config, load_config, with_overrides
from utils.devices import Precision
from utils.files import load_names
from utils.runs import generator_for, seed_everything

FOLDS, EPOCHS = 8, 200


@dataclass
class Trainer:
    """What an epoch needs, whatever its tokens come from."""

    config: Config
    maker: BatchMaker
    encode: Encode
    expression: Tensor
    token_dim: int

    def __post_init__(self) -> None:
        self.device = self.maker.device
        seed_everything(self.config.GENERAL.seed)
        self.model = make_model(
            self.config,
            feature_dim=self.maker.store.target_features.shape[1],
            token_dim=self.token_dim,
            num_genes=self.expression.shape[1],
        ).to(self.device)
        self.optimization = Optimization.of(
            self.model, self.config, Precision(self.config.TRAINING.precision, self.device)
        )
        self.step = make_step(self.model, self.config, self.encode)

    def epoch(self, number: int) -> tuple[float, dict[str, float]]:
        """Seconds of an epoch and its average losses."""
        generator = generator_for(self.config.GENERAL.seed, number)
        seed_everything(self.config.GENERAL.seed, number)
        training, store = self.config.TRAINING, self.maker.store
        rows = epoch_rows(
            store.slide_of_row,
            torch.arange(len(store.slide_of_row)),
            batch_size=training.batch_size,
            minimum=self.config.LOSS.k,
            slides_per_batch=training.slides_per_batch,
            generator=generator,
        )
        self.model.train()
        synchronise(self.device)
        started = time.perf_counter()
        batches = TrainingBatches(self.maker, rows, self.expression, generator)
        terms = train_one_epoch(
            batches, self.step, self.optimization.optimizer, self.optimization.precision, f"epoch {number}"
        )
        synchronise(self.device)
        return time.perf_counter() - started, terms


# --- the demo's size: files, the whole program --------------------------------------------------------------------------


def demo_trainers(folder: Path, arguments: argparse.Namespace, device: torch.device) -> dict[str, Trainer]:
    """Both ways to train on simulated slides whose features were extracted by the program."""
    tiny = arguments.quick
    simulate(
        folder,
        patients=("A", "B") if tiny else ("A", "B", "C", "D"),
        slides_per_patient=1,
        grid=(5, 4) if tiny else (12, 10),
        external=False,
        num_genes=24 if tiny else 60,
    )
    shared = ["--data_dir", str(folder), "--device", str(device), "--num_workers", "2"]
    small = ["DATA.num_genes=24", "DATA.num_neighbors=3"] if tiny else []
    settings = [part for setting in small for part in ("--set", setting)]
    extract(["--config", "demo/dml", "--extract_mode", "all", "--views", "1" if tiny else "8", *shared, *settings])
    overrides = ["LOSS.use_kmeans=true", f"DATA.data_dir={folder}", *small]
    if tiny:
        overrides += ["LOSS.k=4", "TRAINING.batch_size=16"]
    trainers = {}
    for name, choice in (("encoder in every step", "online"), ("token cache", "cache")):
        config = load_config("demo/dml", [*overrides, f"DATA.tokens={choice}"])
        layout = open_layout(config, "demo/dml")
        slides = layout.slides_on_disk()
        run_data = open_run_data(config, "demo/dml", layout, slides, device)
        if tiny:
            run_data.maker.source.num_views = 1  # the cache of a trial holds one view, so neither turns the patches
        targets = store_targets(run_data.store, slides, load_names(layout.panel_path)).to(device)
        trainers[name] = Trainer(config, run_data.maker, run_data.encode, targets, run_data.token_dim)
    return trainers


# --- HER2ST's size: random features in device memory --------------------------------------------------------------------


class RandomTokens:
    """Random tokens of all spots in device memory, in place of a token cache that fits there."""

    gives_tokens = True

    def __init__(self, rows: int, views: int, tokens: int, dim: int, device: torch.device):
        self.num_views, self.dim, self.device = views, dim, device
        self._values = torch.empty(rows, views, tokens, dim, dtype=torch.float16, device=device)
        for row in range(0, rows, 256):
            self._values[row : row + 256].normal_()

    def get(self, rows: Tensor, views: Tensor) -> Tensor:
        return self._values[rows.to(self.device), views.to(self.device)]


def random_store(lengths: list[int], dim: int, tiles: int) -> SpotStore:
    """A store of random features; the tables of its slides are not asked for in an epoch."""
    generator = torch.Generator().manual_seed(1)
    stops = torch.tensor(lengths).cumsum(0).tolist()
    records = [SlideRecord(None, stop - length, stop, (0, 0)) for stop, length in zip(stops, lengths)]
    return SpotStore(
        slides=records,
        encoder=EncoderIdentity("uni", "random"),
        target_features=torch.randn(stops[-1], dim, generator=generator),
        neighbor_features=torch.randn(stops[-1], tiles, dim, generator=generator),
        neighbor_is_valid=random_validity(stops[-1], tiles, generator),
        grid_xy=torch.cat([torch.from_numpy(round_section(length)) for length in lengths]),
        slide_of_row=slide_of_row(records),
    )


def large_trainers(arguments: argparse.Namespace, device: torch.device) -> dict[str, Trainer]:
    """Both ways at UNI size over the sections of a fold's training patients (all but A)."""
    overrides = ["LOSS.use_kmeans=true", f"TRAINING.slides_per_batch={arguments.slides_per_batch}"]
    config = with_overrides(Config(), overrides)
    lengths = [length for name, length in SECTION_SIZES.items() if name[0] != "A"]
    encoder = build_patch_encoder("uni", random_weights=True).to(device)
    store = random_store(lengths, encoder.pooled_dim, config.DATA.num_neighbors**2)
    rows, size = sum(lengths), config.DATA.patch_size
    expression = torch.rand(rows, config.DATA.num_genes, device=device)

    def trainer(source: TargetSource) -> Trainer:
        return Trainer(config, BatchMaker(store, source, device), make_encode(encoder), expression, encoder.dim)

    patches = torch.randint(256, (rows, size, size, 3), dtype=torch.uint8)
    tokens = RandomTokens(rows, arguments.views, encoder.num_tokens(size), encoder.dim, device)
    return {"encoder in every step": trainer(CutPatches(patches, device, "auto")), "token cache": trainer(tokens)}


# --- the report ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> Path:
    parser = flags(__doc__)
    parser.add_argument("--views", type=int, default=NUM_VIEWS, help="CUDA: views in the token cache (4.7 GB each)")
    parser.add_argument("--slides_per_batch", type=int, default=0, help="CUDA: TRAINING.slides_per_batch")
    arguments = parser.parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    on_cuda = device.type == "cuda"
    with scratch() as folder:
        trainers = large_trainers(arguments, device) if on_cuda else demo_trainers(folder, arguments, device)
        found = {name: [trainer.epoch(number) for number in (1, 2, 3)] for name, trainer in trainers.items()}
    seconds = {name: min(s for s, _ in epochs) for name, epochs in found.items()}
    trainer = trainers["token cache"]
    spots = len(trainer.maker.store.slide_of_row)
    report = Report(
        name="epoch",
        title="An epoch of training",
        settings={
            "spots": spots,
            "slides": len(trainer.maker.store.slides),
            "batch": trainer.config.TRAINING.batch_size,
            "slides per batch": trainer.config.TRAINING.slides_per_batch or "all",
            "precision": trainer.optimization.precision.name,
            "encoder": trainer.config.DATA.encoder,
        },
        rows=[
            {
                "target tokens": name,
                "epoch (s)": seconds[name],
                "spots/s": spots / seconds[name],
                "times faster": seconds["encoder in every step"] / seconds[name],
            }
            for name in trainers
        ],
    )
    if on_cuda:
        whole = FOLDS * EPOCHS * seconds["token cache"]
        report.notes.append(
            f"{FOLDS} folds x {EPOCHS} epochs at this rate: {whole / 60:.0f} minutes, evaluation not included."
        )
        report.notes.append(f"Device memory at most: {torch.cuda.max_memory_allocated() / GIGA:.1f} GB.")
        report.goals = [
            Goal(
                "epoch of HER2ST's size on a GPU",
                "-",
                "under 2 s",
                f"{seconds['token cache']:.2f} s",
                seconds["token cache"] < 2,
            )
        ]
    else:
        report.extra["loss_difference"] = greatest_difference(found)
        report.notes.append(
            f"Losses of the three epochs with the cache (float16) and with the encoder differ by at most "
            f"{report.extra['loss_difference']:.1e} of their value."
        )
        assert report.extra["loss_difference"] < 0.02, "training with the cache is not training with the encoder"
    return finish(report, arguments, device, started_on)


def greatest_difference(found: dict[str, list[tuple[float, dict[str, float]]]]) -> float:
    """Relative difference of every loss of every epoch between the two ways; the first epoch counts most plainly."""
    pairs = zip(*(epochs for epochs in found.values()))
    return max(abs(a[name] - b[name]) / abs(a[name]) for (_, a), (_, b) in pairs for name in a)


if __name__ == "__main__":
    run(main)
