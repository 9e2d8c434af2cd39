"""Files: written whole or not at all, and read without trusting them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from utils.locks import sweep, temporary_prefix
from utils.text import LONGEST_NAME, brief, checked_names, ended, is_plain, shortened, some
from utils.untrusted.npy import strings_of_npy

IF_DAMAGED = "It may be damaged, or a file of another kind: compare it with where it came from."
_LOCKED = (
    "it is locked (in use by another process, or the file system has no locks)",
    "Wait until the other process has ended, or set HDF5_USE_FILE_LOCKING=FALSE.",
)
_NO_ACCESS = ("the permission is missing", "Change the permissions of the file or its folder, or choose another place.")
_NO_ROOM = ("there is no space left", "Make room, or choose another place.")
_NO_FOLDER = ("a part of its path is a file and no folder", "Check the path.")
_STORAGE = ("the disk, or the network behind it, gave an error", "Try again, then have the storage looked at.")
_TOO_MANY = ("too many files are open", "Raise the limit of open files (ulimit -n), or try again.")
# Errors of the system, which say nothing against the file itself: in words, and what to do.
_SYSTEM_ERRORS = {
    errno.EAGAIN: _LOCKED,
    errno.ENOLCK: _LOCKED,
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: ("its file system is read-only", "Choose another place."),
    errno.ENOSPC: _NO_ROOM,
    errno.EFBIG: _NO_ROOM,
    errno.EDQUOT: ("the quota of the disk is used up", "Make room, or choose another place."),
    errno.ENAMETOOLONG: ("its name is too long for the file system", "Choose a shorter name."),
    errno.EISDIR: ("it is a folder", "Give a file."),
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EIO: _STORAGE,
    errno.ESTALE: _STORAGE,
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
}
_FAILED_WRITE_OF_TORCH = re.compile("inline_container|PytorchStreamWriter|file write failed")
_NEARLY_FULL = 1 << 16  # bytes


class UnreadableFile(ValueError):
    """A file of the user that cannot be read; the message is complete."""


class UnwritableFile(OSError):
    """A file that cannot be written; the message is complete."""


@contextmanager
def reading(path: str | Path, what: str, remedy: str = IF_DAMAGED) -> Iterator[None]:
    """Turn whatever a library raises about a user's file into one error: the file, what it is read as, why, and a remedy.

    what: the noun, for "... cannot be read as a table of counts".
    remedy: what to do about a file that is damaged or of another kind. Which of the two, and whether it is so at all, is
        not known here: a remedy never says to overwrite or to delete the file.
    Errors of ours, which name the file, pass unchanged.
    Raises FileNotFoundError where there is no file, ValueError for everything else, also for what takes more memory than
    there is or is nested too deeply, and for locks, permissions and other errors of the system, each with its own remedy.
    """
    try:
        yield
    except Exception as error:
        if _is_complete(error, path):
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{error.filename or path} does not exist; expected {what}.") from error
        reason, advice = reason_of(error)
        raise UnreadableFile(f"{path} cannot be read as {what}: {ended(reason)} {advice or remedy}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failed write (full or read-only disk, permission, name too long) into one OSError with the path and the room.

    PyTorch's RuntimeError for a failed write is one, and so is any error of a library while the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = free_bytes(path)
        is_full = free is not None and free < _NEARLY_FULL
        if _is_complete(error, path) or not (is_full or _is_failed_write(error, Path(path))):
            raise
        reason, advice = _NO_ROOM if is_full else reason_of(error)
        room = "" if free is None else f" ({free:,} bytes are free there)"
        raise UnwritableFile(f"{path} cannot be written: {reason}{room}. {advice or ''}".rstrip()) from error


def _is_complete(error: Exception, path: str | Path) -> bool:
    """Whether an error is one of ours that names the file; libraries raise ValueErrors, too, and subclasses of it."""
    if isinstance(error, UnreadableFile | UnwritableFile):
        return True
    is_ours = type(error) is ValueError or (isinstance(error, FileNotFoundError) and error.errno is None)
    return is_ours and re.search(rf"(?<!\w){re.escape(str(path))}(?!\w)", str(error)) is not None


def _is_failed_write(error: OSError | RuntimeError, path: Path) -> bool:
    """Whether it was our file that could not be written, and not another that could not be read meanwhile."""
    if isinstance(error, OSError):
        where = path.absolute()
        return error.filename is None or Path(os.fsdecode(error.filename)).absolute().parent in (where, *where.parents)
    return _FAILED_WRITE_OF_TORCH.search(str(error)) is not None


def reason_of(error: BaseException) -> tuple[str, str | None]:
    """Return why something failed, in words on one line, and what to do about it where the cause tells it."""
    text = shortened(str(error).strip().partition("\n")[0]).rstrip(".") or type(error).__name__
    if isinstance(error, MemoryError):
        return f"it takes more memory than there is ({text})", None
    if isinstance(error, RecursionError):
        return "it is nested too deeply", None
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg}, line {error.lineno})", None
    if "unable to lock file" in text:  # with whatever number the file system gives
        return _LOCKED
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        return _SYSTEM_ERRORS[error.errno]
    is_sentence = isinstance(error, ValueError | OSError | RuntimeError)
    return text if is_sentence else f"{type(error).__name__}: {text}", None


def free_bytes(path: str | Path) -> int | None:
    """Return the free bytes of the file system on which `path` lies or would lie; None where it does not tell."""
    for folder in (Path(path), *Path(path).absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def check_writable(path: str | Path, needed: int = 0) -> None:
    """See that a file can be written, before anything is computed for it.

    needed: bytes that it will take.
    Nothing is left behind, also not by a kill: the file that is tried has no name where the file system can do that, and
    what a killed process left elsewhere goes now.
    Raises OSError as `write_atomically` would in the end: for a part of the path that is a file, for a folder in its place,
    for a permission, a read-only or full disk, a name too long.
    """
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        there = next(folder for folder in path.parents if os.path.lexists(folder))
        if not there.is_dir():
            raise UnwritableFile(f"{path} cannot be written: {there} is a file and no folder. Choose another place.")
        longest = max(len(os.fsencode(part)) for part in path.relative_to(there).parts)
        if longest + len(temporary_prefix("")) + 8 > os.pathconf(there, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, "")
        sweep(there, "check")
        with tempfile.TemporaryFile(dir=there, prefix=temporary_prefix("check")):
            pass
        free = free_bytes(there)
        if free is not None and free < needed:
            raise OSError(errno.ENOSPC, "")


def write_atomically(
    path: str | Path, write: Callable[[Path], object], when_whole: Callable[[], object] | None = None
) -> Path:
    """Publish a file only when it is complete.

    write: gets a temporary path in the same folder (same suffix) and writes the whole file there.
    when_whole: is called when the file is on the disk and about to appear; what it raises throws the file away.
    The file is flushed to the disk and renamed over `path`, so that a reader, also after a crash at any moment,
    sees the old file or the new one and never a part of it. What processes that have ended left half written in the folder
    is removed.
    Raises OSError with the path, the reason and the free bytes if it cannot be written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        # Its name is known before it is there, so that a signal in between leaves nothing behind.
        temporary = path.with_name(f"{temporary_prefix(path.stem)}{secrets.token_hex(4)}{path.suffix}")
        try:
            with writing(path):  # before the temporary file goes, with which the room comes back
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                write(temporary)
                flush(temporary)
            if when_whole is not None:
                when_whole()
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def flush(path: Path) -> None:
    """Wait until a file is on the disk; raises OSError where that has no room for it, which a write need not find."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def publish(temporary: Path, path: Path) -> None:
    """Give a file that is complete its name, with the rights of any other."""
    temporary.chmod(0o666 & ~_umask())
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used, so that another can take its place and nothing is lost; returns its new path."""
    names = (path.with_name(f"{path.stem}.damaged{number or ''}{path.suffix}") for number in count())
    return path.rename(next(name for name in names if not os.path.lexists(name)))


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


def load_names(path: str | Path) -> list[str]:
    """Read a `.npy` array of strings, one name an entry, in order.

    Published *object* arrays are pickles; they are read by following the pickle, which builds nothing but strings, so that a
    prepared file cannot run code or reach memory.
    Raises FileNotFoundError, or ValueError for anything else than a list of names.
    """
    path = require_file(path, "It holds one gene name an entry; make it with preprocess/select_genes.py.")
    with reading(path, "an array of names (.npy)"):
        names = strings_of_npy(path.read_bytes())
        if not names or not all(names):
            raise ValueError(f"{path} should hold names, found {'an empty one' if names else 'none'}.")
        if len(set(names)) < len(names):
            twice = [name for name, times in Counter(names).items() if times > 1]
            raise ValueError(f"{path} should hold distinct names, found more than once: {some(twice)}.")
        return checked_names(names, "genes", path)


def safe_name(name: str, what: str) -> str:
    """Return `name` if it can be one path component; names of slides and test sets may not leave the data folder."""
    name = str(name)
    is_long = len(name.encode(errors="replace")) > LONGEST_NAME
    if is_long or not is_plain(name) or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(
            f"{what} {brief(name)} is not a plain name: it must not be empty, start with a dot or contain a slash, a control "
            f"character or blanks around it, and have at most {LONGEST_NAME} letters."
        )
    return name
