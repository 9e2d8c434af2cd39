"""Prediction files: values and order survive, scanpy and squidpy plot them as they are."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import matplotlib
import numpy as np
import pytest
from anndata.io import write_elem
from matplotlib import pyplot
from matplotlib.figure import Figure
from scipy import sparse

from evaluation.predictions import read_compared, read_prediction, slide_of, tissue_image, write_prediction

matplotlib.use("Agg")
UNIT = "log10(1 + counts per 10 000 of the panel)"


def slide_arguments(spots: int = 30, genes: int = 5, **changes) -> dict:
    """Arguments of `write_prediction` for a slide of 800 x 600 px, its image at a quarter of that."""
    generator = np.random.default_rng(3)
    grid_xy = np.stack([np.arange(spots) % 6, np.arange(spots) // 6], axis=1)
    shape = (spots, genes)
    return {
        "slide": "A1",
        "spot_ids": [f"{x}x{y}" for x, y in grid_xy],
        "genes": [f"GENE{index}" for index in range(genes)],
        "predictions": {name: generator.normal(size=shape) for name in ("fused", "target", "neighbor", "global")},
        "spatial_px": grid_xy * 100.0 + 50.5,
        "grid_xy": grid_xy,
        "measured": generator.normal(size=shape),
        "measured_unsmoothed": generator.normal(size=shape),
        "image": generator.integers(0, 255, size=(150, 200, 3), dtype=np.uint8),
        "image_scale": 0.25,
        "spot_diameter_px": 60.0,
        "unit": UNIT,
        "provenance": {"fold": 2, "checkpoint": "best.pt", "patients": ["A", "B"], "mpp": None, "model": {"name": "x"}},
    } | changes


def test_values_names_and_order_survive(tmp_path: Path) -> None:
    arguments = slide_arguments()
    # An order that sorting would destroy.
    shuffled = np.random.default_rng(0).permutation(30)
    arguments["spot_ids"] = [arguments["spot_ids"][index] for index in shuffled]
    arguments["genes"] = ["ZYX", "ACTB", "MALAT1", "1-Mar", "HLA-B"]
    path = tmp_path / "predictions" / "A1.h5ad"
    write_prediction(path, **arguments)
    adata = read_prediction(path)

    assert list(adata.obs_names) == arguments["spot_ids"]
    assert list(adata.var_names) == arguments["genes"]
    np.testing.assert_array_equal(adata.X, arguments["predictions"]["fused"].astype(np.float32))
    for layer in ("target", "neighbor", "global"):
        np.testing.assert_array_equal(adata.layers[layer], arguments["predictions"][layer].astype(np.float32))
    for layer in ("measured", "measured_unsmoothed"):
        np.testing.assert_array_equal(adata.layers[layer], arguments[layer].astype(np.float32))
    assert adata.X.dtype == np.float32 and all(layer.dtype == np.float32 for layer in adata.layers.values())
    np.testing.assert_array_equal(adata.obsm["spatial"], arguments["spatial_px"])
    np.testing.assert_array_equal(adata.obsm["grid"], arguments["grid_xy"])
    assert adata.uns["unit"] == UNIT
    assert slide_of(adata) == "A1" and set(adata.obs["library_id"]) == {"A1"} == set(adata.obs["slide"])
    image, scale, diameter = tissue_image(adata)
    np.testing.assert_array_equal(image, arguments["image"])
    assert (scale, diameter) == (0.25, 60.0)


def test_provenance_keeps_plain_values(tmp_path: Path) -> None:
    write_prediction(tmp_path / "A1.h5ad", **slide_arguments())
    provenance = read_prediction(tmp_path / "A1.h5ad").uns["gene_dml"]
    assert provenance["fold"] == 2 and provenance["checkpoint"] == "best.pt" and provenance["model"]["name"] == "x"
    assert list(provenance["patients"]) == ["A", "B"]
    assert "mpp" not in provenance


@pytest.mark.parametrize("place", ["X", "layers/measured", "obsm/spatial", "uns/more"])
@pytest.mark.parametrize("index", [2, 500, 2**31 - 1])
def test_sparse_matrices_are_refused_before_anything_touches_them(tmp_path: Path, place: str, index: int) -> None:
    """An index beyond the genes was read: wrong sums, or the end of the process."""
    path = tmp_path / "A1.h5ad"
    write_prediction(path, **slide_arguments())
    with h5py.File(path, "r+") as file:
        if place in file:
            del file[place]
        write_elem(file, place, sparse.eye(30, 5, format="csr", dtype=np.float32))
        file[place]["indices"][0] = index
    said = rf"A1\.h5ad cannot be read as a prediction .*{place} is a sparse matrix"
    with pytest.raises(ValueError, match=f"{said}.*predict again"):
        read_prediction(path)
    if place in ("X", "layers/measured"):
        with pytest.raises(ValueError, match=said):
            read_compared(path, ["GENE0"])


def test_what_scanpy_adds_beside_a_prediction_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "A1.h5ad"
    write_prediction(path, **slide_arguments())
    adata = anndata.read_h5ad(path)
    adata.obsp["connectivities"] = sparse.eye(30, format="csr")
    adata.write_h5ad(path)
    found = read_prediction(path)
    assert not found.obsp and np.array_equal(found.X, adata.X) and slide_of(found) == "A1"


def test_slide_without_counts_image_or_grid(tmp_path: Path) -> None:
    arguments = slide_arguments(measured=None, measured_unsmoothed=None, image=None, grid_xy=None)
    arguments["predictions"] = {"fused": arguments["predictions"]["fused"], "target": None}
    write_prediction(tmp_path / "A1.h5ad", **arguments)
    adata = read_prediction(tmp_path / "A1.h5ad")
    assert set(adata.layers) <= {None} and list(adata.obsm) == ["spatial"]
    assert tissue_image(adata)[0] is None


@pytest.mark.parametrize("with_image", [True, False])
def test_scanpy_plots_it(tmp_path: Path, with_image: bool) -> None:
    scanpy = pytest.importorskip("scanpy")
    write_prediction(tmp_path / "A1.h5ad", **slide_arguments(**({} if with_image else {"image": None})))
    adata = scanpy.read_h5ad(tmp_path / "A1.h5ad")
    axes = scanpy.pl.spatial(adata, color="GENE1", show=False)[0]
    circles = axes.collections[0]
    # scanpy draws in the pixels of the image it shows: a quarter of the full resolution, or the white sheet's.
    scale = 0.25 if with_image else adata.uns["spatial"]["A1"]["scalefactors"]["tissue_hires_scalef"]
    centres = np.asarray([path.vertices.mean(axis=0) for path in circles.get_paths()])
    spatial = adata.obsm["spatial"]
    np.testing.assert_allclose(np.sort(centres[:, 0]), np.sort(spatial[:, 0] * scale), atol=1.0)
    assert axes.images[0].get_array().min() < 255 if with_image else (axes.images[0].get_array() == 255).all()
    axes = scanpy.pl.embedding(adata, basis="spatial", color="GENE1", layer="measured", show=False)
    np.testing.assert_array_equal(np.sort(axes.collections[0].get_offsets()[:, 0]), np.sort(spatial[:, 0]))
    pyplot.close("all")


def test_squidpy_plots_it(tmp_path: Path) -> None:
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed")
    write_prediction(tmp_path / "A1.h5ad", **slide_arguments())
    adata = read_prediction(tmp_path / "A1.h5ad")
    axes = squidpy.pl.spatial_scatter(adata, color="GENE1", library_key="library_id", return_ax=True)
    assert isinstance(np.ravel(axes)[0].figure, Figure)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    arguments = slide_arguments(
        measured=np.zeros((29, 5)), spatial_px=np.full((30, 2), np.nan), image=np.zeros((4, 4, 3)), spot_diameter_px=0.0
    )
    arguments["spot_ids"][1] = arguments["spot_ids"][0]
    with pytest.raises(ValueError) as error:
        write_prediction(tmp_path / "A1.h5ad", **arguments)
    message = str(error.value)
    for part in (
        "slide A1", "spot ids are not unique: 0x0", "measured has shape (29, 5), expected (30, 5)",
        "spatial_px holds values that are not finite", "image is float64", "spot_diameter_px is 0.0",
    ):  # fmt: skip
        assert part in message
    assert not (tmp_path / "A1.h5ad").exists()


def test_unknown_and_missing_scales_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown scales globe.*\"fused\"\] is missing"):
        write_prediction(tmp_path / "A1.h5ad", **slide_arguments(predictions={"globe": np.zeros((30, 5))}))


def test_slide_name_may_not_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_prediction(tmp_path / "A1.h5ad", **slide_arguments(slide="../A1"))


def test_what_was_predicted_and_measured_is_read_alone(tmp_path: Path) -> None:
    arguments = slide_arguments()
    write_prediction(tmp_path / "A1.h5ad", **arguments)
    predicted, measured = read_compared(tmp_path / "A1.h5ad", ["GENE3", "GENE0"])
    np.testing.assert_array_equal(predicted, arguments["predictions"]["fused"].astype(np.float32)[:, [3, 0]])
    np.testing.assert_array_equal(measured, arguments["measured"].astype(np.float32)[:, [3, 0]])
    with pytest.raises(ValueError, match=r"A1\.h5ad cannot be read as a prediction .*lacks the genes TP53"):
        read_compared(tmp_path / "A1.h5ad", ["GENE3", "TP53"])
    with h5py.File(tmp_path / "A1.h5ad", "r+") as file:
        values = file["layers/measured"][:1]
        del file["layers/measured"]
        write_elem(file, "layers/measured", values)
    with pytest.raises(ValueError, match=r"A1\.h5ad .*holds \(30, 5\) predicted, \(1, 5\) measured values"):
        read_compared(tmp_path / "A1.h5ad", ["GENE3"])
    write_prediction(tmp_path / "B1.h5ad", **slide_arguments(measured=None, measured_unsmoothed=None))
    with pytest.raises(ValueError, match=r"B1\.h5ad cannot be read as a prediction"):
        read_compared(tmp_path / "B1.h5ad", ["GENE3"])


def test_reading_what_is_no_prediction(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    with pytest.raises(FileNotFoundError, match="--mode test"):
        read_prediction(tmp_path / "none.h5ad")
    (tmp_path / "broken.h5ad").write_bytes(b"not hdf5")
    with pytest.raises(ValueError, match="truncated"):
        read_prediction(tmp_path / "broken.h5ad")
    anndata.AnnData(np.zeros((2, 2), dtype=np.float32)).write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(ValueError, match=r"no uns\['spatial'\], uns\['unit'\]"):
        read_prediction(tmp_path / "other.h5ad")


def test_an_existing_file_survives_a_failed_write(tmp_path: Path) -> None:
    write_prediction(tmp_path / "A1.h5ad", **slide_arguments())
    before = (tmp_path / "A1.h5ad").read_bytes()
    with pytest.raises(ValueError):
        write_prediction(tmp_path / "A1.h5ad", **slide_arguments(measured=np.zeros((1, 1))))
    assert (tmp_path / "A1.h5ad").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["A1.h5ad"]


def test_a_large_slide(tmp_path: Path) -> None:
    arguments = slide_arguments(spots=40_000, genes=20, image=None)
    arguments["spot_ids"] = [f"spot{index}" for index in range(40_000)]
    write_prediction(tmp_path / "A1.h5ad", **arguments)
    assert read_prediction(tmp_path / "A1.h5ad").shape == (40_000, 20)
