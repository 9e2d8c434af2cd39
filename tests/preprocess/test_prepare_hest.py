"""Samples in the form of HEST-1k: h5ad with barcodes, patches with barcodes in another order, one metadata table."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy import sparse

from datasets.features.cache import read_features, read_identity
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.prepare_hest import find_metadata, main, prepare_hest
from preprocess.raw.hest import patients_of, pixel_size, read_metadata
from preprocess.raw.prepare import Options
from utils.files import load_names

SMALL = Options(num_genes=2)
GENES = ["ACTB", "ERBB2", "KRT19", "NegControlProbe_00042", "BLANK_0007"]
STUDY, OTHER = "Spatially resolved breast tumours, a study", "Another study: without names"
SCALE = 1.25  # level-0 pixels per pixel of a patch
METADATA = pd.DataFrame(
    [
        ["TENX1", STUDY, "Patient 1", "Homo sapiens", "Visium", "0.4", ""],
        ["NCBI2", STUDY, "Patient 2", "Homo sapiens", "Visium", "", "0.41"],
        ["SPA3", OTHER, "", "Homo sapiens", "Spatial Transcriptomics", "0.7", ""],
        ["SPA4", OTHER, "", "Homo sapiens", "Spatial Transcriptomics", "", ""],
    ],
    columns=[
        "id",
        "dataset_title",
        "patient",
        "species",
        "st_technology",
        "pixel_size_um_estimated",
        "pixel_size_um_embedded",
    ],
).assign(fullres_px_width="1200", fullres_px_height="1000")


def write_sample(raw: Path, name: str, *, exchanged: bool = False, grid_columns: bool = True) -> None:
    """12 spots on the tissue and one off it; a patch for all but one, the patches in another order."""
    generator = np.random.default_rng(list(name.encode()))
    cells = np.array([(x, y) for y in range(4, 7) for x in range(10, 14)] + [(20, 20)])
    spatial = cells * 40.0 + 150.5
    barcodes = [f"{'ACGT'[i % 4]}{i:03d}-1" for i in range(13)] if grid_columns else [f"{x}x{y}" for x, y in cells]
    obs = pd.DataFrame({"in_tissue": [1] * 12 + [0]}, index=barcodes)
    if grid_columns:
        obs["array_col"], obs["array_row"] = (cells[:, 1], cells[:, 0]) if exchanged else (cells[:, 0], cells[:, 1])
    counts = sparse.csr_matrix(generator.poisson([3, 9, 6, 2, 2], size=(13, 5)).astype(np.float32))
    data = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES), obsm={"spatial": spatial})
    for folder in ("st", "patches"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    data.write_h5ad(raw / "st" / f"{name}.h5ad")
    order = generator.permutation(11)
    with h5py.File(raw / "patches" / f"{name}.h5", "w") as file:
        patches = np.zeros((11, 224, 224, 3), dtype=np.uint8)
        patches[:] = order[:, None, None, None]  # a patch shows the number of its spot
        file["img"] = patches
        file["coords"] = np.floor(spatial[order] - 112 * SCALE).astype(np.int64)
        file["barcode"] = np.array([[barcodes[i].encode()] for i in order])


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "hest"
    write_sample(folder, "TENX1")
    write_sample(folder, "NCBI2", exchanged=True)
    (folder / "assets").mkdir()
    METADATA.to_csv(folder / "assets" / "HEST_v1_1_0.csv", index=False)
    return folder


def test_samples_become_a_data_set_of_its_own(raw, tmp_path, capsys):
    done = prepare_hest(raw, tmp_path / "data", SMALL, name="hest_breast")
    assert [(slide.name, slide.spots, slide.genes, slide.image) for slide in done] == [
        ("NCBI2", 11, 3, "patches"),
        ("TENX1", 11, 3, "patches"),
    ]
    spec = get_spec("hest_breast", tmp_path / "data")
    layout = Layout(tmp_path / "data", spec)
    assert layout.slides_on_disk() == ["NCBI2", "TENX1"] == list(spec.slides)
    assert len(spec.patients) == 2 and spec.patient_of("TENX1") in spec.patients
    assert spec.patient_of("TENX1").startswith("Spatially-resolved-brea") and spec.patient_of("TENX1").endswith(
        "-Patient-1"
    )
    assert spec.microns_of("TENX1") == pytest.approx(0.4 * SCALE, rel=0.01), "the patches count, not level 0"
    assert load_names(layout.panel_path) == ["ERBB2", "KRT19"]
    slide = load_slide(layout, "TENX1")
    assert slide.var_names.tolist() == ["ACTB", "ERBB2", "KRT19"], "control probes are no genes"
    assert slide.obs_names[:5].tolist() == ["10x4", "11x4", "12x4", "13x4", "10x5"]
    assert slide.obsm["spatial"][1].tolist() == [590.5, 310.5]
    source = anndata.read_h5ad(raw / "st" / "TENX1.h5ad")
    np.testing.assert_array_equal(slide.X.toarray(), source[:11, :3].X.toarray())
    spots = pd.read_csv(layout.spots_path("TENX1"), sep="\t")
    assert spots["barcode"].tolist() == source.obs_names[:11].tolist(), "the barcode stays with its spot"
    assert "2 slides of 2 patients" in capsys.readouterr().out


def test_each_patch_stays_with_its_spot(raw, tmp_path):
    prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    layout = Layout(tmp_path / "data", get_spec("own", tmp_path / "data"))
    for name in ("TENX1", "NCBI2"):
        slide, path = load_slide(layout, name), layout.cache_path("patch", name)
        number = {f"{x}x{y}": i for i, (x, y) in enumerate((x, y) for y in range(4, 7) for x in range(10, 14))}
        patches = read_features(path)
        assert patches.shape == (11, 224, 224, 3) and patches.dtype == np.uint8
        assert patches[:, 0, 0, 0].tolist() == [number[spot] for spot in slide.obs_names]
        identity = read_identity(path)
        assert (identity.kind, identity.patch_size, identity.image_size) == ("patch", 224, (1200, 1000))
        with h5py.File(path) as file:
            assert file["spot_id"].asstr()[:].tolist() == slide.obs_names.tolist()
            np.testing.assert_array_equal(file["coords"], slide.obsm["center"])


def test_exchanged_array_columns_are_noticed(raw, tmp_path):
    """HEST exchanges them in samples of the older arrays; the pixels tell which one runs along x."""
    prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    layout = Layout(tmp_path / "data", get_spec("own", tmp_path / "data"))
    straight, exchanged = load_slide(layout, "TENX1"), load_slide(layout, "NCBI2")
    np.testing.assert_array_equal(straight.obsm["grid"], exchanged.obsm["grid"])
    np.testing.assert_array_equal(straight.obsm["center"], exchanged.obsm["center"])


@pytest.mark.parametrize("named", [True, False], ids=["from names", "from pixels"])
def test_array_positions_without_columns(raw, tmp_path, named):
    write_sample(raw, "SPA3", grid_columns=False)
    if not named:
        data = anndata.read_h5ad(raw / "st" / "SPA3.h5ad")
        names = {old: f"cell{i}" for i, old in enumerate(data.obs_names)}
        data.obs_names = list(names.values())
        data.write_h5ad(raw / "st" / "SPA3.h5ad")
        with h5py.File(raw / "patches" / "SPA3.h5", "r+") as file:
            barcodes = [[names[name.decode()].encode()] for name in file["barcode"][:].ravel()]
            del file["barcode"]
            file["barcode"] = np.array(barcodes)
    prepare_hest(raw, tmp_path / "data", SMALL, name="own", ids="SPA3")
    slide = load_slide(Layout(tmp_path / "data", get_spec("own", tmp_path / "data")), "SPA3")
    grid = slide.obsm["grid"] - slide.obsm["grid"].min(axis=0)
    assert grid.tolist() == [[x, y] for y in range(3) for x in range(4)][:11]


def test_a_whole_slide_image_goes_before_the_patches(raw, tmp_path):
    (raw / "wsis").mkdir()
    Image.new("RGB", (1200, 1000), "white").save(raw / "wsis" / "TENX1.tif")
    done = prepare_hest(raw, tmp_path / "data", Options(num_genes=2, link=True), name="own")
    assert {slide.name: (slide.image, slide.spots) for slide in done} == {
        "TENX1": ("linked", 12),
        "NCBI2": ("patches", 11),
    }
    spec = get_spec("own", tmp_path / "data")
    layout = Layout(tmp_path / "data", spec)
    assert layout.image_path("TENX1").name == "TENX1.tif" and not layout.cache_path("patch", "TENX1").exists()
    assert spec.microns_of("TENX1") == 0.4 and spec.microns_of("NCBI2") == pytest.approx(0.41 * SCALE, rel=0.01)


def test_an_image_of_another_size_than_the_metadata_say_is_refused(raw, tmp_path):
    (raw / "wsis").mkdir()
    Image.new("RGB", (2400, 2000), "white").save(raw / "wsis" / "TENX1.tif")
    said = (
        r"Slide TENX1: .*TENX1\.tif has 2400 x 2000 pixels, the metadata say 1200 x 1000 .*scaled, turned or of another"
    )
    with pytest.raises(ValueError, match=said):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own", ids="TENX1")
    METADATA.drop(columns="fullres_px_width").to_csv(raw / "assets" / "HEST_v1_1_0.csv", index=False)
    (done,) = prepare_hest(raw, tmp_path / "data", SMALL, name="own", ids="TENX1")
    assert "WARNING: the metadata do not say how large" in " ".join(done.notes)


def test_what_macos_leaves_beside_files_is_no_sample(raw, tmp_path):
    for name in ("st/._TENX1.h5ad", "st/.DS_Store", "patches/._TENX1.h5", "assets/._HEST_v1_1_0.csv"):
        (raw / name).write_bytes(b"\0\5\x16\7")
    assert [slide.name for slide in prepare_hest(raw, tmp_path / "data", SMALL, name="own")] == ["NCBI2", "TENX1"]


def test_patients_are_numbered_within_a_study(raw, tmp_path, capsys):
    table = METADATA.set_index("id")
    patients = patients_of(table, list(table.index))
    assert len({patients["TENX1"], patients["NCBI2"]}) == 2
    assert patients["SPA3"] == patients["SPA4"], "unknown patients of one study may be one person"
    other = table.assign(dataset_title=["A", "B", "C", "D"], patient="Patient 1")
    assert len(set(patients_of(other, list(other.index)).values())) == 4
    spelled = table.assign(dataset_title="A", patient=["Patient 1", "patient 1", "Patient 2", "PATIENT 2"])
    assert list(patients_of(spelled, list(spelled.index)).values()) == [f"A-559a-Patient-{i}" for i in (1, 1, 2, 2)]
    for name in ("SPA3", "SPA4"):
        write_sample(raw, name, exchanged=True)
    prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    assert "No patient is known for SPA3, SPA4: all such samples of one study count as one" in capsys.readouterr().out
    assert len(get_spec("own", tmp_path / "data").patients) == 3


def test_pixel_size_is_the_estimate_or_what_the_image_says():
    table = METADATA.set_index("id")
    assert [pixel_size(table.loc[name]) for name in table.index] == [0.4, 0.41, 0.7, None]


def test_a_second_run_keeps_and_other_samples_need_a_decision(raw, tmp_path):
    data = tmp_path / "data"
    prepare_hest(raw, data, SMALL, name="own", ids="TENX1")
    spec_path = data / "own" / "dataset.yaml"
    spec_path.write_text(spec_path.read_text() + "expected_spots: [1, 99]\n")
    kept = [data / "own" / "patches_224" / "TENX1.h5", data / "own" / "ST-cnts" / "TENX1_sub.parquet", spec_path]
    times = [path.stat().st_mtime_ns for path in kept]
    prepare_hest(raw, data, SMALL, name="own", ids="TENX1")
    assert [path.stat().st_mtime_ns for path in kept] == times
    with pytest.raises(ValueError, match=r"describes other samples \(TENX1\) than those given now \(NCBI2, TENX1\)"):
        prepare_hest(raw, data, SMALL, name="own")
    prepare_hest(raw, data, Options(num_genes=2, overwrite=True), name="own")
    assert yaml.safe_load(spec_path.read_text())["slides"] == ["NCBI2", "TENX1"]


def test_patches_that_do_not_fit_are_refused(raw, tmp_path):
    with h5py.File(raw / "patches" / "TENX1.h5", "r+") as file:
        file["coords"][3] += 40
    with pytest.raises(ValueError, match=r"Slide TENX1: .*1 patches do not lie around their spots, for example"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    with h5py.File(raw / "patches" / "TENX1.h5", "r+") as file:
        del file["barcode"]
        file["barcode"] = np.array([[f"other{i}".encode()] for i in range(11)])
    with pytest.raises(
        ValueError, match=r"none of the barcodes of .*TENX1\.h5 \(other0, other1, \.\.\. \(11 in all\)\) is one"
    ):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    with h5py.File(raw / "patches" / "TENX1.h5", "r+") as file:
        del file["barcode"]
        file["barcode"] = np.array([[b"A000-1"]] * 11)
    with pytest.raises(ValueError, match=r"holds img \(11, 224, 224, 3\) uint8, 11 coords and 1 different barcodes"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    content = (raw / "patches" / "TENX1.h5").read_bytes()
    (raw / "patches" / "TENX1.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"TENX1\.h5 cannot be read as a file of patches: it is truncated"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")


def test_expression_that_is_wrong_is_named(raw, tmp_path):
    path = raw / "st" / "TENX1.h5ad"
    data = anndata.read_h5ad(path)
    data.X[2, 1] = 0.5
    data.obs["array_col"] = data.obs["array_col"].astype(float)
    data.write_h5ad(path)
    with pytest.raises(ValueError, match=r"Slide TENX1: .*no integers \(0\.5 for gene ERBB2\) in spots 12x4"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    data.obs.loc[data.obs_names[0], "array_col"] = np.nan
    data.write_h5ad(path)
    with pytest.raises(ValueError, match=r"Slide TENX1: .*array_col or array_row is missing for 1 spots"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    del data.obsm["spatial"]
    data.write_h5ad(path)
    with pytest.raises(ValueError, match=r"lacks obsm\['spatial'\]"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")


def test_sources_without_a_sample(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"No slide of hest was found in .*st\. Expected the HEST-1k download: st/"
    ):
        prepare_hest(tmp_path, tmp_path / "data", Options())


def test_metadata_that_is_missing_or_of_another_version(raw, tmp_path):
    table = raw / "assets" / "HEST_v1_1_0.csv"
    METADATA.iloc[1:].to_csv(table, index=False)
    with pytest.raises(ValueError, match=r"HEST_v1_1_0\.csv does not know TENX1\. Give the table of this version"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    METADATA.drop(columns="patient").to_csv(table, index=False)
    with pytest.raises(ValueError, match=r"lacks patient; found id, dataset_title"):
        read_metadata(table)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"No HEST_v\*\.csv below .*Give it with --metadata FILE"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")


def with_row(**changes: str) -> pd.DataFrame:
    """The metadata with another row of TENX1."""
    return pd.concat([METADATA, METADATA[METADATA.id == "TENX1"].assign(**changes)])


def test_rows_of_a_sample_that_contradict_each_other_are_refused(raw, tmp_path):
    table = raw / "assets" / "HEST_v1_1_0.csv"
    with_row(patient="Someone else").to_csv(table, index=False)
    with pytest.raises(
        ValueError, match=r"HEST_v1_1_0\.csv .*TENX1 has the patient 'Patient 1' and 'Someone else'\. Keep the"
    ):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    assert not (tmp_path / "data").exists()
    prepare_hest(raw, tmp_path / "data", SMALL, name="own", ids="NCBI2")  # of which they say nothing
    with_row(pixel_size_um_estimated="0.5", dataset_title=OTHER).to_csv(table, index=False)
    with pytest.raises(
        ValueError, match=r"TENX1 has the dataset_title .*; TENX1 has the pixel_size_um_estimated '0.4' and '0.5'"
    ):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")


@pytest.mark.parametrize("changes", [{}, {"st_technology": "Xenium"}], ids=["the same", "other in what is not read"])
def test_rows_of_a_sample_that_say_the_same_are_one(raw, tmp_path, changes):
    with_row(**changes).to_csv(raw / "assets" / "HEST_v1_1_0.csv", index=False)
    prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    assert get_spec("own", tmp_path / "data").patient_of("TENX1").endswith("-Patient-1")


def test_the_newest_table_is_read_wherever_it_lies(raw):
    (raw / "assets" / "HEST_v1_1_0.csv").rename(raw / "assets" / "HEST_v1_10_0.csv")
    (raw / "older").mkdir()
    METADATA.assign(patient="Older").to_csv(raw / "older" / "HEST_v1_9_0.csv", index=False)
    assert find_metadata(raw) == raw / "assets" / "HEST_v1_10_0.csv"
    METADATA.assign(patient="Other").to_csv(raw / "older" / "HEST_v1_10_0.csv", index=False)
    with pytest.raises(
        ValueError, match=r"assets/HEST_v1_10_0\.csv, .*older/HEST_v1_10_0\.csv are of one version and differ"
    ):
        find_metadata(raw)


def test_two_images_of_a_sample_are_refused(raw, tmp_path):
    (raw / "wsis").mkdir()
    for suffix in ("tif", "png"):
        Image.new("RGB", (1200, 1000)).save(raw / "wsis" / f"TENX1.{suffix}")
    with pytest.raises(ValueError, match=r"Sample TENX1 has 2 images, expected one: .*TENX1\.png, .*TENX1\.tif"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")


def test_ids_beside_symbols_need_a_map_that_has_them(raw, tmp_path):
    path = raw / "st" / "NCBI2.h5ad"
    data = anndata.read_h5ad(path)
    data.var_names = ids = [f"ENSG{i:011d}" for i in range(data.n_vars)]
    data.write_h5ad(path)
    said = r"The genes of NCBI2 have Ensembl ids \(ENSG00000000000\), those of TENX1 have symbols \(ACTB\).*"
    with pytest.raises(ValueError, match=said + "Give --gene_map FILE, a table with both"):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own")
    maps = tmp_path / "map.tsv"
    maps.write_text("ENSG99999999999\tACTB\n")
    with pytest.raises(
        ValueError, match=said + r"map\.tsv lacks most of these ids; --gene_map should be a table with both"
    ):
        prepare_hest(raw, tmp_path / "data", SMALL, name="own", gene_map=maps)
    maps.write_text("".join(f"{gene}\t{symbol}\n" for gene, symbol in zip(ids, GENES[:3])))
    prepare_hest(raw, tmp_path / "data2", SMALL, name="own", gene_map=maps)
    assert load_names(tmp_path / "data2" / "own" / "genes_own.npy") == ["ERBB2", "KRT19"]


def test_command_line(raw, tmp_path, monkeypatch):
    arguments = ["--source", str(raw), "--data_dir", str(tmp_path / "data"), "--num_genes", "3", "--name", "own"]
    monkeypatch.setattr(sys, "argv", ["prepare_hest.py", *arguments, "--ids", "TENX1"])
    main()
    assert get_spec("own", tmp_path / "data").slides == ("TENX1",)
    for wrong, message in (
        ({"name": "her2st"}, "--name her2st is the name of another data set"),
        ({"name": "../up"}, "is not a plain name"),
        ({"ids": "TENX1,TENX9"}, "--ids TENX1,TENX9: TENX9 is not in"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_hest(raw, tmp_path / "data", SMALL, **wrong)
