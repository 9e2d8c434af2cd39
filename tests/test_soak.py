"""The short version of `make soak`: the same code, few files, one seed."""

from __future__ import annotations

import signal

import pytest

from tests.soak import trials
from tests.soak.fuzz import Report, digest, fuzz
from tests.soak.readers import READERS


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    return fuzz(READERS, tmp_path_factory.mktemp("soak"), seed=0, files_each=4)


def test_damaged_files_are_refused_by_name_or_read_as_what_they_are(report):
    assert report.files == 4 * len(READERS) and report.findings == []


def test_a_change_of_one_number_changes_the_digest():
    assert digest({"a": [1, 2.5]}) == digest({"a": [1.0, 2.5]}) != digest({"a": [1, 2.25]})


def test_a_killed_preparation_is_made_whole_by_the_same_command(tmp_path):
    assert trials.kills(tmp_path, seed=0, chains=1, say=str, names=("preparation",), every=9) == []


@pytest.mark.parametrize("name", ["training", "extraction", "prediction"])
def test_a_stopped_program_leaves_nothing_that_a_later_one_stumbles_over(tmp_path, name):
    """SIGTERM, at some moments of its work with files; then the same command again."""
    found = trials.kills(tmp_path, seed=0, chains=0, say=str, names=(name,), every=19, by=signal.SIGTERM)
    assert found == []
