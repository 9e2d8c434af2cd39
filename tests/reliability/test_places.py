"""Programs started from another folder, where `data` is not: whoever reads the data folder says that it is not there."""

from __future__ import annotations

import re

import pytest

from preprocess import import_features, select_genes, select_spots
from tests.command_line import call, call_extract, call_main

PROGRAMS = {
    "train": lambda run: call_main("--mode", "train", "--config_name", run.config_name, "--device", "cpu"),
    "doctor": lambda run: call_main("--mode", "doctor", "--config_name", run.config_name, "--device", "cpu"),
    "test": lambda run: call_main("--mode", "test", "--model_path", run.path, "--data_dir", "data", "--device", "cpu"),
    "external_test": lambda run: call_main(
        *(
            "--mode",
            "external_test",
            "--model_path",
            run.path,
            "--test_name",
            "mine",
            "--data_dir",
            "data",
            "--device",
            "cpu",
        )
    ),
    "extraction": lambda run: call_extract("--config", run.config_name, "--extract_mode", "all"),
    "extraction, external": lambda _: call_extract(
        "--mode", "external", "--test_name", "mine", "--extract_mode", "all"
    ),
    "select_genes": lambda _: call(select_genes.main, "--type", "mine"),
    "select_spots": lambda _: call(select_spots.main, "--type", "mine", "--slide", "A1", "--region", "r.geojson"),
    "import_features": lambda run: call(
        import_features.main, "--config", run.config_name, "--source", "s", "--format", "clam"
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_data_folder_that_is_not_there(name, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = PROGRAMS[name](tiny_run)
    assert left.status == 2
    where = rf"'data' \({tmp_path}/data; relative paths start at the current folder\)"
    said = rf"The data folder {where} does not exist\. Name the folder of the data sets with --data_dir\."
    assert re.search(said, left.said), left.said
    assert "Unknown data set" not in left.said
