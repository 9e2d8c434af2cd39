"""Panels by every method, from all slides and from training patients only, with the record of how they were made."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets.layout import Layout
from datasets.spec import DatasetSpec, write_spec
from preprocess.select_genes import genes_by_variability, main, select_genes
from utils.files import load_names

OWN = DatasetSpec(name="own", patient_pattern=r"^([A-Z])\d$")
PATIENTS = "ABCD"
HOUSEKEEPING = [f"HIGH{i:02d}" for i in range(40)]  # high mean, no more than Poisson noise
VARIABLE = [f"VAR{i}" for i in range(4)]  # low mean, clustered in half of the spots
BOTH = ["BOTH0", "BOTH1"]  # high mean and clustered
QUIET = [f"LOW{i:03d}" for i in range(200)]
GENES = [*HOUSEKEEPING, *VARIABLE, *BOTH, *QUIET, "OF_PATIENT_A"]


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    """Four patients with two slides of 60 spots; one gene is high in patient A only, one is missing in slide D2."""
    layout = Layout(tmp_path_factory.mktemp("data"), OWN)
    for folder in (layout.counts_dir, layout.spots_dir, layout.images_dir):
        folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    cells = [(x, y) for y in range(6) for x in range(10)]
    half = np.array([x < 5 for x, _ in cells], dtype=float)
    for slide in (f"{patient}{i}" for patient in PATIENTS for i in (1, 2)):
        mean = {
            **{gene: np.full(60, 20.0 + 2 * i) for i, gene in enumerate(HOUSEKEEPING)},
            **{gene: 0.2 + 6 * half for gene in VARIABLE},
            **{gene: 5 + 140 * (1 - half) for gene in BOTH},
            **{gene: np.full(60, 0.3 + 0.03 * i) for i, gene in enumerate(QUIET)},
            "OF_PATIENT_A": np.full(60, 500.0 if slide[0] == "A" else 0.5),
            "NOT_IN_D2": np.full(60, 500.0),
        }
        counts = pd.DataFrame(
            {gene: generator.poisson(m) for gene, m in mean.items()}, index=[f"{x}x{y}" for x, y in cells]
        )
        if slide == "D2":
            counts = counts.drop(columns="NOT_IN_D2")
        counts.to_csv(layout.counts_dir / f"{slide}.tsv", sep="\t")
        spots = pd.DataFrame([(x, y, 10 * x, 10 * y) for x, y in cells], columns=["x", "y", "pixel_x", "pixel_y"])
        spots.to_csv(layout.spots_path(slide), sep="\t", index=False)
        (layout.images_dir / f"{slide}.jpg").write_bytes(b"")
    write_spec(layout.spec_path, OWN)
    return layout


def test_mean_takes_the_highest_and_records_how(layout, tmp_path):
    panel = select_genes(layout, method="mean", num_genes=7, out=tmp_path / "panel.npy")
    assert set(HOUSEKEEPING[-6:]) < set(panel) and panel == sorted(panel)
    assert load_names(tmp_path / "panel.npy") == panel
    record = json.loads((tmp_path / "panel.json").read_text())
    assert record["method"] == "mean" and record["meaning"].startswith("highest mean of log(1 + counts per 10 000")
    assert record["num_genes"] == 7 and record["genes"] == panel and record["data_set"] == "own"
    assert record["slides"] == [f"{patient}{i}" for patient in PATIENTS for i in (1, 2)] and record["spots"] == 480
    assert "NOT_IN_D2" not in select_genes(layout, num_genes=len(GENES), out=tmp_path / "all.npy"), (
        "not measured in every slide"
    )


def test_methods_choose_what_they_say(layout, tmp_path):
    chosen = {
        method: select_genes(layout, method=method, num_genes=6, out=tmp_path / f"{method}.npy")
        for method in ("mean", "mean_raw", "hvg", "hmhvg")
    }
    assert set(VARIABLE) <= set(chosen["hvg"]) and not set(HOUSEKEEPING) & set(chosen["hvg"])
    assert set(BOTH) <= set(chosen["hmhvg"]), "high in both"
    assert "OF_PATIENT_A" in chosen["mean_raw"], "a quarter of 500 is more than 98"
    assert "OF_PATIENT_A" not in chosen["hvg"], "differences between slides do not count as variability"
    assert len({tuple(genes) for genes in chosen.values()}) == 4


def test_variability_does_not_depend_on_the_order_of_slides(layout):
    from datasets.tables.slide_table import load_slide

    slides = [load_slide(layout, slide, GENES) for slide in ("A1", "B1", "C1")]
    assert genes_by_variability(slides, 6) == genes_by_variability(slides[::-1], 6)


def test_a_fold_uses_its_training_patients_only(layout):
    everyone = select_genes(layout, method="mean_raw", num_genes=7, fold=1)
    without_a = select_genes(layout, method="mean_raw", num_genes=7, fold=0)
    assert "OF_PATIENT_A" in everyone and "OF_PATIENT_A" not in without_a
    path = layout.root / "genes_own_fold0.npy"
    record = json.loads(path.with_suffix(".json").read_text())
    assert load_names(path) == without_a and not layout.panel_path.exists()
    assert record["fold"] == 0 and record["train_patients"] == ["B", "C", "D"] and record["left_out"] == ["A"]
    assert record["slides"] == ["B1", "B2", "C1", "C2", "D1", "D2"]


def test_an_existing_panel_is_not_replaced_silently(layout, tmp_path):
    out = tmp_path / "panel.npy"
    first = select_genes(layout, num_genes=5, out=out)
    assert select_genes(layout, num_genes=5, out=out) == first
    said = r"panel\.npy is kept: it holds 5 genes, 1 of the 6 .*keep it and panel\.json elsewhere and repeat"
    with pytest.raises(ValueError, match=said):
        select_genes(layout, num_genes=6, out=out)
    assert load_names(out) == first
    assert load_names(out) != select_genes(layout, num_genes=6, out=out, overwrite=True) == load_names(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fold": 4}, r"--fold 4 does not exist .* possible are 0 \(A\), 1 \(B\), 2 \(C\), 3 \(D\)"),
        ({"num_genes": 248}, "panel of 248 genes was asked for, but the slides have 247 genes in common"),
        ({"out": Path("genes.txt")}, "--out genes.txt should end in .npy"),
    ],
)
def test_impossible_wishes_are_refused(layout, arguments, message):
    with pytest.raises(ValueError, match=message):
        select_genes(layout, **arguments)


@pytest.mark.parametrize("method", ["mean", "hvg", "hmhvg"])
def test_ids_on_one_slide_are_told_and_not_a_panel_of_no_genes(layout, tmp_path, method):
    data = shutil.copytree(layout.data_dir, tmp_path / "data")
    path = data / "own" / "ST-cnts" / "A1.tsv"
    table = pd.read_csv(path, sep="\t", index_col=0)
    table.set_axis([f"ENSG{i:011d}" for i in range(table.shape[1])], axis=1).to_csv(path, sep="\t")
    with pytest.raises(
        ValueError, match=r"The genes of A1 have Ensembl ids .*those of A2, B1, .*--gene_map FILE"
    ) as said:
        select_genes(Layout(data, OWN), method=method, num_genes=5, overwrite=True)
    assert "between 1 and 0" not in str(said.value) and "select_genes" not in str(said.value)


def test_nothing_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"own', does not exist\. See docs/your_data\.md"):
        select_genes(Layout(tmp_path, OWN))
    (tmp_path / "own" / "ST-cnts").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no slide with counts and a spot table"):
        select_genes(Layout(tmp_path, OWN))


def test_command_line_takes_type_or_configuration(layout, tmp_path, monkeypatch, capsys):
    out = tmp_path / "panel.npy"
    arguments = ["--method", "mean", "--data_dir", str(layout.data_dir), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["select_genes.py", "--type", "own", "--num_genes", "3", *arguments])
    main()
    assert len(load_names(out)) == 3
    assert "3 genes, highest mean" in capsys.readouterr().out
    config = tmp_path / "own.yaml"
    config.write_text("DATA:\n  type: own\n  num_genes: 4\n")
    monkeypatch.setattr(sys, "argv", ["select_genes.py", "--config", str(config), "--overwrite", *arguments])
    main()
    assert len(load_names(out)) == 4
    monkeypatch.setattr(sys, "argv", ["select_genes.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
