"""Reading: whatever is wrong with a user's file becomes one message that names it, and no message asks to destroy it."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import re
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from datasets.spec import DatasetSpec, read_spec
from evaluation.fold_files import read_fold
from evaluation.predictions import read_prediction
from tests.command_line import call_main
from tests.test_architecture import ROOMS, ROOT, sources, tree
from utils.cli import run
from utils.config import load_config
from utils.files import UnreadableFile, reading
from utils.runs import read_epochs
from utils.text import brief, parse_yaml, shortened

DESTROYS = ("overwrite", "delete", "remove")
# Texts of the program with such a word that advise nobody to destroy a file.
HARMLESS = {
    "overwrite": "the flag's name where it is defined",
    "--overwrite": "the same",
    "--overwrite with --parallel: each process would make again what another has made. Give --slides to each instead.": (
        "refuses the flag"
    ),
    "table to write (default: the slide's own, with --overwrite)": "--help, which says what the flag does",
}


def read_with(error: BaseException, path: Path) -> str:
    """The message that becomes of an error of a library."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught, reading(path, "a table of counts"):
        raise error
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (zlib.error("Error -3 while decompressing data"), "Error -3 while decompressing data"),
        (KeyError("spot_id"), "KeyError: 'spot_id'"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (AttributeError("'Group' object has no attribute 'shape'"), "AttributeError: 'Group' object"),
        (OverflowError("int too large"), "OverflowError: int too large"),
        (ValueError("operands could not be broadcast together"), "operands could not be broadcast"),
        (json.JSONDecodeError("Unterminated string", "{", 0), "it is not JSON (Unterminated string, line 1)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't decode byte 0xff"),
        (RuntimeError("first line\nsecond line"), "first line. It may"),
        (AssertionError(), "AssertionError"),
        (MemoryError("Unable to allocate 224. GiB"), "takes more memory than there is (Unable to allocate 224. GiB)"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OSError("Unable to open file (file signature not found)"), "file signature not found"),
    ],
)
def test_what_a_library_raises_becomes_one_error_with_the_file_and_the_cause(error, text, tmp_path):
    message = read_with(error, tmp_path / "A1.tsv")
    assert message.startswith(f"{tmp_path / 'A1.tsv'} cannot be read as a table of counts: ")
    assert text in message and "compare it with where it came from" in message
    assert "\n" not in message and not any(word in message for word in DESTROYS)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EAGAIN, "HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.ENOLCK, "HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.EACCES, "the permission is missing"),
        (errno.EIO, "the disk, or the network behind it, gave an error"),
        (errno.ENAMETOOLONG, "its name is too long"),
        (errno.EISDIR, "it is a folder"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_errors_of_the_system_are_told_apart_and_say_nothing_against_the_file(number, text, tmp_path):
    message = read_with(OSError(number, os.strerror(number)), tmp_path / "A1.h5")
    assert text in message
    assert "damaged" not in message and not any(word in message for word in DESTROYS)


def test_a_long_cause_is_cut(tmp_path):
    assert len(read_with(ValueError("x" * 10**6), tmp_path / "a")) < 500


def test_a_missing_file_stays_a_missing_file(tmp_path):
    path = tmp_path / "none.tsv"
    with (
        pytest.raises(FileNotFoundError, match=r"none\.tsv does not exist; expected a table of counts"),
        reading(path, "a table of counts"),
    ):
        path.read_text()


def test_our_own_errors_pass_unchanged(tmp_path):
    path = tmp_path / "A1.h5"
    for error in (
        ValueError(f"{path} holds 3 spots"),
        FileNotFoundError(f"{path} does not exist. Run X"),
        UnreadableFile("another file cannot be read"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, reading(path, "a cache"):
            raise error
        assert caught.value is error


def test_a_library_that_happens_to_have_the_name_in_its_words_is_still_explained():
    assert "cannot be read as a table" in read_with(ValueError("index pointer"), Path("i"))


def test_a_locked_file_is_called_locked(tmp_path):
    path = tmp_path / "A1.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(3)
    with open(path, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"A1\.h5 .*it is locked \(in use by another process"), reading(path, "a"):
            h5py.File(path, "r")


def test_a_value_is_shortened_before_it_is_written_out():
    bomb: object = "lol"
    for _ in range(60):  # 10 ** 60 words when written out
        bomb = [bomb] * 10
    assert len(brief(bomb)) <= 200
    assert brief({"k": 1}) == "{'k': 1}" and brief("a\n b") == r"'a\n b'" and shortened("a\n b") == "a b"
    assert len(shortened("y" * 10**6, 50)) == 50


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "small/demo"),
            "error: small/demo: its file system is read-only",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "its name is too long for the file system"),
        (MemoryError("Unable to allocate 6.98 GiB"), "error: it takes more memory than there is (Unable to"),
        (RecursionError(), "error: it is nested too deeply"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: it takes more memory than there is",
        ),
        (OSError("x.h5 cannot be written: no room"), "error: x.h5 cannot be written: no room\n"),
    ],
)
def test_what_the_machine_refuses_is_a_message_and_status_2(error, text, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    written = capsys.readouterr().err
    assert text in written and "Traceback" not in written


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(10))}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "its aliases stand for more than 1,000,000 values"),
        ("a: &a [*a]\n", "its aliases stand for more than"),
        ("LOSS: {k: 5}\nLOSS: {k: 7}\n", "key 'LOSS' is written twice"),
        ("LOSS:\n  k: 5\n  k: 7\n", "key 'k' is written twice in what begins in line 2"),
        ("a: " + "[" * 1200 + "]" * 1200, "it is nested too deeply"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "not valid YAML (found unhashable key"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        ("a: 2024-99-99\n", "month must be in 1..12"),
    ],
)
def test_yaml_is_bounded_and_says_where_it_is_wrong(text, reason, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    readers = (load_config, lambda path: read_spec(path, name="own"))
    for read in readers:
        with pytest.raises(ValueError, match=r"mine\.yaml cannot be read as ") as caught:
            read(path)
        assert reason in str(caught.value) and len(str(caught.value)) < 600


def test_aliases_that_stand_for_little_are_read():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: &m {x: 1}, y: 2}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"x": 1, "y": 2},
    }


def test_a_bomb_below_the_bound_is_a_short_message(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(BOMB.splitlines()[:5]) + "\nTRAINING: *e\n")
    with pytest.raises(ValueError, match="section TRAINING should hold keys") as caught:
        load_config(path)
    assert len(str(caught.value)) < 2000


def test_a_configuration_in_another_code_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("LOSS: {k: 5}\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"mine\.yaml cannot be read as .*can't decode byte 0xff"):
        load_config(path)


@pytest.mark.parametrize("number", ["1" + "0" * 24, "1" + "0" * 400, "-1" + "0" * 24])
@pytest.mark.parametrize("key", ["TRAINING.batch_size", "TRAINING.learning_rate"])
def test_numbers_beyond_the_machine_are_refused(key, number):
    with pytest.raises(ValueError, match=rf"{key} should be "):
        load_config("demo/dml", [f"{key}={number}"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("image_pattern: '{slide}{x}'", "no other braces"),
        ("image_pattern: '{slide}{0}'", "no other braces"),
        ("image_pattern: '{slide:>1000000000}{slide}'", "no other braces"),
        ("image_pattern: '{slide}{'", "no other braces"),
    ],
)
def test_a_pattern_of_images_has_two_names_only(line, text, tmp_path):
    path = tmp_path / "dataset.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"dataset\.yaml: image_pattern: ") as caught:
        read_spec(path, name="own")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("^(B)?[A-Z]", "leaves the group empty of"),
        ("^(Z*)[A-Z]", "leaves the group empty of"),
        ("^(P[0-9])", "does not match"),
    ],
)
def test_a_pattern_that_gives_no_patient_is_named_with_its_file(pattern, why, tmp_path):
    path = tmp_path / "dataset.yaml"
    path.write_text(f"patient_pattern: '{pattern}'\n")
    with pytest.raises(ValueError, match="Slide 'A1' of own has no known patient") as caught:
        read_spec(path, name="own").patient_of("A1")
    assert f"its name {why} '{pattern}'. Correct patient_pattern in {path}, or write the patient" in str(caught.value)
    with pytest.raises(ValueError, match="describe your own data set in a dataset"):
        DatasetSpec(name="own", patient_pattern=pattern).patient_of("A1")


@pytest.mark.parametrize("line", ["3", "[1]", '{"epoch": 1', "\x00"])
def test_the_log_of_the_epochs_names_its_line(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"epoch": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_epochs(path)


RUN_FILES = {
    "result.json": ["", "{", "[]", "3", "{}", '{"protocol": "clean"}', "[" * 100_000, "\xff\xfe"],
    "split.json": ["", "{", "[]", '{"fold": "0", "name": "A", "protocol": "clean", "test_patients": []}'],
    "metrics.jsonl": ["3\n", "[1]\n", '{"epoch": 0}\n{"epo'],
    "per_gene_slide.csv": ["", "a,b\n1,2\n", '"', "slide,patient,scale,truth,gene\nA1,A,fused,smoothed,X\n"],
    "genes.txt": ["\xff\xfe"],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in RUN_FILES.items() for text in texts])
def test_a_damaged_file_of_a_run_names_itself(name, content, tiny_run, tmp_path):
    fold = tiny_run.copy(tmp_path) / "fold_0"
    read_fold(fold)
    (fold / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(fold / name))) as caught:
        read_fold(fold)
    assert len(str(caught.value)) < 1000


def test_a_damaged_prediction_names_itself(tiny_run, tmp_path):
    path = next((tiny_run.copy(tmp_path) / "fold_0" / "predictions").glob("*.h5ad"))
    content = path.read_bytes()
    read_prediction(path)
    generator = np.random.default_rng(0)
    for length in generator.integers(0, len(content), 8):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_prediction(path)
    for place in generator.integers(0, min(len(content), 60_000), 25):
        path.write_bytes(content[:place] + b"\0" + content[place:])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read as a prediction"):
            read_prediction(path)


def test_a_locked_cache_in_a_whole_command(tiny_run):
    """CASES 6: never the command that throws hours of features away."""
    path = next((tiny_run.data_dir / "demo" / "gt_features_efficientnet-lite0_64").glob("A1.h5"))
    with open(path, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        left = call_main(
            "--mode",
            "doctor",
            "--config_name",
            tiny_run.config_name,
            "--data_dir",
            tiny_run.data_dir,
            "--device",
            "cpu",
        )
    assert left.status == 2 and "it is locked (in use by another process" in left.said, left.said
    assert "HDF5_USE_FILE_LOCKING=FALSE" in left.said and "--overwrite" not in left.said


def texts_of(path: Path) -> list[str]:
    """All texts in a file of the program but its docstrings, those with values in braces in their pieces."""
    found = list(ast.walk(tree(path)))
    said = {id(node.value) for node in found if isinstance(node, ast.Expr)}
    return [n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in said]


def test_no_text_of_the_program_advises_to_destroy_a_file():
    """Whatever is wrong with a file, it may be whole: it is kept elsewhere, and the same command then makes another."""
    wrong = re.compile(
        r"overwrit|delet|remov(?!eprefix|esuffix)|eras|discard|throw|get rid|\brm\b|unlink", re.IGNORECASE
    )
    texts = [(path, text) for room in ROOMS for path in sources(room) for text in texts_of(path)]
    assert [
        (str(path.relative_to(ROOT)), text) for path, text in texts if wrong.search(text) and text not in HARMLESS
    ] == []
    assert set(HARMLESS) <= {text for _, text in texts}
