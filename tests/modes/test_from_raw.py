"""Every raw format, from the files as they are published to a test fold: prepare, extract, one epoch, test; real programs.

The Space Ranger folder goes its way in test_external.py, the published download in test_published.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets.folds import make_folds
from datasets.known_sets import SPECS, get_spec
from datasets.layout import Layout
from preprocess import (
    extract_features_uni,
    prepare_her2st,
    prepare_hest,
    prepare_skinst,
    prepare_stnet,
    prepare_visium,
)
from tests.command_line import call, call_extract, call_main
from tests.preprocess import test_prepare_her2st as her2st
from tests.preprocess import test_prepare_hest as hest
from tests.preprocess import test_prepare_skinst as skinst
from tests.preprocess import test_prepare_stnet as stnet
from tests.space_ranger import write_hd_outs, write_outs

SMALL = [
    "DATA.patch_size=64", "DATA.num_neighbors=3", "DATA.num_genes=2", "DATA.encoder=efficientnet-lite0",
    "MODEL.projection_dim=16", "MODEL.neighbor_depth=1", "MODEL.neighbor_heads=4", "MODEL.neighbor_mlp_ratio=1",
    "MODEL.global_depth=1", "MODEL.global_heads=4", "MODEL.global_mlp_ratio=1", "MODEL.fusion_mlp_dim=16",
    "MODEL.gene_mlp_dim=16", "MODEL.predictor_dim=16", "LOSS.k=3", "TRAINING.batch_size=16",
]  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A raw source written by `write(folder)`; prepared by `program` with `flags`.

    config: of extraction and training.  test: slides of fold `fold`.
    """

    write: Callable[[Path], None]
    program: Callable[[], None]
    flags: tuple[str, ...]
    config: str
    fold: int
    test: tuple[str, ...]
    settings: tuple[str, ...] = ()


def write_her2st(raw: Path) -> None:
    for slide in ("A1", "B1", "C2"):
        her2st.write_slide(raw / "data", slide)


def write_skinst(raw: Path) -> None:
    for number, slide in enumerate(("P2_ST_rep1", "P5_ST_rep2", "P10_ST_rep3")):
        skinst.write_slide(raw, slide, 16 + number)


def stnet_slides() -> tuple[list[str], list[str]]:
    """One slide of a test patient of fold 0 and two of its training patients, whatever the seed has made of them."""
    spec = SPECS["stnet"]
    fold = make_folds(spec.patients, spec.fold_scheme, spec.num_folds, spec.fold_seed)[0]
    chosen = [
        next(s for s in spec.slides if spec.patient_of(s) == p)
        for p in (fold.test_patients[0], *fold.train_patients[:2])
    ]
    return chosen[:1], chosen[1:]


def write_stnet(raw: Path) -> None:
    test, training = stnet_slides()
    for slide in test + training:
        stnet.write_slide(raw, slide, [stnet.ACTB, stnet.ERBB2, stnet.UNKNOWN])
    (raw / "features.tsv").write_text("".join(f"{key}\t{symbol}\n" for key, symbol in stnet.MAP.items()))


def write_hest(raw: Path) -> None:
    """Patches only, of 224 px: no image to cut neighbors from."""
    names = ("TENX1", "NCBI2", "SPA3")
    for name in names:
        hest.write_sample(raw, name)
    hest.METADATA[hest.METADATA["id"].isin(names)].to_csv(raw / "HEST_v1_1_0.csv", index=False)


RAW = {
    "her2st": Raw(write_her2st, prepare_her2st.main, (), "her2st/dml", 0, ("A1",)),
    "skinst": Raw(write_skinst, prepare_skinst.main, (), "skinst/dml", 1, ("P5_ST_rep2",)),
    "stnet": Raw(
        write_stnet, prepare_stnet.main, ("--gene_map", "{raw}/features.tsv"), "stnet/dml", 0, tuple(stnet_slides()[0])
    ),
    "hest": Raw(
        write_hest, prepare_hest.main, ("--name", "hest_breast"), "hest.yaml", 0, ("SPA3",),
        ("DATA.patch_size=224", "MODEL.use_neighbor=false"),
    ),
}  # fmt: skip


def run_said(said: str, tmp_path: Path) -> list[str]:
    """Run the commands that a preparing script has said, small, and return them."""
    said_commands = re.findall(r"^(?:Next|Then|Before it[^:]*): (python .*)$", said, flags=re.MULTILINE)
    settings = [part for setting in SMALL if "num_genes" not in setting for part in ("--set", setting)]
    for command in said_commands:
        script, *words = shlex.split(command)[1:]
        more = ["--device", "cpu", *(["--no_report"] if "external_test" in words else settings)]
        if {"all", "token"} & {*words}:
            more += ["--views", 1]
        if "train" in words:
            more += ["--log_path", tmp_path / "logs", "--fold", 0, "--no_report", "--set", "TRAINING.epochs=1"]
            words = [word if word != "50" else "1" for word in words]
        left = call({"main.py": main.main}.get(script, extract_features_uni.main), *words, *more)
        assert left.status == 0, f"{command}\n{left.said}"
    return said_commands


def write_sheet(folder: Path, generations: tuple[object, ...], patients: Sequence[str]) -> Path:
    """A sheet of sections of about ten spots, of several generations of Space Ranger; "hd" is Visium HD."""
    symbols = ["GAPDH", "TP53", "ERBB2", "KRT5"]
    lines = ["sample,patient,outs,image"]
    for number, (generation, patient) in enumerate(zip(generations, patients, strict=True)):
        home = folder / f"s{number}"
        picture = np.random.default_rng(5 + number).integers(0, 255, (500, 430, 3), dtype=np.uint8)
        if generation == "hd":
            outs, image = write_hd_outs(home / "outs", symbols, sizes=(8,), shape=(112, 84)).folder, home / "image.tif"
            Image.fromarray(picture).save(image)
        else:
            written = write_outs(home / "outs", picture[:310], symbols, generation=generation, pitch=90.0, seed=number)
            outs, image = written.folder, written.image
        lines.append(f"S{number},{patient},{outs},{image}")
    sheet = folder / "samples.csv"
    sheet.write_text("\n".join(lines) + "\n")
    return sheet


@pytest.mark.parametrize(
    ("generations", "patients"), [((1, 2, "hd", 3), ("P1", "P2", "P3", "P1")), ((2, 1), ("P1", "P2"))]
)
def test_a_sample_sheet_becomes_a_training_set_and_what_is_said_next_runs(tmp_path, monkeypatch, generations, patients):
    monkeypatch.chdir(tmp_path)
    sheet = write_sheet(tmp_path, generations, patients)
    left = call(prepare_visium.main, "--samples", sheet, "--name", "mine")
    assert left.status == 0, left.said
    spec = get_spec("mine", tmp_path / "data")
    assert not spec.external and spec.slides == tuple(f"S{i}" for i in range(len(patients)))
    assert [spec.patient_of(slide) for slide in spec.slides] == list(patients)
    assert not Layout("data", spec).panel_path.exists() and "select_genes" not in left.said
    commands = run_said(left.said, tmp_path)
    assert len(commands) == 4 and ("--fixed_epochs" in commands[-1]) == (len(patients) == 2)
    (checkpoint,) = (tmp_path / "logs").rglob("best.pt")
    assert torch.load(checkpoint, weights_only=True)["genes"] == ["ERBB2", "GAPDH", "KRT5", "TP53"]
    again = call(prepare_visium.main, "--samples", sheet, "--name", "mine")
    assert again.status == 0 and again.said.count(" kept") == len(patients), again.said
    # Its last two sections, between both sheets all generations, as an external set for the run that has just been trained.
    run, lines, theirs = checkpoint.parent.parent, sheet.read_text().splitlines(), tmp_path / "theirs.csv"
    theirs.write_text("\n".join([lines[0], *lines[-2:]]))
    left = call(prepare_visium.main, "--samples", theirs, "--name", "theirs", "--test", "--model_path", run)
    assert left.status == 0, left.said
    run_said(left.said, tmp_path)
    assert (run / "external" / "theirs").is_dir() or list(run.glob("fold_0/external/theirs"))
    clash = call(prepare_visium.main, "--samples", sheet, "--name", "mine", "--test")
    assert clash.status == 2 and "describes a training set of this name" in clash.said


@pytest.mark.parametrize("name", RAW)
def test_from_raw_files_to_a_test_fold(name, tmp_path):
    case, raw, data_dir = RAW[name], tmp_path / "raw", tmp_path / "data"
    case.write(raw)
    flags = [flag.format(raw=raw) for flag in case.flags]
    left = call(case.program, "--source", raw, "--data_dir", data_dir, "--num_genes", 2, *flags)
    assert left.status == 0, left.said
    config = case.config
    if config.endswith(".yaml"):
        config = tmp_path / config
        config.write_text("DATA: {type: hest_breast}\n")
    settings = [part for setting in (*SMALL, *case.settings) for part in ("--set", setting)]
    shared = ["--data_dir", data_dir, "--device", "cpu"]
    kinds = ("target", "token") if "MODEL.use_neighbor=false" in case.settings else ("all",)
    for kind in kinds:
        views = () if kind == "target" else ("--views", 1)
        left = call_extract(
            "--config", config, "--mode", "internal", "--extract_mode", kind, *views, "--num_workers", 0, *shared, *settings
        )  # fmt: skip
        assert left.status == 0, left.said
    left = call_main("--mode", "doctor", "--config_name", config, *shared, *settings)
    assert left.status == 0, left.said
    left = call_main(
        "--mode", "train", "--config_name", config, "--log_path", tmp_path / "logs", "--use_kmeans", "--epochs", 1, "--fold",
        case.fold, "--protocol", "paper", "--no_report", *shared, *settings,
    )  # fmt: skip
    assert left.status == 0, left.said
    (checkpoint,) = (tmp_path / "logs").rglob("best.pt")
    content = torch.load(checkpoint, weights_only=True)
    assert tuple(content["fold"]["test_slides"]) == case.test and len(content["genes"]) == 2
    left = call_main("--mode", "test", "--fold", case.fold, "--model_path", checkpoint.parent, "--no_report", *shared)
    assert left.status == 0, left.said
    assert np.isfinite(json.loads((checkpoint.parent / "result.json").read_text())["mse"])
    predicted = anndata.read_h5ad(checkpoint.parent / "predictions" / f"{case.test[0]}.h5ad")
    assert list(predicted.var_names) == content["genes"] and np.isfinite(predicted.X).all()
    assert np.isfinite(predicted.layers["measured"]).all() and predicted.n_obs >= 11
