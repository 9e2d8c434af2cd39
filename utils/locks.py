"""Who works where: a lock keeps a second process out, and a temporary file bears the process that writes it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that has none
_HELD = (errno.EACCES, errno.EAGAIN)
_LEFT_OVER = re.compile(r"\.(?P<stem>.+?)(?:\.(?P<owner>[0-9a-f]{6}-[0-9a-f]+-[0-9a-f]+))?\.[a-z0-9_]{8}(?:\.\w+)?")
_POLL_SECONDS = 0.1
_ABANDONED_SECONDS = 24 * 3600.0  # since the last write of a process of another machine, which cannot be asked for


@dataclass(frozen=True)
class Owner:
    """A process. place: of its machine and the numbering of processes there. start: when it began, as the system counts."""

    host: str
    place: str
    pid: int
    start: int

    @classmethod
    def of_this_process(cls) -> Owner:
        host = socket.gethostname()
        pid = os.getpid()
        return cls(host, _place(host), pid, _start_of(pid) or 0)

    def may_live(self) -> bool:
        """Whether the process may still run; one of another machine may, one whose number another process has does not."""
        if self.place != _place(socket.gethostname()):
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # of another user
            return True
        found = _start_of(self.pid)
        return found is None or found == self.start


def _place(host: str) -> str:
    """Six digits; process numbers mean the same wherever they are equal."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return hashlib.sha256(f"{host} {numbering}".encode()).hexdigest()[:6]


def _start_of(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; 0 for one that has ended, None where the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if words[0] in "ZX" else int(words[19])


def temporary_prefix(stem: str) -> str:
    """Begin the name of a temporary file of this process, so that `sweep` knows whose it is."""
    owner = Owner.of_this_process()
    return f".{stem}.{owner.place}-{owner.pid:x}-{owner.start:x}."


def left_over(folder: str | Path, stem: str | None = None, *, is_locked: bool = False) -> list[Path]:
    """List the temporary files directly in a folder whose writer has ended, sorted.

    stem: only those of files of that stem.
    is_locked: this process holds the lock of whatever writes them, so those of other machines and those of earlier versions,
        which bear no process, are left over, too. Otherwise a file of another machine is one a day after its last write.
    """
    try:
        paths = sorted(Path(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in paths if _is_left_over(path, stem, is_locked)]


def _is_left_over(path: Path, stem: str | None, is_locked: bool) -> bool:
    found = _LEFT_OVER.fullmatch(path.name)
    if found is None or (stem is not None and found["stem"] != stem):
        return False
    if found["owner"] is None:
        return is_locked
    place, pid, start = found["owner"].split("-")
    owner = Owner("", place, int(pid, 16), int(start, 16))
    if not owner.may_live():
        return True
    if place == _place(socket.gethostname()):
        return False
    try:
        return is_locked or time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def sweep(folder: str | Path, stem: str | None = None, *, is_locked: bool = False) -> None:
    """Remove what `left_over` lists."""
    for path in left_over(folder, stem, is_locked=is_locked):
        path.unlink(missing_ok=True)


class Held(ValueError):
    """Another process holds a lock."""


@contextmanager
def lock(path: Path, what: str, advice: str, *, waits: bool = False) -> Iterator[None]:
    """Hold the lock that a file stands for; the file goes at the end. It is taken over from a process that has ended.

    what, advice: for "<what> by process 12 on HOST. <advice>"
    waits: until it is free, where it is held for moments only.
    Raises Held, a ValueError, with that message while another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = None
    while descriptor is None:
        try:
            descriptor = _acquired(path, what, advice)
        except Held:
            if not waits:
                raise
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(path: Path, what: str, advice: str) -> None:
    """Raise Held as `lock` would, before any work is done for it."""
    if path.exists():
        with lock(path, what, advice):
            pass


def _acquired(path: Path, what: str, advice: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(descriptor, path, what, advice)
            if _is_still_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(Owner.of_this_process())).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it meanwhile


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take(descriptor: int, path: Path, what: str, advice: str) -> None:
    """A record lock: the system frees it when the process ends, and a process that it forked does not keep it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except OSError as error:
        if error.errno not in (*_NO_LOCKS, *_HELD):
            raise
        is_held = error.errno in _HELD
    owner = _owner_in(descriptor)
    if not is_held and (owner is None or not owner.may_live()):
        return
    by = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
    remedy = (
        "" if is_held else f" The file system has no locks: if that process has ended, move {path} away and repeat."
    )
    raise Held(f"{what} by {by}. {advice}{remedy}")


def _owner_in(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):  # not written yet
        return None
