"""The short version of `make soak`: the same code, few files, one seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.patch_encoders.build import build_patch_encoder
from tests.shortcuts import read_encoders_once
from tests.soak import trials
from tests.soak.fuzz import Report, digest, fuzz
from tests.soak.readers import READERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    return fuzz(READERS, tmp_path_factory.mktemp("soak"), seed=0, files_each=4, start="fork")


def test_damaged_files_are_refused_by_name_or_read_as_what_they_are(report):
    assert report.files == 4 * len(READERS) and report.findings == []


def test_a_change_of_one_number_changes_the_digest():
    assert digest({"a": [1, 2.5]}) == digest({"a": [1.0, 2.5]}) != digest({"a": [1, 2.25]})


def test_killed_and_stopped_programs_are_made_whole_by_the_same_command(tmp_path, monkeypatch):
    """Beside CUDA in a process that has done nothing with PyTorch before it is forked."""
    if torch.cuda.is_available():
        words = ["-m", "tests.soak", "--parts", "kills", "--kills", "0", "--in_a_row"]
        ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        said = ended.stdout
        assert ended.returncode == 0, said + ended.stderr
    else:
        told: list[str] = []
        read_encoders_once(monkeypatch)
        build_patch_encoder("efficientnet-lite0")  # whoever is forked has it
        assert trials.kills(tmp_path, 0, 0, 0, told.append, in_a_row=True) == []
        said = "\n".join(told)
    assert said.count("1 trials at them, 0 chains, 0 findings") == len(trials.NAMES)
