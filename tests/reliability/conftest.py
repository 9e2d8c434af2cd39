"""What the tests of reliability share."""

from __future__ import annotations

import subprocess

import pytest

from tests.modes.conftest import tiny_run

__all__ = ["small_disk", "tiny_run"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; only root may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
