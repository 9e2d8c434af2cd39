"""What the group loss groups: how far the clusters of an image and of its expression tell patients, slides and tissue apart.

    python benchmarks/groups.py --data demo
    python benchmarks/groups.py --data mob --raw FOLDER          (or GENE_DML_MOB)
    python benchmarks/groups.py --data her2st --raw FOLDER       (or GENE_DML_HER2ST)

Gene-DML learns from all patients of the data set, as `accuracy.py` would train it (rate, epochs, batch, k), seed 0. Before
the first epoch and after each one the batches of an epoch are grouped as the loss groups them, without dropout. A number
is the normalised mutual information (0 to 1) of the clusters of a batch with a label of its spots, mean over batches. Small
groups agree by chance, so what shuffled labels give stands beside it. Tissue is known of the simulation alone: the region
at the middle of a spot.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import argparse
import json
import shlex
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import normalized_mutual_info_score

from benchmarks.accuracy import DATA_SETS, SEARCH, prepare, searched, shown_flags
from benchmarks.common import RESULTS, machine, software
from datasets.batches import SpotBatch
from datasets.spots import SlideRecord
from engine import train_one_epoch
from evaluation.report.tables import Table, number
from models.contract import ExpressionModel
from models.losses import GeneDMLLoss
from modes.train import epoch_batches, make_step
from modes.training.compose import Optimization, forward, open_layout
from modes.training.fold import new_model
from modes.training.plan import plan_all_patients
from modes.training.run_data import RunData, open_run_data
from modes.training.split import Split, prepare_split
from preprocess.simulate_demo import MANIFEST
from preprocess.simulation.tissue import simulate_section
from utils.cli import run, say
from utils.config import Config, load_config
from utils.devices import device_from, keep_freed_memory
from utils.files import require_file, write_text
from utils.runs import write_json

SHUFFLES = 20
MODALITIES = ("image", "gene")


def labels_of(run_data: RunData) -> dict[str, np.ndarray]:
    """Patient, slide and, of a simulation, tissue of every row of the store, as (R,) numbers.

    A label that has one value alone is left out.
    """
    slides = run_data.store.slides
    sizes = [slide.stop - slide.start for slide in slides]
    labels = {
        "patient": np.repeat([slide.patient for slide in slides], sizes),
        "slide": np.repeat([slide.name for slide in slides], sizes),
    }
    manifest = Path(run_data.layout.root) / MANIFEST
    if manifest.exists():
        simulated = json.loads(manifest.read_text(encoding="utf-8"))["arguments"]
        labels["tissue"] = np.concatenate([tissue_of(slide, simulated) for slide in slides])
    numbered = {name: np.unique(values, return_inverse=True)[1] for name, values in labels.items()}
    return {name: values for name, values in numbered.items() if values.max() > 0}


def tissue_of(slide: SlideRecord, simulated: dict) -> np.ndarray:
    """Simulate the section again: the region (N,) at the middle of each spot of the slide."""
    width, height = slide.image_size
    section = simulate_section(simulated["seed"], slide.patient, slide.name, (height, width), simulated["patch_size"])
    x, y = np.floor(slide.table.obsm["spatial"]).astype(np.intp).T
    return section.region[y, x]


def agreement(clusters: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Normalised mutual information of two groupings (B,), and its mean over shuffled labels."""
    shuffled = [normalized_mutual_info_score(random.permutation(labels), clusters) for _ in range(SHUFFLES)]
    return float(normalized_mutual_info_score(labels, clusters)), float(np.mean(shuffled))


def measure(
    run_data: RunData, model: ExpressionModel, batches: Iterable[SpotBatch], labels: dict[str, np.ndarray]
) -> list[dict[str, object]]:
    """Group every batch as the loss does and compare with each label: rows of modality, label, nmi, chance."""
    random = np.random.default_rng(0)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    loss = GeneDMLLoss(run_data.config.LOSS)
    model.eval()
    with torch.inference_mode(), run_data.precision.autocast():
        for batch in batches:
            embeddings = forward(model, run_data.encode, batch).embeddings
            assert embeddings is not None, "the batches hold measured expression"
            for modality, clusters in zip(MODALITIES, loss.clusters(embeddings)):
                for name, values in labels.items():
                    both = agreement(clusters.labels.cpu().numpy(), values[batch.rows.numpy()], random)
                    found.setdefault((modality, name), []).append(both)
    means = {key: np.mean(pairs, axis=0) for key, pairs in found.items()}
    return [
        {"modality": modality, "label": label, "nmi": float(nmi), "chance": float(chance)}
        for (modality, label), (nmi, chance) in means.items()
    ]


def groups_by_epoch(
    run_data: RunData, split: Split, labels: dict[str, np.ndarray], every: int
) -> Iterator[list[dict[str, object]]]:
    """Train, and measure before the first epoch, after the first, and after each `every`-th and the last.

    Yields the rows of every measurement: epoch, modality, label, nmi, chance.
    """
    config = run_data.config
    epochs = config.EVALUATION.fixed_epochs
    assert epochs is not None, "accuracy_search.py chose it"
    model = new_model(run_data, split)
    optimization = Optimization.of(model, config, run_data.precision)
    step, expression = make_step(model, config, run_data.encode), split.targets.to(run_data.device)
    for epoch in range(epochs + 1):
        if epoch > 0:
            model.train()
            batches = epoch_batches(run_data, split, expression, epoch)
            train_one_epoch(batches, step, optimization.optimizer, optimization.precision, f"epoch {epoch}")
            optimization.scheduler.step()
        if epoch in (0, 1, epochs) or epoch % every == 0:
            measured = measure(run_data, model, epoch_batches(run_data, split, expression, epoch), labels)
            shown = ", ".join(f"{row['modality']} with {row['label']} {row['nmi']:.3f}" for row in measured)
            say(f"Epoch {epoch} of {epochs}: {shown}")
            yield [{"epoch": epoch, **row} for row in measured]


def groups_table(rows: pd.DataFrame) -> Table:
    """One row per modality and label, one column per epoch measured, and what shuffled labels give (mean over epochs)."""
    by_label = rows.groupby(["modality", "label"], sort=False)
    epochs = sorted(rows["epoch"].unique())
    cells = []
    for (modality, label), group in by_label:
        values = group.set_index("epoch")["nmi"]
        shown = (number(values[epoch], 3) for epoch in epochs)
        cells.append((f"clusters of the {modality}", str(label), *shown, number(group["chance"].mean(), 3)))
    return Table(("", "with", *(f"epoch {epoch}" for epoch in epochs), "shuffled"), tuple(cells))


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="demo", choices=tuple(DATA_SETS))
    parser.add_argument("--raw", type=Path, help="folder of the raw files (default: the variable of the data set)")
    parser.add_argument("--work", type=Path, help="where the data go (default: accuracy/<data>; of the demo: demo)")
    parser.add_argument("--every", type=int, default=7, help="epochs between two measurements")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.key=value", help="setting of the training"
    )
    parser.add_argument("--search", type=Path, default=SEARCH, help="result of accuracy_search.py")
    parser.add_argument("--out", type=Path, help="folder of the table (default: benchmarks/results/groups/<data>)")
    arguments = parser.parse_args(argv)
    data = DATA_SETS[arguments.data]
    work = arguments.work or (Path("demo") if data.name == "demo" else Path("accuracy") / data.name)
    require_file(arguments.search, "Make it first: python benchmarks/accuracy_search.py")
    found = json.loads(arguments.search.read_text(encoding="utf-8"))["methods"]
    shared = prepare(data, work, arguments.raw)
    config = load_config(data.config, [*shared, *searched("gene_dml", found), *arguments.set])
    run_data, split = open_all_patients(config, data.config)
    given = shown_flags(sys.argv[1:] if argv is None else argv)
    about: dict[str, object] = {"command": shlex.join(["python", "benchmarks/groups.py", *given])}
    about |= {"settings": [*searched("gene_dml", found), *arguments.set]}
    about |= {"machine": machine(run_data.device), "versions": software()}
    out, rows = arguments.out or RESULTS / "groups" / data.name, list[dict[str, object]]()
    for measured in groups_by_epoch(run_data, split, labels_of(run_data), arguments.every):
        rows += measured
        path = write_groups(out, rows, about)  # after every measurement, so that an interruption leaves a table
    say(path.read_text(encoding="utf-8"))
    return path


def write_groups(out: Path, rows: list[dict[str, object]], about: dict[str, object]) -> Path:
    """Write groups.json and groups.md; returns the latter."""
    write_json(out / "groups.json", {**about, "rows": rows})
    text = groups_table(pd.DataFrame(rows)).to_markdown()
    return write_text(out / "groups.md", f"{text}\n\n`{about['command']}`\n")


def open_all_patients(config: Config, config_name: str) -> tuple[RunData, Split]:
    """Open the data of the one fold that learns from every patient."""
    device = device_from(None, None)
    if device.type == "cpu":
        keep_freed_memory()
    layout = open_layout(config, config_name)
    record = plan_all_patients(config, layout.patients_on_disk())
    run_data = open_run_data(config, config_name, layout, record.train_slides, device, [record])
    return run_data, prepare_split(run_data, record)


if __name__ == "__main__":
    run(main)
