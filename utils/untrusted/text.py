"""Tables of text from elsewhere, compressed or not, read with bounds: a file of a few megabytes may unpack to gigabytes."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, cast

import pandas as pd

MOST_BYTES = 1 << 29  # of a table when it is unpacked
LONGEST_LINE = 1 << 24
_GZIP = b"\x1f\x8b"
_CONTROL = bytes(code for code in range(32) if code not in b"\t\n\r")
_MARK = b"\xef\xbb\xbf"  # that some programs put before UTF-8


def open_unpacked(path: Path) -> IO[bytes]:
    """Open a file for reading, without its compression if its name or its first bytes say that it has one."""
    with open(path, "rb") as file:
        is_packed = path.suffix == ".gz" or file.read(2) == _GZIP
    return cast(IO[bytes], gzip.open(path, "rb")) if is_packed else open(path, "rb")


def unpacked_bytes(path: Path) -> bytes:
    """Read a whole file, without its compression and without a byte order mark.

    Raises ValueError if it holds more than `MOST_BYTES`; whatever gzip raises. To be called inside `reading`.
    """
    with open_unpacked(path) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it holds more than {MOST_BYTES:,} bytes, which is no table of one slide")
    if content.find(b"\n", 0, LONGEST_LINE) < 0 and len(content) > LONGEST_LINE:
        raise ValueError(f"its first line is longer than {LONGEST_LINE:,} characters")
    return content.removeprefix(_MARK)


def text_bytes(path: Path) -> bytes:
    """Read a file of text, as `unpacked_bytes` does. Raises ValueError if it holds a NUL or another control character."""
    content = unpacked_bytes(path)
    if len(content.translate(None, _CONTROL)) < len(content):
        place = next(i for i, byte in enumerate(content) if byte in _CONTROL)
        raise ValueError(f"line {content.count(10, 0, place) + 1} holds the control character {content[place]:#04x}")
    return content


def first_lines(path: Path, count: int) -> list[bytes]:
    """Read the first lines of a file without the rest, as `unpacked_bytes` does; empty where there are fewer."""
    with open_unpacked(path) as file:
        lines = [file.readline(LONGEST_LINE + 1) for _ in range(count)]
    if any(len(line) > LONGEST_LINE for line in lines):
        raise ValueError(f"one of its first lines is longer than {LONGEST_LINE:,} characters")
    return [line.removeprefix(_MARK) if number == 0 else line for number, line in enumerate(lines)]


def text_of(path: Path) -> str:
    """Read a file of UTF-8 text, as `text_bytes` does. Raises ValueError if it is none."""
    return text_bytes(path).decode("utf-8")


def cells_of(text: str, separator: str | None = None, *, has_header: bool = True) -> pd.DataFrame:
    """Take a table of text apart: every cell as text, "" where a row has fewer.

    separator: None = tab where the first line has one, else comma.  has_header: whether the first line names the columns.
    Raises ValueError (of pandas, too) where it is no table, a column is named twice, or rows alone end with the separator.
    """
    first = text.partition("\n")[0]
    separator = separator or ("\t" if "\t" in first else ",")
    header = [cell.strip().strip('"').lower() for cell in first.rstrip("\r").split(separator)]
    if has_header and (twice := sorted({name for name in header if name and header.count(name) > 1})):
        raise ValueError(f"the column {twice[0]!r} is there twice")
    header_row = 0 if has_header else None
    table = pd.read_csv(io.StringIO(text), sep=separator, header=header_row, dtype=str, keep_default_na=False)
    has_more_cells = not isinstance(table.index, pd.RangeIndex)  # R leaves out the name of the first column
    if has_more_cells and (table.index.nlevels > 1 or table.isna().to_numpy().any()):
        raise ValueError(f"rows of it have other numbers of cells than its first line, {len(header)}")
    # As if the first column were one of names, which it may be.
    if has_more_cells and header[-1] and (table.iloc[:, -1].str.strip() == "").all():
        raise ValueError(
            f"its rows end with {separator!r} and its first line does not: add it there, at the end; or at the beginning, if "
            "the first column holds names of rows"
        )
    return table.fillna("")
