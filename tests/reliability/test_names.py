"""Names that are no text, wherever they enter: bytes that are not UTF-8 in HDF5, halves of letters in JSON, missing ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from datasets.features.cache import opened
from datasets.tables.positions import read_positions
from evaluation.fold_files import read_genes
from evaluation.predictions import read_held_out, read_prediction
from evaluation.report.fold_figures import read_clusters
from modes.training.resume import _started
from preprocess.raw.hest_patches import HestPatches
from preprocess.simulate_demo import read_manifest
from tests.checkpoints import fabricated_fold
from tests.soak import binary_readers, run_readers, user_readers
from utils.runs import read_versions

NO_UTF8, HALF = b"A\xff", "A\ud800"


def cache_with(folder: Path, change: Callable[[h5py.File], object]) -> Path:
    path = binary_readers.cache(folder, kind="patch", is_earlier=True)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize("name", ["encoder", "encoder_sha256", "image_fingerprint", "fill"])
@pytest.mark.parametrize("value", [np.bytes_(NO_UTF8), "", "a\nb", " a"])
def test_what_a_cache_says_about_itself_is_text(tmp_path, name, value):
    path = cache_with(tmp_path, lambda file: file.attrs.__setitem__(name, value))
    with pytest.raises(ValueError, match=rf"A1\.h5 cannot be read .*its {name.replace('_', ' ')} is"), opened(path):
        pass


@pytest.mark.parametrize("name", [NO_UTF8, b"", b"1x1\n"])
def test_the_spots_of_a_cache_have_names(tmp_path, name):
    path = cache_with(tmp_path, lambda file: file["spot_id"].__setitem__(0, name))
    with pytest.raises(ValueError, match=r"A1\.h5"), opened(path) as cache:
        assert cache.spot_ids


@pytest.mark.parametrize("name", [NO_UTF8, b"", b"A\x07"])
def test_the_barcodes_of_other_tools(tmp_path, name):
    for folder, make, place in (
        ("features", lambda to: user_readers.features_of_a_tool(to, kind="hest"), "barcodes"),
        ("patches", binary_readers.hest_patches, "barcode"),
    ):
        (tmp_path / folder).mkdir()
        path = make(tmp_path / folder)
        with h5py.File(path, "r+") as file:
            file[place][0, 0] = name
        with pytest.raises(ValueError, match=r"S1\.h5"):
            if folder == "patches":
                HestPatches(binary_readers.sample_of(path), path)
            else:
                user_readers.patches_of_a_tool(path, kind="hest")


@pytest.mark.parametrize("name", [NO_UTF8, b"A\x07"])
def test_the_slide_of_a_prediction(tmp_path, name):
    path = run_readers.prediction(tmp_path)
    with h5py.File(path, "r+") as file:
        file.move("uns/spatial/A1", b"uns/spatial/" + name)
    with pytest.raises(ValueError, match=r"A1\.h5ad"):
        read_prediction(path)


def test_names_in_json(tmp_path):
    held_out = run_readers.run_folder_file(tmp_path, name="held_out.json")
    content = json.loads(held_out.read_text())
    held_out.write_text(json.dumps({**content, "genes": [HALF, *content["genes"][1:]]}))
    with pytest.raises(ValueError, match=r"held_out\.json: genes with names that are"):
        read_held_out(held_out.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_slides": [HALF]}, "test slides with names that are"),
        ({"train_patients": "AB"}, "train_patients should be a list, found 'AB'"),
        ({"fold": "0"}, "fold should be a int, found '0'"),
        ({"fold": True}, "fold should be a int, found True"),
        ({"features": ["encoder"]}, "features should be a dict"),
        ({"digests": 3}, "digests should be a dict, found 3"),
    ],
)
def test_the_record_of_how_a_fold_was_started(tmp_path, changes, message):
    (tmp_path / "split.json").write_text(json.dumps({**asdict(fabricated_fold().split), **changes}))
    with pytest.raises(ValueError, match=rf"split\.json: {message}"):
        _started(tmp_path)


def test_the_genes_of_a_fold(tmp_path):
    (tmp_path / "genes.txt").write_text("TP53\n\nCD3E\n")
    with pytest.raises(ValueError, match=r"genes\.txt: genes with names that are"):
        read_genes(tmp_path / "genes.txt")


def test_a_barcode_that_is_missing_in_parquet(tmp_path):
    path = user_readers.position_parquet(tmp_path)
    table = pd.read_parquet(path)
    table.loc[2, "barcode"] = None
    table.to_parquet(path, index=False)
    with pytest.raises(ValueError, match=r"tissue_positions\.parquet: the barcode is missing in some rows"):
        read_positions(path)


@pytest.mark.parametrize("cluster", ["", "1.5", "-1", "a", "99999999999"])
def test_clusters_are_whole_numbers(tmp_path, cluster):
    (tmp_path / "clusters.csv").write_text(f"slide,patient,image_cluster,gene_cluster\nA1,A,0,1\nA1,A,{cluster},1\n")
    with pytest.raises(ValueError, match=r"clusters\.csv cannot be read .*image_cluster should be whole numbers"):
        read_clusters(tmp_path / "clusters.csv")


@pytest.mark.parametrize("text", ['[["a", "b"]]', '{"torch": 2}', "3", '[{"torch": null}]'])
def test_versions_are_names_and_texts(tmp_path, text):
    (tmp_path / "versions.json").write_text(text)
    with pytest.raises(ValueError, match=r"versions\.json cannot be read .*expected names and versions of every start"):
        read_versions(tmp_path / "versions.json")


@pytest.mark.parametrize("text", ["[]", "{}", '{"is_complete": 1, "arguments": {}, "programs": {}}', "{"])
def test_the_description_of_a_simulation(tmp_path, text):
    (tmp_path / "simulation.json").write_text(text)
    with pytest.raises(ValueError, match=r"simulation\.json cannot be read as the description of a simulation"):
        read_manifest(tmp_path / "simulation.json")
