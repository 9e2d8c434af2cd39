"""Files as the field has them: several samples below one folder, names of GEO, quotes, Visium HD, HEST of every kind."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from scipy import sparse

from datasets.known_sets import SPECS, get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.extraction.pixels import choose_slides
from preprocess.prepare_hest import prepare_hest
from preprocess.prepare_skinst import prepare_skinst
from preprocess.prepare_visium import main as prepare_visium
from preprocess.raw.gene_map import read_gene_map
from preprocess.raw.prepare import Options, Prepared, findings
from preprocess.raw.space_ranger.output import microns_per_pixel
from preprocess.raw.space_ranger.outs import read_outs
from preprocess.select_genes import genes_by_variability
from tests.preprocess.test_prepare_hest import METADATA, SCALE, write_sample
from tests.space_ranger import Outs, write_outs
from utils.files import load_names

SYMBOLS = ["TP53", "ERBB2", "CD3E", "KRT5"]
IDS = ["ENSG00000141510", "ENSG00000141736", "ENSG00000198851", "ENSG00000186081"]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 255, (240, 320, 3), dtype=np.uint8)


def prepare(source: Path, image: Path, tmp_path: Path, *more: str) -> Layout:
    (tmp_path / "p.txt").write_text("\n".join(SYMBOLS[:3]) + "\n")
    flags = {"--source": source, "--image": image, "--name": "v", "--panel": tmp_path / "p.txt"}
    main = [str(word) for flag in flags.items() for word in flag]
    prepare_visium([*main, "--data_dir", str(tmp_path / "data"), *more])
    return Layout(tmp_path / "data", get_spec("v", tmp_path / "data"))


# Several samples below one source


def with_slide_barcodes(outs: Outs) -> Outs:
    """As on real slides: a barcode belongs to a position of the array, the same on every slide."""
    new = {b: f"AC{r:02d}{c:03d}GT-1" for b, r, c in zip(outs.barcodes, outs.array_row, outs.array_col, strict=True)}
    for path in (outs.folder / "spatial").glob("tissue_positions*"):
        lines = [line.partition(",") for line in path.read_text().splitlines()]
        path.write_text("".join(f"{new.get(name, name)},{rest}\n" for name, _, rest in lines))
    with h5py.File(outs.folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        old = file["matrix/barcodes"].asstr()[:]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array([new[name] for name in old], dtype="S")
    return outs


@pytest.mark.parametrize("generations", [(2, 1), (2, 2), (1, 1)])
def test_two_samples_below_one_source_are_told_apart(tmp_path, picture, generations):
    for name, seed, generation in zip("AB", (1, 2), generations, strict=True):
        outs = write_outs(
            tmp_path / "RAW" / f"sample{name}" / "outs", picture, SYMBOLS, seed=seed, generation=generation
        )
        with_slide_barcodes(outs)
    with pytest.raises(
        ValueError, match=r"2 files where one was expected: .*sampleA.*sampleB.*a folder with one of them"
    ):
        prepare(tmp_path / "RAW", tmp_path / "RAW" / "sampleA" / "fullres.tif", tmp_path)
    assert not (tmp_path / "data").exists()
    layout = prepare(tmp_path / "RAW" / "sampleA", tmp_path / "RAW" / "sampleA" / "fullres.tif", tmp_path)
    assert load_slide(layout, "v").n_obs > 0


@pytest.mark.parametrize("moved", ["spatial", "filtered_feature_bc_matrix.h5"])
def test_the_positions_of_one_sample_are_not_paired_with_the_counts_of_another(tmp_path, picture, moved):
    """One file of each kind, but of two samples: barcodes are the same on every slide, so nothing else would tell."""
    outs = with_slide_barcodes(write_outs(tmp_path / "RAW" / "sampleA" / "outs", picture, SYMBOLS))
    (tmp_path / "RAW" / "sampleB" / "outs").mkdir(parents=True)
    (outs.folder / moved).rename(tmp_path / "RAW" / "sampleB" / "outs" / moved)
    with pytest.raises(ValueError, match="seem to be of two samples"):
        read_outs(tmp_path / "RAW")


MATRIX = "filtered_feature_bc_matrix.h5"


@pytest.mark.parametrize("of_b", [MATRIX, "spatial/scalefactors_json.json", "spatial/tissue_hires_image.png"])
@pytest.mark.parametrize("below", ["sampleB/outs", "sampleB", "outs/sampleB"])
def test_a_sample_at_the_root_is_not_completed_by_one_below(tmp_path, picture, of_b, below):
    """What has no name of its own is of the sample whose folder it is in, not of any sample."""
    raw = tmp_path / "RAW"
    first = with_slide_barcodes(write_outs(raw / "outs", picture, SYMBOLS, seed=1))
    other = with_slide_barcodes(write_outs(tmp_path / "other" / "outs", picture, SYMBOLS, seed=2))
    (first.folder / of_b).unlink()
    (raw / below / of_b).parent.mkdir(parents=True)
    shutil.copy(other.folder / of_b, raw / below / of_b)
    with pytest.raises(ValueError, match="seem to be of two samples"):
        prepare(raw, raw / "fullres.tif", tmp_path)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["V1_filtered_feature_bc_matrix.h5", "V1/outs/V1_filtered_feature_bc_matrix.h5"])
def test_a_name_may_be_left_out_in_the_folder_of_the_sample(tmp_path, picture, name):
    outs = write_outs(tmp_path / "V1" / "outs", picture, SYMBOLS)
    source = tmp_path if "/" in name else outs.folder
    (outs.folder / MATRIX).rename(source / name)
    assert len(read_outs(source).positions) == outs.in_tissue.sum()


def test_a_sample_that_has_both_tables_of_positions_takes_the_one_with_a_header(tmp_path, picture):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    table = outs.folder / "spatial" / "tissue_positions.csv"
    (table.with_name("tissue_positions_list.csv")).write_text("".join(table.read_text().splitlines(True)[1:]))
    assert read_outs(outs.folder).positions_path == table


def test_two_files_of_one_name_are_two_files(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        (tmp_path / "raw" / folder / "P2_ST_rep1_stdata.tsv").write_text("\tA\n1x1\t1\n")
    with pytest.raises(
        ValueError, match=r"2 files where one was expected: .*/a/P2_ST_rep1_stdata\.tsv, .*/b/P2_ST_rep1"
    ):
        prepare_skinst(tmp_path / "raw", tmp_path / "data", Options(num_genes=1))


# Names of a GEO download


def geo_copy(outs: Outs, folder: Path, prefix: str) -> Path:
    folder.mkdir(exist_ok=True)
    for path in sorted(path for path in outs.folder.rglob("*") if path.is_file()):
        target = folder / f"{prefix}{path.name}"
        if path.suffix == ".gz":
            shutil.copy(path, target)
        else:
            target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder


@pytest.mark.parametrize("matrix", ["mtx", "h5"])
def test_a_geo_download_is_read_as_one_sample(tmp_path, picture, matrix):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS, generation=1, matrix=matrix)
    flat = geo_copy(outs, tmp_path / "geo", "GSM5420749_P1_")
    found, plain = read_outs(flat), read_outs(outs.folder)
    assert found.smaller == plain.smaller == {"hires": (80, 60)} and found.scale_factors == plain.scale_factors
    assert (found.counts.matrix != plain.counts.matrix).nnz == 0 and found.counts.barcodes == plain.counts.barcodes
    layout = prepare(flat, outs.image, tmp_path)
    assert load_slide(layout, "v").n_obs == outs.in_tissue.sum()
    geo_copy(outs, flat, "GSM5420750_P2_")
    with pytest.raises(ValueError, match=r"2 files where one was expected: .*GSM5420749_P1_.*GSM5420750_P2_"):
        read_outs(flat)


def test_files_of_two_prefixes_are_not_paired(tmp_path, picture):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS, matrix="mtx")
    flat = geo_copy(outs, tmp_path / "geo", "GSM1_")
    for path in flat.glob("GSM1_tissue_positions*"):
        path.rename(path.with_name(path.name.replace("GSM1_", "GSM2_")))
    with pytest.raises(ValueError, match=r"GSM[12]_.* and .*GSM[12]_.* seem to be of two samples"):
        read_outs(flat)
    for path in flat.glob("GSM1_barcodes*"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no GSM1_barcodes\.tsv, compressed or not, for GSM1_matrix\.mtx"
    ):
        read_outs(flat)


# The three files of a matrix


@pytest.fixture
def mtx(tmp_path, picture) -> Outs:
    return write_outs(tmp_path / "outs", picture, SYMBOLS, matrix="mtx")


def rewrite(outs: Outs, name: str, change: Callable[[list[str]], str]) -> Path:
    path = outs.folder / "filtered_feature_bc_matrix" / f"{name}.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()).decode().splitlines()).encode()))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: "".join(f'"{row}"\n' for row in rows),
        lambda rows: "".join('"' + row.replace("\t", '"\t"') + '"\n' for row in rows),
        lambda rows: "\r\n".join(rows) + "\r\n",
        "\n".join,
        lambda rows: "\ufeff" + "\n".join(rows) + "\n\n",
    ],
    ids=["quoted rows", "quoted cells", "windows", "no end of line", "byte order mark"],
)
def test_tables_of_features_and_barcodes_are_read_as_they_are_meant(mtx, change):
    plain = read_outs(mtx.folder).counts
    for name in ("features.tsv", "barcodes.tsv"):
        rewrite(mtx, name, change)
    found = read_outs(mtx.folder).counts
    assert (found.ids, found.symbols, found.barcodes) == (plain.ids, plain.symbols, plain.barcodes)
    assert (found.matrix != plain.matrix).nnz == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: "\n".join([*r[:2], r[2].rpartition("\t")[0], r[3]]), r"features\.tsv\.gz, line 3: expected 3 cells"),
        (lambda r: "\n".join([*r[:2], "", *r[2:]]), r"features\.tsv\.gz, line 3: expected 3 cells"),
        (lambda r: "\n".join(r[:3]), r"the matrix is \(4, \d+\), but there are 3 genes"),
        (lambda r: "\n".join(r).replace("TP53", "TP\x1b53"), r"line 1 holds the control character 0x1b"),
        (lambda r: "\n".join(r).replace("TP53", "x" * 201), r"genes with names that are"),
        (lambda r: "\n".join(r).replace("Gene Expression", "Antibody Capture"), r"no features of the type 'Gene Exp"),
    ],
)
def test_a_table_of_features_that_is_wrong_is_named(mtx, change, message):
    rewrite(mtx, "features.tsv", change)
    with pytest.raises(ValueError, match=message) as caught:
        read_outs(mtx.folder)
    assert str(mtx.folder) in str(caught.value)


def test_antibodies_are_left_out_and_said(mtx, tmp_path, capsys):
    plain = read_outs(mtx.folder).counts
    rewrite(
        mtx,
        "features.tsv",
        lambda rows: "\n".join([rows[0], rows[1].replace("Gene Expression", "Antibody Capture"), *rows[2:]]),
    )
    found = read_outs(mtx.folder).counts
    assert found.symbols == ["TP53", "CD3E", "KRT5"]
    np.testing.assert_array_equal(found.matrix.toarray(), plain.matrix.toarray()[:, [0, 2, 3]])
    layout = prepare(mtx.folder, mtx.image, tmp_path)
    assert "left out, as they are no genes: 1 features 'Antibody Capture'" in capsys.readouterr().out
    assert load_names(layout.panel_path) == ["TP53", "CD3E"] and "ERBB2" not in load_slide(layout, "v").var_names


HEAD = "%%MatrixMarket matrix coordinate integer general\n%comment\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n\n", "it begins with"),
        ("", "it begins with"),
        (
            HEAD.replace("integer", "pattern") + "4 {n} 1\n1 1\n",
            "it begins with '%%MatrixMarket matrix coordinate pattern",
        ),
        (HEAD.replace("integer", "complex") + "4 {n} 1\n1 1 1 1\n", "it begins with"),
        (HEAD.replace("general", "symmetric") + "4 {n} 1\n1 1 1\n", "it begins with"),
        (HEAD, "its line of sizes is ''"),
        (HEAD + "4 {n}\n1 1 1\n", "its line of sizes is"),
        (HEAD + "4 9999999999999999999 1\n1 1 1\n", "its line of sizes is"),
        (HEAD + "5 {n} 1\n1 1 1\n", r"the matrix is \(5, \d+\), but there are 4 genes"),
        (HEAD + "4 {n} 1\n1 1 1.5\n", r"line 4: expected gene, barcode and count, found '1 1 1\.5'"),
        (HEAD + "4 {n} 1\n1 1 -1\n", r"line 4: expected gene, barcode and count, found '1 1 -1'"),
        (HEAD + "4 {n} 1\n1 1 0x10\n", "line 4: expected gene, barcode and count"),
        (HEAD + "4 {n} 2\n1 1 1\n1 2\n", "(Expected 3 columns|CSV parse error)"),
        (HEAD + "4 {n} 1\n1 1 99999999999999999999\n", "(conversion error|CSV)"),
        (HEAD + "4 {n} 1\n0 1 1\n", "it has an entry for gene 0 of 4"),
        (HEAD + "4 {n} 1\n5 1 1\n", "it has an entry for gene 5 of 4"),
        (HEAD + "4 {n} 1\n1 4000000000 1\n", r"it has an entry for barcode 4000000000 of"),
        (HEAD + "4 {n} 2\n1 1 1\n", "it should have 2 entries, found 1"),
        (HEAD + "4 {n} 0\n1 1 1\n", "it should have 0 entries, found 1"),
        (HEAD + "4 {n} 2\n1 1 1\n1 1 1\n", "1 of its entries are there twice"),
        (HEAD + "4 {n} 1\n1 1 3000000000\n", "holds 3e.09 where raw counts were expected"),
        (HEAD.replace("integer", "real") + "4 {n} 1\n1 1 1.5\n", r"holds 1\.5 where raw counts were expected"),
        (HEAD.replace("integer", "real") + "4 {n} 1\n1 1 -2\n", "holds -2 where raw counts were expected"),
        (HEAD.replace("integer", "real") + "4 {n} 1\n1 1 1e999\n", "holds inf where raw counts were expected"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_matrix_is_an_error_and_no_crash(mtx, text, message, packed):
    path = mtx.folder / "filtered_feature_bc_matrix" / "matrix.mtx.gz"
    content = text.replace("{n}", str(mtx.in_tissue.sum())).encode()
    if packed:
        path.write_bytes(gzip.compress(content))
    else:
        path.unlink()
        path.with_suffix("").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_outs(mtx.folder)
    assert "matrix.mtx" in str(caught.value)


def test_a_matrix_of_whole_numbers_written_as_real_is_read(mtx):
    plain = read_outs(mtx.folder).counts.matrix
    path = mtx.folder / "filtered_feature_bc_matrix" / "matrix.mtx.gz"
    with gzip.open(path, "wb") as file:
        scipy.io.mmwrite(file, sparse.coo_matrix(plain.T.astype(float)))
    assert b"real" in gzip.decompress(path.read_bytes()) and (read_outs(mtx.folder).counts.matrix != plain).nnz == 0


# The one file of a matrix


@pytest.mark.parametrize("version", ["h5", "h5 v2"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("barcodes", lambda a: a[1:], r"the matrix is for \d+ barcodes, but \d+ are listed"),
        ("shape", lambda a: a + np.array([46, 0]), r"the matrix is for 50 genes, but 4 are listed"),
        ("shape", lambda a: a + np.array([0, 5]), r"the matrix is for \d+ barcodes, but"),
        ("features/name", lambda a: a[1:], r"the matrix is for 4 names of genes, but 3 are listed"),
        ("indices", lambda a: np.r_[500, a[1:]], "indices holds 500, but there are 4 columns"),
        ("indices", lambda a: np.r_[np.int64(2**40), a[1:]], "indices holds 1099511627776"),
        ("indptr", lambda a: np.r_[a[:3], 2**30, a[4:]], "indptr does not lead from 0"),
        ("data", lambda a: np.r_[np.int64(3_000_000_000), a[1:]], "holds 3e.09 where raw counts were expected"),
        ("data", lambda a: np.r_[np.inf, a[1:]], "holds inf where raw counts were expected"),
        ("data", lambda a: np.r_[1e10, a[1:]], "holds 1e.10 where raw counts were expected"),
        ("indices", None, "KeyError|has no attribute|TypeError|Group|doesn't exist"),
    ],
)
def test_arrays_of_other_lengths_and_wrong_references_write_nothing(tmp_path, picture, version, name, change, message):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS, matrix=version)
    path = outs.folder / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "r+") as file:
        group = file["matrix" if version == "h5" else "GRCh38"]
        name = name if version == "h5" else name.replace("features/name", "gene_names")
        array = group[name][:]
        del group[name]
        if change is None:
            group.create_group(name)
        else:
            group[name] = change(array)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(outs.folder, outs.image, tmp_path)
    assert str(path) in str(caught.value) and not (tmp_path / "data").exists()


def test_every_feature_has_a_type(tmp_path, picture):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    with h5py.File(outs.folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = np.array(["Gene Expression"] * 3, dtype="S")
    with pytest.raises(ValueError, match="the matrix is for 4 types of features, but 3 are listed"):
        read_outs(outs.folder)


def test_sums_of_genes_of_one_name_are_checked_too(tmp_path, picture):
    outs = write_outs(tmp_path / "outs", picture, ["TP53", "TP53", "ERBB2"])
    with h5py.File(outs.folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        file["matrix/data"][:] = 2_000_000_000
    with pytest.raises(
        ValueError, match=r"filtered_feature_bc_matrix\.h5: counts above 2147483647 \(4e\+09 for gene TP53"
    ):
        prepare(outs.folder, outs.image, tmp_path)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "text",
    ['{"tissue_hires_scalef": 1' + "0" * 400 + "}", "[" * 100_000, '{"tissue_hires_scalef": 1e-320}', "[1, 2]", ""]
    + [f'{{"{name}": {value}}}' for name in ("spot_diameter_fullres", "bin_size_um") for value in ("-5", "NaN", '"a"')],
)
def test_scale_factors_that_are_none(tmp_path, picture, text):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    (outs.folder / "spatial" / "scalefactors_json.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"scalefactors_json\.json cannot be read as|scalefactors_json\.json: "
    ) as caught:
        read_outs(outs.folder)
    assert len(str(caught.value)) < 600


# Visium HD, exported to CSV


def write_bins(folder: Path, factors: dict[str, float], pitch: float = 16.0) -> Path:
    """12 x 12 bins of 8 um."""
    rows, columns = (axis.ravel() for axis in np.mgrid[0:12, 0:12])
    names = [f"s_008um_{row:05d}_{column:05d}-1" for row, column in zip(rows, columns, strict=True)]
    (folder / "spatial").mkdir(parents=True)
    table = pd.DataFrame({"barcode": names, "in_tissue": 1, "array_row": rows, "array_col": columns})
    table["pxl_row_in_fullres"], table["pxl_col_in_fullres"] = 20 + pitch * rows, 20 + pitch * columns
    table.to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    stored = sparse.csc_matrix(np.random.default_rng(0).poisson(2.0, (3, 144)))
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(stored, name)
        group["shape"], group["barcodes"] = np.array(stored.shape), np.array(names, dtype="S")
        group["features/id"], group["features/name"] = np.array(IDS[:3], dtype="S"), np.array(SYMBOLS[:3], dtype="S")
        group["features/feature_type"] = np.array(["Gene Expression"] * 3, dtype="S")
    return folder


HD = {"spot_diameter_fullres": 16.0, "bin_size_um": 8.0, "microns_per_pixel": 0.5}


def test_visium_hd_has_its_own_pixel_size(tmp_path, picture, capsys):
    from PIL import Image

    folder = write_bins(tmp_path / "square_008um", HD)
    Image.fromarray(picture).save(tmp_path / "image.tif")
    layout = prepare(folder, tmp_path / "image.tif", tmp_path)
    assert layout.spec.microns_per_pixel == {"v": 0.5}
    told = capsys.readouterr().out
    assert "0.5000 um per pixel (16.0 px between neighbors, which are 8 um apart)" in told and "100 um" not in told
    assert "WARNING: bins of 8 um are not added up: each counts as a spot" in told


def test_the_size_of_a_bin_is_enough_and_must_agree(tmp_path):
    some = {name: value for name, value in HD.items() if name != "microns_per_pixel"}
    assert microns_per_pixel(read_outs(write_bins(tmp_path / "a", some))) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"do not belong together: 0\.5 um per pixel are stated, the positions give 1"):
        microns_per_pixel(read_outs(write_bins(tmp_path / "b", HD, pitch=8.0)))


@pytest.mark.parametrize("factors", [None, {"microns_per_pixel": 0.5}, {"spot_diameter_fullres": 16.0}])
def test_the_names_of_bins_tell_their_size(tmp_path, picture, factors, capsys):
    from PIL import Image

    folder = write_bins(tmp_path / "bins", factors or {})
    if factors is None:
        (folder / "spatial" / "scalefactors_json.json").unlink()
    Image.fromarray(picture).save(tmp_path / "image.tif")
    layout = prepare(folder, tmp_path / "image.tif", tmp_path)
    assert layout.spec.microns_per_pixel == {"v": pytest.approx(0.5)}
    assert "0.5000 um per pixel (16.0 px between neighbors, which are 8 um apart)" in capsys.readouterr().out


def test_scale_factors_of_another_bin_size_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"do not belong together: bin_size_um is 16, but bins are called '?s_008um_.*one bin size"
    ):
        read_outs(write_bins(tmp_path / "bins", {"bin_size_um": 16.0}))


@pytest.mark.parametrize(("factors", "microns"), [({"spot_diameter_fullres": 16.0}, None), ({**HD}, 0.5)])
def test_a_square_array_without_the_names_of_bins_is_not_taken_for_visium(tmp_path, picture, factors, microns, capsys):
    from PIL import Image

    folder = write_bins(tmp_path / "bins", {name: value for name, value in factors.items() if name != "bin_size_um"})
    positions = folder / "spatial" / "tissue_positions.csv"
    positions.write_text(positions.read_text().replace("s_008um_", "B"))
    with h5py.File(folder / MATRIX, "r+") as file:
        names = [name.replace(b"s_008um_", b"B") for name in file["matrix/barcodes"][:]]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = names
    Image.fromarray(picture).save(tmp_path / "image.tif")
    assert prepare(folder, tmp_path / "image.tif", tmp_path).spec.microns_of("v") == microns
    told = capsys.readouterr().out
    assert ("the size of a pixel is unknown" in told) == (microns is None) and "100 um" not in told


# Maps of genes


def test_a_gene_map_that_contradicts_itself(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text(f"{IDS[0]}\tTP53\n{IDS[1]}.3\tERBB2\n{IDS[0]}.1\tP53\n{IDS[1]}\tERBB2\n")
    with pytest.raises(ValueError, match=rf"map\.tsv gives several symbols to one gene: {IDS[0]} \(TP53, P53\)\."):
        read_gene_map(path)
    path.write_text(f"{IDS[0]}\tTP53\n{IDS[1]}\t HER2\n")
    with pytest.raises(ValueError, match=r"map\.tsv: genes with names that are"):
        read_gene_map(path)
    path.write_bytes("".join(f"{i}\t{s}\r\n" for i, s in zip(IDS, SYMBOLS, strict=True)).encode("utf-8-sig"))
    assert read_gene_map(path) == dict(zip(IDS, SYMBOLS, strict=True))


# HEST


def change_sample(raw: Path, name: str, change: Callable[[anndata.AnnData], None]) -> None:
    path = raw / "st" / f"{name}.h5ad"
    data = anndata.read_h5ad(path)
    change(data)
    data.write_h5ad(path)


@pytest.fixture
def hest(tmp_path) -> Path:
    raw = tmp_path / "hest"
    for name in ("TENX1", "NCBI2"):
        write_sample(raw, name)
    METADATA.to_csv(raw / "HEST_v1_1_0.csv", index=False)
    return raw


def renamed(names: Sequence[str]) -> Callable[[anndata.AnnData], None]:
    def change(data: anndata.AnnData) -> None:
        data.var_names = [*names, *data.var_names[3:]]

    return change


def test_samples_with_ids_beside_samples_with_symbols(hest, tmp_path, capsys):
    ids = ["ENSG00000075624.18", "ENSG00000141736.14", "ENSG00000171345.13"]  # ACTB, ERBB2, KRT19
    change_sample(hest, "TENX1", renamed(ids))
    with pytest.raises(
        ValueError, match=r"The genes of TENX1 have Ensembl ids .*, those of NCBI2 have symbols .*--gene_map FILE"
    ):
        prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own")
    table = tmp_path / "map.tsv"
    table.write_text(
        "".join(f"{i.partition('.')[0]}\t{s}\n" for i, s in zip(ids, ("ACTB", "ERBB2", "KRT19"), strict=True))
    )
    prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own", gene_map=table)
    layout = Layout(tmp_path / "data", get_spec("own", tmp_path / "data"))
    assert load_names(layout.panel_path) == ["ERBB2", "KRT19"]
    first, second = load_slide(layout, "TENX1"), load_slide(layout, "NCBI2")
    assert first.var_names.tolist() == second.var_names.tolist() == ["ACTB", "ERBB2", "KRT19"]
    assert "Ensembl" not in capsys.readouterr().out


def test_versions_of_ids_are_cut_without_a_map(hest, tmp_path, capsys):
    change_sample(hest, "TENX1", renamed(["ENSG00000075624.18", "ENSG00000141736.14", "ENSG00000171345.13"]))
    change_sample(hest, "NCBI2", renamed(["ENSG00000075624", "ENSG00000141736", "ENSG00000171345"]))
    prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own")
    panel = load_names(Layout(tmp_path / "data", get_spec("own", tmp_path / "data")).panel_path)
    assert panel == ["ENSG00000141736", "ENSG00000171345"]
    assert "TENX1: 3 of 3 genes are under an Ensembl id" in capsys.readouterr().out


def test_spots_with_a_patch_are_on_the_tissue_whatever_in_tissue_says(hest, tmp_path, capsys):
    """HEST made the patches on the tissue; the flag says nothing in many of its samples."""
    for number, values in enumerate(([0, 1] * 6 + [0], ["False", "True"] * 6 + ["False"])):
        change_sample(hest, "TENX1", lambda data, values=values: data.obs.__setitem__("in_tissue", values))
        folder = tmp_path / f"data {number}"
        done = prepare_hest(hest, folder, Options(num_genes=2), name="own", ids="TENX1")
        assert done[0].spots == 11, "those with a patch"
    assert "left out, as in_tissue is 0 and no patch says otherwise:" in capsys.readouterr().out


def test_in_tissue_that_leaves_nothing_or_says_something_else(hest, tmp_path):
    (hest / "patches" / "TENX1.h5").unlink()
    change_sample(hest, "TENX1", lambda data: data.obs.__setitem__("in_tissue", 0))
    with pytest.raises(
        ValueError, match=r"Slide TENX1: .*TENX1\.h5ad: in_tissue is 0 for all 13 spots, and none has a patch"
    ):
        prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own", ids="TENX1")
    change_sample(hest, "TENX1", lambda data: data.obs.__setitem__("in_tissue", ["maybe", "1"] * 6 + ["1"]))
    with pytest.raises(ValueError, match=r"TENX1\.h5ad: in_tissue should be 0 or 1, found maybe"):
        prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own", ids="TENX1")
    change_sample(hest, "TENX1", lambda data: data.obs.__setitem__("in_tissue", [True] * 12 + [False]))
    assert prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own", ids="TENX1")[0].spots == 12


def test_patches_of_another_size_are_said_with_the_flag_that_takes_them(hest, tmp_path, capsys):
    path = hest / "patches" / "TENX1.h5"
    with h5py.File(path, "r+") as file:
        coords = file["coords"][:] + int(112 * SCALE) - int(128 * SCALE)
        del file["img"], file["coords"]
        file["img"], file["coords"] = np.zeros((11, 256, 256, 3), np.uint8), coords
    flag = r"add --set DATA.patch_size=256"
    prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own", ids="TENX1")
    assert f"TENX1: patches of 256 px are in patches_256: {flag}" in capsys.readouterr().out
    layout = Layout(tmp_path / "data", get_spec("own", tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=f"has an image in .*Patches of 256 px are in patches_256: {flag}"):
        choose_slides(layout, None, ["target"])
    with pytest.raises(FileNotFoundError, match=f"no image .*Patches of 256 px are in patches_256: {flag}"):
        layout.slides_on_disk()
    with pytest.raises(FileNotFoundError, match=f"has no image: .*Patches of 256 px are in patches_256: {flag}"):
        layout.image_path("TENX1")
    assert Layout(layout.data_dir, layout.spec, patch_size=256).slides_on_disk() == ["TENX1"]
    capsys.readouterr()


def test_one_changed_index_of_a_sample_is_an_error_and_no_crash(hest, tmp_path):
    path = hest / "st" / "TENX1.h5ad"
    for value in (500, -1, 2**31 - 1):
        with h5py.File(path, "r+") as file:
            file["X/indices"][0] = value
        with pytest.raises(
            ValueError, match=rf"TENX1\.h5ad cannot be .*indices holds {value}, but there are 5 columns"
        ):
            prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own", ids="TENX1")


def test_a_study_without_a_title_has_no_known_patients(hest, tmp_path):
    METADATA.assign(dataset_title="").to_csv(hest / "HEST_v1_1_0.csv", index=False)
    with pytest.raises(ValueError, match="name no study"):
        prepare_hest(hest, tmp_path / "data", Options(num_genes=2), name="own")


# The report, and panels


def test_slides_that_were_not_asked_for_are_not_called_missing(tmp_path):
    layout = Layout(tmp_path, SPECS["her2st"])
    one = [Prepared("A1", "A", 346, 15000, 0, 0, "copied")]
    (said,) = findings(layout, one, is_all=False)
    assert said == "1 of 36 slides were asked for and prepared."
    assert "35 of 36 expected slides are not in the source" in findings(layout, one)[0]


def test_a_slide_with_too_few_spots_is_left_out_of_the_ranking_and_said(capsys):
    draw = np.random.default_rng(0)

    def slide(name: str, spots: int) -> anndata.AnnData:
        data = anndata.AnnData(sparse.csr_matrix(draw.poisson(draw.gamma(2, 2, (spots, 60))).astype(np.int32)))
        data.obs_names, data.uns["slide"] = [f"{i}x1" for i in range(spots)], name
        return data

    large = [slide("A1", 40), slide("B1", 30)]
    expected = genes_by_variability(large, 10)
    assert genes_by_variability([*large, slide("C1", 1)], 10) == expected
    assert "(10 with counts are needed): C1." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"All slides have too few spots .*: C1, D1\. Choose --method mean"):
        genes_by_variability([slide("C1", 1), slide("D1", 2)], 10)
