"""Exit statuses, and a device that is never chosen silently."""

from __future__ import annotations

import contextlib
import io
import os

import pytest
import torch

from utils.cli import going_on_by, run
from utils.devices import device_from


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("bad k"), 2, "error: bad k"),
        (FileNotFoundError("no file"), 2, "error: no file"),
        (KeyboardInterrupt(), 130, "interrupted: finished work is kept; run the same command again."),
        (RuntimeError("ours"), 1, "Traceback"),
    ],
)
def test_exit_status_says_whose_fault_it_is(error, status, text, capsys):
    with pytest.raises(SystemExit) as caught:
        run(failing(error))
    assert caught.value.code == status
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (KeyboardInterrupt, 130, "interrupted: finished work is kept; repeat it with --resume."),
        (
            BrokenPipeError,
            1,
            "stopped, for whoever read the output has gone: finished work is kept; repeat it with --resume.",
        ),
    ],
)
def test_an_end_from_outside_says_how_to_go_on(end, status, said):
    def main():
        with going_on_by("repeat it with --resume"):
            raise end

    text = io.StringIO()
    with (
        open(os.devnull, "w") as nobody,
        contextlib.redirect_stdout(nobody),
        contextlib.redirect_stderr(text),
        pytest.raises(SystemExit) as left,
    ):
        run(main)
    assert left.value.code == status and text.getvalue().strip() == said


def test_success_is_zero():
    with pytest.raises(SystemExit) as caught:
        run(lambda: None)
    assert caught.value.code == 0


def test_devices(capsys):
    assert device_from(device="cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="give one of them"):
        device_from(0, "cpu")
    with pytest.raises(ValueError, match="not a device of PyTorch"):
        device_from(device="gpu7")
    for device in ("meta", "xpu"):
        with pytest.raises(ValueError, match=f"--device {device} cannot compute on this machine"):
            device_from(device=device)
    with pytest.raises(ValueError, match=r"--gpu 99: this machine has \d+ CUDA devices?\. Leave the flag out"):
        device_from(99)
    if not torch.cuda.is_available():
        assert device_from() == torch.device("cpu")
        assert "running on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "device", "expected", "made_current"),
    [
        (1, None, "cuda:1", [1]),
        (None, "cuda:1", "cuda:1", [1]),
        (None, "cuda", "cuda:0", []),
        (None, None, "cuda:0", []),
    ],
)
def test_a_cuda_device_has_its_index_and_is_the_current_one(gpu, device, expected, made_current, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device_from(gpu, device) == torch.device(expected)
    assert chosen == made_current
