"""Visium HD as Space Ranger writes it: bins are added up to squares; what does not fit together is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.prepare_visium import main
from preprocess.raw.space_ranger import matrices
from preprocess.raw.space_ranger.outs import read_outs
from tests.space_ranger import Bins, write_hd_outs, write_outs

SYMBOLS = ["TP53", "ERBB2", "CD3E"]


@pytest.fixture
def bins(tmp_path) -> Bins:
    return write_hd_outs(tmp_path / "outs", SYMBOLS)


def expected_squares(bins: Bins, side: int) -> dict[str, np.ndarray]:
    """name -> counts of every square with tissue in half of its bins, one after the other; the last ones are cut off."""
    rows, columns = bins.is_tissue.shape
    found = {}
    for row in range(-(-rows // side)):
        for column in range(-(-columns // side)):
            part = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
            if bins.is_tissue[part].sum() * 2 >= side * side:
                found[f"{column}x{row}"] = bins.counts[part][bins.is_tissue[part]].sum(axis=0)
    return found


@pytest.mark.parametrize("at_a_time", [1 << 24, 100])
@pytest.mark.parametrize("bin_um", [56, 40, 6])
def test_bins_are_added_up_to_squares(tmp_path, bins, bin_um, at_a_time, monkeypatch, capsys):
    monkeypatch.setattr(matrices, "_COUNTS_AT_A_TIME", at_a_time)
    Image.fromarray(np.full((660, 740, 3), 200, dtype=np.uint8)).save(tmp_path / "image.tif")
    flags = [
        "--source",
        bins.folder,
        "--image",
        tmp_path / "image.tif",
        "--name",
        "hd",
        "--data_dir",
        tmp_path / "data",
    ]
    main([str(word) for word in [*flags, "--bin_um", bin_um]])
    layout = Layout(tmp_path / "data", get_spec("hd", tmp_path / "data"))
    assert layout.spec.microns_per_pixel == {"hd": bins.microns}
    table, wanted = load_slide(layout, "hd"), expected_squares(bins, bin_um // 2)
    assert set(table.obs_names) == set(wanted)
    np.testing.assert_array_equal(table[:, SYMBOLS].X.toarray(), [wanted[name] for name in table.obs_names])
    whole = [
        i
        for i, (column, row) in enumerate(table.obsm["grid"])
        if (column + 1) * bin_um <= 280 and (row + 1) * bin_um <= 224
    ]
    centers = bins.origin + (table.obsm["grid"] + 0.5) * bin_um / bins.microns
    np.testing.assert_allclose(table.obsm["spatial"][whole], centers[whole], atol=1e-3)
    told = capsys.readouterr().out
    assert f"squares of {bin_um} um of {bin_um // 2} x {bin_um // 2} bins of 2 um (square_002um)" in told
    assert f"0.5000 um per pixel ({bin_um / 0.5:.1f} px between neighbors, which are {bin_um} um apart)" in told


def test_the_finest_bins_that_fit_are_read_and_all_give_the_same_counts(bins):
    from_finest = read_outs(bins.folder)
    assert "bins of 2 um" in from_finest.notes[0]
    shutil.rmtree(bins.folder / "binned_outputs" / "square_002um")
    from_coarser = read_outs(bins.folder)
    assert "7 x 7 bins of 8 um" in from_coarser.notes[0]
    shared = [name for name in from_finest.counts.barcodes if name in from_coarser.counts.barcodes]
    inside = [name for name in shared if int(name.split("_")[2]) + int(name.split("_")[3]) > 1]
    first, second = (
        output.counts.matrix[[output.counts.barcodes.index(name) for name in inside]]
        for output in (from_finest, from_coarser)
    )
    assert len(inside) > 10 and (first != second).nnz == 0
    alone = read_outs(bins.folder / "binned_outputs" / "square_008um")
    assert alone.counts.barcodes == from_coarser.counts.barcodes


def _flat(folder: Path, target: Path, prefix: str, *, packed: bool) -> Path:
    """As in a GEO download: the files of one bin size in one folder, with the sample's name, compressed or not."""
    target.mkdir(exist_ok=True)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        name = f"{prefix}{path.name}{'.gz' if packed else ''}"
        (target / name).write_bytes(gzip.compress(content) if packed else content)
    return target


@pytest.mark.parametrize("packed", [False, True])
def test_bins_under_the_names_of_a_download_are_pooled(tmp_path, bins, packed):
    home, flat = bins.folder / "binned_outputs", tmp_path / "geo"
    plain = read_outs(home / "square_008um")
    found = read_outs(_flat(home / "square_008um", flat, "GSM1_P_", packed=packed))
    assert found.counts.barcodes == plain.counts.barcodes and (found.counts.matrix != plain.counts.matrix).nnz == 0
    assert found.scale_factors == plain.scale_factors and found.smaller == plain.smaller
    np.testing.assert_array_equal(found.positions.pixels, plain.positions.pixels)
    _flat(home / "square_002um", flat, "GSM2_P_", packed=packed)
    with pytest.raises(ValueError, match=r"Bins of 2 folders where those of one slide were expected.*GSM1_P_.*GSM2_P_"):
        read_outs(flat)


def test_bin_sizes_of_one_sample_in_one_folder(tmp_path, bins):
    for size in ("002", "008"):
        folder = bins.folder / "binned_outputs" / f"square_{size}um"
        _flat(folder, tmp_path / "geo", f"GSM1_square_{size}um_", packed=size == "008")
    assert "bins of 2 um" in read_outs(tmp_path / "geo").notes[0]
    assert read_outs(tmp_path / "geo").counts.barcodes == read_outs(bins.folder).counts.barcodes


def test_bins_are_known_by_their_names_too(tmp_path, bins):
    folder = (bins.folder / "binned_outputs" / "square_008um").rename(tmp_path / "mine")
    factors = folder / "spatial" / "scalefactors_json.json"
    plain = read_outs(folder).counts.barcodes
    factors.with_name("scalefactors_json.json.gz").write_bytes(gzip.compress(factors.read_bytes()))
    factors.unlink()
    assert read_outs(folder).counts.barcodes == plain
    factors.with_name("scalefactors_json.json.gz").unlink()
    with pytest.raises(ValueError, match=r"mine is of Visium HD, but no .*scalefactors_json\.json says"):
        read_outs(folder)


def test_bins_are_not_paired_with_counts_of_another_name(tmp_path, bins):
    flat = _flat(bins.folder / "binned_outputs" / "square_008um", tmp_path / "geo", "GSM1_", packed=False)
    (flat / "GSM1_filtered_feature_bc_matrix.h5").rename(flat / "GSM2_filtered_feature_bc_matrix.h5")
    with pytest.raises(FileNotFoundError, match=r"GSM1_filtered.* does not exist.*its name begins as that of their"):
        read_outs(flat)


def test_two_slides_of_two_bin_sizes_are_two_slides(tmp_path, bins):
    for name, size in (("A", "002"), ("B", "008")):
        shutil.copytree(bins.folder / "binned_outputs" / f"square_{size}um", tmp_path / "RAW" / name)
    with pytest.raises(ValueError, match="Bins of 2 folders where those of one slide were expected"):
        read_outs(tmp_path / "RAW")
    shutil.rmtree(tmp_path / "RAW" / "A")
    assert read_outs(tmp_path / "RAW").counts.barcodes == read_outs(tmp_path / "RAW" / "B").counts.barcodes
    write_outs(tmp_path / "RAW" / "outs", np.full((200, 200, 3), 90, dtype=np.uint8), SYMBOLS)
    with pytest.raises(ValueError, match="seem to be of two samples"):
        read_outs(tmp_path / "RAW")


def test_what_cannot_be_pooled_is_refused(bins):
    home = bins.folder / "binned_outputs"
    shutil.rmtree(home / "square_002um")
    with pytest.raises(
        ValueError, match=r"Squares of 20 um cannot be made of bins of 8 um.*--bin_um .* for example 16\."
    ):
        read_outs(bins.folder, 20)
    shutil.copytree(bins.folder, bins.folder.parent / "both" / "first")
    shutil.copytree(bins.folder, bins.folder.parent / "both" / "second")
    with pytest.raises(ValueError, match=r"Bins of 2 folders where those of one slide were expected.*first.*second"):
        read_outs(bins.folder.parent / "both")
    factors = home / "square_008um" / "spatial" / "scalefactors_json.json"
    text = factors.read_text()
    factors.write_text(json.dumps({**json.loads(text), "microns_per_pixel": 0.3}))
    from preprocess.raw.space_ranger.output import microns_per_pixel

    with pytest.raises(
        ValueError, match=r"do not belong together: 0\.3 um per pixel are stated, the positions give 0\.5"
    ):
        microns_per_pixel(read_outs(bins.folder))
    factors.unlink()
    with pytest.raises(ValueError, match=r"square_008um is of Visium HD, but no .*scalefactors_json\.json says"):
        read_outs(bins.folder)
    factors.write_text(text)
    matrix = home / "square_008um" / "filtered_feature_bc_matrix.h5"
    matrix.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"filtered_feature_bc_matrix.h5 does not exist. It holds the counts of the bins"
    ):
        read_outs(bins.folder)


def _changed(path: Path, **columns: object) -> None:
    pd.read_parquet(path).assign(**columns).to_parquet(path, index=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_tissue": 0}, r"no square of 7 x 7 bins is under tissue \(0 of 980 bins are\)"),
        ({"array_row": 3}, "bin s_008um_.* stands in row 3, column"),
        ({"pxl_col_in_fullres": np.nan}, "pxl_col_in_fullres is missing or no number"),
        ({"barcode": "AAAC-1"}, "bin AAAC-1 stands in row"),
    ],
)
def test_damaged_positions_are_named(bins, change, message):
    shutil.rmtree(bins.folder / "binned_outputs" / "square_002um")
    path = bins.folder / "binned_outputs" / "square_008um" / "spatial" / "tissue_positions.parquet"
    _changed(path, **change)
    with pytest.raises(
        ValueError, match=rf"tissue_positions\.parquet cannot be read as the positions of bins.*{message}"
    ):
        read_outs(bins.folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("barcodes", lambda names: np.r_[names[1:], names[1:2]], "a bin of it is listed twice"),
        ("barcodes", lambda names: np.array([b"AAAC-1"] * len(names)), "its barcodes should be bins like"),
        ("barcodes", lambda names: np.r_[names[:-1], [b"s_008um_0001x_00001-1"]], "one is b's_008um_0001x_00001-1'"),
        ("barcodes", lambda names: names[1:], r"the matrix is for \d+ barcodes, but \d+ are listed"),
        ("indices", lambda values: values + 3, "indices holds [345], but there are 3 columns"),
        ("indptr", lambda values: values[::-1], "indptr has"),
        ("data", lambda values: values * 0 - 1, "holds -1 where raw counts were expected"),
        ("data", lambda values: values * 0 + 2**31 - 2, "add up to more than"),
    ],
)
def test_a_damaged_matrix_of_bins_is_an_error(bins, name, change, message):
    shutil.rmtree(bins.folder / "binned_outputs" / "square_002um")
    path = bins.folder / "binned_outputs" / "square_008um" / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "r+") as file:
        values = file["matrix"][name][:]
        del file["matrix"][name]
        file["matrix"][name] = change(values)
    with pytest.raises(ValueError, match=rf"filtered_feature_bc_matrix\.h5.*{message}"):
        read_outs(bins.folder)


def test_squares_are_for_visium_hd_only(tmp_path):
    outs = write_outs(tmp_path / "visium" / "outs", np.full((200, 200, 3), 90, dtype=np.uint8), SYMBOLS)
    with pytest.raises(ValueError, match=r"--bin_um 56 is for Visium HD, and .* holds no bins"):
        read_outs(outs.folder, 56)
