"""How a cache lies on the disk: an HDF5 file under a seal that is verified before HDF5 sees the file.

The first 512 bytes, which HDF5 skips as its user block, say how long the file is, where its numbers lie, and the checksum of
everything else. The numbers themselves have one checksum a block (of a spot, or of a spot in one view) in the data set
`checksum`, so that whoever reads only some of them verifies those. Checksums are XXH3 of 64 bits: they find faults, not
forgery. HDF5 writes into memory only, and what it would leave out, the numbers, goes past it: a full disk is then an error
of Python and no crash of HDF5.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

CHECKSUM = "checksum"
_SEAL_BYTES = 512
_MAGIC = b"GENE-DML cache\n"
_PIECE = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class Seal:
    """length: of the file.  start, num_bytes: where its numbers lie.  rest: checksum of everything else but the seal."""

    length: int
    start: int
    num_bytes: int
    rest: str


class _Skeleton(io.RawIOBase):
    """A file in memory of which only the pieces that were written are held; the rest of it has no content yet."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.length = self._place = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.length}[whence]
        return self._place

    def write(self, data) -> int:
        content = bytes(data)
        self.pieces.append((self._place, content))
        self._place += len(content)
        self.length = max(self.length, self._place)
        return len(content)

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self._place))
        view[:count] = bytes(count)
        for place, content in self.pieces:
            first, last = max(place, self._place), min(place + len(content), self._place + count)
            if first < last:
                view[first - self._place : last - self._place] = content[first - place : last - place]
        self._place += count
        return count

    def truncate(self, size: int | None = None) -> int:
        self.length = self._place if size is None else size
        return self.length


@dataclass(frozen=True)
class Payload:
    """The numbers of a file.

    path: where it will be, for messages.  name, dtype: of their data set.  num_rows: in all.
    block_axes: there is one checksum for each index of so many leading axes.
    """

    path: Path
    name: str
    dtype: str
    num_rows: int
    block_axes: int


def write_sealed(
    path: Path, payload: Payload, describe: Callable[[h5py.File], None], blocks: Iterable[np.ndarray]
) -> None:
    """Write an HDF5 file, its numbers one after the other as their blocks come, and seal it.

    path: of a temporary file.  describe: writes everything else into an open file.
    blocks: arrays (b, ...) of consecutive rows; only one is held at a time.
    Raises ValueError for a number that is not finite, OSError if the disk cannot take it.
    """
    blocks = iter(blocks)
    first = next(blocks)
    shape = (payload.num_rows, *first.shape[1:])
    skeleton = _Skeleton()
    with h5py.File(skeleton, "w", userblock_size=_SEAL_BYTES) as file:
        describe(file)
        sums_start = _reserve(file, CHECKSUM, "uint64", shape[: payload.block_axes])
        start = _reserve(file, payload.name, payload.dtype, shape)
    num_bytes = math.prod(shape) * np.dtype(payload.dtype).itemsize
    with open(path, "rb+") as out:
        for place, content in skeleton.pieces:
            out.seek(place)
            out.write(content)
        out.seek(start)
        sums = [_write_block(out, payload, block, shape) for block in chain([first], blocks)]
        done = sum(map(len, sums))
        assert done == payload.num_rows, f"{done} of {payload.num_rows} rows for {path}"
        out.truncate(max(skeleton.length, start + num_bytes))
        out.seek(sums_start)
        out.write(np.concatenate(sums).tobytes())
    seal(path, start, num_bytes)


def _reserve(file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """The place in the file of a new data set that is not written yet."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape, dtype=dtype, dcpl=properties).id.get_offset()


def _write_block(out: BinaryIO, payload: Payload, block: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    assert block.shape[1:] == shape[1:], f"{payload.name} {block.shape} for {shape}"
    block = np.ascontiguousarray(block, payload.dtype)
    if not is_finite(block):
        raise ValueError(f"{payload.path} is not written: its {payload.name} would hold numbers that are not finite.")
    out.write(block.reshape(-1).view(np.uint8).data)
    return checksums_of(block, payload.block_axes)


def checksums_of(block: np.ndarray, block_axes: int) -> np.ndarray:
    """Checksum (uint64) of the bytes below each index of the first `block_axes` axes of a contiguous array."""
    rows = block.reshape(math.prod(block.shape[:block_axes]), math.prod(block.shape[block_axes:]))
    sums = np.fromiter((xxh3_64_intdigest(row.data) for row in rows), np.uint64, len(rows))
    return sums.reshape(block.shape[:block_axes])


def read_whole(path: str | Path, out: np.ndarray, place: int) -> None:
    """Fill a contiguous array with the bytes of a file from `place` on; other threads run meanwhile.

    Raises ValueError if the file ends before.
    """
    target, position = out.reshape(-1).view(np.uint8).data, 0
    with open(path, "rb", buffering=0) as file:
        file.seek(place)
        while position < len(target):
            count = file.readinto(target[position:])
            if not count:
                raise ValueError("it ends in the middle of its numbers")
            position += count


def is_finite(block: np.ndarray) -> bool:
    """Whether all numbers of a contiguous array are; integers are."""
    if block.dtype.kind != "f":
        return True
    exponent = {2: 0x7C00, 4: 0x7F80_0000}[block.itemsize]  # all ones in NaN and infinities, and in nothing else
    bits = block.reshape(-1).view(f"u{block.itemsize}")
    step = 1 << 17  # so that the masked copy stays in the cache
    return all((bits[start : start + step] & exponent).max() < exponent for start in range(0, len(bits), step))


def seal(path: Path, start: int, num_bytes: int) -> None:
    """Write the seal of a file whose numbers lie in `num_bytes` bytes from `start`; everything else is read."""
    with open(path, "rb+") as file:
        length = file.seek(0, io.SEEK_END)
        found = Seal(length, start, num_bytes, _rest(file, length, start, num_bytes))
        content = _MAGIC + json.dumps(asdict(found)).encode() + b"\n"
        file.seek(0)
        file.write(content.ljust(_SEAL_BYTES, b"\0"))


def read_seal(path: Path) -> Seal | None:
    """Return the seal of a file once everything but the numbers has been compared with it; None if it bears none.

    Raises ValueError, "is ..." without the name of the file, if the file is another than was sealed.
    """
    with open(path, "rb") as file:
        head = file.read(_SEAL_BYTES)
        if not head.startswith(_MAGIC):
            return None
        try:
            found = Seal(**json.loads(head[len(_MAGIC) :].rstrip(b"\0")))
            start, num_bytes = int(found.start), int(found.num_bytes)
        except (TypeError, ValueError) as error:
            raise ValueError("is damaged: its seal cannot be read") from error
        length = file.seek(0, io.SEEK_END)
        if length != found.length:
            changed = "truncated" if length < found.length else "longer than what was written"
            raise ValueError(f"is {changed}: it has {length:,} of {found.length:,} bytes")
        if found.rest != _rest(file, length, start, num_bytes):
            raise ValueError("is damaged: its attributes, spots or checksums are not what was written")
    return found


def _rest(file: BinaryIO, length: int, start: int, num_bytes: int) -> str:
    """Checksum of what lies before and behind the numbers, and of where they lie."""
    digest = xxh3_64(f"{length} {start} {num_bytes}".encode())
    for first, last in ((_SEAL_BYTES, start), (start + num_bytes, length)):
        file.seek(first)
        while first < last:
            piece = file.read(min(_PIECE, last - first))
            if not piece:
                break
            digest.update(piece)
            first += len(piece)
    return digest.hexdigest()
