"""The first and the last moments of a run: a start that was killed starts again, a signal ends in order."""

from __future__ import annotations

import json
import os
import signal

import pytest

import main
from utils.cli import going_on_by, run, undisturbed
from utils.config import load_config
from utils.locks import temporary_prefix
from utils.runs import check_run, note_versions, open_run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_ends_in_order_and_says_how_to_go_on(number, status, capsys):
    kept = []

    def work():
        with going_on_by("repeat it with --resume"):
            try:
                os.kill(os.getpid(), number)
                pytest.fail("the signal was ignored")
            finally:
                kept.append("best weights")

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        run(work)
    assert caught.value.code == status and kept == ["best weights"]
    assert "interrupted: finished work is kept; repeat it with --resume." in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_is_repeated_does_not_disturb_the_saving(number):
    kept = []

    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            with undisturbed():
                os.kill(os.getpid(), number)
                kept.append("best weights")
            with pytest.raises(KeyboardInterrupt):  # after it, signals are heard again
                os.kill(os.getpid(), number)
            raise

    with pytest.raises(SystemExit) as caught:
        run(work)
    assert caught.value.code == 128 + number and kept == ["best weights"]


def test_ctrl_c_ends_even_the_saving():
    with pytest.raises(KeyboardInterrupt), undisturbed():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("left", ["", "versions.json", "hidden"])
def test_a_folder_in_which_nothing_was_begun_is_started(tmp_path, resume, left):
    config, folder = load_config("demo/dml"), tmp_path / "run"
    folder.mkdir()
    if left:
        name = f"{temporary_prefix('config')}abcd1234.yaml" if left == "hidden" else left
        (folder / name).write_text("[]")
    check_run(folder, config, resume)
    assert open_run(folder, config, resume)
    assert len(json.loads((folder / "versions.json").read_text())) == 1 and (folder / "config.yaml").is_file()


def test_a_continuation_notes_what_is_other_than_at_the_start(tmp_path):
    first = {"torch": "0.1", "commit": "unknown"}
    (tmp_path / "versions.json").write_text(json.dumps(first))  # of an earlier version
    note_versions(tmp_path)
    before, after = json.loads((tmp_path / "versions.json").read_text())
    assert before == first and after["torch"] != "0.1" and "started" in after


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_checkpoint_seconds_are_a_time(seconds):
    words = ["--mode", "train", "--config_name", "demo/dml", "--device", "cpu", f"--checkpoint_seconds={seconds}"]
    with pytest.raises(ValueError, match=r"--checkpoint_seconds .* is no time"):
        main.main(words)
