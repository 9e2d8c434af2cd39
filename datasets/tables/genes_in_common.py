"""The genes that all slides list, and why there are too few: Ensembl ids beside symbols, or a slide that shares none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from utils.text import is_ensembl, some

WHERE = (
    "a table with both, for example a features.tsv.gz of any Space Ranger output, or an export of BioMart with the columns "
    "'Gene stable ID' and 'Gene name'"
)
IN_TABLES = (
    f"Give all slides one kind of names in their tables of counts, by {WHERE}; where ids share a symbol, add up their "
    "counts."
)
AGAIN = f"Prepare the set again with --gene_map FILE if its script takes that. Else: {IN_TABLES}"


def without_version(name: str) -> str:
    """Cut the version of an Ensembl id, ENSG00000141510.18 -> ENSG00000141510; other names stay as they are."""
    return name.rpartition(".")[0] if is_ensembl(name) and "." in name else name


def genes_in_common(
    measured: Mapping[str, Collection[str]], num_genes: int = 1, *, flag: str = "--num_genes", remedy: str = AGAIN
) -> list[str]:
    """List, sorted, the genes that every slide has.

    measured: {slide: names of the genes in its counts}.  num_genes: how many are needed.  flag: what asks for them.
    remedy: against Ensembl ids beside symbols, as far as the program at hand has one.
    Raises ValueError for fewer: with the slides that list ids and those that list symbols, else with the slide that shares
    none, else with how many there are.
    """
    shared = _shared([set(genes) for genes in measured.values()])
    if 1 <= num_genes <= len(shared):
        return sorted(shared)
    if len(shared) < max(num_genes, 1):
        check_one_kind(measured, remedy)
    if not shared:
        raise ValueError(_who_shares_none(measured))
    raise ValueError(
        f"A panel of {num_genes} genes was asked for, but the slides have {len(shared)} genes in common. Give {flag} between "
        f"1 and {len(shared)}."
    )


def check_one_kind(measured: Mapping[str, Collection[str]], remedy: str = AGAIN) -> None:
    """Raise ValueError, with the `remedy`, if some slides list Ensembl ids and others symbols. See `genes_in_common`."""
    with_ids = [slide for slide, genes in measured.items() if sum(map(is_ensembl, genes)) > len(genes) / 2]
    others = [slide for slide in measured if slide not in with_ids]
    if with_ids and others:
        an_id = next(gene for gene in measured[with_ids[0]] if is_ensembl(gene))
        a_symbol = next((gene for gene in measured[others[0]] if not is_ensembl(gene)), "none")
        raise ValueError(
            f"The genes of {some(with_ids)} have Ensembl ids ({an_id}), those of {some(others)} have symbols ({a_symbol}); "
            f"under two names a gene is not in common. {remedy}"
        )


def _shared(sets: Sequence[set[str]]) -> set[str]:
    return set.intersection(*sets) if sets else set()


def _who_shares_none(measured: Mapping[str, Collection[str]]) -> str:
    """Which slide has none of the genes of others: the one without which most are in common, else the first that ends it."""
    sets = {slide: set(genes) for slide, genes in measured.items()}
    times = Counter(gene for genes in sets.values() for gene in genes)
    nearly = {gene for gene, count in times.items() if count == len(sets) - 1}
    missing = {slide: len(nearly - genes) for slide, genes in sets.items()}
    slide = max(missing, key=lambda name: missing[name])
    others = [other for other in sets if other != slide]
    if len(sets) == 2 or not missing[slide]:
        names = list(sets)
        number = next(n for n in range(1, len(names)) if not _shared([sets[name] for name in names[: n + 1]]))
        slide, others = names[number], names[:number]
    shared = _shared([sets[other] for other in others])
    have = "have in common" if len(others) > 1 else "lists"
    return (
        f"No gene is on all {len(sets)} slides: {slide} ({some(sorted(sets[slide]), 3)}) has none of the {len(shared)} genes "
        f"that {some(others)} {have} ({some(sorted(shared), 3)}).{_what_differs(sets[slide], shared)} Name the genes of all "
        f"slides alike in their tables of counts, or leave {slide} out."
    )


def _what_differs(genes: set[str], shared: set[str]) -> str:
    kinds: list[tuple[Callable[[str], str], str]] = [
        (without_version, "the versions of their Ensembl ids (.1, .2, ...)"),
        (str.upper, "upper and lower case, as those of two species do"),
    ]
    for plain, what in kinds:
        if alike := {plain(gene) for gene in genes} & {plain(gene) for gene in shared}:
            return f" {len(alike)} of them differ only in {what}."
    return ""
