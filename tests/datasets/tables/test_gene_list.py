"""Panels that the user gives: read from every form, held against the counts."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.tables.gene_list import check_given_genes, given_genes, note_on_given_genes


def test_genes_come_from_a_file_or_written_out(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("\ufeffERBB2\r\n\n  ENSG00000091831 \n", encoding="utf-8")
    np.save(tmp_path / "genes.npy", np.array(["B", "A"]))
    assert given_genes(str(path)) == ["ERBB2", "ENSG00000091831"]
    assert given_genes(str(tmp_path / "genes.npy")) == ["B", "A"]
    assert given_genes("ERBB2, ESR1,") == ["ERBB2", "ESR1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A,B,A", "lists A more than once"),
        ("genes.tx", r"lists genes\.tx; there is no file of that name.*at least 2 genes"),
        (",", "lists no gene"),
        ("A," + "B" * 300, "longer than 200 letters"),
    ],
)
def test_lists_that_cannot_be_a_panel(text, message):
    with pytest.raises(ValueError, match=message):
        given_genes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [('ERBB2\n"ESR1"\n', "line 2: .*ESR1.* holds quotes"), ("ERBB2,ESR1\n", "line 1: 'ERBB2,ESR1' holds a comma")],
)
def test_a_file_with_other_than_one_name_a_line(tmp_path, text, message):
    (tmp_path / "genes.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"genes\.txt, {message}.*one name a line, without quotes"):
        given_genes(str(tmp_path / "genes.txt"))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_bytes(b"ERBB2\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"genes\.txt cannot be read as a list of genes"):
        given_genes(str(path))


def test_missing_genes_are_named_with_the_nearest():
    measured = {"A1": {"ERBB2", "ERBB3", "Esr1"}, "B1": {"ERBB2", "Esr1"}}
    check_given_genes(["Esr1", "ERBB2"], measured)
    with pytest.raises(ValueError) as error:
        check_given_genes(["ERBB", "ESR1", "ERBB3", "QQQQ", "ERBB2"], measured)
    assert "4 of 5 genes are not in the counts of every slide" in str(error.value)
    assert "ERBB is on no slide (near: ERBB2, ERBB3)" in str(error.value).replace("ERBB3, ERBB2", "ERBB2, ERBB3")
    assert "ESR1 is on no slide (near: Esr1" in str(error.value)
    assert "ERBB3 is not on B1" in str(error.value) and "QQQQ is on no slide\n" in str(error.value)


def test_symbols_where_the_counts_have_ensembl_ids():
    measured = {"A1": {"ENSMUSG00000045573.10", "ENSMUSG00000000001.4", "Esr1"}}
    with pytest.raises(
        ValueError, match=r"Penk is on no slide\nGenes are named by Ensembl ids there, such as ENSMUSG"
    ) as said:
        check_given_genes(["Penk", "Esr1"], measured)
    assert "--gene_map" in str(said.value) and "near" not in str(said.value)
    with pytest.raises(
        ValueError, match=r"is on no slide \(near: ENSMUSG00000045573\.10.*\)\nName genes as the counts do"
    ):
        check_given_genes(["ENSMUSG00000045573", "Esr1"], measured)


def test_the_note_warns_of_few_genes_only():
    assert "WARNING: values are relative to these 2 genes" in note_on_given_genes(["A", "B"], "A,B")
    assert "WARNING" not in note_on_given_genes([str(n) for n in range(60)], "x")
