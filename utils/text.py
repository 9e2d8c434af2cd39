"""Words of messages and pages: the unit of all numbers, lists of names, a stranger's values cut short; and YAML."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path

import yaml

# Of every target, prediction and error.
UNIT = "log10(1 + counts per 10 000 of the panel)"
_MOST_VALUES = 1_000_000  # of a YAML text
LONGEST_NAME = 200
NOT_PLAIN = f"empty, have blanks around them, hold control characters or are longer than {LONGEST_NAME} letters"
_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{6,}(\.\d+)?$")
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\ufeff\ud800-\udfff"
_PLAIN = re.compile(rf"[^\s{_CONTROL}](?:[^{_CONTROL}]*[^\s{_CONTROL}])?")
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 2, 80, 80, 40


def shortened(text: str, length: int = 200) -> str:
    """Return a text on one line of at most `length` characters."""
    text = " ".join(text[: 2 * length].split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def ended(text: str) -> str:
    """Return a text of someone else's as a sentence that has one mark at its end: a period, unless it brings another."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def located(path: str | Path) -> str:
    """Return a path that the user gave, and where it leads if it is relative, for a message that it is not there."""
    if Path(path).is_absolute():
        return f"'{path}'"
    return f"'{path}' ({Path(path).absolute()}; relative paths start at the current folder)"


def brief(value: object) -> str:
    """Return the `repr` of a value of someone else's, on one short line.

    What is nested is cut at its second level before it is written out, so that a few lines of YAML whose aliases multiply
    do not become a message of megabytes.
    """
    return shortened(_BRIEF.repr(value))


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few names and how many there are in all, for a message."""
    text = ", ".join(str(name) for name in list(names)[:shown])
    return text if len(names) <= shown else f"{text}, ... ({len(names)} in all)"


def checked_names(names: Sequence[object], what: str, source: str | Path) -> list[str]:
    """Return names (of genes, spots, slides) as they are, if files, lines and columns can be made of them.

    what: the noun, for "genes".  source: the file they are from.
    Raises ValueError with the first of those that are empty, begin or end with a blank, hold a line break, a byte order
    mark or another control character, or are longer than `LONGEST_NAME`.
    """
    plain = [str(name) for name in names]
    wrong = [brief(name) for name in plain if not is_plain(name)]
    if wrong:
        raise ValueError(f"{source}: {what} with names that are {NOT_PLAIN}: {some(wrong)}. Correct these names.")
    return plain


def is_plain(name: str) -> bool:
    """Whether a name is not empty, of sane length, and without control characters or blanks around it."""
    return len(name) <= LONGEST_NAME and _PLAIN.fullmatch(name) is not None


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """Say in a message that there is no such name, which one may be meant, and which there are."""
    close = difflib.get_close_matches(name, known, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {what} '{name}'.{suggestion} Known: {', '.join(known)}"


def capitalised(text: str) -> str:
    """Begin a sentence: its first letter large, the others as they are."""
    return text[0].upper() + text[1:]


def check_genes(wanted: Sequence[str], genes: Collection[str], of_what: str) -> None:
    """Raise ValueError for genes of --genes that are not there, with near ones. of_what: "the run predicts", say."""
    if absent := [gene for gene in wanted if gene not in genes]:
        if note := note_on_ids(absent, genes):
            raise ValueError(f"--genes {', '.join(absent)}: not among the {len(genes)} genes that {of_what}. {note}")
        close = sorted({name for gene in absent for name in difflib.get_close_matches(gene, genes, n=2)})
        shown = f"near: {', '.join(close)}" if close else some(list(genes))
        raise ValueError(f"--genes {', '.join(absent)}: not among the {len(genes)} genes that {of_what} ({shown}).")


def is_ensembl(name: str) -> bool:
    """Tell whether a name is an Ensembl id of a gene of any species, with or without its version."""
    return _ENSEMBL.match(name) is not None


def note_on_ids(absent: Sequence[str], known: Collection[str]) -> str:
    """Say that the genes there are go by Ensembl ids, where some that are not among them are no such ids; else "".

    Near names mean nothing then.
    """
    ids = [name for name in known if is_ensembl(name)]
    if 2 * len(ids) <= len(known) or all(map(is_ensembl, absent)):
        return ""
    return (
        f"Genes are named by Ensembl ids there, such as {ids[0]}: give the id of a gene. To have symbols, prepare the data set "
        "with --gene_map (a table of ids and symbols) and train on that."
    )


class _StrictLoader(yaml.SafeLoader):
    """Plain values only; a key that is written twice is an error and not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            line = node.start_mark.line + 1
            raise ValueError(f"key {brief(twice[0])} is written twice in what begins in line {line}")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> object:
    """Return the plain values (text, numbers, lists, dictionaries) that a YAML text describes; None of an empty one.

    Raises ValueError where it is not YAML, repeats a key, refers to itself, or has aliases that stand for more than a million
    values; RecursionError where it is nested too deeply. Callers name the file with `reading`.
    """
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"not valid YAML ({problem or shortened(str(error))}{where})") from error


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for, every alias counted as what it refers to; infinite if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # for whoever meets it before it is counted
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(node)]
