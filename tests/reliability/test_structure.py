"""What stands inside a file: references of sparse matrices, lengths of arrays that belong together, integers, names."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from scipy import sparse

from datasets.tables.counts import gene_names, read_counts, round_ids
from datasets.tables.positions import read_positions
from datasets.tables.sparse import Stored, checked_sparse
from datasets.tables.spot_table import read_spots
from preprocess.raw.hest import HestSample
from preprocess.raw.hest_patches import HestPatches
from utils.files import load_names, safe_name
from utils.text import checked_names

GENES = [f"GENE{i}" for i in range(12)]
SPOTS = [f"{i}x{i + 1}" for i in range(9)]


@pytest.fixture
def h5ad(tmp_path) -> Path:
    """Counts (9, 12), some zero, as another program writes them."""
    values = np.random.default_rng(0).poisson(1.0, (len(SPOTS), len(GENES))).astype(np.float32)
    data = anndata.AnnData(sparse.csr_matrix(values), obs=pd.DataFrame(index=SPOTS), var=pd.DataFrame(index=GENES))
    data.write_h5ad(tmp_path / "B1.h5ad")
    return tmp_path / "B1.h5ad"


def change(path: Path, name: str, place: object, value: object) -> None:
    with h5py.File(path, "r+") as file:
        file[name][place] = value


def entry(path: Path, name: str, place: int) -> int:
    with h5py.File(path, "r") as file:
        return int(file[name][place])


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("X/indices", 0, 500, "indices holds 500, but there are 12 columns"),
        ("X/indices", 0, -1, "indices holds -1, but there are 12 columns"),
        ("X/indices", 0, 2**31 - 1, "indices holds 2147483647"),
        ("X/indices", 1, None, "an entry of it is there twice"),
        ("X/indptr", 3, 0, "indptr does not lead from 0"),
        ("X/indptr", 3, 10**9, "indptr does not lead from 0"),
        ("X/indptr", -1, 1, "indptr does not lead from 0"),
        ("X/indptr", 0, 1, "indptr does not lead from 0"),
    ],
)
@pytest.mark.parametrize("genes", [None, GENES[3:5]], ids=["all genes", "a panel"])
def test_a_wrong_reference_in_the_counts_of_an_h5ad_is_refused(h5ad, name, place, value, message, genes):
    change(h5ad, name, place, entry(h5ad, name, place - 1) if value is None else value)
    with pytest.raises(ValueError, match=message) as caught:
        read_counts(h5ad, genes)
    assert str(h5ad) in str(caught.value)


def test_every_layout_of_an_h5ad_gives_the_same_counts(h5ad):
    """Rows, columns, dense; columns of a row in any order; any type of whole numbers."""
    data = anndata.read_h5ad(h5ad)
    true = read_counts(h5ad).to_df()
    unsorted = data.X.copy()
    for row in range(len(SPOTS)):
        place = slice(unsorted.indptr[row], unsorted.indptr[row + 1])
        unsorted.indices[place], unsorted.data[place] = unsorted.indices[place][::-1], unsorted.data[place][::-1]
    unsorted.has_sorted_indices = False
    for matrix in (unsorted, data.X.tocsc(), data.X.toarray(), data.X.astype(np.int64), data.X.astype(np.uint16)):
        anndata.AnnData(matrix, obs=data.obs, var=data.var).write_h5ad(h5ad)
        pd.testing.assert_frame_equal(read_counts(h5ad).to_df(), true)
    anndata.AnnData(data.X.astype(bool), obs=data.obs, var=data.var).write_h5ad(h5ad)
    pd.testing.assert_frame_equal(read_counts(h5ad).to_df(), true.clip(upper=1))


def test_an_h5ad_of_before_0_7_is_read(h5ad, tmp_path):
    old = tmp_path / "old.h5ad"
    true = read_counts(h5ad)
    with h5py.File(old, "w") as file:
        for axis, names in (("obs", SPOTS), ("var", GENES)):
            file[axis] = np.array([(name.encode(),) for name in names], dtype=[("index", "S10")])
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", np.array(true.shape)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(true.X, name)
    pd.testing.assert_frame_equal(read_counts(old).to_df(), true.to_df())
    assert gene_names(old) == GENES


def test_an_h5ad_with_more_or_fewer_names_than_rows_is_refused(h5ad):
    with h5py.File(h5ad, "r+") as file:
        del file["obs/_index"]
        file["obs"].create_dataset("_index", data=SPOTS[1:], dtype=h5py.string_dtype())
        for key, value in {"encoding-type": "string-array", "encoding-version": "0.2.0"}.items():
            file["obs/_index"].attrs[key] = value
    with pytest.raises(ValueError, match=r"X is of the shape \(9, 12\), but obs names 8 rows and var 12 columns"):
        read_counts(h5ad)


def test_what_another_program_has_added_to_an_h5ad_does_not_matter(h5ad):
    true = read_counts(h5ad).to_df()
    with h5py.File(h5ad, "r+") as file:
        file["__DATA_TYPES__/Enum_Boolean"] = np.dtype("i1")
        file["obs"].create_group("strange").attrs["encoding-type"] = "of tomorrow"
    pd.testing.assert_frame_equal(read_counts(h5ad).to_df(), true)
    with h5py.File(h5ad, "r+") as file:
        file["X"].attrs["encoding-type"] = "of tomorrow"
    with pytest.raises(ValueError, match=r"B1\.h5ad cannot be read.*X is a of tomorrow.*Write it again with AnnData"):
        read_counts(h5ad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [0, 1]}, "data has 3 entries, indices has 2"),
        ({"indptr": [0, 3]}, "indptr has 2 entries for 2 rows"),
        ({"indices": [0.0, 1.0, 2.0]}, "indices is float64"),
        ({"shape": (2, -3)}, "its shape is"),
        ({"shape": (2, 2)}, "indices holds 2, but there are 2 columns"),
    ],
)
def test_arrays_that_are_no_sparse_matrix(changes, message):
    arrays = {"data": [1, 2, 3], "indices": [0, 2, 1], "indptr": [0, 2, 3]} | changes
    shape = arrays.pop("shape", (2, 3))
    with pytest.raises(ValueError, match=message):
        checked_sparse(Stored(**{name: np.array(a) for name, a in arrays.items()}, shape=shape, by_rows=True))


@pytest.mark.parametrize("kind", ["uint32", "int64", "float64"])
def test_a_count_that_is_too_large_is_refused_before_it_is_narrowed(tmp_path, kind):
    path = tmp_path / "s.parquet"
    pd.DataFrame({"A": np.array([1, 3_000_000_000], kind)}, index=["1x1", "2x1"]).to_parquet(path)
    with pytest.raises(ValueError, match=r"s\.parquet: counts above 2147483647 \(3e\+09 for gene A\) in spots 2x1"):
        read_counts(path)


def test_an_empty_cell_among_integers_is_no_count(tmp_path):
    path = tmp_path / "s.parquet"
    pa.parquet.write_table(pa.table({"spot": ["1x1", "2x1"], "A": pa.array([1, None], pa.int32())}), path)
    with pytest.raises(ValueError, match=r"missing counts \(NaN\) \(gene A\) in spots 2x1"):
        read_counts(path)


@pytest.mark.parametrize("cell", ["0x10", "true", "0X1F", "1_000"])
def test_what_only_looks_like_a_number_is_no_count(tmp_path, cell):
    path = tmp_path / "s.tsv"
    path.write_text(f"\tA\tB\n10x13\t3\t{cell}\n2x1\t1\t{cell}\n")
    with pytest.raises(ValueError, match=f"{cell}'.*"):
        read_counts(path)


def test_ids_have_at_most_nine_digits(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text(f"\tA\n{'9' * 400}x1\t1\n")
    with pytest.raises(ValueError, match=r"spot ids should look like '10x13', found 9+ \.\.\."):
        read_counts(path)
    assert round_ids(["٣x١"])[1] == ["٣x١"]


WRONG_NAMES = ["", " A", "A ", "NL\nX", "A\r", "A\0B", "\ufeffA", "A\x1bB", "x" * 201, "a\u2028b"]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_that_lines_and_files_cannot_be_made_of(name, tmp_path):
    with pytest.raises(ValueError, match=r"panel\.txt: genes with names that are empty, have blanks around them"):
        checked_names(["TP53", name], "genes", "panel.txt")
    with pytest.raises(ValueError, match="is not a plain name"):
        safe_name(name, "Slide")
    pd.DataFrame({"TP53": [1], name: [2]}, index=["1x1"]).to_parquet(tmp_path / "s.parquet")
    for read in (read_counts, gene_names):
        with pytest.raises(ValueError, match=r"s\.parquet: genes with names that are"):
            read(tmp_path / "s.parquet")
    if name not in ("", "A\0B"):
        np.save(tmp_path / "panel.npy", np.array(["TP53", name]))
        with pytest.raises(ValueError, match=r"panel\.npy: genes with names that are"):
            load_names(tmp_path / "panel.npy")


def test_names_that_are_odd_and_right():
    names = ["MT-CO1", "A.B", "HLA-DRB1*15:01", "名前", "x" * 200, "(E2-independent) E3", "a/b"]
    assert checked_names(names, "genes", "x") == names


def test_a_panel_lists_a_gene_once(tmp_path):
    np.save(tmp_path / "panel.npy", np.array(["A", "B", "A"]))
    with pytest.raises(ValueError, match=r"panel\.npy should hold distinct names, found more than once: A\."):
        load_names(tmp_path / "panel.npy")


@pytest.mark.parametrize("name", ["img", "coords", "barcode"])
def test_a_group_in_place_of_the_patches_of_a_sample(name, tmp_path):
    path = tmp_path / "S1.h5"
    parts = {
        "img": np.zeros((2, 8, 8, 3), np.uint8),
        "coords": np.zeros((2, 2), int),
        "barcode": np.array([b"A-1", b"C-1"]),
    }
    with h5py.File(path, "w") as file:
        file.create_group(name)
        for part in parts.keys() - {name}:
            file[part] = parts[part]
    sample = HestSample("S1", "P1", tmp_path / "S1.h5ad", path, None, None, (100, 100), "human")
    with pytest.raises(
        ValueError, match=r"S1\.h5 (cannot be read as a file of patches|holds img .*expected N patches)"
    ):
        HestPatches(sample, path)


@pytest.mark.parametrize("name", ["s.tsv", "s.csv"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, name):
    separator = "," if name == "s.csv" else "\t"
    (tmp_path / name).write_bytes(f"\ufeffA{separator}B\n1x1{separator}5{separator}0\n".encode())
    assert read_counts(tmp_path / name).var_names.tolist() == ["A", "B"] == gene_names(tmp_path / name)


@pytest.mark.parametrize("column", ["x", "pixel_y"])
def test_coordinates_beyond_any_array_and_image(tmp_path, column):
    row = {"x": "1", "y": "2", "pixel_x": "10", "pixel_y": "20"} | {column: "1e300"}
    for name, read in (("s.tsv", read_spots), ("p.tsv", read_positions)):
        (tmp_path / name).write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
        with pytest.raises(ValueError, match=f"{column} is beyond 1,000,000,000 in"):
            read(tmp_path / name)


def test_a_spot_without_a_barcode(tmp_path):
    header = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    (tmp_path / "p.csv").write_text(f"{header}\nAC-1,1,0,0,5,5\n,1,0,2,5,15\n")
    with pytest.raises(ValueError, match=r"p\.csv: spots with names that are empty"):
        read_positions(tmp_path / "p.csv")


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "s.tsv").write_text("x\ty\tpixel_x\tpixel_y\tX\n1\t2\t10\t20\t3\n")
    with pytest.raises(ValueError, match=r"s\.tsv cannot be read .*the column 'x' is there twice"):
        read_spots(tmp_path / "s.tsv")
