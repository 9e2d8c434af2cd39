"""The genes that all slides list, and what is said where there are too few of them."""

from __future__ import annotations

import pytest

from datasets.tables.genes_in_common import check_one_kind, genes_in_common, without_version

SYMBOLS = ["ACTB", "ERBB2", "KRT19", "TP53"]
IDS = [f"ENSG{i:011d}" for i in range(4)]


def test_genes_of_every_slide_are_listed_in_order():
    measured = {"A1": ["TP53", "ERBB2", "KRT19"], "B1": ["ERBB2", "ACTB", "TP53"]}
    assert genes_in_common(measured, 2) == ["ERBB2", "TP53"] == genes_in_common(measured)
    assert genes_in_common({"A1": ["B", "A"]}, 2) == ["A", "B"]


@pytest.mark.parametrize("num_genes", [-1, 0, 3])
def test_a_panel_that_there_are_not_the_genes_for(num_genes):
    measured = {"A1": ["A", "B", "C"], "B1": ["B", "A"]}
    with pytest.raises(
        ValueError, match=rf"^A panel of {num_genes} genes .* have 2 genes in common\. Give --num_genes between"
    ):
        genes_in_common(measured, num_genes)
    with pytest.raises(ValueError, match="Give --set X=N, N between 1 and 2"):
        genes_in_common(measured, num_genes, flag="--set X=N, N")


@pytest.mark.parametrize("also", [[], ["ERBB2"]], ids=["none in common", "too few in common"])
def test_ids_beside_symbols_are_told_with_the_slides_and_the_remedy(also):
    measured = {"A1": [*IDS, *also], "B1": SYMBOLS, "B2": [*SYMBOLS, IDS[0]]}
    said = r"The genes of A1 have Ensembl ids \(ENSG00000000000\), those of B1, B2 have symbols \(ACTB\)"
    with pytest.raises(ValueError, match=said + ".* Give --gene_map FILE\\.$"):
        genes_in_common(measured, 2, remedy="Give --gene_map FILE.")
    with pytest.raises(ValueError, match=said + ".* with --gene_map FILE if its script takes that.*features.tsv.gz"):
        genes_in_common(measured, 2)
    with pytest.raises(ValueError, match=said):
        check_one_kind(measured)
    check_one_kind({"A1": IDS, "B1": [f"{gene}.4" for gene in IDS]})
    check_one_kind({"B1": SYMBOLS, "B2": [*SYMBOLS, IDS[0]]})


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"A1": SYMBOLS, "A2": SYMBOLS[1:], "B1": ["x", "y"], "B2": SYMBOLS},
         r"No gene is on all 4 slides: B1 \(x, y\) has none of the 3 genes that A1, A2, B2 have in common \(ERBB2, .*leave B1"),
        ({"A1": ["x", "y"], "B1": SYMBOLS, "C1": SYMBOLS}, r"A1 \(x, y\) has none of the 4 genes that B1, C1 have in common"),
        ({"A1": SYMBOLS, "B1": ["x"]}, r"B1 \(x\) has none of the 4 genes that A1 lists"),
        ({"A1": ["a", "b"], "B1": ["b", "c"], "C1": ["c", "d"], "D1": ["d", "a"]},
         r"C1 \(c, d\) has none of the 1 genes that A1, B1 have in common \(b\)"),
        ({"A1": SYMBOLS, "B1": ["Actb", "Tp53", "Xist"]}, "2 of them differ only in upper and lower case, as those of two"),
        ({"A1": IDS, "B1": [f"{gene}.18" for gene in IDS]}, "4 of them differ only in the versions of their Ensembl ids"),
    ],
)  # fmt: skip
def test_the_slide_that_shares_none_is_named(measured, said):
    with pytest.raises(ValueError, match=said):
        genes_in_common(measured, 2)


def test_versions_are_cut_from_ids_alone():
    assert [without_version(name) for name in ("ENSG00000141510.18", "ENSG00000141510", "AC011.2")] == [
        "ENSG00000141510", "ENSG00000141510", "AC011.2",
    ]  # fmt: skip
