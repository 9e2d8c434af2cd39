"""The command line of main.py: a flag is read by the mode it is given to, or refused; a mode is one call away."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

import main
from tests.command_line import call_main
from utils.config import KEYS

ROOT = Path(__file__).resolve().parents[1]
RUN = ("--config_name", "demo/dml", "--device", "cpu")
SLIDE = ("--image", "slide.png", "--out", "slide.h5ad")
FLAGS = {flag.name: flag for flag in main.COMMAND_LINE.flags}


def refused(mode: str, *flags: object) -> str:
    left = call_main("--mode", mode, *flags)
    assert left.status == 2 and left.said.startswith("error: "), left.said
    return left.said.removeprefix("error: ")


def test_every_flag_has_its_modes():
    """A flag without a mode would be ignored by all, a hint for a mode that reads the flag would never be seen."""
    assert len(FLAGS) == len(list(main.COMMAND_LINE.flags)), "a name is in the table twice"
    for flag in FLAGS.values():
        assert flag.modes and set(flag.modes) <= set(main.MODES), flag.name
        assert set(flag.needed_by) <= set(flag.modes), flag.name
        assert set(flag.instead) <= set(main.MODES) - set(flag.modes), flag.name
        assert flag.key is None or flag.key.partition("=")[0] in KEYS, flag.name
    assert {mode for flag in FLAGS.values() for mode in flag.modes} == set(main.MODES)


@pytest.mark.parametrize("flag", FLAGS, ids="--{}".format)
def test_a_flag_that_a_mode_does_not_read_is_refused(flag):
    is_switch = FLAGS[flag].kind is bool
    for mode in set(main.MODES) - set(FLAGS[flag].modes):
        message = refused(mode, f"--{flag}", *(() if is_switch else ("7",)))
        assert f"--{flag} is for --mode {FLAGS[flag].modes[0]}" in message, message


def test_all_unread_flags_are_named_at_once():
    message = refused("test", "--model_path", "nowhere", "--folds", "0,2", "--out", "x", "--pitch_um", "100")
    assert message.splitlines() == [
        "--folds is for --mode train; --mode test takes --fold N or tests all folds.",
        "--out is for --mode predict, compare or import_reference; --mode test writes beside the checkpoint.",
        "--pitch_um is for --mode predict.",
    ]
    message = refused("predict", "--model_path", "nowhere", *SLIDE, "--config_name", "her2st/dml", "--test_name", "a")
    assert "--mode predict finds the configuration in the checkpoint.\n--test_name is for" in message


def test_an_unread_flag_is_refused_whatever_its_value():
    message = refused("test", "--model_path", "nowhere", "--checkpoint_seconds", 60, "--folds", 0, "--device", "cpu")
    assert "--checkpoint_seconds is for --mode train." in message and "--folds is for --mode train;" in message


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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epoch", "--epoch is no flag of main.py; did you mean --epochs?"),
        ("--batch-size", "--batch-size is no flag of main.py; did you mean --batch_size?"),
        ("-k", "-k is no flag of main.py; did you mean --k?"),
        ("--lr", "--lr is no flag of main.py; --set TRAINING.learning_rate=VALUE sets that."),
        ("--no_neighbor", "--no_neighbor is no flag of main.py; --set MODEL.use_neighbor=VALUE sets that."),
        ("--normalize_fused", "--normalize_fused is no flag of main.py; --set LOSS.normalize_fused=VALUE sets that."),
    ],
)
def test_an_unknown_flag_names_what_was_meant(flag, message):
    assert refused("train", *RUN, flag, 7).splitlines() == [message]


def test_text_is_text_although_yaml_would_read_a_number():
    arguments = main.COMMAND_LINE.parse(["--mode", "train", "--config_name", "demo/dml", "--data_dir", "2021"])
    assert main.load_config("demo/dml", main.COMMAND_LINE.overrides(arguments)).DATA.data_dir == "2021"


def test_set_comes_last_and_wins():
    words = ["--mode", "train", "--config_name", "skinst/dml", "--set", "LOSS.k=9", "--k", "3", "--model_size", "large"]
    config = main.load_config("skinst/dml", main.COMMAND_LINE.overrides(main.COMMAND_LINE.parse(words)))
    assert (config.LOSS.k, config.DATA.encoder, config.MODEL.global_depth) == (9, "uni2-h", 5)


def test_the_help_of_a_mode_lists_what_it_reads_and_nothing_else():
    for mode in main.MODES:
        left = call_main("--mode", mode, "--help")
        listed = set(re.findall(r"^  (?:-h, )?--(\w+)", left.said, flags=re.MULTILINE)) - {"help", "mode"}
        assert left.status == 0
        assert listed == {name for name, flag in FLAGS.items() if mode in flag.modes}, mode


def test_without_a_mode_the_modes_are_listed():
    shown, bare = call_main("--help"), call_main()
    assert (shown.status, bare.status) == (0, 2) and bare.said.startswith("error: --mode is missing")
    for said in (shown.said, bare.said):
        assert re.findall(r"^  (\w+)  ", said, flags=re.MULTILINE) == list(main.MODES)
        assert not re.findall(r"^  +--", said, flags=re.MULTILINE)
    assert "found 'tran'; did you mean train?" in refused("tran")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("train", ("--mode", "train", *RUN)),
        ("test", ("--mode", "test", "--model_path", "nowhere", "--device", "cpu")),
        (
            "external_test",
            ("--mode", "external_test", "--model_path", "nowhere", "--test_name", "x", "--device", "cpu"),
        ),
        ("predict", ("--mode", "predict", "--model_path", "nowhere", *SLIDE, "--device", "cpu")),
        ("compare", ("--mode", "compare", "--runs", "nowhere")),
        ("doctor", ("--mode", "doctor", *RUN)),
        (
            "convert",
            (
                "--mode",
                "import_reference",
                "--config_name",
                "demo/dml",
                "--model_path",
                "no",
                "--fold",
                "0",
                "--out",
                "o",
            ),
        ),
    ],
)
def test_main_calls_the_mode_itself(function, words, tmp_path, monkeypatch):
    """From Python, too: `main.main([...])`. One frame lies between the program and the mode, which finds no data here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        main.main(words)
    frames = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert frames[1:3] == ["main", function]


def program(*words: str, name: str = "main.py", **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, name, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_goes_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    with program("--help", stdout=writing) as process:
        os.close(writing)
        assert process.communicate()[1] == (
            "stopped, for whoever read the output has gone: finished work is kept; run the same command again.\n"
        )
    assert process.returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "preprocess.raw.prepare"],
        ["-m", "models.layers.attention", "--help"],
        ["-W", "ignore", "-mutils.grid"],
        ["-m", "modes"],
        ["engine.py"],
        ["-m", "engine"],
    ],
    ids=" ".join,
)
def test_a_part_of_the_programs_that_is_run_says_what_the_programs_are(words):
    """Beside `python modes/train.py`, of which nothing of ours is found."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    name = next(word for word in words[::-1] if not word.startswith("--")).removeprefix("-m").removesuffix(".py")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(
        f"error: {name} is a part of the programs and none itself: run python main.py --help, or"
    )
    assert all(path.name in done.stderr for path in (ROOT / "preprocess").glob("[!_]*.py"))


def test_a_program_is_run_as_a_module_too():
    """One of preprocess/ is so in test_simulate_demo.py."""
    done = subprocess.run([sys.executable, "-m", "main", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into the process by /proc")
@pytest.mark.parametrize(
    ("name", "library", "words"),
    [
        ("main.py", "libtorch", ("--mode", "train", "--config_name", "demo/dml", "--data_dir")),
        ("preprocess/prepare_visium.py", "_multiarray_umath", ("--name", "own", "--samples")),
        ("preprocess/extract_features_uni.py", "libtorch", ("--config", "demo/dml", "--data_dir")),
    ],
)
def test_an_interrupt_while_libraries_are_imported(name, library, words, tmp_path):
    """A library may swallow an interrupt that hits its own start (it is then as if none had come), so there are three."""
    statuses = []
    while 130 not in statuses and len(statuses) < 3:
        with program(*words, str(tmp_path / "none"), name=name, stdout=subprocess.PIPE) as process:
            maps, until = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
            while library not in maps.read_text():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.002)
            process.send_signal(signal.SIGINT)
            said = "".join(process.communicate())
        assert "Traceback" not in said
        statuses.append(process.returncode)
    assert statuses[-1] == 130 and "interrupted: " in said


@pytest.mark.parametrize(
    "path", [ROOT / "main.py", *sorted((ROOT / "preprocess").glob("[!_]*.py"))], ids=lambda path: path.stem
)
def test_a_program_is_ready_for_an_interrupt_before_it_imports_libraries(path):
    """And leaves by the door of all of them, `run`."""
    text = path.read_text()
    assert text.endswith('\n\nif __name__ == "__main__":\n    run(main)\n')
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    before = names[: names.index("utils._interrupts")]
    assert {name.partition(".")[0] for name in before} <= sys.stdlib_module_names
