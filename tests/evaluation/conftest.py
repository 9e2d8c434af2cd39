"""A run folder made of random numbers through the real functions: what reports and comparisons are tested on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.fold_files import write_fold
from evaluation.predictions import write_prediction
from evaluation.protocol import score_fold
from evaluation.slide_result import SlideResult

GENES = ["ACTB", "ERBB2", "HLA-DRB1", "MT/1A", "CONSTANT", "GAPDH", "KRT19", "FN1", "<b>&", "ZYX"]
PATIENTS = ("A", "B", "C")
UNIT = "log10(1 + counts per 10 000 of the panel)"


def make_slide(generator: np.random.Generator, slide: str, signal: float) -> SlideResult:
    """A 6 x 5 slide whose predictions carry `signal` of the measured values; one gene is constant."""
    grid_xy = np.stack([np.arange(30) % 6, np.arange(30) // 6], axis=1)
    measured = 1.0 + generator.normal(size=(30, len(GENES))) * 0.3
    measured[:, GENES.index("CONSTANT")] = 0.0
    scales = {"fused": signal, "target": signal * 0.8, "neighbor": signal * 0.5, "global": 0.0}
    predictions = {
        name: (1 + share * (measured - 1) + 0.3 * (1 - share) * generator.normal(size=measured.shape)).astype(
            np.float32
        )
        for name, share in scales.items()
    }
    return SlideResult(
        slide=slide,
        patient=slide[0],
        spot_ids=[f"{x}x{y}" for x, y in grid_xy],
        grid_xy=grid_xy,
        genes=GENES,
        measured=measured.astype(np.float32),
        measured_unsmoothed=measured.astype(np.float32),
        predictions=predictions,
    )


def write_slide(result: SlideResult, path: Path, generator: np.random.Generator) -> None:
    """The prediction file of a slide of 700 x 600 px on an image at half the size."""
    write_prediction(
        path,
        slide=result.slide,
        spot_ids=result.spot_ids,
        genes=result.genes,
        predictions=result.predictions,
        spatial_px=result.grid_xy * 100.0 + 100.0,
        grid_xy=result.grid_xy,
        measured=result.measured,
        measured_unsmoothed=result.measured_unsmoothed,
        image=generator.integers(150, 255, size=(300, 350, 3), dtype=np.uint8),
        image_scale=0.5,
        spot_diameter_px=55.0,
        unit=UNIT,
        provenance={"run": "fabricated"},
    )


def write_run(
    run_dir: Path, *, protocol: str = "clean", signal: float = 0.6, seed: int = 5, predictions: bool = True
) -> Path:
    """Three folds of one patient and two slides each, with everything that a finished run holds."""
    generator = np.random.default_rng(seed)
    for index, patient in enumerate(PATIENTS):
        fold_dir = run_dir / f"fold_{index}"
        slides = [make_slide(generator, f"{patient}{number}", signal) for number in (1, 2)]
        for result in slides if predictions else []:
            write_slide(result, fold_dir / "predictions" / f"{result.slide}.h5ad", generator)
        others = [name for name in PATIENTS if name != patient]
        split = {
            "fold": index, "name": patient, "protocol": protocol, "test_patients": [patient],
            "train_patients": others[:1], "validation_patients": others[1:], "test_slides": [s.slide for s in slides],
            "train_slides": [], "validation_slides": [], "selection": {"paper": "test"}.get(protocol, "validation"),
        }  # fmt: skip
        fold_dir.mkdir(parents=True, exist_ok=True)
        (fold_dir / "split.json").write_text(json.dumps(split))
        epochs = [
            {"epoch": epoch, "train/total": 9 / epoch, "train/prediction": 1 / epoch, "train/instance": 6 / epoch,
             "train/group": 2 / epoch, "learning_rate": 1e-4, "validation/mse": 0.5 / epoch + 0.1,
             "validation/pcc_all": 0.1 * epoch, "test/pcc_all": 0.09 * epoch, "test/mse": None}
            for epoch in range(1, 6)
        ]  # fmt: skip
        (fold_dir / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
        scores = score_fold(
            slides,
            training_mean=np.ones(len(GENES)),
            training_mean_unsmoothed=np.ones(len(GENES)),
            gene_lists={"highly_predictive": GENES[:2], "highly_variable": GENES[1:3]},
            protocol=protocol,
        )
        write_fold(scores, fold_dir, {"epoch": 4})
        clusters = pd.DataFrame(
            {
                "slide": generator.choice([f"{name}{number}" for name in others for number in (1, 2)], size=64),
                "image_cluster": generator.integers(0, 5, size=64),
                "gene_cluster": generator.integers(0, 5, size=64),
            }
        )
        clusters.insert(1, "patient", clusters["slide"].str[0])
        clusters.to_csv(fold_dir / "clusters.csv", index=False)
    (run_dir / "config.yaml").write_text("GENERAL:\n  seed: 5\nDATA:\n  type: demo\n")
    (run_dir / "versions.json").write_text(json.dumps({"gene_dml": "1.0.0", "python": "3.11"}))
    return run_dir


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """make_run(folder, protocol=.., signal=.., seed=.., predictions=..): writes a finished run there."""
    return write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A finished run under the clean protocol; tests that change it copy it first."""
    return write_run(tmp_path_factory.mktemp("runs") / "fabricated")
