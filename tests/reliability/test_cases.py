"""The files that once ended or held up the program, as they are (GENE_DML_CASES): each is refused by its name, at once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from datasets.features.block_store import BlockStore
from datasets.features.cache import read_features
from datasets.images.slides import open_slide
from preprocess.raw.hest import HestSample, read_expression
from preprocess.raw.space_ranger.matrices import read_matrix
from utils.files import load_names

USUAL_NAMES = {"hang_visium.h5": "filtered_feature_bc_matrix.h5"}  # by which the program finds it
SECONDS = 30  # on a busy machine; what hangs takes minutes


def pixels_of(path: Path) -> None:
    with open_slide(path) as image:
        image.read_region(0, 0, 10, 10)


def counts_of(path: Path) -> None:
    read_matrix([path], path.parent, "a matrix")


def expression_of(path: Path) -> None:
    read_expression(HestSample("S1", "P1", path, None, None, None, (1, 1), "human"))


@pytest.mark.parametrize(
    ("name", "read", "why"),
    [
        ("crafted_panel.npy", load_names, "its pickle is not that of an array of strings"),
        ("hang_token.h5", read_features, "bytes were inserted or appended"),
        ("hang_token.h5", lambda path: BlockStore([path], "token"), "bytes were inserted or appended"),
        ("hang_visium.h5", counts_of, "bytes were inserted or appended"),
        ("hang_hest.h5ad", expression_of, "bytes were inserted or appended"),
        ("header50k.png", pixels_of, "50000 x 50000 pixels, which 69 bytes cannot hold"),
    ],
)
def test_a_file_that_once_broke_the_program_is_refused_at_once(cases, tmp_path, name, read, why):
    if not (cases / name).is_file():
        pytest.skip(f"real cases: {cases} holds no {name}")
    path = tmp_path / USUAL_NAMES.get(name, name)
    shutil.copyfile(cases / name, path)
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and why in str(caught.value)
    assert time.monotonic() - began < SECONDS
