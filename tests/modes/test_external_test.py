"""External tests: the mean of the folds, genes in common, spot order in both conventions, leaks and refusals."""

from __future__ import annotations

import html
import json
import shutil
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import main
from datasets.features.cache import read_features
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec, leaking_slides
from datasets.layout import Layout
from datasets.spec import DatasetSpec, write_spec
from datasets.tables.slide_table import load_slide
from datasets.targets import slide_targets
from evaluation.external import combined_list
from evaluation.metrics import pearson
from evaluation.slide_result import MEAN
from modes.external_test import external_test, highly_predictive_of
from modes.prediction.ensemble import load_members
from modes.prediction.external_data import _note_on_genes
from preprocess.extract_features_uni import main as extract
from preprocess.prepare_visium import main as prepare_visium
from tests.checkpoints import edit
from tests.command_line import call_main
from tests.space_ranger import write_outs
from utils.checkpoint import chosen_checkpoints, load_checkpoint
from utils.files import load_names

CPU = torch.device("cpu")


def _extract(run, data_dir: Path, test_name: str, kind: str = "all") -> None:
    flags = ["--config", run.config_name, "--mode", "external", "--test_name", test_name, "--extract_mode", kind]
    flags += ["--views", "1"] if kind == "all" else []
    extract([*flags, "--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "1"])


@pytest.fixture(scope="module")
def tested(tiny_run, tmp_path_factory) -> tuple[Path, Path]:
    """(data folder with extracted test/demo_external, folder of the results of both folds)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("external")
    data_dir = Path(shutil.copytree(tiny_run.data_dir, folder / "data"))
    _extract(tiny_run, data_dir, "demo_external")
    return data_dir, external_test(tiny_run.copy(folder), "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU)


def _by_hand(data_dir: Path, run_dir: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Genes in common, measured targets and the mean prediction, from the checkpoints one whole slide at a time."""
    from modes.prediction.model import restored_model
    from modes.prediction.slide import predict_slide
    from modes.training.compose import open_layout
    from modes.training.run_data import open_run_data
    from utils.config import with_overrides

    paths = [run_dir / f"fold_{fold}" / "best.pt" for fold in (0, 1)]
    folds = [load_checkpoint(path) for path in paths]
    config = with_overrides(folds[0].config, [f"DATA.data_dir={data_dir}"])
    layout = open_layout(config, "tiny", "demo_external")
    run_data = open_run_data(config, "tiny", layout, ["X1"], CPU)
    (record,) = run_data.store.slides
    measured = set(record.table.var_names)
    genes = [g for g in folds[0].genes if g in folds[1].genes and g in measured]
    predictions = []
    for path, fold in zip(paths, folds):
        model = restored_model(fold, path, CPU)
        (whole,) = predict_slide([model], run_data.maker.slide(record), run_data.precision, chunk_size=256)
        predictions.append(whole["fused"][:, [fold.genes.index(gene) for gene in genes]])
    return genes, slide_targets(record.table, genes), np.mean(predictions, axis=0)


def test_headline_is_the_mean_of_the_folds_on_the_genes_in_common(tested):
    data_dir, folder = tested
    genes, measured, mean = _by_hand(data_dir, folder.parents[1])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["genes"] == genes and 0 < len(summary["missing_genes"]) <= 3
    adata = anndata.read_h5ad(folder / "predictions" / "X1.h5ad")
    assert list(adata.var_names) == genes
    np.testing.assert_allclose(adata.X, mean, atol=2e-5)
    np.testing.assert_allclose(adata.layers["measured"], measured, atol=1e-6)
    assert summary["headline"]["predictor"] == MEAN
    assert summary["headline"]["pcc_all"] == pytest.approx(np.nanmean(pearson(measured, mean)), abs=1e-4)
    assert summary["headline"]["mse"] == pytest.approx(((measured - mean) ** 2).mean(), rel=1e-4)
    assert [row["predictor"] for row in summary["predictors"]] == ["fold_0", "fold_1", MEAN]
    assert any("only the panel genes" in note for note in summary["notes"])
    assert summary["peak_memory"]["host_gb"] > 0


def test_tables_hold_every_predictor_scale_and_truth(tested):
    _, folder = tested
    genes = pd.read_csv(folder / "per_gene.csv", keep_default_na=False)
    slides = pd.read_csv(folder / "per_slide.csv")
    assert set(genes["predictor"]) == set(slides["predictor"]) == {"fold_0", "fold_1", MEAN}
    assert set(genes["scale"]) == {"fused", "target", "neighbor", "global", "training_mean"}
    assert set(genes["truth"]) == {"smoothed", "unsmoothed"} and set(slides["slide"]) == {"X1"}
    assert (folder / "summary.md").read_text().count("| mean of folds") == 1


def test_the_verdict_the_figures_and_the_report_are_of_the_mean_of_the_folds(tested, tmp_path):
    data_dir, folder = tested
    summary = json.loads((folder / "summary.json").read_text())
    row, verdict = summary["headline"], summary["verdict"]
    assert f"MSE {row['mse']:.3f} against {row['training_mean_mse']:.3f}" in verdict[0]
    assert verdict[0].startswith("Better" if row["mse"] < row["training_mean_mse"] else "Worse")
    (single,) = (
        each["pcc_all"]
        for each in summary["scales"]
        if (each["predictor"], each["scale"], each["truth"]) == (row["predictor"], "fused", "unsmoothed")
    )
    assert verdict[1].endswith(f"(means over 3 x 3 spots); on the counts of single spots PCC(A) is {single:.3f}.")
    assert "One patient stands behind this" in verdict[2] and f"{row['pcc_all']:.3f}" in verdict[2]
    assert f"- {verdict[0]}" in (folder / "summary.md").read_text()
    page = (folder / "report.html").read_text()
    assert html.escape(verdict[0]) in page and page.count("<img") >= 7
    shown = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"patients", "pcc_distribution", "gene_bars"} < shown and len(
        [n for n in shown if n.startswith("map_")]
    ) == 4
    # Chosen genes; without a report there is nothing to draw them in.
    run = shutil.copytree(folder.parents[1], tmp_path / "run", ignore=shutil.ignore_patterns("external"))
    words = ["--mode", "external_test", "--test_name", "demo_external", "--model_path", str(run), "--device", "cpu"]
    words += ["--data_dir", str(data_dir), "--fold", "0"]
    gene = summary["genes"][3]
    assert call_main(*words, "--genes", gene).status == 0
    drawn = run / "fold_0" / "external" / "demo_external"
    assert (drawn / "figures" / f"map_chosen_{gene}_X1.png").is_file()
    assert f"Measured, predicted and error of {gene} on slide X1" in (drawn / "report.html").read_text()
    assert "--genes draws genes in the report" in call_main(*words, "--no_report", "--genes", gene).said
    wrong = call_main(*words, "--genes", "NOPE").said
    assert "--genes NOPE: not among the" in wrong and "the run predicts and demo_external has measured" in wrong
    shutil.rmtree(drawn)
    assert call_main(*words, "--no_report").status == 0
    assert {path.name for path in drawn.iterdir()} == {
        "summary.json", "summary.md", "per_gene.csv", "per_slide.csv", "predictions",
    }  # fmt: skip


def test_test_draws_chosen_genes(tiny_run, tmp_path):
    run = tiny_run.copy(tmp_path)
    shutil.rmtree(run / "fold_1")
    genes = load_checkpoint(run / "fold_0" / "best.pt").genes
    words = ["--mode", "test", "--model_path", str(run), "--device", "cpu", "--data_dir", str(tiny_run.data_dir)]
    wrong = call_main(*words, "--genes", f"{genes[0]}X")
    assert (
        wrong.status == 2 and f"--genes {genes[0]}X: not among the" in wrong.said and f"near: {genes[0]}" in wrong.said
    )
    assert call_main(*words, "--fold", "0", "--genes", genes[5]).status == 0
    assert "Chosen genes" in (run / "report.html").read_text()
    assert list((run / "fold_0" / "figures").glob(f"map_chosen_{genes[5]}_*.png"))


def test_pcc_h_is_over_the_list_of_the_training_run(tested):
    """Neither the test slide nor its ranks choose the genes."""
    data_dir, folder = tested
    genes, measured, mean = _by_hand(data_dir, folder.parents[1])
    folds = [load_checkpoint(folder.parents[1] / f"fold_{fold}" / "best.pt") for fold in (0, 1)]
    lists = [fold.gene_lists["highly_predictive"] for fold in folds]
    chosen = combined_list(lists, genes)
    assert set(chosen) <= set(lists[0]) | set(lists[1]) and set(lists[0]) & set(lists[1]) & set(genes) <= set(chosen)
    scores = pearson(measured, mean)[[genes.index(gene) for gene in chosen]]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["headline"]["pcc_h"] == pytest.approx(np.nanmean(scores), abs=1e-4)
    assert summary["gene_lists"]["fold_1"]["h"] == [gene for gene in lists[1] if gene in genes]
    assert "pcc_ranked_on_test" not in summary["headline"]


def test_combined_list_prefers_genes_that_most_folds_list():
    assert combined_list([["a", "b", "c"], ["c", "a", "d"], ["e", "c", "a"]], ["a", "b", "c", "d", "e"]) == [
        "a",
        "c",
        "e",
    ]
    assert combined_list([["a", "b"], ["b", "x"]], ["b", "a"]) == ["b", "a"]
    assert combined_list([[], []], ["a"]) == []


def test_paper_run_takes_its_list_from_its_own_summary(tested, tmp_path, monkeypatch):
    data_dir, folder = tested
    run = Path(shutil.copytree(folder.parents[1], tmp_path / "run", ignore=shutil.ignore_patterns("external")))
    for fold in (0, 1):
        edit(run / f"fold_{fold}" / "best.pt", lambda content: content["fold"].update(protocol="paper"))
        edit(run / f"fold_{fold}" / "best.pt", lambda content: content["gene_lists"].pop("highly_predictive"))
    ranked = json.loads((run / "summary.json").read_text())["pcc_h"]["paper"]["genes"]
    again = external_test(run, "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    summary = json.loads((again / "summary.json").read_text())
    assert summary["gene_lists"]["fold_0"]["h"] == [gene for gene in ranked if gene in summary["genes"]] != []
    monkeypatch.chdir(run / "fold_0")
    for given in (".", "best.pt", "../fold_1"):
        (member,) = load_members(chosen_checkpoints(given)[0], [], CPU)
        assert highly_predictive_of(member) == ranked
    (run / "summary.json").unlink()
    external_test(run, "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    summary = json.loads((again / "summary.json").read_text())
    assert summary["headline"]["pcc_h"] is None and any("PCC(H) is undefined" in note for note in summary["notes"])


def test_one_fold_alone_goes_into_its_own_folder_and_without_token_caches_gives_the_same(tested, tiny_run, tmp_path):
    data_dir, folder = tested
    run = tiny_run.copy(tmp_path)
    cached = external_test(run, "demo_external", 1, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    assert cached == run / "fold_1" / "external" / "demo_external"
    first = anndata.read_h5ad(cached / "predictions" / "X1.h5ad")
    online = external_test(
        run / "fold_1",
        "demo_external",
        None,
        [f"DATA.data_dir={data_dir}", "DATA.tokens=online"],
        CPU,
        with_report=False,
    )
    second = anndata.read_h5ad(online / "predictions" / "X1.h5ad")
    np.testing.assert_allclose(first.X, second.X, atol=0.02)  # the cache holds tokens in float16
    assert np.corrcoef(first.X.ravel(), second.X.ravel())[0, 1] > 0.999
    alone, both = (json.loads((place / "summary.json").read_text())["genes"] for place in (cached, folder))
    assert [row["predictor"] for row in json.loads((cached / "summary.json").read_text())["predictors"]] == ["fold_1"]
    assert set(both) <= set(alone)  # the folds have panels of their own, the mean can only have what they share


def test_every_slide_of_a_set_is_scored_on_its_own_counts_and_written_under_its_name(tested, tiny_run, tmp_path):
    data_dir = Path(shutil.copytree(tested[0], tmp_path / "data"))
    root = data_dir / "test" / "demo_external"
    for path in [path for path in root.rglob("*X1*") if path.is_file()]:
        for added, name in enumerate(("X2", "X3"), start=1):
            copied = root / str(path.relative_to(root)).replace("X1", name)
            copied.parent.mkdir(exist_ok=True)
            shutil.copy(path, copied)
            if path.suffix == ".parquet":
                (pd.read_parquet(path) + added).to_parquet(copied)
    folder = external_test(
        tiny_run.copy(tmp_path), "demo_external", 0, [f"DATA.data_dir={data_dir}"], CPU, with_report=False
    )
    scores = pd.read_csv(folder / "per_slide.csv").query("scale == 'fused' and truth == 'smoothed'").set_index("slide")
    assert sorted(scores.index) == ["X1", "X2", "X3"]
    found = {name: anndata.read_h5ad(folder / "predictions" / f"{name}.h5ad") for name in scores.index}
    layout = Layout(data_dir, get_spec("demo_external", data_dir), patch_size=64)
    for name, adata in found.items():
        measured = slide_targets(load_slide(layout, name)[adata.obs_names], list(adata.var_names))
        np.testing.assert_allclose(adata.layers["measured"], measured, atol=1e-6)
        assert scores.loc[name, "mse"] == pytest.approx(((measured - adata.X) ** 2).mean(), rel=1e-3)
    assert len({adata.layers["measured"].tobytes() for adata in found.values()}) == 3


def test_an_imported_checkpoint_without_means_or_lists_is_scored_all_the_same(tested, tiny_run, tmp_path):
    """A run of one fold, as `import_reference` leaves it: results go beside the run, what is unknown is undefined."""
    run = tiny_run.copy(tmp_path)
    shutil.rmtree(run / "fold_1")
    (run / "summary.json").unlink()

    def as_imported(content: dict) -> None:
        content["fold"]["protocol"] = "paper"
        content |= {"gene_lists": {}, "training_mean": torch.full_like(content["training_mean"], torch.nan)}
        content["encoder"].pop("token_pool", None)

    edit(run / "fold_0" / "best.pt", as_imported)
    folder = external_test(run, "demo_external", None, [f"DATA.data_dir={tested[0]}"], CPU, with_report=False)
    assert folder == run / "external" / "demo_external"
    headline = json.loads((folder / "summary.json").read_text())["headline"]
    assert headline["predictor"] == "fold_0" and headline["mse"] > 0 and np.isfinite(headline["pcc_all"])
    assert headline["training_mean_mse"] is None and headline["pcc_h"] is None


def test_chunks_do_not_change_a_prediction(tested, tiny_run, tmp_path):
    data_dir, _ = tested
    run, found = tiny_run.copy(tmp_path), []
    for size in (1024, 7):
        overrides = [f"DATA.data_dir={data_dir}", f"EVALUATION.chunk_size={size}"]
        folder = external_test(run, "demo_external", 0, overrides, CPU, with_report=False)
        found.append(anndata.read_h5ad(folder / "predictions" / "X1.h5ad").X)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def _beacon_slide(layout: Layout, exchanged: bool, genes: list[str], seed: int = 3) -> dict[str, tuple[int, int, int]]:
    """A slide whose spots sit on patches of a colour of their own; counts name the spot. Returns id -> colour.

    exchanged: in the convention of the published sets, x counting rows, pixel_x the image row.
    """
    random = np.random.default_rng(seed)
    columns, rows, pitch = 5, 4, 64
    picture = np.full((rows * pitch + 128, columns * pitch + 64, 3), 255, dtype=np.uint8)
    spots, colours = [], {}
    for row in range(rows):
        for column in range(columns):
            colour = tuple(int(value) for value in random.integers(0, 255, 3))
            left, top = 32 + column * pitch, 64 + row * pitch
            picture[top : top + pitch, left : left + pitch] = colour
            x, y = (row, column) if exchanged else (column, row)
            px, py = left + pitch // 2, top + pitch // 2
            spots.append((x, y, *((py, px) if exchanged else (px, py))))
            colours[f"{x}x{y}"] = colour
    order = random.permutation(len(spots))
    table = pd.DataFrame([spots[i] for i in order], columns=["x", "y", "pixel_x", "pixel_y"])
    counts = pd.DataFrame(random.integers(1, 50, (len(spots), len(genes))), columns=genes, index=list(colours))
    counts[genes[0]] = [10 + sum(colour) for colour in colours.values()]
    for path in (layout.counts_dir, layout.spots_dir, layout.images_dir):
        path.mkdir(parents=True)
    counts.sample(frac=1, random_state=1).to_csv(layout.counts_dir / "S.csv")
    table.to_csv(layout.spots_path("S"), sep="\t", index=False)
    Image.fromarray(picture).save(layout.images_dir / "S.png")
    return colours


@pytest.mark.parametrize("exchanged", [False, True])
def test_every_feature_stays_with_its_spot(tiny_run, tmp_path, exchanged):
    """Recognisable patches: target, neighbor, token, label and prediction of a spot all belong to its own colour."""
    from models.patch_encoders.build import build_patch_encoder

    data_dir = tmp_path / "data"
    spec = DatasetSpec(name="beacons", external=True, exchanged_pixels=exchanged, sort_by="xy" if exchanged else "yx")
    layout = Layout(data_dir, spec, patch_size=64, num_neighbors=3, encoder="efficientnet-lite0")
    genes = load_checkpoint(tiny_run.path / "fold_0" / "best.pt").genes
    colours = _beacon_slide(layout, exchanged, genes)
    write_spec(layout.spec_path, spec)
    _extract(tiny_run, data_dir, "beacons")
    folder = external_test(tiny_run.copy(tmp_path), "beacons", 0, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)

    table = load_slide(layout, "S")
    patches = np.stack([np.full((64, 64, 3), colours[spot], dtype=np.uint8) for spot in table.obs_names])
    patch_encoder = build_patch_encoder("efficientnet-lite0")
    encoded = patch_encoder(torch.from_numpy(patches).permute(0, 3, 1, 2))
    target, neighbor, tokens = (read_features(layout.cache_path(k, "S")) for k in ("target", "neighbor", "token"))
    np.testing.assert_allclose(target, encoded.pooled.numpy(), atol=1e-4)
    np.testing.assert_allclose(neighbor[:, 4], target, atol=1e-6)
    np.testing.assert_allclose(tokens[:, 0].astype(np.float32), encoded.tokens.numpy(), rtol=1e-3, atol=5e-3)
    # The tile to the right of a spot is the patch of the spot to its right on the image.
    by_place = {tuple(place): row for row, place in enumerate(table.obsm["grid"].tolist())}
    for (column, row), place in by_place.items():
        if (column + 1, row) in by_place and (0 < row < 3):
            np.testing.assert_allclose(neighbor[place, 5], target[by_place[column + 1, row]], atol=1e-5)
    adata = anndata.read_h5ad(folder / "predictions" / "S.h5ad")
    assert list(adata.obs_names) == list(table.obs_names)
    image = np.asarray(Image.open(layout.images_dir / "S.png"))
    for spot, (x, y) in zip(adata.obs_names, adata.obsm["spatial"].astype(int)):
        assert tuple(image[y, x].tolist()) == colours[spot]
        assert table[spot, genes[0]].X.sum() == 10 + sum(colours[spot])
    by_hand = _predicted_from_the_picture(
        tiny_run, image, spots=pd.read_csv(layout.spots_path("S"), sep="\t"), exchanged=exchanged
    )
    expected = np.stack([by_hand[spot] for spot in adata.obs_names])
    distance = np.linalg.norm(adata[:, genes].X[:, None] - expected[None], axis=2)
    assert (distance.argmin(axis=1) == np.arange(len(expected))).all(), "a prediction belongs to another spot"
    others = distance[~np.eye(len(expected), dtype=bool)]
    assert others.min() > 5 * distance.diagonal().max()  # what is left is float16 of the token cache


def _predicted_from_the_picture(run, image: np.ndarray, spots: pd.DataFrame, exchanged: bool) -> dict[str, np.ndarray]:
    """Spot id -> prediction of fold 0, from crops made here, in the shuffled order of the table."""
    from datasets.images.geometry import neighbor_validity
    from models.contract import ModelInputs
    from models.patch_encoders.build import build_patch_encoder
    from modes.prediction.model import restored_model

    first, second = ("pixel_y", "pixel_x") if exchanged else ("pixel_x", "pixel_y")
    centers = spots[[first, second]].to_numpy()
    grid = spots[["y", "x"] if exchanged else ["x", "y"]].to_numpy()
    padded = np.pad(image, ((200, 200), (200, 200), (0, 0)), constant_values=255)
    tiles = np.stack([padded[y + 104 : y + 296, x + 104 : x + 296] for x, y in centers])  # 3 x 3 tiles of 64 px
    tiles = tiles.reshape(-1, 3, 64, 3, 64, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 64, 64, 3)
    encoded = build_patch_encoder("efficientnet-lite0")(torch.from_numpy(tiles).permute(0, 3, 1, 2))
    is_valid = torch.from_numpy(neighbor_validity(centers, (image.shape[1], image.shape[0]), 64, 3))
    neighbors = encoded.pooled.reshape(len(spots), 9, -1) * is_valid[..., None]
    path = run.path / "fold_0" / "best.pt"
    model = restored_model(load_checkpoint(path), path, CPU).eval()
    with torch.inference_mode():
        inputs = ModelInputs(
            target_tokens=encoded.tokens.unflatten(0, (-1, 9))[:, 4],
            neighbor_features=neighbors,
            neighbor_is_valid=is_valid,
            global_tokens=model.encode_slides(neighbors[:, 4], torch.from_numpy(grid), [len(spots)], None),
        )
        values = model(inputs).fused.numpy()
    return {f"{x}x{y}": row for x, y, row in zip(spots["x"], spots["y"], values)}


def test_space_ranger_folder_goes_through_and_is_plotted(tiny_run, tiny_data, tmp_path):
    """Prepare, extract, test, read back with scanpy, plot with obsm['spatial']; by the commands of the documentation."""
    import matplotlib

    matplotlib.use("Agg")
    import scanpy

    picture = np.asarray(Image.open(next((tiny_data / "demo/ST-imgs/A/A1").iterdir())))[:300, :340]
    panel = load_checkpoint(tiny_run.path / "fold_0" / "best.pt").genes
    outs = write_outs(tmp_path / "outs", picture, [*panel[2:], "OTHER"], generation=1, pitch=64.0)
    data_dir, run = tmp_path / "data", tiny_run.copy(tmp_path)
    flags = ["--source", str(outs.folder), "--image", str(outs.image), "--name", "mine", "--model_path", str(run)]
    prepare_visium([*flags, "--data_dir", str(data_dir)])
    assert get_spec("mine", data_dir).training_type == "demo"
    for kind in ("target", "neighbor"):
        _extract(tiny_run, data_dir, "mine", kind)
    folder = external_test(run, "mine", None, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    adata = scanpy.read_h5ad(folder / "predictions" / "mine.h5ad")
    assert set(adata.var_names) <= set(load_names(data_dir / "test/mine/genes_mine.npy"))
    pixels = {f"{c}x{r}": xy for c, r, xy in zip(outs.array_col, outs.array_row, outs.pixels)}
    np.testing.assert_allclose(adata.obsm["spatial"], [pixels[spot] for spot in adata.obs_names], atol=1e-3)
    axes = scanpy.pl.spatial(adata, color=adata.var_names[0], show=False)
    assert len(axes) == 1
    assert not np.isnan(adata.X).any() and adata.uns["gene_dml"]["prediction"] == MEAN


def test_squidpy_takes_the_file_as_it_is(tested):
    squidpy = pytest.importorskip("squidpy")
    adata = anndata.read_h5ad(tested[1] / "predictions" / "X1.h5ad")
    squidpy.gr.spatial_neighbors(adata)
    assert adata.obsp["spatial_connectivities"].nnz > 0


def test_how_many_genes_are_scored_is_told(tested):
    folder = tested[1]
    summary = json.loads((folder / "summary.json").read_text())
    scored, missing = summary["genes"], summary["missing_genes"]
    number = len(scored) + len(missing)
    first = f"{len(scored)} of the {number} genes that the run predicts are measured in every slide and scored; not measured: "
    assert any(note.startswith(f"{first}{missing[0]}") for note in summary["notes"])
    assert _note_on_genes(["a", "b"], []) == []
    assert _note_on_genes(["a", "b"], ["c", "d"])[0].startswith("2 of the 4 genes")
    (warning,) = _note_on_genes(["a", "b"], ["c", "d", "e"])
    assert warning.startswith("WARNING: only 2 of the 5 genes") and "not measured: c, d, e. Values are" in warning
    assert "not comparable with those of the run itself" in warning


def test_leaks_between_the_two_breast_sets_are_found():
    slides = {"BC23567_D2": "BC23567", "BC23209_C1": "BC23209", "renamed BC24044 x": "p"}
    found = leaking_slides("her2st", ["A", "E", "H"], slides)
    assert set(found) == {"BC23567_D2", "renamed BC24044 x"}
    assert found["BC23567_D2"] == "BC23567_D2 is tissue of stnet BC23567, which is her2st E: a training patient"
    assert leaking_slides("her2st", ["A", "B"], slides) == {}
    assert set(leaking_slides("stnet", ["BC23810", "BC23209"], {"F2": "F", "G1": "G"})) == {"F2"}
    assert leaking_slides("skinst", ["P2"], slides) == {}


def test_leakage_is_loud_in_the_output_and_the_summary(tested, tiny_run, tmp_path, capsys):
    """A her2st run on a section of the same tumour: here the demo run under that name, its patient A being called E."""
    data_dir = Path(shutil.copytree(tested[0] / "test", tmp_path / "data" / "test")).parent
    root = data_dir / "test" / "demo_external"
    for path in [path for path in root.rglob("*X1*") if path.is_file()]:
        path.rename(path.with_name(path.name.replace("X1", "BC23567_D2")))
    (root / "ST-imgs/X/X1").rename(root / "ST-imgs/X/BC23567_D2")
    text = (root / "dataset.yaml").read_text()
    (root / "dataset.yaml").write_text(
        text.replace("^([A-Z]+)\\d+$", "^(.+)$").replace("{patient}/{slide}/*", "X/{slide}/*")
    )
    run = tiny_run.copy(tmp_path)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("type: demo", "type: her2st"))
    edit(run / "fold_1" / "best.pt", lambda content: content["config"]["DATA"].update(type="her2st"))
    edit(run / "fold_1" / "best.pt", lambda content: content["fold"].update(train_patients=["E"]))
    folder = external_test(run, "demo_external", 1, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    said = capsys.readouterr().out
    assert "LEAKAGE: the run has been trained on the tissue of 1 of 1 slides" in said
    assert "is meant for models of demo; this run was trained on her2st" in said
    assert json.loads((folder / "summary.json").read_text())["notes"][0].startswith("LEAKAGE")


def test_an_image_of_the_training_is_leakage_under_any_name(tested, tiny_run, tmp_path, capsys):
    """What the training recorded of its own slide is what the external one has."""
    with open_slide(tested[0] / "test/demo_external/ST-imgs/X/X1/X1.jpg") as slide:
        image = slide.fingerprint()
    run = tiny_run.copy(tmp_path)
    edit(run / "fold_1" / "best.pt", lambda content: content["fold"]["digests"]["A1"].update(image=image))
    external_test(run, "demo_external", None, [f"DATA.data_dir={tested[0]}"], CPU, with_report=False)
    said = "1 of 1 slides, so these scores are not those of unseen tissue: X1 is the image of A1, a training slide of fold_1."
    assert said in capsys.readouterr().out


def test_fields_of_view_that_differ_are_told(tested, tiny_run, tmp_path, capsys):
    data_dir = Path(shutil.copytree(tested[0] / "test", tmp_path / "data" / "test")).parent
    path = data_dir / "test" / "demo_external" / "dataset.yaml"
    path.write_text(path.read_text().replace("microns_per_pixel: 1.6", "microns_per_pixel: 0.4"))
    external_test(tiny_run.copy(tmp_path), "demo_external", 0, [f"DATA.data_dir={data_dir}"], CPU, with_report=False)
    assert (
        "WARNING: A patch is 26 um wide on X1 and was 102 um wide in training, a factor of 0.25"
        in capsys.readouterr().out
    )


class TestRefusals:
    def test_run_without_a_checkpoint(self, tmp_path):
        (tmp_path / "run").mkdir()
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint .*Train first"):
            external_test(tmp_path / "run", "demo_external", None, [], CPU)

    def test_no_gene_in_common(self, tested, tiny_run, tmp_path):
        data_dir = Path(shutil.copytree(tested[0] / "test", tmp_path / "data" / "test")).parent
        path = data_dir / "test/demo_external/ST-cnts/X1_sub.parquet"
        counts = pd.read_parquet(path)
        counts.columns = [f"ENSG{i:011d}" for i in range(counts.shape[1])]
        counts.to_parquet(path)
        with pytest.raises(ValueError, match=r"None of the \d+ genes that the run predicts .*ENSG0.*prepare_visium"):
            external_test(tiny_run.path, "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU)

    def test_a_gene_in_common_is_too_few(self, tested, tiny_run, tmp_path):
        data_dir = Path(shutil.copytree(tested[0] / "test", tmp_path / "data" / "test")).parent
        path = data_dir / "test/demo_external/ST-cnts/X1_sub.parquet"
        panel = set.intersection(*(set(load_checkpoint(tiny_run.path / f"fold_{n}" / "best.pt").genes) for n in (0, 1)))
        counts = pd.read_parquet(path)
        kept = next(name for name in counts.columns if name in panel)
        counts.rename(columns=lambda name: name if name == kept else f"other_{name}").to_parquet(path)
        said = (
            rf"demo_external share 1 of the {len(panel)} genes .*; expected at least 2, .*Slide X1 has the fewest, 1:"
        )
        with pytest.raises(ValueError, match=said):
            external_test(tiny_run.path, "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU)

    def test_features_of_another_encoder(self, tested, tiny_run, tmp_path):
        run = tiny_run.copy(tmp_path)
        edit(run / "fold_0" / "best.pt", lambda content: content["encoder"].update(sha256="0" * 64))
        overrides = [f"DATA.data_dir={tested[0]}"]
        with pytest.raises(
            ValueError, match=r"other weights of the encoder .*elsewhere and run:\n.*--slides X1"
        ) as refused:
            external_test(run, "demo_external", 0, overrides, CPU)
        assert "--overwrite" not in str(refused.value)
        with pytest.raises(ValueError, match=r"cannot be averaged: encoder"):
            external_test(run, "demo_external", None, overrides, CPU)

    def test_missing_features_name_the_command(self, tiny_run):
        with pytest.raises(ValueError, match=r"X1 has no target features. Run: .*--mode external --test_name demo_ext"):
            external_test(tiny_run.path, "demo_external", None, [], CPU)

    def test_training_slides_are_no_external_set(self, tiny_run):
        with pytest.raises(ValueError, match=r"was trained on these slides.*--mode test"):
            external_test(tiny_run.path, "demo", None, [], CPU)

    def test_names_may_not_leave_the_data_folder(self, tiny_run):
        with pytest.raises(ValueError, match="not a plain name"):
            external_test(tiny_run.path, "../demo", None, [], CPU)

    def test_what_a_model_was_trained_with_cannot_be_changed(self, tiny_run):
        with pytest.raises(ValueError, match=r"(?s)other settings.*DATA\.num_neighbors: the run has 3, asked for 5"):
            external_test(tiny_run.path, "demo_external", None, ["DATA.num_neighbors=5"], CPU)


def test_command_line_needs_no_configuration(tested, tiny_run, tmp_path, monkeypatch, capsys):
    data_dir, run = tested[0], tiny_run.copy(tmp_path)
    flags = ["--mode", "external_test", "--test_name", "demo_external", "--model_path", str(run)]
    monkeypatch.setattr(sys, "argv", ["main.py", *flags, "--data_dir", str(data_dir), "--device", "cpu", "--no_report"])
    main.main()
    said = capsys.readouterr().out
    assert "mean of folds" in said and "PCC(A)" in said and "Peak memory" in said
    monkeypatch.setattr(sys, "argv", ["main.py", *flags[:2], "--model_path", str(run)])
    with pytest.raises(ValueError, match="--mode external_test needs --test_name"):
        main.main()


def test_a_model_on_all_patients_is_tested_and_said_to_have_no_score(tested, tiny_run, tmp_path):
    data_dir, _ = tested
    shared = ("--data_dir", data_dir, "--device", "cpu", "--no_report")
    trained = call_main(
        *("--mode", "train", "--config_name", tiny_run.config_name, "--log_path", tmp_path, "--model", "ridge"),
        *("--all_patients", "--run_name", "final", *shared),
    )
    assert trained.status == 0, trained.said
    run = tmp_path / "tiny" / "final"
    left = call_main("--mode", "external_test", "--test_name", "demo_external", "--model_path", run, *shared)
    assert left.status == 0, left.said
    summary = json.loads((run / "external" / "demo_external" / "summary.json").read_text())
    assert summary["checkpoints"] == ["all_patients/best.pt"]
    assert any("no patient is held out and it has no score of its own" in note for note in summary["notes"])
