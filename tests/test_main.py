"""The command line of main.py: a flag is read by the mode it is given to, or refused."""

from __future__ import annotations

import re

import pytest

import main
from tests.command_line import call_main

RUN = ("--config_name", "demo/dml", "--device", "cpu")
SLIDE = ("--image", "slide.png", "--out", "slide.h5ad")


def refused(mode: str, *flags: object) -> str:
    left = call_main("--mode", mode, *flags)
    assert left.status == 2 and left.said.startswith("error: "), left.said
    return left.said.removeprefix("error: ")


def test_every_flag_has_its_modes():
    """A flag without an entry would be ignored by the modes that do not read it."""
    flags = {action.dest for action in main.build_parser()._actions} - {"help", "mode"}
    assert set(main.MODES_OF_FLAG) == flags
    assert {mode for modes in main.MODES_OF_FLAG.values() for mode in modes} == set(main.MODES)
    for flag, mode in main.INSTEAD:
        assert mode not in main.MODES_OF_FLAG[flag], (flag, mode)


@pytest.mark.parametrize("flag", main.MODES_OF_FLAG, ids="--{}".format)
def test_a_flag_that_a_mode_does_not_read_is_refused(flag):
    value = {
        **dict.fromkeys(
            ("pitch_px", "pitch_um", "mpp", "min_tissue", "lambda_cld", "cld_t", "checkpoint_seconds"), "7"
        ),
        **dict.fromkeys(("k", "epochs", "batch_size", "slides_per_batch", "fixed_epochs", "num_workers"), "7"),
        **dict.fromkeys(("seed", "exp_id", "gpu", "fold", "folds", "seeds"), "7"),
        "protocol": "paper",
        "model_size": "large",
        "set": "LOSS.k=7",
    }.get(flag, "word")
    is_switch = next(action for action in main.build_parser()._actions if action.dest == flag).nargs == 0
    for mode in set(main.MODES) - set(main.MODES_OF_FLAG[flag]):
        message = refused(mode, f"--{flag}", *(() if is_switch else (value,)))
        assert message.startswith(f"--{flag} is for --mode {main.MODES_OF_FLAG[flag][0]}"), message


def test_all_unread_flags_are_named_at_once():
    message = refused("test", "--model_path", "nowhere", "--folds", "0,2", "--out", "x", "--genes", "ERBB2")
    assert message.splitlines() == [
        "--folds is for --mode train; --mode test takes --fold N or tests all folds.",
        "--out is for --mode predict, compare or import_reference; --mode test writes beside the checkpoint.",
        "--genes is for --mode predict.",
    ]
    message = refused("predict", "--model_path", "nowhere", *SLIDE, "--config_name", "her2st/dml", "--test_name", "a")
    assert "--mode predict finds the configuration in the checkpoint.\n--test_name is for" in message


def test_a_default_that_is_written_out_is_not_refused():
    left = call_main("--mode", "test", "--model_path", "nowhere", "--checkpoint_seconds", 60, "--device", "cpu")
    assert "--model_path nowhere does not exist" in left.said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--no_group_loss", "--lambda_cld", 0.5), "--no_group_loss leaves the loss out that --lambda_cld 0.5 weighs."),
        (
            ("--model_size", "large", "--encoder", "uni"),
            "--model_size large means --encoder uni2-h, but --encoder uni is given.",
        ),
        (("--seed", 1, "--seeds", "1,2"), "--seed and --seeds are both given; give one of them."),
    ],
)
def test_flags_that_contradict_each_other(flags, message, tmp_path):
    assert refused("train", *RUN, "--log_path", tmp_path / "logs", *flags).strip() == message
    assert not (tmp_path / "logs").exists()


def test_a_wrong_value_of_a_flag_is_not_blamed_on_another_flag():
    message = refused("train", *RUN, "--epochs", 0)
    assert re.match(r"command line: TRAINING\.epochs should be more than zero, found 0", message)
    assert "--set" not in message
