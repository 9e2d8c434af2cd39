"""A region from its file to the prediction, to QuPath and into a spot table."""

from __future__ import annotations

import json
import shutil

import anndata
import numpy as np
import pytest
from PIL import Image

from datasets.images import overlay
from datasets.images.overlay import draw_overlay
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess import select_spots
from tests.command_line import call, call_main


@pytest.fixture
def slide(tiny_run, tmp_path):
    """The simulated external slide, its size, and a region of its left half."""
    image = tiny_run.data_dir / "test" / "demo_external" / "ST-imgs/X/X1/X1.jpg"
    with Image.open(image) as opened:
        width, height = opened.size
    half = [[0, 0], [width / 2, 0], [width / 2, height], [0, height], [0, 0]]
    (tmp_path / "half.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [half]}))
    return image, (width, height), tmp_path / "half.geojson"


@pytest.mark.parametrize("given", [True, False], ids=["spots", "grid"])
def test_only_the_region_is_predicted_and_goes_to_qupath(tiny_run, slide, tmp_path, monkeypatch, given):
    monkeypatch.setattr(overlay, "draw_overlay", draw_overlay)  # the true one
    image, (width, height), region = slide
    gene = (tiny_run.path / "fold_0" / "genes.txt").read_text().split()[0]
    spots = ("--spots", image.parents[3] / "ST-spotfiles/X1_selection.tsv") if given else ()
    shared = (
        "--mode",
        "predict",
        "--image",
        image,
        "--model_path",
        tiny_run.path / "fold_0",
        "--device",
        "cpu",
        *spots,
    )
    left = call_main(
        *shared, "--out", tmp_path / "x.h5ad", "--region", region, "--geojson", tmp_path / "x.geojson", "--genes", gene
    )
    assert left.status == 0 and "lie in the region of half.geojson" in left.said, left.said
    found = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert found.n_obs > 0 and found.obsm["spatial"][:, 0].max() <= width / 2
    with Image.open(tmp_path / "x_tissue.png") as picture:
        assert picture.width / picture.height == pytest.approx(width / height, rel=0.01)
        assert max(picture.size) > 100 and len(picture.getcolors()) > 50
    detections = json.loads((tmp_path / "x.geojson").read_text())["features"]
    assert len(detections) == found.n_obs
    for row in (0, found.n_obs - 1):
        one = detections[row]
        measured = one["properties"]["measurements"]
        assert one["properties"]["objectType"] == "detection" and one["properties"]["name"] == found.obs_names[row]
        assert measured[gene] == pytest.approx(float(found[:, gene].X[row, 0]), abs=1e-4)
        assert measured["novelty"] == pytest.approx(found.obs["novelty"].iloc[row], abs=1e-4)
        ring = np.array(one["geometry"]["coordinates"][0])
        np.testing.assert_allclose(ring[:-1].mean(axis=0), found.obsm["spatial"][row], atol=0.02)
        assert (ring[0] == ring[-1]).all()
    again = call_main(*shared, "--out", tmp_path / "y.h5ad", "--geojson", tmp_path / "x.geojson")
    assert again.status and "x.geojson exists" in again.said and "--genes, which is not given" in again.said


def test_a_region_without_a_spot_is_refused(tiny_run, slide, tmp_path):
    image, _, region = slide
    corner = [[0, 0], [2, 0], [2, 2], [0, 0]]
    region.write_text(json.dumps({"type": "Polygon", "coordinates": [corner]}))
    left = call_main(
        *("--mode", "predict", "--image", image, "--model_path", tiny_run.path, "--device", "cpu"),
        *("--out", tmp_path / "x.h5ad", "--region", region),
    )
    assert left.status and "spots lies in the region. Is it of this slide?" in left.said


def test_a_region_goes_into_the_spot_table(tiny_run, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(tiny_run.data_dir / "demo", data_dir / "demo")
    layout = Layout(data_dir, get_spec("demo", data_dir), patch_size=64)
    before = load_slide(layout, "A1")
    middle = np.median(before.obsm["spatial"][:, 0])
    area = [[0, 0], [middle, 0], [middle, 1e6], [0, 1e6]]
    region = tmp_path / "left.geojson"
    region.write_text(json.dumps({"type": "Polygon", "coordinates": [area]}))
    shared = ("--type", "demo", "--slide", "A1", "--region", region, "--data_dir", data_dir)
    refused = call(select_spots.main, *shared)
    assert refused.status and "keep this one elsewhere" in refused.said
    assert call(select_spots.main, *shared, "--overwrite").status == 0
    after = load_slide(layout, "A1")
    expected = before[before.obsm["center"][:, 0] < middle]
    assert list(after.obs_names) == list(expected.obs_names) and 0 < after.n_obs < before.n_obs
    np.testing.assert_array_equal(after.obsm["spatial"], expected.obsm["spatial"])
    area = [[middle, 0], [1e6, 0], [1e6, 1e6], [middle, 1e6]]
    region.write_text(json.dumps({"type": "Polygon", "coordinates": [area]}))
    none = call(select_spots.main, *shared, "--overwrite")
    assert none.status and "none of the" in none.said, "what is marked already stays out"
