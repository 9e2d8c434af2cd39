"""AnnData files of every form in, the documented layout out; what is no counts, or whose patient is unknown, is refused."""

from __future__ import annotations

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse

from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess import prepare_anndata
from preprocess.raw import anndata_file
from tests.command_line import Left, call
from tests.modes.test_from_raw import run_said

GENES = ["TP53", "ERBB2", "CD3E", "KRT5"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_data.md"

pytestmark = pytest.mark.usefixtures("_takes_shortcuts")


def slide(seed: int, *, hexagonal: bool = True, with_array: bool = True, rows: int = 6) -> AnnData:
    """A slide of some rows of 5 spots, 64 px apart, in random order."""
    random, count = np.random.default_rng(seed), 5 * rows
    row, column = (axis.ravel() for axis in np.mgrid[0:rows, 0:5])
    x = 60.0 + 64 * column + (32 * (row % 2) if hexagonal else 0)
    y = 60.0 + 64 * row * (np.sqrt(0.75) if hexagonal else 1)
    obs = pd.DataFrame(index=[f"BC{seed}{i:02d}-1" for i in range(count)])
    if with_array:
        obs["array_row"], obs["array_col"] = row, 2 * column + row % 2 if hexagonal else column
    counts = sparse.csr_matrix(random.poisson(3.0, (count, len(GENES))).astype(np.float32))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES), obsm={"spatial": np.stack([x, y], axis=1)})
    return adata[random.permutation(count)].copy()


def _picture(path: Path, seed: int) -> Path:
    coarse = np.random.default_rng(seed).integers(120, 140, (45, 46, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((460, 450), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def image(tmp_path) -> Path:
    return _picture(tmp_path / "image.png", seed=5)


@pytest.fixture
def several(tmp_path) -> AnnData:
    """Three small slides of three patients, their rows mixed, and a folder of their images."""
    joined = anndata.concat([slide(i, rows=2) for i in range(3)], label="slide", keys=["S0", "S1", "S2"])
    joined.obs["patient"] = joined.obs["slide"].map({"S0": "P1", "S1": "P2", "S2": "P3"}).astype("category")
    (tmp_path / "images").mkdir()
    for name in ("S0", "S1", "S2"):
        _picture(tmp_path / "images" / f"{name}.png", seed=int(name[1:]))
    return joined[np.random.default_rng(0).permutation(joined.n_obs)].copy()


def prepare(adata: AnnData, folder: Path, image: object, *more: object, external: bool = True) -> Left:
    adata.write_h5ad(folder / "file.h5ad")
    flags = ["--source", folder / "file.h5ad", "--image", image, "--name", "own", "--data_dir", folder / "data"]
    return call(prepare_anndata.main, *flags, *(["--test"] if external else []), *more)


def prepared(adata: AnnData, folder: Path, image: object, *more: object) -> AnnData:
    left = prepare(adata, folder, image, *more)
    assert left.status == 0, left.said
    return load_slide(Layout(folder / "data", get_spec("own", folder / "data")), "own")


def same_as(table: AnnData, adata: AnnData, counts: np.ndarray) -> bool:
    """Whether every spot has its own counts, found by its pixels."""
    by_pixel = {tuple(np.round(xy, 3)): row for xy, row in zip(adata.obsm["spatial"], counts, strict=True)}
    wanted = [by_pixel[tuple(np.round(xy, 3))] for xy in table.obsm["spatial"]]
    return np.array_equal(table[:, list(adata.var_names)].X.toarray(), wanted)


@pytest.mark.parametrize("at_a_time", [1 << 24, 10])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("place", ["X", "layer", "raw"])
def test_counts_of_every_place_and_form(tmp_path, image, kind, place, at_a_time, monkeypatch):
    monkeypatch.setattr(anndata_file, "_AT_A_TIME", at_a_time)
    monkeypatch.setattr("preprocess.raw.prepare.compared_with_image", lambda *_: [])  # others draw the overlay
    adata = slide(1)
    counts = adata.X.toarray()
    form = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[kind]
    adata.X = form(counts)
    flags: list[str] = []
    if place == "layer":
        adata.layers["counts"], flags = form(counts), ["--layer", "counts"]
    if place == "raw":
        adata.raw, flags = adata.copy(), ["--raw"]
        adata = adata[:, :2].copy()
    if place != "X":
        adata.X = np.log1p(adata.X if isinstance(adata.X, np.ndarray) else adata.X.toarray())
    table = prepared(adata, tmp_path, image, *flags)
    adata = adata.raw.to_adata() if place == "raw" else adata
    assert table.n_obs == 30 and same_as(table, adata, counts)


def test_places_on_the_array_are_those_of_the_file_or_found_from_the_pixels(tmp_path, image):
    for hexagonal in (True, False):
        grids = []
        for with_array in (True, False):
            folder = tmp_path / f"{hexagonal}{with_array}"
            folder.mkdir()
            grids.append(prepared(slide(1, hexagonal=hexagonal, with_array=with_array), folder, image).obsm["grid"])
        np.testing.assert_array_equal(grids[0] - grids[0].min(axis=0), grids[1])


def test_logarithmic_values_are_refused_with_where_counts_are(tmp_path, image):
    adata = slide(1)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray())
    left = prepare(adata, tmp_path, image)
    assert left.status == 2 and "Counts seem to be in layers/counts: give --layer counts." in left.said
    del adata.layers["counts"]
    left = prepare(adata, tmp_path, image)
    assert left.status == 2 and "take the file from before sc.pp.normalize_total" in left.said
    assert re.search(r"X holds [\d.]+ where raw counts were expected", left.said)
    adata.raw = slide(1)
    assert "Counts seem to be in raw/X: give --raw." in prepare(adata, tmp_path, image).said
    assert not (tmp_path / "data").exists()


def test_spots_off_the_tissue_and_symbols_of_a_column(tmp_path, image):
    adata = slide(1)
    adata.obs["in_tissue"] = [0] * 4 + [1] * 26
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"ENSG{i:011d}" for i in range(4)]
    table = prepared(adata, tmp_path, image, "--gene_column", "symbol")
    assert table.n_obs == 26 and set(table.var_names) == set(GENES)


@pytest.mark.parametrize("column", ["feature_name", "Gene_Symbols"])
def test_symbols_beside_ensembl_ids_are_taken_without_being_asked(tmp_path, image, column):
    adata = slide(1)
    adata.var[column] = adata.var_names
    adata.var_names = [f"ENSG{i:011d}" for i in range(4)]
    assert set(prepared(adata, tmp_path, image).var_names) == set(GENES)
    adata.var_names = [f"name {i}" for i in range(4)]  # names of the file's own choice stay
    (tmp_path / "own").mkdir()
    assert set(prepared(adata, tmp_path / "own", image).var_names) == set(adata.var_names)


def test_symbols_beside_ids_are_taken_among_spike_ins_too(tmp_path, image):
    adata = slide(1)
    adata.var["feature_name"] = adata.var_names
    adata.var_names = [*(f"ENSG{i:011d}" for i in range(3)), "ERCC-00002"]
    assert set(prepared(adata, tmp_path, image).var_names) == set(GENES)


def test_numbers_of_rows_are_no_names_of_genes(tmp_path, image):
    adata = slide(1)
    adata.var["gene_name"] = adata.var_names
    adata.var_names = [str(i) for i in range(4)]
    left = prepare(adata, tmp_path, image)
    assert left.status == 2 and "no names but 0, 1, 2" in left.said and "--gene_column NAME" in left.said
    assert "var has the columns gene_name" in left.said
    assert set(prepared(adata, tmp_path, image, "--gene_column", "gene_name").var_names) == set(GENES)


def test_two_slides_that_no_column_tells_apart(tmp_path, image):
    adata = slide(1)
    adata.obs["array_col"], adata.obs["array_row"] = np.arange(30) % 15, 0
    left = prepare(adata, tmp_path, image)
    assert left.status == 2 and "15 of 30 spots have the place on the array of another one" in left.said
    assert "--slide_column" in left.said


def test_a_size_of_a_pixel_does_not_outlive_its_preparation(tmp_path, image):
    adata = slide(1)
    for flags, microns in (((), None), (("--mpp", 0.5), 0.5), ((), None)):
        prepared(adata, tmp_path, image, "--overwrite", *flags)
        assert get_spec("own", tmp_path / "data").microns_of("own") == microns


@pytest.mark.parametrize("mpp", ["0", "-1", "nan", "400"])
def test_sizes_of_a_pixel_that_are_none(tmp_path, image, mpp):
    left = prepare(slide(1), tmp_path, image, "--mpp", mpp)
    assert left.status == 2 and "--mpp is micrometres per pixel, more than 0 and less than 100" in left.said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("factors", "flags", "microns"),
    [
        ({"tissue_hires_scalef": 0.1, "microns_per_pixel": 1.6}, [], 1.6),
        ({"spot_diameter_fullres": 40.0}, [], 100 / 64),  # the array is fitted: 100 um between spots
        ({"spot_diameter_fullres": 40.0}, ["--mpp", 0.5], 0.5),
        (None, [], None),
    ],
)
def test_the_size_of_a_pixel_is_that_of_space_ranger_where_it_is_known(tmp_path, image, factors, flags, microns):
    adata = slide(1)
    if factors:
        adata.uns["spatial"] = {"library": {"scalefactors": factors}}
    prepared(adata, tmp_path, image, *flags)
    found = get_spec("own", tmp_path / "data").microns_of("own")
    assert found == (microns if microns is None else pytest.approx(microns, rel=1e-3))


def _microns(adata: AnnData, folder: Path, image: Path, factors: dict[str, float]) -> float | None:
    adata.uns["spatial"] = {"library": {"scalefactors": factors}}
    prepared(adata, folder, image)
    return get_spec("own", folder / "data").microns_of("own")


@pytest.mark.parametrize("with_array", [True, False])
@pytest.mark.parametrize(
    ("names", "microns"),
    [
        ("BC{i}", None),
        ("{column}x{row}", None),
        ("s_032um_{row:05d}_{column:05d}-1", 0.5),
        ("S1_s_032um_{row:05d}_{column:05d}", 0.5),
    ],
)
def test_a_square_array_has_no_pitch_but_that_of_bins(tmp_path, image, with_array, names, microns):
    """64 px are not 100 um: of a square array only the names of bins tell how large it is."""
    adata = slide(1, hexagonal=False, with_array=with_array)
    column, row = ((adata.obsm["spatial"] - 60) / 64).round().astype(int).T
    adata.obs_names = [names.format(i=i, row=r, column=c) for i, (r, c) in enumerate(zip(row, column, strict=True))]
    assert _microns(adata, tmp_path, image, {"spot_diameter_fullres": 64.0, "tissue_hires_scalef": 0.2}) == microns


def test_a_turned_section_of_visium_has_the_pitch_of_visium(tmp_path, image):
    adata = slide(1)
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()
    assert _microns(adata, tmp_path, image, {"tissue_hires_scalef": 0.2}) == pytest.approx(100 / 64, rel=1e-3)


def _without(adata: AnnData, **changes: object) -> AnnData:
    for name, value in changes.items():
        if name == "spatial":
            del adata.obsm["spatial"]
            adata.obsm["X_pixels"] = np.zeros((adata.n_obs, 2))
        else:
            adata.obs[name] = value
    return adata


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"spatial": None}, (), r"has no obsm\['spatial'\].*obsm has X_pixels"),
        ({}, ("--layer", "counts"), r"has no layers/counts; counts could be in X"),
        ({}, ("--layer", "counts", "--raw"), "--layer and --raw are both given"),
        ({}, ("--gene_column", "symbol"), "var has no column symbol; it has none"),
        ({}, ("--slide_column", "slide"), "obs has no column slide; it has array_col, array_row"),
        ({"patient": ["P1", "P2"] * 15}, ("--patient_column", "patient"), r"is of the patients P1, P2.*--slide_column"),
        ({"patient": ["P1"] * 29 + [""]}, ("--patient_column", "patient"), "patient is empty for some spots"),
        ({"in_tissue": 0}, (), "in_tissue is 0 for all 30 spots"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_what_there_is(tmp_path, image, changes, flags, message):
    left = prepare(_without(slide(1), **changes), tmp_path, image, *flags)
    assert left.status == 2 and re.search(message, left.said), left.said


def test_several_slides_become_a_training_set_and_what_is_said_next_runs(tmp_path, several, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--slide_column", "slide", "--patient_column", "patient"]
    left = prepare(several, tmp_path, tmp_path / "images", *flags, external=False)
    assert left.status == 0, left.said
    layout = Layout(tmp_path / "data", get_spec("own", tmp_path / "data"))
    assert dict(layout.spec.patient_of_slide) == {"S0": "P1", "S1": "P2", "S2": "P3"}
    for name in layout.spec.slides:
        of_slide = several[several.obs["slide"] == name]
        assert same_as(load_slide(layout, name), of_slide, of_slide.X.toarray())
    assert len(run_said(left.said, tmp_path)) == 4 and list((tmp_path / "logs").rglob("best.pt"))


def test_scale_factors_are_those_of_the_slide_of_their_name(tmp_path, several):
    several.uns["spatial"] = {"S1": {"scalefactors": {"tissue_hires_scalef": 0.1, "microns_per_pixel": 1.6}}}
    left = prepare(several, tmp_path, tmp_path / "images", "--slide_column", "slide")
    assert left.status == 0, left.said
    spec = get_spec("own", tmp_path / "data")
    assert [spec.microns_of(name) for name in ("S0", "S1", "S2")] == [None, 1.6, None]


def notes_on(adata: AnnData, image: Path) -> str:
    adata.write_h5ad(image.with_name("file.h5ad"))
    source = anndata_file.AnnDataFile(image.with_name("file.h5ad"))
    return " ".join(prepare_anndata.read_section(source, anndata_file.find_slides(source)[0], image, None).notes)


@pytest.mark.parametrize("name", ["hires", "lowres"])
def test_an_image_that_contradicts_the_smaller_one_of_the_file_is_refused(tmp_path, image, name):
    """As of a folder of Space Ranger: all positions lie inside an enlarged image, too."""
    adata = slide(1)
    small = {"scalefactors": {f"tissue_{name}_scalef": 0.1}, "images": {name: np.zeros((45, 46, 3), dtype=np.float32)}}
    adata.uns["spatial"] = {"library": small}
    assert "WARNING" not in notes_on(adata, image)
    Image.open(image).resize((920, 900)).save(tmp_path / "enlarged.png")
    with pytest.raises(ValueError, match=rf"file\.h5ad refer to about 460 x 450 \(tissue_{name}.*scaled by about 2"):
        notes_on(adata, tmp_path / "enlarged.png")
    del adata.uns["spatial"]["library"]["images"]
    assert "WARNING: whether image.png is the full-resolution image was not checked" in notes_on(adata, image)


@pytest.mark.parametrize(("size", "is_fine"), [("008", True), ("056", False)])
def test_bins_that_nothing_adds_up_are_told(image, size, is_fine):
    adata = slide(1, hexagonal=False)
    adata.obs_names = [f"s_{size}um_{row:05d}_{row:05d}-1" for row in range(30)]
    assert ("WARNING: bins of 8 um are not added up" in notes_on(adata, image)) == is_fine


def test_images_of_several_slides(tmp_path, several):
    flags = ["--slide_column", "slide"]
    each = [f"{name}={tmp_path}/images/{name}.png" for name in ("S0", "S1", "S2")]
    left = prepare(several, tmp_path, each[0], "--image", *each[1:], *flags)
    assert left.status == 0, left.said
    left = prepare(several, tmp_path, each[0], "--image", each[1], each[1], *flags)
    assert left.status == 2 and "--image names a slide twice" in left.said
    left = prepare(several, tmp_path, each[0], "--image", "S9=x.png", *flags)
    assert left.status == 2 and "missing are S1, S2, no slides of the file are S9" in left.said
    (tmp_path / "images" / "S1.png").unlink()
    left = prepare(several, tmp_path, tmp_path / "images", *flags)
    assert left.status == 2 and "no image, or several, of the name of S1" in left.said


def test_a_file_a_slide_goes_into_one_set(tmp_path, image):
    left = prepare(slide(1), tmp_path, image, external=False)
    assert left.status == 2 and "give --patient_column" in left.said
    left = prepare(slide(1), tmp_path, image, "--sample", "S1", "--patient", "P1", external=False)
    assert left.status == 0 and "So far all sections are of patient P1" in left.said
    left = prepare(slide(2), tmp_path, image, "--sample", "S2", "--patient", "P2", external=False)
    assert left.status == 0 and "Two patients leave none to choose" in left.said
    left = prepare(slide(2), tmp_path, image, "--sample", "S2", "--patient", "P9", external=False)
    assert left.status == 2 and "says that S2 is of patient P2, not of P9" in left.said
    left = prepare(slide(2), tmp_path, image, "--panel", "x.npy", "--patient", "P1", external=False)
    assert left.status == 2 and "--panel is for an external set" in left.said


def test_a_spatialdata_object_gets_there_by_the_code_of_the_page(tmp_path, image, monkeypatch):
    spatialdata = pytest.importorskip("spatialdata")
    monkeypatch.chdir(tmp_path)
    table = slide(1)
    centers = table.obsm.pop("spatial")
    table.obs["spot_id"], table.obs["region"] = np.arange(30), pd.Categorical(["spots"] * 30)
    shapes = spatialdata.models.ShapesModel.parse(centers, geometry=0, radius=20.0, index=np.arange(30))
    model = spatialdata.models.TableModel.parse(table, region="spots", region_key="region", instance_key="spot_id")
    spatialdata.SpatialData(shapes={"spots": shapes}, tables={"table": model}).write(tmp_path / "sample.zarr")
    (code,) = re.findall(r"```python\n(import spatialdata.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(code, {})
    written = anndata.read_h5ad(tmp_path / "sample.h5ad")
    np.testing.assert_allclose(written.obsm["spatial"], centers)
    assert prepared(written, tmp_path, image).n_obs == 30
