"""Counts in every accepted format, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from datasets.tables.counts import gene_names, read_counts, round_ids
from utils.text import some

TABLE = pd.DataFrame(
    [[3, 0, 1], [0, 0, 0], [12, 7, 70_000]], index=["10x13", "2x4", "3x4"], columns=["GENE1", "MT-CO1", "A.B"]
)


def save(table: pd.DataFrame, path: Path) -> Path:
    if path.name.endswith(".parquet"):
        table.to_parquet(path)
    elif path.name.endswith(".h5ad"):
        data = anndata.AnnData(sparse.csr_matrix(table.to_numpy(dtype=np.float32)))
        data.obs_names, data.var_names = table.index.astype(str), table.columns
        data.write_h5ad(path)
    else:
        table.to_csv(path, sep="," if path.suffix == ".csv" else "\t")
    return path


@pytest.mark.parametrize("name", ["s_sub.parquet", "s.tsv.gz", "s.tsv", "s.csv", "s.h5ad"])
def test_every_format_gives_the_same_counts(tmp_path, name):
    counts = read_counts(save(TABLE, tmp_path / name))
    pd.testing.assert_frame_equal(counts.to_df(), TABLE, check_dtype=False, check_names=False)
    assert counts.X.dtype == np.int32 and sparse.issparse(counts.X) and counts.X.nnz == 5
    assert gene_names(tmp_path / name) == list(TABLE.columns)
    chosen = read_counts(tmp_path / name, genes=["A.B", "GENE1"])
    pd.testing.assert_frame_equal(chosen.to_df(), TABLE[["A.B", "GENE1"]], check_dtype=False, check_names=False)


def test_parquet_without_an_index_and_of_other_types(tmp_path):
    table = TABLE.astype({"GENE1": np.uint8, "MT-CO1": np.float64, "A.B": np.int64}).reset_index(names="spot")
    table.to_parquet(tmp_path / "s.parquet", index=False)
    pd.testing.assert_frame_equal(
        read_counts(tmp_path / "s.parquet").to_df(), TABLE, check_dtype=False, check_names=False
    )


def test_text_as_r_writes_it(tmp_path):
    """The header lacks the corner, names are quoted, lines end as on Windows."""
    lines = ['"GENE1"\t"B"', '"1x2"\t5\t0', '"2x2"\t1\t1', ""]
    (tmp_path / "s.tsv").write_bytes("\r\n".join(lines).encode())
    counts = read_counts(tmp_path / "s.tsv")
    assert counts.to_df().to_dict() == {"GENE1": {"1x2": 5, "2x2": 1}, "B": {"1x2": 0, "2x2": 1}}


def test_whole_numbers_written_as_decimals_are_counts(tmp_path):
    assert read_counts(save(TABLE.astype(float), tmp_path / "s.tsv")).X.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "count"), [("1e+05", 100_000), ("1e3", 1000), ("1.5e3", 1500), ("2E0", 2), ("5e-1", None), ("1e10", None)]
)
@pytest.mark.parametrize("name", ["s.tsv", "s.csv"])
def test_whole_numbers_in_scientific_notation_are_counts_as_r_writes_them(tmp_path, name, text, count):
    path = save(changed(1, "A.B", text), tmp_path / name)
    if count is None:
        with pytest.raises(ValueError, match=r"(no integers|above 2147483647) .*for gene A\.B\) in spots 2x4"):
            read_counts(path)
    else:
        expected = changed(1, "A.B", count).astype(int)
        pd.testing.assert_frame_equal(read_counts(path).to_df(), expected, check_dtype=False, check_names=False)


def test_large_tables_of_text_are_read_cell_by_cell(tmp_path):
    """More rows than are read at once, counts of one to nine digits, no end of line at the end of the file."""
    generator = np.random.default_rng(0)
    values = 10 ** generator.integers(0, 9, size=(150, 7)) - generator.integers(0, 2, size=(150, 7))
    table = pd.DataFrame(values, index=[f"{i}x7" for i in range(150)], columns=list("ABCDEFG"))
    path = save(table, tmp_path / "s.tsv")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    pd.testing.assert_frame_equal(read_counts(path).to_df(), table, check_dtype=False, check_names=False)
    table.iloc[149, 6] = 2_000_000_000  # ten digits
    assert read_counts(save(table, path)).to_df().iloc[149].tolist() == table.iloc[149].tolist()


def test_ids_are_rounded():
    assert round_ids(["10x13", "9.98x13.02", "-1x3"]) == (["10x13", "10x13", "-1x3"], [])
    assert round_ids(["AAAC-1", "3 x 4", "x", "1x2x3"])[1] == ["AAAC-1", "3 x 4", "x", "1x2x3"]


def test_some_names_a_few_and_counts_the_rest():
    assert some(["a", "b"]) == "a, b"
    assert some(list(range(9)), 2) == "0, 1, ... (9 in all)"


def changed(row: int, column: str, value: object) -> pd.DataFrame:
    table = TABLE.astype(object)
    table.loc[table.index[row], column] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(1, "A.B", -4), r"negative counts \(-4 for gene A\.B\) in spots 2x4"),
        (changed(2, "GENE1", 0.5), r"counts that are no integers \(0\.5 for gene GENE1\) in spots 3x4"),
        (changed(0, "GENE1", ""), r"missing counts \(NaN\) \(gene GENE1\) in spots 10x13"),
        (changed(0, "MT-CO1", "many"), r"non-numeric counts \('many' for gene MT-CO1\) in spots 10x13"),
        (changed(0, "MT-CO1", 2**40), r"counts above 2147483647 \(1\.09951e\+12 for gene MT-CO1\) in spots 10x13"),
        (changed(0, "MT-CO1", "inf"), r"counts above 2147483647 \(inf for gene MT-CO1\) in spots 10x13"),
        (TABLE.rename(index={"2x4": "10x13"}), "duplicated spots: 10x13"),
        (TABLE.rename(index={"2x4": "3.9x4", "3x4": "4x4"}), "duplicated spots: 4x4"),
        (TABLE.rename(columns={"A.B": "GENE1"}), "duplicated genes: GENE1"),
        (TABLE.set_axis(list("0123456789")[: TABLE.shape[1]], axis=1), "genes have no names but 0, 1, 2"),
        (TABLE.rename(index={"2x4": "AAAC-1"}), "spot ids should look like '10x13', found AAAC-1"),
    ],
)
@pytest.mark.parametrize("name", ["s.tsv", "s.tsv.gz", "s.csv"])
def test_wrong_counts_name_file_gene_and_spots(tmp_path, name, table, message):
    path = save(table, tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_counts(path)
    assert str(path) in str(caught.value) and "Expected raw counts, spots x genes" in str(caught.value)


@pytest.mark.parametrize("name", ["s.parquet", "s.h5ad"])
@pytest.mark.parametrize(
    ("value", "message"), [(-4, "negative counts"), (0.5, "no integers"), (np.nan, r"missing counts \(NaN\)")]
)
def test_wrong_counts_in_binary_formats(tmp_path, name, value, message):
    path = save(changed(1, "A.B", value).astype(float), tmp_path / name)
    with pytest.raises(ValueError, match=rf"{message} .*gene A\.B\) in spots 2x4"):
        read_counts(path)


def test_independent_problems_are_told_at_once(tmp_path):
    table = TABLE.rename(index={"2x4": "10x13"}).rename(columns={"A.B": "GENE1"})
    with pytest.raises(ValueError, match=r"duplicated spots: 10x13; duplicated genes: GENE1"):
        read_counts(save(table, tmp_path / "s.tsv"))
    values = changed(1, "A.B", -4)
    values.loc["3x4", "GENE1"] = 0.5
    with pytest.raises(
        ValueError, match=r"negative counts .* in spots 2x4; counts that are no integers .* in spots 3x4"
    ):
        read_counts(save(values, tmp_path / "t.tsv"))


def test_many_bad_spots_are_counted(tmp_path):
    table = pd.DataFrame({"G": [-1] * 30}, index=[f"{i}x1" for i in range(30)])
    with pytest.raises(ValueError, match=r"in spots 0x1, 1x1, 2x1, 3x1, 4x1, \.\.\. \(30 in all\)"):
        read_counts(save(table, tmp_path / "s.tsv"))


@pytest.mark.parametrize("name", ["s.parquet", "s.tsv", "s.h5ad"])
def test_genes_that_are_not_there_are_named(tmp_path, name):
    path = save(TABLE, tmp_path / name)
    with pytest.raises(ValueError, match="genes asked for but not there: NOT, NOT_EITHER"):
        read_counts(path, genes=["GENE1", "NOT_EITHER", "NOT"])


@pytest.mark.parametrize("name", ["s.parquet", "s.tsv.gz", "s.h5ad"])
def test_truncated_files_are_named(tmp_path, name):
    path = save(pd.concat([TABLE] * 1), tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read as a table of counts") as caught:
        read_counts(path)
    assert str(path) in str(caught.value)
    assert "take the original file again" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\tA\tB\n", "holds no spots"),
        ("spot\tA\tB\n1x1\t1\t2\t\n", "header names 3 columns, the first row has 4"),
        ("\tA\tB\n1x1\t1\n", "header names 3 columns, the first row has 2"),
        ("\tA\tB\n1x1\t1\t2\n2x1\t3\n", "cannot be read as a table of counts"),
        ("\tA\tB\n1x1\t1\t2\n2x1\t3\n3x1\t4\t5\t6\n", "cannot be read as a table of counts"),
        ("A,B\n1x1,1\n", "header names 1 columns, the first row has 1"),
    ],
)
def test_text_that_is_no_table(tmp_path, text, message):
    path = tmp_path / "s.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_counts(path)


def test_text_that_is_not_compressed_though_it_says_so(tmp_path):
    path = tmp_path / "s.tsv.gz"
    path.write_text("\tA\n1x1\t1\n")
    with pytest.raises(ValueError, match=r"s\.tsv\.gz cannot be read as a table"):
        read_counts(path)
    path.write_bytes(gzip.compress(b"\tA\n1x1\t1\n"))
    assert read_counts(path).shape == (1, 1)


def test_missing_file_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"s\.tsv does not exist\. It should hold the raw counts"):
        read_counts(tmp_path / "s.tsv")
