"""Writing: a disk that is full, a place that cannot be written, a name too long are one message, and found early."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from tests.command_line import Left, call_main
from tests.ended import ended
from utils.files import UnwritableFile, check_writable, write_atomically, write_text
from utils.locks import temporary_prefix

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

        def write(_temporary, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            write_atomically(tmp_path / "a.h5", write)
        assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_a_signal_just_after_the_temporary_file_was_made_leaves_nothing(tmp_path, monkeypatch):
    opened = os.open

    def open_and_interrupt(path, flags, *more, **named):
        descriptor = opened(path, flags, *more, **named)
        if flags & os.O_EXCL:
            assert len(os.listdir(tmp_path)) == 1
            os.close(descriptor)
            raise KeyboardInterrupt
        return descriptor

    monkeypatch.setattr(os, "open", open_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "text")
    assert os.listdir(tmp_path) == []


def test_what_can_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a" / "b" / "x.h5ad", Path("x.h5ad"), Path("a/x.h5ad")):
        check_writable(path, needed=1000)
    (tmp_path / "x.h5ad").touch()
    check_writable(Path("x.h5ad"))
    assert os.listdir(tmp_path) == ["x.h5ad"]


def test_a_kill_while_it_is_tried_leaves_nothing_that_stays(tmp_path):
    process = os.fork()
    if process == 0:
        opened = os.open

        def open_and_end(*given, **named):
            opened(*given, **named)
            os._exit(9)

        os.open = open_and_end
        check_writable(tmp_path / "x.h5ad")
        os._exit(1)  # no file was tried
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    (tmp_path / f"{temporary_prefix('check').replace(f'-{os.getpid():x}-', f'-{process:x}-')}abcdefgh").touch()
    check_writable(tmp_path / "x.h5ad")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "needed", "text"),
    [
        ("blocker/x.h5ad", 0, "blocker is a file and no folder"),
        ("blocker/a/b/x.h5ad", 0, "blocker is a file and no folder"),
        ("folder", 0, "it is a folder"),
        ("folder/" + "n" * 250, 0, "its name is too long for the file system"),
        ("n" * 300 + "/x.h5ad", 0, "its name is too long for the file system"),
        ("x.h5ad", 10**18, "there is no space left"),
        ("/proc/x.h5ad", 0, "cannot be written"),
    ],
)
@pytest.mark.parametrize("is_relative", [False, True])
def test_what_cannot_be_written_is_found_beforehand(path, needed, text, is_relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocker").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnwritableFile, match="cannot be written: ") as caught:
        check_writable(Path(path) if is_relative else tmp_path / path, needed)
    assert text in str(caught.value)


def predict(run, out, *more) -> Left:
    image = run.data_dir / "test" / "demo_external" / "ST-imgs/X/X1/X1.jpg"
    return call_main(
        "--mode", "predict", "--image", image, "--model_path", run.path, "--fold", 0, "--out", out, "--device", "cpu", *more
    )  # fmt: skip


def train(run, logs, *more) -> Left:
    return call_main(
        "--mode", "train", "--config_name", run.config_name, "--data_dir", run.data_dir, "--log_path", logs, "--fold", 0,
        "--device", "cpu", "--no_report", *more,
    )  # fmt: skip


def refused(left: Left, *texts: str) -> None:
    assert left.status == 2, left.said
    assert "Traceback" not in left.said and left.said.count("error:") == 1
    for text in texts:
        assert text in left.said, left.said


def test_no_mode_computes_what_it_cannot_write(tiny_run, tmp_path):
    (tmp_path / "blocker").touch()
    refused(
        predict(tiny_run, tmp_path / "blocker" / "x.h5ad"), "blocker/x.h5ad cannot be written: ", "blocker is a file"
    )
    refused(predict(tiny_run, "/proc/x.h5ad"), "/proc/x.h5ad cannot be written")
    refused(predict(tiny_run, tmp_path / f"{'n' * 250}.h5ad"), "its name is too long")
    refused(train(tiny_run, tmp_path / "blocker"), "config.yaml cannot be written: ", "blocker is a file")
    refused(train(tiny_run, tmp_path / "logs", "--run_name", "n" * 300), "--run_name", "is not a plain name")
    assert not (tmp_path / "logs").exists()
    left = call_main("--mode", "compare", "--runs", tiny_run.path, tiny_run.path, "--out", tmp_path / "blocker")
    refused(left, "comparison.html cannot be written: ", "blocker is a file")


def test_the_doctor_finds_it_too(tiny_run, tmp_path):
    (tmp_path / "blocker").touch()
    left = call_main(
        "--mode", "doctor", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir, "--log_path",
        tmp_path / "blocker", "--device", "cpu",
    )  # fmt: skip
    assert left.status == 2 and "cannot be written" in left.said


def test_a_file_that_is_there_is_replaced_only_on_request(tiny_run, tmp_path):
    out = tmp_path / "precious.h5ad"
    out.write_bytes(b"a table of counts")
    refused(
        predict(tiny_run, out, "--pitch_px", 64),
        f"--out {out} exists",
        "Give another name, or keep that file elsewhere",
    )
    assert out.read_bytes() == b"a table of counts"
    left = predict(tiny_run, out, "--pitch_px", 64, "--overwrite")
    assert left.status == 0 and anndata.read_h5ad(out).n_vars == 24, left.said


def test_a_full_disk_in_a_prediction_and_in_a_training(tiny_run, small_disk, tmp_path):
    """The prediction in a process that ends: HDF5 once crashed when it did."""
    (small_disk / "filler").write_bytes(bytes(MEBIBYTE - 200_000))

    def predict_and_end() -> int:
        left = predict(tiny_run, small_disk / "x.h5ad", "--pitch_px", 256)
        os.write(2, left.said.encode())
        return left.status

    predicted = Left(*ended(predict_and_end, tmp_path / "log"))
    refused(predicted, "cannot be written: there is no space left (")
    refused(train(tiny_run, small_disk / "logs"), "cannot be written: there is no space left (")


def test_a_read_only_disk_is_found_before_anything_is_computed(tiny_run, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(predict(tiny_run, small_disk / "x.h5ad"), "its file system is read-only")
    refused(train(tiny_run, small_disk / "logs"), "its file system is read-only")
