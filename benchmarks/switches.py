"""What follows from clusters that are patients, tried: Gene-DML with one thing changed, on the data and rules of accuracy.py.

    pip install torchstain
    python benchmarks/switches.py --data demo
    python benchmarks/switches.py --data mob --raw FOLDER          (or GENE_DML_MOB)
    python benchmarks/switches.py --data her2st --raw FOLDER       (or GENE_DML_HER2ST)

* clusters within a patient, or a slide: the group loss of each patient (slide) of a batch by itself, over clusters in
  proportion to its spots, two at least; the mean over spots. No other patient's cluster is in the softmax.
* batches balanced over patients, or slides: as many spots of each in every batch; of the smaller ones some twice.
* features standardised per slide: every feature of a slide brought to mean 0 and deviation 1, in each cache by itself.
* stain normalisation: the images brought to the stain of the first slide (Macenko, by torchstain) before the extraction.

A switch becomes part of the program if it helps on two of the three data sets. The folds of the real ones train on one
patient, where "within a patient" and "balanced over patients" change nothing: there slides stand for patients.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy import (
    DATA_SETS,
    METRICS,
    SEARCH,
    TITLES,
    DataSet,
    prepare,
    searched,
    shown_flags,
    train_method,
    write_accuracy,
)
from benchmarks.common import RESULTS, machine, software
from datasets.features.cache import opened, write_cache
from datasets.images.plain_reader import open_picture
from evaluation.comparison.runs import compare_methods
from models.contract import Embeddings
from models.losses import GeneDMLLoss
from modes import train
from modes.training.run_data import RunData
from utils.cli import run, say
from utils.config import load_config
from utils.devices import device_from
from utils.files import require_file, write_text

# name: (what it is, what labels a spot; None: other images or features)
SWITCHES = {
    "within_patient": ("clusters within a patient", "patient"),
    "within_slide": ("clusters within a slide", "slide"),
    "balanced_patient": ("batches balanced over patients", "patient"),
    "balanced_slide": ("batches balanced over slides", "slide"),
    "standardised": ("features standardised per slide", None),
    "stain": ("stain normalised (Macenko)", None),
}
ONE_PATIENT = ("mob", "her2st")  # in the training of a fold
ALIGNMENT = GeneDMLLoss._alignment
TITLES.update({name: title for name, (title, _) in SWITCHES.items()})


def labels_of(run_data: RunData, label: str) -> Tensor:
    """Number the patient or the slide of every row of the store, (R,)."""
    slides = run_data.store.slides
    names = [slide.patient if label == "patient" else slide.name for slide in slides]
    sizes = [slide.stop - slide.start for slide in slides]
    return torch.from_numpy(np.unique(np.repeat(names, sizes), return_inverse=True)[1])


def of_spots(embeddings: Embeddings, spots: Tensor) -> Embeddings:
    """The vectors of some spots of a batch; vectors of single scales are not among them."""
    vectors = {field.name: getattr(embeddings, field.name) for field in fields(embeddings)}
    return replace(embeddings, **{name: value[spots] for name, value in vectors.items() if isinstance(value, Tensor)})


def grouped_within(loss: GeneDMLLoss, embeddings: Embeddings, labels: Tensor) -> Tensor:
    """Group loss (scalar) of spots that share a label, in clusters of their own; mean over the spots."""
    terms, k = [], loss.settings.k
    for label in labels.unique():
        spots = torch.nonzero(labels == label).squeeze(1)
        share = len(spots) / len(labels)
        own = min(max(2, round(k * share)), len(spots))
        alone = replace(loss, settings=replace(loss.settings, k=own, instance_weight=0.0))
        terms.append(share * ALIGNMENT(alone, of_spots(embeddings, spots))["group"])
    return torch.stack(terms).sum()


def balanced_rows(labels: Tensor, rows: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Batches with as many spots of each label, as many batches as otherwise; spots of small groups come again."""
    groups = [rows[labels[rows] == label] for label in labels[rows].unique()]
    count, of_each = max(1, len(rows) // batch_size), batch_size // len(groups)
    drawn = []
    for group in groups:
        rounds = -(-count * of_each // len(group))
        order = torch.cat([group[torch.randperm(len(group), generator=generator)] for _ in range(rounds)])
        drawn.append(order[: count * of_each].view(count, of_each))
    return list(torch.cat(drawn, dim=1))


@contextmanager
def switched_on(name: str) -> Iterator[None]:
    """Train meanwhile as the switch has it; as always where it changes images or features alone, or is none."""
    label = SWITCHES[name][1] if name in SWITCHES else None
    if label is None:
        yield
        return
    train_fold, make_step, epoch_rows = train.train_fold, train.make_step, train.epoch_rows
    of_rows, of_batch = torch.empty(0), torch.empty(0)

    def noting(run_data: RunData, *others, **named) -> None:
        nonlocal of_rows
        of_rows = labels_of(run_data, label)
        train_fold(run_data, *others, **named)

    def steps(*given) -> Callable:
        step = make_step(*given)

        def noting_step(batch) -> dict[str, Tensor]:
            nonlocal of_batch
            of_batch = of_rows[batch.rows]
            return step(batch)

        return noting_step

    def within(loss: GeneDMLLoss, embeddings: Embeddings) -> dict[str, Tensor]:
        without = replace(loss, settings=replace(loss.settings, group_weight=0.0))
        return {**ALIGNMENT(without, embeddings), "group": grouped_within(loss, embeddings, of_batch)}

    def balanced(_slide_of_row, rows: Tensor, *, batch_size: int, generator: torch.Generator, **_) -> list[Tensor]:
        return balanced_rows(of_rows, rows, batch_size, generator)

    train.train_fold = noting
    if name.startswith("within"):
        train.make_step, GeneDMLLoss._alignment = steps, within
    else:
        train.epoch_rows = balanced
    try:
        yield
    finally:
        train.train_fold, train.make_step, train.epoch_rows = train_fold, make_step, epoch_rows
        GeneDMLLoss._alignment = ALIGNMENT


def normalised(data: DataSet) -> DataSet:
    """The data set with all images in the stain of the first."""
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

    def lay_out(raw: Path, data_dir: Path) -> None:
        if data_dir.exists():
            return
        fresh = data_dir.with_name("being_normalised")
        data.lay_out(raw, fresh)
        images = [path for path in sorted(fresh.rglob("ST-imgs/**/*")) if path.suffix in (".jpg", ".png", ".tif")]
        normalizer = NumpyMacenkoNormalizer()
        normalizer.fit(np.asarray(open_picture(images[0]).convert("RGB")))
        for path in images:
            pixels = np.asarray(open_picture(path).convert("RGB"))
            say(f"{path.name}: {pixels.shape[1]} x {pixels.shape[0]} px to the stain of {images[0].name}")
            path.unlink()
            Image.fromarray(normalizer.normalize(pixels, stains=False)[0].astype(np.uint8)).save(path, quality=95)
        fresh.rename(data_dir)

    return replace(data, lay_out=lay_out)


def standardise_caches(data_dir: Path) -> None:
    """Bring every feature of a slide to mean 0 and deviation 1 over what was encoded, in each cache below `data_dir`, once.

    Neighbor tiles that cross an edge are zero, take no part and stay zero.
    """
    done = data_dir / "standardised.txt"
    before = done.stat().st_mtime_ns if done.exists() else 0
    for path in sorted(data_dir.rglob("*.h5")):
        if path.stat().st_mtime_ns <= before:
            continue
        say(f"{path.relative_to(data_dir)}: standardised")
        with opened(path) as cache:
            numbers, identity, spot_ids, centers = cache.read(), cache.identity, cache.spot_ids, cache.centers
        encoded = numbers.astype(np.float32)
        is_inside = encoded.any(axis=-1)
        inside = encoded[is_inside]
        mean, deviation = inside.mean(axis=0, dtype=np.float64), inside.std(axis=0, dtype=np.float64)
        encoded[is_inside] = (inside - mean) / np.maximum(deviation, 1e-6)
        write_cache(path, identity, spot_ids, centers, [encoded.astype(numbers.dtype)])
    write_text(done, "The features of every slide have mean 0 and deviation 1.\n")


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="demo", choices=tuple(DATA_SETS))
    parser.add_argument("--raw", type=Path, help="folder of the raw files (default: the variable of the data set)")
    parser.add_argument("--work", type=Path, help="where data and runs go (default: that of accuracy.py)")
    parser.add_argument("--switches", help=f"of {', '.join(SWITCHES)} (default: all that change something)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="setting of every run")
    parser.add_argument("--search", type=Path, default=SEARCH, help="result of accuracy_search.py")
    parser.add_argument("--device", help="any PyTorch device (default: CUDA if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the table (default: benchmarks/results/switches/<data>)")
    arguments = parser.parse_args(argv)
    data, seeds = DATA_SETS[arguments.data], [int(seed) for seed in arguments.seeds.split(",")]
    useful = [name for name in SWITCHES if not (data.name in ONE_PATIENT and name.endswith("patient"))]
    names = arguments.switches.split(",") if arguments.switches else useful
    if unknown := sorted(set(names) - set(SWITCHES)):
        raise ValueError(f"--switches: {', '.join(unknown)} unknown; known: {', '.join(SWITCHES)}.")
    work = arguments.work or (Path("demo") if data.name == "demo" else Path("accuracy") / data.name)
    out = arguments.out or RESULTS / "switches" / data.name
    require_file(arguments.search, "Make it first: python benchmarks/accuracy_search.py")
    chosen = searched("gene_dml", json.loads(arguments.search.read_text(encoding="utf-8"))["methods"])
    given = shown_flags(sys.argv[1:] if argv is None else argv)
    about = {
        "command": shlex.join(["python", "benchmarks/switches.py", *given]),
        "settings": {"gene_dml": chosen},
        "seeds": ", ".join(map(str, seeds)),
        "machine": machine(device_from(None, arguments.device)),
        "versions": software(),
    }
    complete, path = {}, out / "accuracy.md"
    for name in ("gene_dml", *names):
        say(f"== {TITLES[name]}")
        own_work = work / name if SWITCHES.get(name, ("", ""))[1] is None else work
        shared = prepare(normalised(data) if name == "stain" else data, own_work, arguments.raw)
        if name == "standardised":
            standardise_caches(own_work / "data")
        config = load_config(data.config, [*shared, *chosen, *arguments.set])
        with switched_on(name):
            complete[name] = train_method(config, name, data.config, seeds, arguments.device)
        if len(complete) > 1:
            # The list of PCC(H) is chosen by features, which two switches change; all take that of Gene-DML.
            path = write_accuracy(out, compare_methods(complete, metrics=METRICS, intersect=True), about)
    say(path.read_text(encoding="utf-8"))
    return path


if __name__ == "__main__":
    run(main)
