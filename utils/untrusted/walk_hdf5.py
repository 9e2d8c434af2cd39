"""Walk through HDF5 files, as a process of its own: HDF5 may crash on a damaged file, or read in a circle for ever.

Reads one path a line on standard input and answers one line of JSON each: null, or what is wrong with the file. It imports
h5py and nothing of this program, so that it starts quickly.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import struct
import sys
from collections.abc import Iterator

import h5py

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MEMORY = 4 << 30  # bytes of address space
_MOST_OBJECTS = 1_000_000
_MOST_EXPANSION = 1100  # deflate makes a kilobyte of zeros of one byte
_GIVEN_UP = 180  # seconds, more than anyone waits
_ROWS = 1 << 16  # strings read at a time


def problem_of(path: str) -> str | None:
    """Return what is wrong with the structure of an HDF5 file, or None; its numbers are not read.

    Everything that a later read will follow is followed here: objects, attributes, indices of chunks, and names.
    """
    try:
        size = _size_of(path)
        with h5py.File(path, "r", locking=False) as file:
            for name, item in _objects(file):
                for attribute in item.attrs:
                    item.attrs[attribute]
                if isinstance(item, h5py.Dataset):
                    _check_dataset(name, item, size)
    except OSError as error:
        # What the system says (permission, lock, disk) is found again, and told, by whoever opens the file.
        return None if error.errno else _sentence(error)
    except Exception as error:
        return _sentence(error)
    return None


def _size_of(path: str) -> int:
    """Bytes of the file, compared with what it says about itself."""
    with open(path, "rb") as file:
        head, place = file.read(1 << 16), 0
        size = file.seek(0, 2)
    while head[place : place + 8] != _SIGNATURE:
        place = place * 2 or 512
        if place >= len(head):
            raise ValueError("it is no HDF5 file")
    version = head[place + 8]
    if version not in (0, 1, 2, 3):
        raise ValueError(f"its superblock has the unknown version {version}")
    width = head[place + (13 if version < 2 else 9)]
    if width != 8:
        return size
    base = place + {0: 24, 1: 28, 2: 12, 3: 12}[version]
    start, _, end = struct.unpack("<QQQ", head[base : base + 24])
    if size not in (end, start + end):  # from the start of the file, or from that of HDF5's part of it
        changed = "it is truncated" if size < end else "bytes were inserted or appended"
        raise ValueError(f"{changed}: it has {size:,} bytes, {end:,} by its own account")
    return size


def _objects(group: h5py.Group) -> Iterator[tuple[str, h5py.HLObject]]:
    """Every object of a file once, with its name; only what lies in the file itself."""
    waiting, known = [("", group)], set()
    while waiting:
        name, item = waiting.pop()
        address = h5py.h5o.get_info(item.id).addr
        if address in known:
            continue
        known.add(address)
        if len(known) > _MOST_OBJECTS:
            raise ValueError(f"it holds more than {_MOST_OBJECTS:,} objects")
        yield name or "/", item
        if isinstance(item, h5py.Group):
            for key in item:
                link = item.get(key, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    raise ValueError(f"{name}/{key} is a link ({type(link).__name__}), and links are not followed")
                waiting.append((f"{name}/{key}", item[key]))


def _check_dataset(name: str, dataset: h5py.Dataset, size: int) -> None:
    """Compare the declared size of a data set with what the file can hold, before anyone reserves memory for it."""
    if dataset.shape is None:  # a null data space
        return
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"the numbers of {name} lie in other files, which are not read")
    declared = dataset.size * dataset.dtype.itemsize
    if dataset.chunks is not None:
        chunks = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks))
        stored = _bytes_of_chunks(name, dataset, size, chunks)
        limit = stored * (_MOST_EXPANSION if dataset.id.get_create_plist().get_nfilters() else 1)
        padded = chunks * math.prod(dataset.chunks) * dataset.dtype.itemsize
        if padded > limit:
            raise ValueError(f"{name} declares {declared:,} bytes, of which the file holds {stored:,}")
    elif dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS and declared:
        place = dataset.id.get_offset()
        if place is None or place + declared > size:
            raise ValueError(f"{name} declares {declared:,} bytes, more than the file holds")
    if h5py.check_string_dtype(dataset.dtype) is not None or dataset.dtype.kind == "O":
        _read_names(dataset)


def _bytes_of_chunks(name: str, dataset: h5py.Dataset, size: int, expected: int) -> int:
    found = stored = 0

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        nonlocal found, stored
        found, stored = found + 1, stored + chunk.size
        if chunk.byte_offset is None or chunk.byte_offset + chunk.size > size:
            raise ValueError(f"a chunk of {name} lies outside the file")

    dataset.id.chunk_iter(note)
    if found < expected:
        raise ValueError(f"{name} declares {expected:,} chunks, of which the file holds {found:,}")
    return min(stored, size)


def _read_names(dataset: h5py.Dataset) -> None:
    if not dataset.shape:
        dataset[()]
    elif dataset.size:
        step = max(1, _ROWS * dataset.shape[0] // dataset.size)
        for start in range(0, dataset.shape[0], step):
            dataset[start : start + step]


def _sentence(error: Exception) -> str:
    text = str(error).partition("\n")[0][:300] or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        signal.alarm(_GIVEN_UP)  # whoever asked may be gone
        sys.stdout.write(json.dumps(problem_of(json.loads(line))) + "\n")
        sys.stdout.flush()
        signal.alarm(0)


if __name__ == "__main__":
    main()
