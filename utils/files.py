"""Files: written whole or not at all, and read without trusting them."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Publish a file only when it is complete.

    write: gets a temporary path in the same folder (same suffix) and writes the whole file there.
    The file is flushed to the disk and renamed over `path`, so that a reader, also after a crash at any moment,
    sees the old file or the new one and never a part of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def require_file(path: str | Path, hint: str) -> Path:
    """Return `path` if it is a file; otherwise raise FileNotFoundError with `hint`, the next thing to do."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {hint}")
    return path


def load_tensors(path: str | Path, *, memory_map: bool = False) -> object:
    """Read a `.pt` file with PyTorch's safe loader (tensors, numbers, strings, lists and dicts only) on the CPU.

    memory_map: leave the numbers of the tensors on disk until they are used (files in the old format are read anyway).
    """
    path = require_file(path, "Check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=memory_map and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects other than tensors, numbers, strings, lists and dicts, and files from elsewhere "
            f"are not trusted to run code. Save a plain state dict instead. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable PyTorch file (truncated?): {str(error).splitlines()[0]}") from error


class _StringArrayUnpickler(pickle.Unpickler):
    """Admits what a pickled NumPy array of strings is made of, and nothing else."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("ndarray", "dtype", "_reconstruct", "scalar", "str_")
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def load_names(path: str | Path) -> list[str]:
    """Read a `.npy` array of strings, one name an entry, in order.

    Plain fixed-width arrays are read without pickle. A published *object* array goes through an unpickler that admits
    only NumPy arrays of strings, so that a prepared file cannot run code.
    """
    path = require_file(path, "It holds one gene name an entry; make it with preprocess/select_genes.py.")
    content = path.read_bytes()
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError:
        array = _load_object_array(path, content)
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    names = np.asarray(array).ravel().tolist()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path} should hold names (non-empty strings), found an array of {array.dtype}.")
    return names


def _load_object_array(path: Path, content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        reader(file)
        array = _StringArrayUnpickler(file).load()
    except (ValueError, pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not an array of names that is safe to read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} should hold an array of names, found {type(array).__name__}.")
    return array


def safe_name(name: str, what: str) -> str:
    """Return `name` if it can be one path component; names of slides and test sets may not leave the data folder."""
    name = str(name)
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise ValueError(
            f"{what} {name!r} is not a plain name: it must not be empty, start with a dot or contain a slash."
        )
    return name
