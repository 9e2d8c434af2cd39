"""Files of a source brought to their place: copied, linked or unpacked, never replacing what differs without leave.

Every file is written whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from anndata import AnnData

from datasets.images.plain_reader import open_picture
from datasets.images.slides import open_slide
from datasets.tables.counts import read_counts
from utils.files import reading, sha256, write_atomically, write_text
from utils.text import some
from utils.untrusted.text import open_unpacked, text_of

KEEP = "Keep it elsewhere and repeat, or prepare into another --data_dir."
_CELLS_AT_A_TIME = 1 << 27  # of a table of counts: half a gigabyte


def image_size(path: Path) -> tuple[int, int]:
    """Read (width, height) of an image, also of a plain one that is compressed as a whole; the pixels are not decoded."""
    if path.suffix != ".gz":
        with open_slide(path) as image:
            return image.size
    return plain_image_size(path)


def plain_image_size(path: Path) -> tuple[int, int]:
    """Read (width, height) of a plain image, compressed as a whole or not. ValueError naming the file if it is none."""
    with reading(path, "an image"), open_unpacked(path) as file, open_picture(path, file) as image:
        return image.size


def place_file(source: Path, target: Path, *, overwrite: bool, link: bool = False) -> str:
    """Copy a file, or link it unless it is compressed. Returns "copied", "linked" or "kept" (it is there already).

    Raises ValueError if the target is there, differs, and --overwrite is not given, or if the source is damaged; OSError if
    there is no room.
    """
    source = source.resolve(strict=True)
    if target.exists() or target.is_symlink():
        if target.exists() and same_content(source, target):
            return "kept"
        if not overwrite:
            raise ValueError(f"{target} is there already and differs from {source}. {KEEP}")
    if link and not is_packed(source, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.link")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(source)
        os.replace(temporary, target)
        return "linked"

    def copy(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            for piece in pieces(source, target):
                out.write(piece)

    write_atomically(target, copy)
    return "copied"


def is_packed(source: Path, target: Path) -> bool:
    """Tell whether the target is the source without its compression."""
    return source.suffix == ".gz" and target.suffix != ".gz"


def pieces(source: Path, target: Path) -> Iterator[bytes]:
    """Yield the bytes that belong into the target, some at a time. Raises ValueError if the source is damaged."""
    opened = gzip.open if is_packed(source, target) else open
    with reading(source, "a file to copy", remedy="Download it again."), opened(source, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def same_content(source: Path, target: Path) -> bool:
    """Tell whether the target holds what a copy would; lengths first, since images are large."""
    if is_packed(source, target):
        digest = hashlib.sha256()
        for piece in pieces(source, target):
            digest.update(piece)
        return digest.hexdigest() == sha256(target)
    if source.samefile(target):
        return True
    return source.stat().st_size == target.stat().st_size and sha256(source) == sha256(target)


def files_below(folder: Path) -> list[Path]:
    """List all files of a source, however it was unpacked, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def find_file(files: Sequence[Path], pattern: str, what: str) -> Path:
    """Find the one file whose name matches the regular expression; of a file and its compressed twin, the file.

    Raises FileNotFoundError if there is none, ValueError if there are several, also of one name in several folders.
    """
    found = find_optional(files, pattern, what)
    if found is None:
        raise FileNotFoundError(f"{what}: not found in the source.")
    return found


def without_twins(files: Sequence[Path]) -> list[Path]:
    """Leave out what lies unpacked beside itself; a packed file whose content is another one stays."""
    twins = {path: path.with_suffix("") for path in files if path.suffix == ".gz" and path.with_suffix("") in files}
    return [path for path in files if path not in twins or not same_content(path, twins[path])]


def find_optional(files: Sequence[Path], pattern: str, what: str) -> Path | None:
    """Find a file as `find_file` does; None if there is none. One and the same unpacked beside it are one."""
    found = without_twins([path for path in files if re.fullmatch(pattern, path.name)])
    if len(found) > 1:
        raise ValueError(
            f"{what}: {len(found)} files where one was expected: {some(found)}. Give as --source a folder with one of them."
        )
    return found[0] if found else None


def write_counts(path: Path, slide: AnnData, *, overwrite: bool) -> None:
    """Write counts as parquet, index = spot ids, one int32 column a gene, with checksums. Every gene of the source is
    kept, so that a panel can be computed from any patients.

    Raises ValueError if a file is there that holds other counts, and --overwrite is not given.
    """
    if path.exists() and not overwrite:
        if not same_counts(read_counts(path), slide):
            raise ValueError(f"{path} is there already and holds other counts. {KEEP}")
        return
    # Neither dictionaries nor statistics: with thousands of short columns they only cost time, here and at every reading.
    write_atomically(path, lambda temporary: _write_parquet(temporary, slide))


def _write_parquet(path: Path, slide: AnnData) -> None:
    """Rows in groups of at most `_CELLS_AT_A_TIME` counts: one group, but for the largest slides."""
    rows = max(1, _CELLS_AT_A_TIME // slide.n_vars)
    first = counts_table(slide, 0, rows)
    writer = pa.parquet.ParquetWriter(
        path,
        first.schema,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        writer.write_table(first, row_group_size=rows)
        del first
        for start in range(rows, slide.n_obs, rows):
            writer.write_table(counts_table(slide, start, start + rows), row_group_size=rows)


def same_counts(first: AnnData, second: AnnData) -> bool:
    """Tell whether two slides hold the same counts, in whatever order of spots and genes."""
    if set(first.obs_names) != set(second.obs_names) or set(first.var_names) != set(second.var_names):
        return False
    return (first[second.obs_names, second.var_names].X != second.X).nnz == 0


def counts_table(slide: AnnData, start: int, stop: int) -> pa.Table:
    """Lay out counts (X csr int32) of some rows as columns, with the ids as what pandas takes for the index.

    Made column by column from the matrix: by way of a pandas table it takes ten times as long, and the description of
    each of thousands of columns is read again at every opening.
    """
    assert slide.X.dtype == np.int32, "counts are checked"
    dense = slide.X[start:stop].toarray(order="F")
    columns = [pa.array(dense[:, gene]) for gene in range(slide.n_vars)]
    index = {"name": "spot", "field_name": "spot", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    description = {"index_columns": ["spot"], "column_indexes": [], "columns": [index]}
    table = pa.table([pa.array(slide.obs_names[start:stop].tolist()), *columns], names=["spot", *slide.var_names])
    return table.replace_schema_metadata({"pandas": json.dumps(description)})


def write_spots(path: Path, spots: pd.DataFrame, *, overwrite: bool) -> None:
    """Write the spot table, tab separated; ValueError if another one is there, and --overwrite is not given."""
    text = spots.to_csv(sep="\t", index=False)
    if path.exists() and not overwrite:
        with reading(path, "a table of spots"):
            is_same = text_of(path) == text
        if not is_same:
            raise ValueError(f"{path} is there already and differs. {KEEP}")
    write_text(path, text)
