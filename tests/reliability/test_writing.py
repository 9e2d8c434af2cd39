"""Writing: a disk that is full, a place that cannot be written, a name too long are one message, and found early."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from utils.files import UnwritableFile, write_atomically, write_text

MEBIBYTE = 1 << 20


WRITERS = {
    "text": lambda path: path.write_text("x" * 3 * MEBIBYTE),
    "torch": lambda path: torch.save({"a": torch.randn(MEBIBYTE)}, path),
    "parquet": lambda path: pd.DataFrame({"a": np.random.default_rng(0).random(MEBIBYTE)}).to_parquet(path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_error_with_the_path_and_the_room(kind, small_disk):
    with pytest.raises(
        UnwritableFile, match=r"a\.bin cannot be written: there is no space left \([\d,]+ bytes are free"
    ):
        write_atomically(small_disk / "a.bin", WRITERS[kind])
    assert os.listdir(small_disk) == []


def test_a_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UnwritableFile, match=r"run/a\.txt cannot be written: its file system is read-only"):
        write_text(small_disk / "run" / "a.txt", "x")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "blocker").touch()
    with pytest.raises(UnwritableFile, match=r"blocker/x\.txt cannot be written: a part of its path is a file"):
        write_text(tmp_path / "blocker" / "x.txt", "x")


def test_a_name_too_long(tmp_path):
    with pytest.raises(UnwritableFile, match="its name is too long for the file system"):
        write_text(tmp_path / ("n" * 300) / "x.txt", "x")


def test_an_error_while_writing_that_is_no_failed_write_stays_what_it_is(tmp_path):
    for error in (RuntimeError("CUDA error"), OSError(5, "Input/output error", "/elsewhere/slide.svs")):

        def write(temporary, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            write_atomically(tmp_path / "a.h5", write)
        assert caught.value is error
    assert os.listdir(tmp_path) == []
