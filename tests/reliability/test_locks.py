"""Two processes at once: the second is refused with the owner's name; what the dead have left is taken over and removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from utils.files import write_text
from utils.locks import Owner, check_free, left_over, lock, sweep, temporary_prefix

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from utils.locks import lock, temporary_prefix
with lock(Path(sys.argv[1]), "it is made", "Wait."):
    print(temporary_prefix("A1"), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `tmp_path/.A1.lock`, and the beginning of the names of its temporary files."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".A1.lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def held(path: Path):
    return lock(path / ".A1.lock", "it is made", "Wait.")


def test_the_second_process_is_told_who_holds_the_lock(tmp_path, holder):
    process, _ = holder
    for attempt in (
        lambda: held(tmp_path).__enter__(),
        lambda: check_free(tmp_path / ".A1.lock", "it is made", "Wait."),
    ):
        with pytest.raises(ValueError, match=rf"^it is made by process {process.pid} on \S+\. Wait\.$"):
            attempt()
    process.stdin.close()
    process.wait()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    process, _ = holder
    process.kill()
    process.wait()
    assert (tmp_path / ".A1.lock").exists()
    with held(tmp_path):
        assert json.loads((tmp_path / ".A1.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has no locks."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_of_the_file_system_the_name_of_the_owner_counts(tmp_path, holder):
    process, _ = holder
    with (
        pytest.raises(ValueError, match=rf"by process {process.pid} on .* move .*\.A1\.lock away and repeat"),
        held(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with held(tmp_path):
        pass


@pytest.mark.usefixtures("without_locks")
def test_an_owner_on_another_machine_may_live(tmp_path):
    elsewhere = {**asdict(Owner.of_this_process()), "host": "node7", "place": "000000", "pid": 1}
    (tmp_path / ".A1.lock").write_text(json.dumps(elsewhere))
    with pytest.raises(ValueError, match=r"by process 1 on node7"), held(tmp_path):
        pass


def test_another_process_with_the_number_of_a_dead_one_is_not_it():
    owner = asdict(Owner.of_this_process())
    assert Owner(**owner).may_live()
    assert not Owner(**{**owner, "start": owner["start"] - 1}).may_live()


def test_left_over_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path, holder):
    process, prefix = holder
    ours, theirs = tmp_path / f"{temporary_prefix('A1')}abcd1234.h5", tmp_path / f"{prefix}abcd1234.h5"
    elsewhere, earlier = tmp_path / ".A1.000000-1-1.abcd1234.h5", tmp_path / ".A1.abcd1234.h5"
    kept = [tmp_path / name for name in ("A1.h5", ".hidden", ".A1.lock.h5")]
    for path in (ours, theirs, elsewhere, earlier, *kept):
        path.touch()
    assert left_over(tmp_path) == []
    process.kill()
    process.wait()
    assert left_over(tmp_path) == [theirs] and left_over(tmp_path, "B1") == []
    sweep(tmp_path)
    assert left_over(tmp_path) == []
    sweep(tmp_path, "A1", is_locked=True)
    assert sorted(tmp_path.iterdir()) == sorted([ours, *kept, tmp_path / ".A1.lock"])


def test_a_file_of_another_machine_is_left_over_a_day_after_its_last_write(tmp_path):
    path = tmp_path / ".A1.000000-1-1.abcd1234.h5"
    path.touch()
    assert left_over(tmp_path) == []
    os.utime(path, (0, path.stat().st_mtime - 25 * 3600))
    assert left_over(tmp_path) == [path]


def test_a_file_being_written_bears_its_process(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(path.name for path in tmp_path.iterdir()))
    write_text(tmp_path / "a.txt", "text")
    assert len(seen) == 1 and seen[0].startswith(temporary_prefix("a")) and seen[0].endswith(".txt")


def test_whoever_writes_into_a_folder_removes_what_the_dead_have_left_there(tmp_path, holder):
    process, prefix = holder
    ours, theirs = tmp_path / f"{temporary_prefix('b')}abcd1234.txt", tmp_path / f"{prefix}abcd1234.h5"
    for path in (ours, theirs):
        path.touch()
    write_text(tmp_path / "a.txt", "text")
    assert ours.exists() and theirs.exists()
    process.kill()
    process.wait()
    write_text(tmp_path / "a.txt", "text")
    assert ours.exists() and not theirs.exists()
