"""A gene panel that the user gives: names in a file, or written out, held against the genes that the slides have."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from utils.files import load_names, reading
from utils.text import brief, checked_names, note_on_ids, some
from utils.untrusted.text import text_of

_LEAST_GENES = 2
_FEW_GENES = 50
_KEY = "DATA.genes"
_CHARACTERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
_NO_NAME = re.compile(r"""[",;\t]|^'.*'$""")


def given_genes(text: str) -> list[str]:
    """Read the genes that DATA.genes names, in their order.

    text: a file with one name a line (or a `.npy` array of names), or the names themselves, with commas between them.
    Raises ValueError for fewer than two genes, of which each is a share of the others' sum, for a name that is there twice,
    and for a file that is no list of names.
    """
    if os.path.isfile(text):
        names = load_names(text) if text.endswith(".npy") else names_of_lines(Path(text))
        source = f"{_KEY} ({text})"
    else:
        names, source = [name.strip() for name in text.split(",") if name.strip()], _KEY
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{source} lists {some(twice)} more than once; give each gene once.")
    checked_names(names, "genes", source)
    if len(names) < _LEAST_GENES:
        hint = "" if os.path.isfile(text) else "; there is no file of that name"
        raise ValueError(
            f"{source} lists {some(names) if names else 'no gene'}{hint}. Expected at least {_LEAST_GENES} genes: expression "
            "is measured in counts per 10 000 of the panel, so one gene alone would be 10 000 everywhere."
        )
    return names


def names_of_lines(path: Path) -> list[str]:
    """Read genes from a text file, one a line; empty lines do not count.

    Raises ValueError naming the file and the first line with a quote, comma, semicolon or tab: several names, or one that a
    program for tables has quoted.
    """
    with reading(path, "a list of genes (one a line)"):
        lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text_of(path))]
    for number, line in enumerate(lines, start=1):
        if found := _NO_NAME.search(line):
            what = _CHARACTERS.get(found[0], "quotes")
            raise ValueError(
                f"{path}, line {number}: {brief(line)} holds {what}. Expected one name a line, without quotes or separators "
                "(a name that has them itself can be given in a .npy array of names)."
            )
    return [line for line in lines if line]


def check_given_genes(genes: Sequence[str], measured: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError for genes that are not in the counts of every slide, each with the nearest names there are.

    measured: {slide: names of the genes in its counts}.
    """
    union = set().union(*measured.values())
    known = sorted(union)
    note = note_on_ids([gene for gene in genes if gene not in union], known)
    problems = []
    for gene in genes:
        absent = [slide for slide, names in measured.items() if gene not in names]
        if len(absent) == len(measured):
            problems.append(f"{gene} is on no slide{'' if note else _near(gene, known)}")
        elif absent:
            problems.append(f"{gene} is not on {some(absent)}")
    if problems:
        raise ValueError(
            f"{_KEY}: {len(problems)} of {len(genes)} genes are not in the counts of every slide:\n  "
            + "\n  ".join(problems[:20])
            + (f"\n  ... ({len(problems)} in all)" if len(problems) > 20 else "")
            + f"\n{note or f'Name genes as the counts do, symbols or ids ({some(known, 3)}), or leave them out.'}"
        )


def checked_genes(text: str, measured: Mapping[str, Collection[str]]) -> list[str]:
    """Read the genes that DATA.genes names and check them; see `given_genes` and `check_given_genes`, for errors, too."""
    genes = given_genes(text)
    check_given_genes(genes, measured)
    return genes


def _near(gene: str, known: Sequence[str]) -> str:
    by_capitals: dict[str, list[str]] = {}
    for name in known:
        by_capitals.setdefault(name.upper(), []).append(name)
    close = difflib.get_close_matches(gene.upper(), by_capitals, n=3, cutoff=0.7)
    return f" (near: {', '.join(name for match in close for name in by_capitals[match])})" if close else ""


def note_on_given_genes(genes: Sequence[str], text: str) -> str:
    """Say in a report that the panel was given, and what that means for the unit."""
    source = f" ({text})" if os.path.isfile(text) else ""
    note = f"The panel of every fold was given by the user{source}: {some(genes)}."
    if len(genes) < _FEW_GENES:
        note += (
            f" WARNING: values are relative to these {len(genes)} genes alone (counts per 10 000 of the panel), so each also "
            "changes with the others; a longer list makes them steadier."
        )
    return note
