"""The simulated demo: readable by the real loaders, the same in every process, and worth learning from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.images.geometry import neighbor_validity
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.expression import expression_targets
from datasets.tables.slide_table import load_slide
from preprocess.simulate_demo import MANIFEST, simulate
from preprocess.simulation.genes import GENES, PROGRAM_OF, PROGRAMS, activities, gene_model
from preprocess.simulation.slide import simulate_slide
from preprocess.simulation.staining import draw_stain
from preprocess.simulation.tissue import BACKGROUND, simulate_section, smooth_noise
from preprocess.simulation.tissue import generator as seeded
from utils.files import load_names

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"patients": ("A", "B"), "slides_per_patient": 1, "grid": (6, 5), "patch_size": 32, "num_genes": 24}
PATCH = 48


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A data folder with a data set of two small slides and an external one. Read only."""
    folder = tmp_path_factory.mktemp("small")
    simulate(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def slides():
    """Eight slides of four patients in memory, large enough for statistics."""
    model = gene_model(2021, 60)
    names = [(patient, f"{patient}{number}") for patient in "ABCD" for number in (1, 2)]
    return [
        simulate_slide(model, seed=2021, patient=patient, name=name, grid=(9, 8), pitch=PATCH)
        for patient, name in names
    ]


def layout_of(folder: Path, name: str) -> Layout:
    return Layout(folder, get_spec(name, folder), patch_size=SMALL["patch_size"])


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name, names", [("demo", ["A1", "B1"]), ("demo_external", ["X1"])])
def test_the_real_loaders_read_what_was_written(small, name, names):
    layout = layout_of(small, name)
    assert layout.slides_on_disk() == names
    panel = load_names(layout.panel_path)
    for slide in names:
        adata = load_slide(layout, slide)
        listed = pd.read_csv(layout.spots_path(slide), sep="\t")
        assert list(listed) == ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
        assert 15 <= adata.n_obs < len(listed) <= 30, "the table lists a few spots that have no counts"
        assert set(panel) <= set(adata.var_names)


def test_counts_are_integers_with_some_zeros(small):
    for slide in ("A1", "B1"):
        counts = pd.read_parquet(layout_of(small, "demo").counts_path(slide))
        assert (counts.dtypes == np.int64).all()
        assert counts.shape[1] == 2 * SMALL["num_genes"]
        assert (counts.to_numpy() >= 0).all()
        assert 0.02 < (counts == 0).to_numpy().mean() < 0.6
        assert counts.sum(axis=1).min() > 50


def test_every_patch_lies_inside_and_some_outer_neighbors_outside(small):
    layout = layout_of(small, "demo")
    for slide in layout.slides_on_disk():
        size = Image.open(layout.image_path(slide)).size
        is_valid = neighbor_validity(load_slide(layout, slide).obsm["center"], size, SMALL["patch_size"])
        assert is_valid[:, 12].all()
        assert not is_valid.all()
        inner = is_valid.reshape(-1, 5, 5)[:, 1:4, 1:4]
        assert inner.all(), "the first ring is always inside"


def test_the_panel_holds_the_highest_means_of_all_slides(small):
    layout = layout_of(small, "demo")
    counts = pd.concat([pd.read_parquet(layout.counts_path(slide)) for slide in ("A1", "B1")])
    mean = np.log1p(counts.mul(1e4 / counts.sum(axis=1), axis=0)).mean()
    assert load_names(layout.panel_path) == sorted(mean.nlargest(SMALL["num_genes"]).index)
    assert np.load(layout.panel_path, allow_pickle=False).dtype.kind == "U"


def test_the_external_set_matches_the_training_panel(small):
    panel = load_names(layout_of(small, "demo").panel_path)
    external = layout_of(small, "demo_external")
    genes, indices = load_names(external.panel_path), np.load(external.panel_index_path)
    assert genes == [panel[index] for index in indices]
    assert len(set(genes)) == len(genes) == len(panel) - 3, "a few panel genes were not measured"
    measured = pd.read_parquet(external.counts_path("X1")).columns.tolist()
    assert genes == [gene for gene in measured if gene in panel], "in the order of that set"
    assert not set(panel) - set(genes) & set(measured)
    assert (np.diff(indices) < 0).any(), "an order other than that of the training panel"
    assert external.spec.external and external.spec.training_type == "demo"
    assert not external.spec.exchanged_pixels


def test_the_manifest_names_scale_and_genes_of_every_program(small):
    content = json.loads((small / "demo" / MANIFEST).read_text())
    assert content["is_complete"]
    assert {program["scale"] for program in content["programs"].values()} == {"target", "neighbor", "global"}
    listed = [gene for program in content["programs"].values() for gene in program["genes"]]
    assert sorted(listed) == sorted(load_names(layout_of(small, "demo").panel_path))


def test_every_process_writes_the_same_bytes(small, tmp_path):
    command = [sys.executable, "-m", "preprocess.simulate_demo", "--data_dir", str(tmp_path), "--patients", "A,B"]
    command += ["--slides_per_patient", "1", "--grid", "6", "5", "--patch_size", "32", "--num_genes", "24"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 simulated slides of 2 patients" in done.stdout
    assert digests(tmp_path) == digests(small)


def test_another_seed_gives_another_data_set():
    model = gene_model(1, 24)
    assert not np.array_equal(model.base, gene_model(2, 24).base)
    sections = [simulate_section(seed, "A", "A1", (200, 220), 32).region for seed in (1, 2)]
    assert (sections[0] != sections[1]).mean() > 0.2


def test_finished_data_are_kept(tmp_path):
    arguments = {**SMALL, "patients": ("A",), "external": False}
    first = simulate(tmp_path, **arguments)
    image = tmp_path / "demo" / "ST-imgs" / "A" / "A1" / "A1.jpg"
    image.write_bytes(b"edited")
    assert simulate(tmp_path, **arguments) == first
    assert image.read_bytes() == b"edited", "a complete data set is not written again"

    with pytest.raises(ValueError, match=r"holds another simulation: seed is 2021, asked for 7.*Keep it elsewhere"):
        simulate(tmp_path, **arguments, seed=7)
    simulate(tmp_path, **{**arguments, "patients": ("B",)}, overwrite=True)
    assert layout_of(tmp_path, "demo").slides_on_disk() == ["B1"], "no slide of the earlier simulation remains"


def test_an_interrupted_simulation_is_done_again(tmp_path, small):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "demo" / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "is_complete": False}))
    (tmp_path / "demo" / "ST-cnts" / "B1_sub.parquet").unlink()
    simulate(tmp_path, **SMALL)
    assert digests(tmp_path) == digests(small)


def test_data_of_another_origin_are_never_replaced(tmp_path):
    (tmp_path / "demo" / "ST-cnts").mkdir(parents=True)
    table = tmp_path / "demo" / "ST-cnts" / "A1.tsv"
    table.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"has no simulation\.json.*they are kept.*another --data_dir"):
            simulate(tmp_path, **SMALL, overwrite=overwrite)
    assert table.read_text() == "mine"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patients": ()}, "at least one patient"),
        ({"patients": ("A", "A")}, "not all different"),
        ({"patients": ("P1", "b")}, "capital letters"),
        ({"grid": (3, 9)}, "3 x 9 spots: at least 4 x 4"),
        ({"patch_size": 8}, "patch_size is 8 px"),
        ({"seed": -1}, "must not be negative"),
        ({"num_genes": 500}, f"num_genes is 500.*{len(GENES)} genes"),
        ({"name": "../demo"}, "not a plain name"),
    ],
)
def test_arguments_that_make_no_data_set(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path, **{**SMALL, **wrong})
    assert not any(tmp_path.iterdir())


def test_genes_are_distinct_symbols_and_every_program_is_in_a_small_panel():
    assert len(set(GENES)) == len(GENES) == sum(len(genes.split()) for _, genes in PROGRAMS.values())
    assert {PROGRAM_OF[gene] for gene in gene_model(0, 24).genes} == set(PROGRAMS)


def test_smooth_noise_has_unit_variance_at_every_length():
    for length in (2.0, 9.0, 40.0):
        draws = [smooth_noise(seeded(seed, "noise"), (120, 160), length) for seed in range(80)]
        assert draws[0].shape == (120, 160)
        assert np.std(draws) == pytest.approx(1.0, abs=0.12)


def test_sections_of_a_patient_are_alike_in_tissue_and_stain(slides):
    """Two sections of one patient share most of their regions, and their stain more than two patients do."""
    regions = [slide.section.region for slide in slides]
    same = [(regions[i] == regions[i + 1])[regions[i] != BACKGROUND].mean() for i in (0, 2, 4, 6)]
    other = [
        (regions[i] == regions[j])[regions[i] != BACKGROUND].mean()
        for i in range(0, 8, 2)
        for j in (1, 3, 5, 7)
        if j != i + 1
    ]
    assert np.mean(same) > np.mean(other) + 0.15
    stains = [[draw_stain(2021, patient, f"{patient}{n}").eosin for n in (1, 2)] for patient in "ABCDEFGH"]
    within = np.mean([np.abs(first - second).sum() for first, second in stains])
    between = np.mean([np.abs(stains[i][0] - stains[i + 1][0]).sum() for i in range(7)])
    assert within < 0.6 * between


def color_features(slide) -> np.ndarray:
    """(N, 2 * 9): mean, spread and dark share of every channel, in the patch and in the 3 x 3 tiles around it.

    Standardised within the slide, the crudest way to take its stain out.
    """
    ids = [f"{x}x{y}" for x, y in slide.spots[["x", "y"]].to_numpy()]
    centers = slide.spots.set_index(pd.Index(ids)).loc[slide.counts.index, ["pixel_x", "pixel_y"]]
    features = []
    for x, y in centers.to_numpy().astype(int):
        row = []
        for half in (PATCH // 2, 3 * PATCH // 2):
            window = slide.picture[max(y - half, 0) : y + half, max(x - half, 0) : x + half].reshape(-1, 3)
            row += [window.mean(axis=0), window.std(axis=0), (window < 130).mean(axis=0) * 100]
        features.append(np.concatenate(row))
    features = np.array(features)
    return (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)


def targets(slide) -> np.ndarray:
    grid = np.array([[int(part) for part in spot.split("x")] for spot in slide.counts.index])
    return expression_targets(slide.counts.to_numpy(), grid)


def leave_one_patient_out(slides, features: list[np.ndarray], expression: list[np.ndarray]):
    """Ridge on standardised features -> (mean PCC over genes and slides, MSE, MSE of the training mean)."""
    correlations, errors, floor = [], [], []
    for patient in "ABCD":
        train = [index for index, slide in enumerate(slides) if slide.patient != patient]
        x, y = (np.concatenate([blocks[index] for index in train]) for blocks in (features, expression))
        center, spread, mean = x.mean(axis=0), x.std(axis=0), y.mean(axis=0)
        scaled = (x - center) / spread
        weights = np.linalg.solve(scaled.T @ scaled + 30.0 * np.eye(x.shape[1]), scaled.T @ (y - mean))
        for index in set(range(len(slides))) - set(train):
            predicted = (features[index] - center) / spread @ weights + mean
            measured = expression[index]
            a, b = predicted - predicted.mean(axis=0), measured - measured.mean(axis=0)
            correlations.append((a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0) + 1e-12))
            errors.append(((predicted - measured) ** 2).mean())
            floor.append(((mean - measured) ** 2).mean())
    return np.mean(correlations), np.mean(errors), np.mean(floor)


def test_colors_of_the_patch_predict_expression_and_the_neighborhood_adds(slides):
    features, expression = [color_features(slide) for slide in slides], [targets(slide) for slide in slides]
    target_only = leave_one_patient_out(slides, [block[:, :9] for block in features], expression)
    with_neighbors = leave_one_patient_out(slides, features, expression)
    assert target_only[0] > 0.2
    assert with_neighbors[0] > target_only[0] + 0.03
    assert with_neighbors[1] < 0.97 * with_neighbors[2], "better than the training mean"


def test_each_scale_has_programs_of_its_own(slides):
    """Given the tissue of the patch, neighbor and global programs still vary; target programs do not."""
    unexplained = {"target": [], "neighbor": [], "global": []}
    local_columns = [list(PROGRAMS).index(name) for name in ("tumour", "gland", "stroma", "fat", "lymphoid")]
    activity = []
    for slide in slides:
        ids = [f"{x}x{y}" for x, y in slide.spots[["x", "y"]].to_numpy()]
        table = slide.spots.set_index(pd.Index(ids)).loc[slide.counts.index]
        activity.append(activities(slide.section, table[["pixel_x", "pixel_y"]].to_numpy()))
    activity = np.concatenate(activity)
    assert activity.min() >= 0.0 and activity.max() <= 1.3
    local = activity[:, local_columns]
    design = np.column_stack([np.ones(len(local)), local, local**2, np.prod(local[:, :2], axis=1)])
    for column, (scale, _) in enumerate(PROGRAMS.values()):
        fitted = design @ np.linalg.lstsq(design, activity[:, column], rcond=None)[0]
        unexplained[scale].append(np.var(activity[:, column] - fitted) / np.var(activity[:, column]))
    assert max(unexplained["target"]) < 0.2
    assert min(unexplained["neighbor"]) > 0.2
    assert min(unexplained["global"]) > 0.4
