"""The published preprocessed download, untouched: bare tensors, object arrays, both spellings, through the real programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datasets.features.cache import write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.reader import FeatureReader
from datasets.images.slides import open_slide
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from tests.command_line import call_main

GENES = [f"GENE{i:02d}" for i in range(14)]  # the download holds more genes than the panel
PANEL = GENES[:12]
EXTERNAL = "10x_breast_ff1"
WIDE, LITE = 1024, 112  # UNI; the small encoder that runs online here
SIZES = [
    f"MODEL.{name}={value}"
    for name, value in {
        "projection_dim": 16, "neighbor_depth": 1, "neighbor_mlp_ratio": 0.1, "global_depth": 1, "global_mlp_ratio": 0.1,
        "fusion_mlp_dim": 16, "gene_mlp_dim": 16, "predictor_dim": 16,
    }.items()
]  # fmt: skip
SMALL = [part for size in [*SIZES, "DATA.num_genes=12"] for part in ("--set", size)]


def spots_of(seed: int) -> pd.DataFrame:
    """12 spots, listed in no order; x and y differ in range so that a wrong order cannot pass."""
    cells = [(x, y) for x in range(3, 6) for y in range(11, 15)]
    random = np.random.default_rng(seed)
    table = pd.DataFrame([cells[i] for i in random.permutation(12)], columns=["x", "y"])
    return table.assign(new_x=table["x"] + 0.01, new_y=table["y"] - 0.01)


def write_slide(root: Path, slide: str, image: Path, spots: pd.DataFrame, panel: list[str], width: int) -> None:
    """Counts, spot table and image as the download has them."""
    random = np.random.default_rng(len(slide) + ord(slide[0]))
    for folder in (root / "ST-cnts", root / "ST-spotfiles", image.parent):
        folder.mkdir(parents=True, exist_ok=True)
    ids = [f"{x}x{y}" for x, y in spots[["x", "y"]].to_numpy()]
    counts = pd.DataFrame(random.poisson(np.linspace(2, 9, len(panel)), (12, len(panel))), ids, panel)
    counts.sample(frac=1, random_state=1).to_parquet(root / "ST-cnts" / f"{slide}_sub.parquet")
    spots.assign(selected=1).to_csv(root / "ST-spotfiles" / f"{slide}_selection.tsv", sep="\t", index=False)
    Image.fromarray(random.integers(0, 255, (400, width, 3), dtype=np.uint8)).save(image)


def features_of(ids: list[str], width: int, tiles: int | None = None) -> torch.Tensor:
    """Rows that say which spot they are of: the first two numbers are its x and y."""
    random = torch.Generator().manual_seed(width)
    shape = (len(ids), width) if tiles is None else (len(ids), tiles, width)
    features = torch.randn(shape, generator=random)
    for row, spot in enumerate(ids):
        features[row, ..., :2] = torch.tensor([float(part) for part in spot.split("x")])
    return features


def write_features(root: Path, slide: str, ids: list[str], width: int, spelling: str) -> None:
    for folder, tiles in ((f"gt_features{spelling}_224", None), (f"n_features{spelling}_5_224", 25)):
        (root / folder).mkdir(exist_ok=True)
        torch.save(features_of(ids, width, tiles), root / folder / f"{slide}.pt")


def write_download(data_dir: Path, *, width: int, spelling: str) -> None:
    """her2st with patients A, B, C of one slide each, and one external set."""
    root = data_dir / "her2st"
    for number, slide in enumerate(("A1", "B1", "C1")):
        spots = spots_of(number)
        spots = spots.assign(pixel_x=spots["new_x"] * 60, pixel_y=spots["new_y"] * 20)
        image = root / "ST-imgs" / slide[0] / slide / "HE_BT0001.jpg"
        write_slide(root, slide, image, spots, GENES, width=420)
        ordered = spots.sort_values(["y", "x"])
        write_features(root, slide, [f"{x}x{y}" for x, y in ordered[["x", "y"]].to_numpy()], width, spelling)
    np.save(root / "genes_her2st.npy", np.array(PANEL, dtype=object), allow_pickle=True)

    root = data_dir / "test" / EXTERNAL
    spots = spots_of(9)
    # The two columns are exchanged: pixel_x is the image row. 14 * 40 px lie outside the 400 rows if they were not.
    spots = spots.assign(pixel_x=spots["new_x"] * 60, pixel_y=spots["new_y"] * 40)
    write_slide(root, EXTERNAL, root / "ST-imgs" / f"{EXTERNAL}.tif", spots, PANEL[2:], width=600)
    ordered = spots.sort_values(["x", "y"])
    write_features(root, EXTERNAL, [f"{x}x{y}" for x, y in ordered[["x", "y"]].to_numpy()], width, spelling)
    np.save(root / f"genes_{EXTERNAL}.npy", np.array(PANEL[2:], dtype=object), allow_pickle=True)
    np.save(root / "ind_match.npy", np.arange(2, 12))


def layout_of(data_dir: Path, name: str = "her2st") -> Layout:
    return Layout(data_dir, get_spec(name, data_dir))


def cache_tokens(layout: Layout, slide: str) -> None:
    """A token cache of UNI's width, as the extraction would have made it from the image: five tokens, one view."""
    table = load_slide(layout, slide)
    with open_slide(layout.image_path(slide)) as image:
        identity = CacheIdentity(
            kind="token", encoder="uni", encoder_sha256="of the published weights", image_size=image.size,
            image_fingerprint=image.fingerprint(), patch_size=224, microns_per_pixel=None, num_neighbors=5, views=1,
            dtype="float16",
        )  # fmt: skip
    tokens = np.random.default_rng(0).normal(size=(table.n_obs, 1, 5, WIDE)).astype(np.float16)
    write_cache(layout.cache_path("token", slide), identity, list(table.obs_names), table.obsm["center"], [tokens])


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """UNI features in the first spelling, with token caches beside them. Read only."""
    data_dir = tmp_path_factory.mktemp("published") / "data"
    write_download(data_dir, width=WIDE, spelling="")
    for slide in ("A1", "B1", "C1"):
        cache_tokens(layout_of(data_dir), slide)
    cache_tokens(layout_of(data_dir, EXTERNAL), EXTERNAL)
    return data_dir


def train(data_dir: Path, logs: Path, *more: str) -> tuple[Path, str]:
    left = call_main(
        "--mode", "train", "--config_name", "her2st/dml", "--data_dir", data_dir, "--log_path", logs, "--device", "cpu",
        "--k", 3, "--use_kmeans", "--epochs", 1, "--fold", 0, "--no_report", *SMALL, *more,
    )  # fmt: skip
    assert left.status == 0, left.said
    return logs / "her2st" / "dml" / "exp_0", left.said


def test_one_epoch_and_the_tests_of_the_download_with_a_token_cache(download, tmp_path):
    run, said = train(download, tmp_path, "--protocol", "paper")
    assert "Target tokens: from the token cache" in said
    content = torch.load(run / "fold_0" / "best.pt", weights_only=True)
    assert content["encoder"]["sha256"] == "unknown" and content["encoder"]["dim"] == WIDE
    assert content["genes"] == PANEL, "the panel of the object array, in its order"
    left = call_main(
        "--mode", "test", "--fold", 0, "--model_path", run, "--data_dir", download, "--device", "cpu", "--no_report"
    )
    assert left.status == 0, left.said
    assert np.isfinite(json.loads((run / "fold_0" / "result.json").read_text())["mse"])
    left = call_main(
        "--mode", "external_test", "--test_name", EXTERNAL, "--model_path", run, "--data_dir", download, "--device", "cpu",
        "--no_report",
    )  # fmt: skip
    assert left.status == 0, left.said
    scored = pd.read_csv(run / "external" / EXTERNAL / "per_gene.csv")
    assert sorted(scored["gene"].unique()) == PANEL[2:], "those that the external set has measured"


def test_without_a_token_cache_the_encoder_runs_on_patches_of_the_image(tmp_path):
    """Features in the other spelling of the folders."""
    write_download(tmp_path / "data", width=LITE, spelling="_uni_small")
    run, said = train(tmp_path / "data", tmp_path / "logs", "--encoder", "efficientnet-lite0")
    assert "the frozen encoder runs in every step" in said
    assert torch.load(run / "fold_0" / "best.pt", weights_only=True)["encoder"]["token_dim"] == LITE


@pytest.mark.parametrize(("name", "slides"), [("her2st", ("A1", "B1", "C1")), (EXTERNAL, (EXTERNAL,))])
def test_every_row_of_the_tensors_meets_its_spot(download, name, slides):
    layout = layout_of(download, name)
    reader = FeatureReader(layout, "uni")
    store = reader.read_features(reader.read_tables(slides))
    assert store.encoder.sha256 == "unknown"
    for slide in store.slides:
        expected = torch.tensor([[float(part) for part in spot.split("x")] for spot in slide.table.obs_names])
        assert torch.equal(store.target_features[slide.start : slide.stop, :2], expected)
        assert torch.equal(store.neighbor_features[slide.start : slide.stop, 12, :2], expected)
        x, y = expected.numpy().T
        center, grid = slide.table.obsm["center"], slide.table.obsm["grid"]
        if name == EXTERNAL:  # exchanged: x of the array counts rows
            assert np.array_equal(center, np.floor(np.stack([(y - 0.01) * 40, (x + 0.01) * 60], axis=1)))
            assert np.array_equal(grid, np.stack([y, x], axis=1))
        else:
            assert np.array_equal(center, np.floor(np.stack([(x + 0.01) * 60, (y - 0.01) * 20], axis=1)))
            assert np.array_equal(grid, np.stack([x, y], axis=1))


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        (15, "made from a longer table, for example all spots of the spot file"),
        (11, "made from a shorter table, for example only the spots marked as selected"),
        (12 * 25, "25 neighbor tiles of each spot, flattened"),
    ],
)
def test_a_wrong_number_of_rows_is_refused_with_the_likely_cause(tmp_path, rows, cause):
    write_download(tmp_path / "data", width=LITE, spelling="")
    path = tmp_path / "data" / "her2st" / "gt_features_224" / "B1.pt"
    torch.save(torch.zeros(rows, LITE), path)
    left = call_main(
        "--mode", "train", "--config_name", "her2st/dml", "--data_dir", tmp_path / "data", "--log_path", tmp_path / "logs",
        "--device", "cpu", "--k", 3, "--encoder", "efficientnet-lite0", *SMALL,
    )  # fmt: skip
    assert left.status == 2
    for part in (str(path), f"holds {rows} rows but slide B1 has 12 spots", cause, "extract_features_uni.py"):
        assert part in left.said, left.said
    assert not (tmp_path / "logs").exists(), "nothing was started"


def test_features_of_another_width_than_the_encoder_are_refused(download, tmp_path):
    left = call_main(
        "--mode", "train", "--config_name", "her2st/dml", "--data_dir", download, "--log_path", tmp_path, "--device",
        "cpu", "--k", 3, "--encoder", "kaiko-vits16", "--model", "ridge", *SMALL,
    )  # fmt: skip
    assert left.status == 2 and "have width 1024, those of kaiko-vits16 have 384" in left.said, left.said
