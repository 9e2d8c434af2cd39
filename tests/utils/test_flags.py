"""The table of flags: one message with everything that is wrong, values that mean what they say."""

from __future__ import annotations

import pytest

import main
from preprocess import extract_features_uni
from utils.flags import CommandLine, Flag, one_of, parse_names, parse_numbers

FLAGS = (
    Flag("plain", ("one", "two"), "text"),
    Flag("number", ("one",), "a whole number", "LOSS.k", int, needed_by=("one",)),
    Flag("share", ("one", "two"), "a share", "LOSS.group_weight", float),
    Flag("switch", ("one",), "on", "LOSS.use_kmeans=true", bool),
    Flag("size", ("one", "two"), "how large", choices=("base", "large"), presets={"large": ("LOSS.k=9", "LOSS.a=1")}),
    Flag("views", ("two",), "how many", kind=int, choices=(1, 2, 8)),
    Flag("folds", ("two",), "folds", kind=parse_numbers, instead={"one": "takes --number"}),
    Flag("genes", ("two",), "genes", kind=parse_names, also="names"),
    Flag("runs", ("two",), "runs", nargs="+"),
    Flag("set", ("one", "two"), "any key", is_repeated=True, metavar="SECTION.key=value"),
)


def conflicts(arguments):
    if arguments.plain == "a" and arguments.share:
        yield "--plain a and --share contradict each other."


def command_line(default_mode: str | None = None) -> CommandLine:
    modes = {"one": "the first", "two": "the second"}
    return CommandLine("x.py", "About.", modes, {"all": FLAGS}, conflicts, default_mode)


def problems(*words: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        command_line().parse(words)
    return str(caught.value).splitlines()


def test_values():
    found = command_line().parse(
        ["--mode", "two", "--share", "-0.5", "--views=8", "--folds", "0,2", "--genes", "A, B,", "--runs", "a", "b"]
    )
    assert (found.share, found.views, found.folds, found.genes, found.runs) == (-0.5, 8, [0, 2], ["A", "B"], ["a", "b"])
    assert (found.plain, found.number, found.switch, found.set) == (None, None, False, None)


def test_a_second_name_means_the_same_flag():
    assert command_line().parse(["--mode", "two", "--names", "A,B"]).genes == ["A", "B"]
    assert command_line().parse(["--mode", "two", "--genes", "A,B"]).genes == ["A", "B"]


def test_both_programs_take_both_names_of_the_configuration():
    given = ["--config", "demo/dml"], ["--config_name", "demo/dml"]
    assert {main.COMMAND_LINE.parse(["--mode", "train", *words]).config_name for words in given} == {"demo/dml"}
    extraction = extract_features_uni.COMMAND_LINE
    words = ["--mode", "internal", "--extract_mode", "target"]
    assert {extraction.parse([*words, *flag]).config for flag in given} == {"demo/dml"}


def test_zero_is_given():
    assert command_line().parse(["--mode", "one", "--number", "0"]).number == 0
    assert "--folds is for --mode two; --mode one takes --number." in problems("--mode", "one", "--folds", "0")


def test_everything_that_is_wrong_is_said_at_once():
    assert problems(
        *("--mode", "one", "--plian", "a", "--share", "half", "--size", "larg", "--genes", "A", "--plain", "a")
    ) == [
        "--plian is no flag of x.py; did you mean --plain?",
        "--share should be a number, found 'half'.",
        "--size should be base or large, found 'larg'; did you mean large?",
        "--mode one needs --number: a whole number.",
        "--genes is for --mode two.",
    ]


def test_a_wrong_value_is_not_missing_too():
    assert problems("--mode", "one", "--number", "x") == ["--number should be a whole number, found 'x'."]
    assert problems("--mode", "two", "--views", "3") == ["--views should be 1, 2 or 8, found '3'."]
    assert problems("--mode", "two", "--folds", "0;2") == ["--folds should be whole numbers such as 0,2, found '0;2'."]


def test_flags_that_contradict_each_other():
    assert problems("--mode", "two", "--plain", "a", "--share", "1") == ["--plain a and --share contradict each other."]


def test_words_that_are_no_flags():
    assert problems("--mode", "two", "her2st/dml") == ["'her2st/dml' stands where a flag is expected."]
    assert problems("--mode", "two", "-k", "-3", "--lamda", "1") == [
        "-k is no flag of x.py; --set LOSS.k=VALUE sets that.",
        "--lamda is no flag of x.py.",
    ]
    assert problems("--mode", "two", "--plain") == ["--plain: expected one argument."]
    assert problems("--mode", "two", "--plai", "x") == ["--plai is no flag of x.py; did you mean --plain?"]


def test_what_a_misspelt_flag_explains_is_not_said_beside_it():
    assert problems("--mode", "one", "--nubmer", "3") == ["--nubmer is no flag of x.py; did you mean --number?"]
    assert problems("--mode", "two", "--plain", "a", "--share", "1", "--shar", "1") == [
        "--shar is no flag of x.py; did you mean --share?",
        "--plain a and --share contradict each other.",
    ]
    assert problems("--mode", "two", "--nmes", "A") == ["--nmes is no flag of x.py; did you mean --names?"]
    for words in (["--mdoe", "two"], ["--plain", "a", "--mdoe=two"]):
        assert problems(*words) == ["--mdoe is no flag of x.py; did you mean --mode?"]
    with pytest.raises(ValueError, match=r"^--mdoe is no flag of x\.py; did you mean --mode\?$"):
        command_line("one").parse(["--mdoe", "two", "--views", "8"])
    with pytest.raises(ValueError, match=r"extract_features_uni\.py; did you mean --config\?$") as caught:
        extract_features_uni.COMMAND_LINE.parse(["--conifg", "X", "--extract_mode", "all"])
    assert "needs" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^--conifg is no flag of main\.py; did you mean --config\?$"):
        main.COMMAND_LINE.parse(["--mode", "train", "--conifg", "X"])
    with pytest.raises(ValueError, match=r"^--all_patient is no flag of main\.py; did you mean --all_patients\?$"):
        main.COMMAND_LINE.parse(["--mode", "train", "--config", "X", "--all_patient", "--epochs_from", "RUN"])


def test_modes():
    assert problems("--plain", "x")[:3] == ["--mode is missing; it is one of", "  one  the first", "  two  the second"]
    assert problems("--mode", "tow") == ["--mode should be one or two, found 'tow'; did you mean two?"]
    assert command_line("two").parse([]).mode == "two"
    assert command_line("two").parse(["--mode", "one", "--number", "1"]).mode == "one"


def test_help(capsys):
    for words in (["--mode", "two", "--help"], ["-h"]):
        with pytest.raises(SystemExit) as left:
            command_line("two").parse(words)
        assert not left.value.code
    of_mode, of_program = capsys.readouterr().out.split("About.")
    assert "--views {1,2,8}" in of_mode and "--set SECTION.key=value" in of_mode and "--number" not in of_mode
    assert "  one  the first\n  two  the second\n" in of_program and "--views" not in of_program


def test_what_is_set_in_the_configuration():
    line = command_line()

    def overrides(*words: str) -> list[str]:
        return line.overrides(line.parse(["--mode", "one", "--number", "3", *words]))

    assert overrides() == ["LOSS.k=3"]
    assert overrides("--set", "LOSS.k=4", "--set", "A.b=c", "--switch", "--size", "large") == [
        *("LOSS.k=3", "LOSS.use_kmeans=true", "LOSS.k=9", "LOSS.a=1"),
        *("LOSS.k=4", "A.b=c"),
    ]
    assert overrides("--size", "base", "--share", "1e-3") == ["LOSS.k=3", "LOSS.group_weight=0.001"]
    assert Flag("path", (), "", "DATA.data_dir").overrides("ä: 1") == ['DATA.data_dir="ä: 1"']


def test_names_in_a_sentence():
    assert [one_of("a"), one_of("ab"), one_of("abc")] == ["a", "a or b", "a, b or c"]
