"""Peak memory of a training over ever more spots, resident and out of core; the data lie on the disk only once a patient.

A part of bench_scale.py. The slides of a patient are links to the same files, so that a data set of any size fits the disk and
its page cache; each is read, verified and held like a slide of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from benchmarks.common import GIGA, Goal, Report, available_memory, watched
from benchmarks.fabricated import ENCODER, Sizes, fabricate, fabricated_layout
from datasets.layout import Layout
from datasets.spec import SPEC_FILE
from engine import train_one_epoch
from modes.train import epoch_batches, make_step
from modes.training.compose import Optimization, open_layout
from modes.training.fold import new_model, untrained_fold
from modes.training.plan import find_folds
from modes.training.run_data import open_run_data
from modes.training.score import predict_record
from modes.training.split import prepare_split
from utils.config import Config, with_overrides
from utils.devices import keep_freed_memory
from utils.files import write_text

PATCH = 224  # px
KINDS = ("target", "neighbor", "token")
STEPS = 3
PATIENTS = "ABCD"
MODEL = [
    "MODEL.projection_dim=16", "MODEL.neighbor_depth=1", "MODEL.neighbor_mlp_ratio=1", "MODEL.global_depth=2",
    "MODEL.global_mlp_ratio=1", "MODEL.fusion_mlp_dim=16", "MODEL.gene_mlp_dim=16", "MODEL.predictor_dim=16", "LOSS.k=3",
    "LOSS.use_kmeans=true", "TRAINING.batch_size=32", "TRAINING.slides_per_batch=1", "EVALUATION.chunk_size=32",
]  # fmt: skip
KB, MOST_KB = 1000, 12
SPOTS, DISK = 1_500_000, 200 * GIGA  # of the projection
FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Scale:
    """Of the data. slide: its spots. spots: of the data sets. genes: measured, and of the panel."""

    slide: int = 1000
    spots: tuple[int, ...] = (10_000, 40_000, 160_000)
    genes: int = 1000
    panel: int = 250
    dim: int = 1024
    narrow: int = 256  # of the greatest data set, resident: 24 GB have no room for all of it

    @classmethod
    def of(cls, is_quick: bool) -> Scale:
        return cls(20, (80, 160), 40, 8, 32, 16) if is_quick else cls()


def lay_out(folder: Path, scale: Scale, dim: int, spots: int) -> Layout:
    """A data folder with so many spots; `folder` holds a slide of each patient once, for all sizes of one width."""
    sizes = Sizes(dim=dim, tokens=5)
    once, names = folder / f"once_{dim}", [f"{patient}1" for patient in PATIENTS]
    if not once.exists():
        fabricate(once, dict.fromkeys(names, scale.slide), sizes, KINDS, num_genes=scale.genes)
    found, source = (fabricated_layout(place, sizes, PATCH) for place in (folder / f"{dim}_{spots}", once))
    if found.root.exists():
        return found
    found.root.mkdir(parents=True)
    write_text(found.root / SPEC_FILE, "patient_pattern: ^([A-Z])\n")
    for number in range(spots // scale.slide):
        patient = PATIENTS[number % len(PATIENTS)]
        slide, original = f"{patient}{number // len(PATIENTS) + 1}", f"{patient}1"
        pairs = [(source.counts_path(original), found.new_counts_path(slide))]
        pairs += [(source.spots_path(original), found.spots_path(slide))]
        pairs += [(source.cache_path(kind, original), found.cache_path(kind, slide)) for kind in KINDS]
        for file, link in pairs:
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, link)
    return found


def train_a_little(folder: str, residence: str, panel: int) -> float:
    """What a training does: read, choose the panel, take steps, describe the fold, predict a test slide; gives the loss."""
    keep_freed_memory()
    settings = ["DATA.type=fabricated", f"DATA.data_dir={folder}", f"DATA.encoder={ENCODER}", f"DATA.num_genes={panel}"]
    config = with_overrides(Config(), [*MODEL, *settings, f"DATA.residence={residence}"])
    layout, device = open_layout(config, "scale"), torch.device("cpu")
    slides = layout.patients_on_disk()
    folds, _ = find_folds(config, layout, slides, [0])
    run_data = open_run_data(config, "scale", layout, list(slides), device, folds)
    split = prepare_split(run_data, folds[0])
    model = new_model(run_data, split)
    optimization = Optimization.of(model, config, run_data.precision)
    untrained_fold(run_data, split)
    batches = islice(epoch_batches(run_data, split, split.targets, 1), STEPS)
    step = make_step(model.train(), config, run_data.encode)
    terms = train_one_epoch(batches, step, optimization.optimizer, optimization.precision, "steps")
    predict_record(run_data, model.eval(), run_data.store.named(split.record.test_slides)[0])
    return float(terms["total"])


def measure(report: Report, folder: Path, is_quick: bool) -> None:
    """Put rows, projection and goal into the report."""
    scale = Scale.of(is_quick)
    cases = [("disk", scale.dim, spots) for spots in scale.spots]
    cases += [("host", scale.dim, spots) for spots in scale.spots[:-1]] + [("host", scale.narrow, scale.spots[-1])]
    rows, peaks, losses = [], {}, {}
    for residence, dim, spots in cases:
        layout = lay_out(folder, scale, dim, spots)
        before = available_memory()
        found = watched(train_a_little, str(layout.data_dir), residence, scale.panel, apart=not is_quick)
        peaks[residence, dim, spots], losses[residence, dim, spots] = found.peak_bytes, found.value
        rows.append(
            {
                "neighbor features": {"disk": "in their files", "host": "in memory"}[residence],
                "width": dim,
                "spots": spots,
                "peak memory (GB)": found.peak_bytes / GIGA,
                "over the start (GB)": found.taken_bytes / GIGA,
                "seconds": found.seconds,
                "memory free before (GB)": before / GIGA,
            }
        )
    first, *_, last = scale.spots
    slope = (peaks["disk", scale.dim, last] - peaks["disk", scale.dim, first]) / (last - first)
    assert all(losses["host", scale.dim, spots] == losses["disk", scale.dim, spots] for spots in scale.spots[:-1]), (
        losses
    )
    report.tables[f"Peak memory of a training ({STEPS} steps of a small model on features of this width)"] = rows
    report.tables[f"{SPOTS / 1e6:g} million spots on a disk of {DISK / GIGA:.0f} GB"] = projection(scale.dim)
    report.extra |= {"kb_a_spot": {"disk": slope / KB, "host": _resident_slope(peaks, scale)}}
    at_all = peaks["disk", scale.dim, last] + slope * (SPOTS - last)
    report.notes.append(
        f"Out of core a spot takes {slope / KB:.1f} KB of memory, so {SPOTS / 1e6:g} million take {at_all / GIGA:.0f} GB; in "
        f"memory {report.extra['kb_a_spot']['host']:.0f} KB. Losses of both are equal, bit for bit."
    )
    report.goals.append(
        Goal(
            "memory of a further spot, out of core",
            "-",
            f"at most {MOST_KB} KB",
            f"{slope / KB:.1f} KB, {first} to {last} spots",
            None if is_quick else slope <= MOST_KB * KB,
        )
    )


def _resident_slope(peaks: dict[tuple[str, int, int], int], scale: Scale) -> float:
    """KB a spot in memory at full width; of a trial with one such size, over its start."""
    spots = scale.spots[:-1]
    if len(spots) < 2:
        return peaks["host", scale.dim, spots[0]] / spots[0] / KB
    return (peaks["host", scale.dim, spots[-1]] - peaks["host", scale.dim, spots[0]]) / (spots[-1] - spots[0]) / KB


def projection(dim: int, tiles: int = 25, tokens: int = 197) -> list[dict[str, object]]:
    """What so many spots take on the disk, and what it must deliver, for variants of the features."""
    pooled = {2: 7 * 7 + 1, 7: 2 * 2 + 1}  # tokens left of a grid of 14 x 14 and the class token
    variants = {
        "the pooled feature alone (DATA.tokens=pooled)": (0, 0),
        "pooled by 7, one view": (pooled[7], 1),
        "pooled by 7, eight views": (pooled[7], 8),
        "pooled by 2, one view": (pooled[2], 1),
        "all, one view": (tokens, 1),
        "all, eight views": (tokens, 8),
    }
    rows = []
    for name, (kept, views) in variants.items():
        neighbors, token = FLOAT * dim * tiles, HALF * dim * kept
        on_disk, read = FLOAT * dim + neighbors + token * views, neighbors + token
        rows.append(
            {
                "target tokens": name,
                "of a spot (KB)": on_disk / KB,
                "on the disk (GB)": on_disk * SPOTS / GIGA,
                f"fits {DISK / GIGA:.0f} GB": on_disk * SPOTS <= DISK,
                "read for a spot of a batch (KB)": read / KB,
                "in reads": 1 + (kept > 0),
                "at 1000 spots/s (MB/s)": read * 1000 / 1e6,
                "in an epoch (GB)": read * SPOTS / GIGA,
            }
        )
    return rows
