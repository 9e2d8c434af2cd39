"""What the group loss groups: the agreement of clusters with labels, measured in the training of `--mode train`."""

import json

import numpy as np
import pytest

from benchmarks import groups
from benchmarks.accuracy import DATA_SETS, DataSet
from modes.train import TrainOptions, epoch_batches, train
from modes.training.fold import new_model
from utils.checkpoint import load_checkpoint
from utils.config import load_config
from utils.devices import device_from


@pytest.fixture(autouse=True)
def _few_shuffles(monkeypatch):
    monkeypatch.setattr(groups, "SHUFFLES", 4)


def test_agreement_is_one_for_the_same_groups_and_near_chance_for_unrelated_ones():
    random = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2, 3], 8)
    same, chance = groups.agreement(3 - labels, labels, random)
    assert same == pytest.approx(1.0) and 0.05 < chance < 0.4, "32 spots agree by chance, too"
    unrelated, chance = groups.agreement(np.tile([0, 1, 2, 3], 8), labels, random)
    assert unrelated < chance


def test_tissue_is_the_region_that_was_simulated(tiny_run):
    config = load_config(tiny_run.config_name, [f"DATA.data_dir={tiny_run.data_dir}", "EVALUATION.fixed_epochs=1"])
    run_data, _ = groups.open_all_patients(config, tiny_run.config_name)
    labels = groups.labels_of(run_data)
    assert set(labels) == {"patient", "slide", "tissue"}
    assert all(len(values) == len(run_data.store.slide_of_row) for values in labels.values())
    assert np.array_equal(labels["slide"], run_data.store.slide_of_row)
    assert 2 <= len(np.unique(labels["tissue"])) <= 5, "spots lie on tissue, and not all on the same"


def test_groups_are_those_of_a_training_on_all_patients(tiny_run, tmp_path):
    settings = [f"DATA.data_dir={tiny_run.data_dir}", f"GENERAL.log_path={tmp_path}", "EVALUATION.fixed_epochs=2"]
    config = load_config(tiny_run.config_name, settings)
    run_data, split = groups.open_all_patients(config, tiny_run.config_name)
    labels = groups.labels_of(run_data)
    measured = list(groups.groups_by_epoch(run_data, split, labels, every=5))
    assert [{row["epoch"] for row in rows} for rows in measured] == [{0}, {1}, {2}]
    assert all(0 <= row[name] <= 1 for rows in measured for row in rows for name in ("nmi", "chance"))

    options = TrainOptions("tiny", "run", device_from(None, "cpu"), None, False, 60.0, False, all_patients=True)
    checkpoint = load_checkpoint(train(config, options) / "all_patients" / "best.pt")
    model = new_model(run_data, split)
    model.load_state_dict(checkpoint.weights)
    expected = groups.measure(run_data, model, epoch_batches(run_data, split, split.targets, 2), labels)
    assert measured[-1] == [{"epoch": 2, **row} for row in expected]


def test_the_table_is_written(tiny_run, tmp_path, monkeypatch):
    found = {"methods": {"gene_dml": {"learning_rate": "1e-3", "weight_decay": "0", "epochs": 1}}}
    (tmp_path / "search.json").write_text(json.dumps(found))
    tiny = DataSet("tiny", tiny_run.config_name, lambda _raw, _data: None, views=1)
    monkeypatch.setitem(DATA_SETS, "tiny", tiny)
    (tmp_path / "data").symlink_to(tiny_run.data_dir)
    arguments = ["--data", "tiny", "--work", str(tmp_path), "--search", str(tmp_path / "search.json")]
    path = groups.main([*arguments, "--out", str(tmp_path / "out")])
    content = json.loads((path.parent / "groups.json").read_text())
    assert {row["modality"] for row in content["rows"]} == set(groups.MODALITIES)
    last = next(
        row for row in content["rows"] if (row["epoch"], row["modality"], row["label"]) == (1, "image", "tissue")
    )
    line = next(
        line for line in path.read_text().splitlines() if "clusters of the image | tissue" in " ".join(line.split())
    )
    assert f"{last['nmi']:.3f}" in line
