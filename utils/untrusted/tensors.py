"""PyTorch files: read by PyTorch's safe loader, with the checksums that PyTorch writes and does not read."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from utils.files import IF_DAMAGED, reading, reason_of, require_file, sha256

_BEGINNINGS = (b"PK", b"\x80")  # of a zip and, in the old format, of a pickle
_LARGE = 1 << 20  # bytes of a record
_PIECE = 1 << 20


def load_tensors(
    path: str | Path, *, what: str = "a PyTorch file", remedy: str = IF_DAMAGED, memory_map: bool = False
) -> object:
    """Read a `.pt` file with PyTorch's safe loader (tensors, numbers, strings, lists and dicts only) on the CPU.

    what, remedy: see `reading`.
    memory_map: leave the numbers of the tensors on disk until they are used (files in the old format are read anyway).
    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    path = require_file(path, "Check the path.")
    with reading(path, what, remedy), ThreadPoolExecutor(1) as beside:
        with open(path, "rb") as file:
            if not file.read(2).startswith(_BEGINNINGS):
                raise ValueError("it is no PyTorch file")
        checked = beside.submit(_check_records, path, with_large=not memory_map)
        try:
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=memory_map and zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError as error:
            checked.result()
            raise ValueError(
                f"{path} holds Python objects, not only tensors, and is not read: files from elsewhere are not trusted to "
                f"run code. Save a state dict alone: torch.save(model.state_dict(), ...). ({reason_of(error)[0]})"
            ) from error
        except Exception:
            checked.result()  # a damaged record is the better reason
            raise
        checked.result()
        _check_kinds(content)
        return content


def check_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare a PyTorch file with its checksums, also what was left on disk, and see that all its numbers are finite.

    tensors: those of the file that are used, by name.
    Raises ValueError naming the file.
    """
    with reading(path, "a PyTorch file"):
        _check_records(Path(path), with_large=True)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (is_finite := torch.isfinite(tensor)).all():
            count = int((~is_finite).sum())
            raise ValueError(f"{path}: {count} of the {tensor.numel():,} numbers of {name} are not finite.")


def digest_of(path: str | Path) -> str:
    """Compute a digest of what a PyTorch file holds, from the checksums of its records; in the old format, from all of it."""
    if not zipfile.is_zipfile(path):
        return sha256(Path(path))
    with reading(path, "a PyTorch file"), zipfile.ZipFile(path) as archive:
        records = [(record.filename.partition("/")[2], record.file_size, record.CRC) for record in archive.infolist()]
    return hashlib.sha256(repr(sorted(records)).encode()).hexdigest()


def _check_kinds(content: object) -> None:
    """Refuse tensors that are not plain arrays of numbers."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(f"a tensor of the layout {value.layout} is no plain array of numbers")
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def _check_records(path: Path, *, with_large: bool) -> None:
    """Compare the records of a PyTorch file with their CRC-32; files in the old format, which is no zip, have none.

    with_large: also those of large tensors; without them it takes a moment, whatever the file.
    Raises ValueError, without the name of the file, for a record that is damaged or compressed (PyTorch never does that), or
    zipfile.BadZipFile.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {record.filename} is compressed")
            if with_large or record.file_size < _LARGE:
                with archive.open(record) as file:  # compares the checksum at the end
                    while file.read(_PIECE):
                        pass
