"""Words of messages: one mark at the end of a sentence, where a path leads, genes by another name."""

from __future__ import annotations

import pytest

from utils.text import check_genes, ended, is_ensembl, located


def test_a_sentence_ends_with_one_mark():
    assert [ended(text) for text in ("a", "a.", "is it?", "no!")] == ["a.", "a.", "is it?", "no!"]


def test_a_relative_path_says_where_it_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("a/b") == f"'a/b' ({tmp_path}/a/b; relative paths start at the current folder)"
    assert located(tmp_path / "a") == f"'{tmp_path}/a'"


def test_genes_that_are_not_there_are_named_with_near_ones():
    check_genes(["TP53"], ["TP53", "CD3E"], "the run predicts")
    with pytest.raises(
        ValueError, match=r"--genes TP54: not among the 2 genes that the run predicts \(near: TP53\)\.$"
    ):
        check_genes(["TP54"], ["TP53", "CD3E"], "the run predicts")


def test_symbols_where_genes_go_by_ensembl_ids():
    ids = ["ENSMUSG00000045573.10", "ENSMUSG00000000001.4", "ENSMUSG00000000028.15"]
    with pytest.raises(ValueError) as caught:
        check_genes(["Penk", ids[0]], ids, "the run predicts")
    assert str(caught.value) == (
        "--genes Penk: not among the 3 genes that the run predicts. Genes are named by Ensembl ids there, such as "
        "ENSMUSG00000045573.10: give the id of a gene. To have symbols, prepare the data set with --gene_map (a table of ids "
        "and symbols) and train on that."
    )
    with pytest.raises(ValueError, match=r"\(near: .*ENSMUSG00000045573\.10\)"):
        check_genes(["ENSMUSG00000045573"], ids, "the run predicts")
    with pytest.raises(ValueError, match=r"near: TP53"):
        check_genes(["TP5"], ["TP53", "CD3E", ids[0]], "the run predicts")


def test_ensembl_ids():
    assert all(map(is_ensembl, ["ENSG00000141510", "ENSG00000141510.18", "ENSMUSG00000045573"]))
    assert not any(map(is_ensembl, ["TP53", "ENST00000269305", "ENSG1"]))
