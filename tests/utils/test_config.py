"""Strict, typed configuration: precedence, every kind of mistake, no key without a reader."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from utils.config import (
    _OTHER_NAMES,
    KEYS,
    LARGE,
    SECTIONS,
    Config,
    config_from_dict,
    find_key,
    load_config,
    read_config,
    save_config,
    with_overrides,
)

ROOT = Path(__file__).resolve().parents[2]


PAPER = {
    "GENERAL.seed": 2021,
    "DATA.patch_size": 224,
    "DATA.num_neighbors": 5,
    "DATA.num_genes": 250,
    "DATA.encoder": "uni",
    "MODEL.projection_dim": 512,
    "MODEL.neighbor_depth": 4,
    "MODEL.neighbor_dropout": 0.3,
    "MODEL.fusion_heads": 1,
    "MODEL.fusion_mlp_dim": 1024,
    "MODEL.fusion_dropout": 0.1,
    "MODEL.gene_dropout": 0.3,
    "MODEL.gene_mlp_dim": 1024,
    "MODEL.gene_mlp_dropout": 0.1,
    "MODEL.predictor_dim": 1536,
    "MODEL.predictor_dropout": 0.1,
    "LOSS.instance_weight": 1.0,
    "LOSS.instance_temperature": 0.07,
    "LOSS.group_weight": 0.8,
    "LOSS.group_temperature": 0.07,
    "LOSS.normalize_fused": False,
    "TRAINING.epochs": 200,
    "TRAINING.patience": 20,
    "TRAINING.learning_rate": 1e-4,
    "TRAINING.lr_step_epochs": 20,
    "TRAINING.lr_decay": 0.95,
}
OF_DATA_SET = (
    *("DATA.type", "LOSS.k", "TRAINING.batch_size", "MODEL.neighbor_heads", "MODEL.neighbor_mlp_ratio"),
    *("MODEL.global_depth", "MODEL.global_heads", "MODEL.global_mlp_ratio", "MODEL.global_dropout"),
)
PAPER_OF_DATA_SET = {
    "her2st/dml": ("her2st", 18, 512, 4, 4.0, 5, 8, 4.0, 0.3),
    "skinst/dml": ("skinst", 25, 256, 16, 1.0, 2, 16, 1.0, 0.1),
    "stnet/dml": ("stnet", 90, 512, 8, 4.0, 3, 8, 2.0, 0.1),
}


def flat(content: dict) -> dict[str, object]:
    return {f"{name}.{key}": value for name, section in content.items() for key, value in section.items()}


@pytest.mark.parametrize("name", PAPER_OF_DATA_SET)
def test_what_the_files_of_the_paper_say_is_what_the_paper_says_and_what_runs(name):
    """Every setting of the paper is written out, and nothing else, so that the file alone can be read."""
    paper = PAPER | dict(zip(OF_DATA_SET, PAPER_OF_DATA_SET[name], strict=True))
    written = flat(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()))
    assert written == paper
    runs = flat(load_config(name).to_dict())
    assert {key: runs[key] for key in paper} == paper
    left_open = {key: value for key, value in flat(Config().to_dict()).items() if key not in paper}
    assert {key: runs[key] for key in left_open} == left_open


def test_the_defaults_are_the_values_for_her2st():
    assert load_config("her2st/dml") == Config()


def test_command_line_beats_yaml_beats_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("LOSS:\n  k: 7\n  group_weight: 0.5\n")
    config = load_config(path, ["LOSS.k=9", "TRAINING.learning_rate=1e-3"])
    assert (config.LOSS.k, config.LOSS.group_weight, config.TRAINING.learning_rate) == (9, 0.5, 1e-3)
    assert config.TRAINING.epochs == 200


def test_a_configuration_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = ROOT / "config" / "data/mob/mob.yaml"
    for given in ("data/mob/mob.yaml", "data/mob/mob"):
        with pytest.raises(FileNotFoundError) as caught:
            load_config(given)
        assert str(caught.value).startswith(
            f"There is no configuration '{given}' ({tmp_path}/{given}; relative paths start at the current folder): neither a "
            f"file of that path nor {inside}. Known: "
        )
    with pytest.raises(
        FileNotFoundError, match=rf"There is no configuration '{tmp_path}/mob\.yaml'\. Known: .*her2st/dml"
    ):
        load_config(tmp_path / "mob.yaml")
    assert load_config("her2st/dml.yaml") == load_config("her2st/dml")


def test_large_takes_the_sizes_of_her2st_for_any_data_set():
    config = load_config("skinst/dml", LARGE)
    assert config.DATA.encoder == "uni2-h"
    assert (config.MODEL.global_depth, config.MODEL.global_heads, config.MODEL.neighbor_heads) == (5, 8, 4)


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        (
            "TRAINING:\n  learing_rate: 1\n",
            r"mine.yaml: unknown key 'TRAINING.learing_rate'; did you mean 'TRAINING.learning_rate'\?",
        ),
        ("TRAINIG:\n  epochs: 1\n", r"unknown section 'TRAINIG'; did you mean 'TRAINING'"),
        ("LOSS:\n  k: many\n", "LOSS.k should be a whole number, found 'many'"),
        ("LOSS:\n  k: true\n", "LOSS.k should be a whole number, found True"),
        ("LOSS:\n  use_kmeans: 1\n", "LOSS.use_kmeans should be true or false, found 1"),
        ("LOSS:\n  k: 0\n", "LOSS.k should be more than zero, found 0"),
        ("MODEL:\n  fusion_dropout: 1.5\n", "MODEL.fusion_dropout should be below 1"),
        ("MODEL:\n  neighbor_mlp_ratio: 1.0e+300\n", "MODEL.neighbor_mlp_ratio should be at most 1,000,000"),
        ("MODEL:\n  projection_dim: 4611686018427387904\n", "MODEL.projection_dim should be at most 1,000,000"),
        ("DATA:\n  num_neighbors: 4\n", "DATA.num_neighbors should be odd"),
        (
            "TRAINING:\n  precision: int8\n",
            "TRAINING.precision should be one of auto, float32, bf16, fp16, found 'int8'",
        ),
        ("- a\n- b\n", "expected sections"),
        ("LOSS: 3\n", "section LOSS should hold keys, found 3"),
        ("LOSS: {k: 1\n", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, yaml_text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml_text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_all_mistakes_are_reported_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("LOSS:\n  kk: 1\nTRAINING:\n  epochs: none\n")
    with pytest.raises(ValueError) as caught:
        load_config(path, ["GENERAL.sed=1", "nonsense"])
    for part in ("LOSS.kk", "TRAINING.epochs", "'GENERAL.seed'", "--set nonsense: expected SECTION.key=value"):
        assert part in str(caught.value)


def test_a_key_without_its_section_is_recognised():
    with pytest.raises(ValueError, match=r"unknown key 'k'; did you mean 'LOSS\.k'"):
        load_config("her2st/dml", ["k=3"])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("TRAINING.lr=1", "TRAINING.learning_rate"),
        ("LOSS.epochs=1", "TRAINING.epochs"),
        ("LOSS.lambda=1", "LOSS.group_weight"),
        ("MODEL.num_clusters=1", "LOSS.k"),
    ],
)
def test_a_key_is_recognised_by_another_name_and_in_another_section(override, meant):
    with pytest.raises(ValueError, match=rf"unknown key '{re.escape(override[:-2])}'; did you mean '{meant}'\?$"):
        load_config("her2st/dml", [override])


def test_other_names_lead_to_keys():
    assert set(_OTHER_NAMES.values()) <= set(KEYS)
    assert not {key.rpartition(".")[2] for key in KEYS} & set(_OTHER_NAMES)
    assert (find_key("lr"), find_key("patience"), find_key("nothing")) == (
        *("TRAINING.learning_rate", "TRAINING.patience"),
        None,
    )


def test_unknown_configuration_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"config/her3st/dml\.yaml.*Known: .*her2st/dml"):
        load_config("her3st/dml")


def test_resolved_configuration_round_trips(tmp_path):
    config = load_config("demo/dml", ["EVALUATION.fixed_epochs=3", "DATA.weights=weights/a.bin"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config.to_dict(), "checkpoint") == config
    assert with_overrides(config, ["EVALUATION.fixed_epochs=null"]).EVALUATION.fixed_epochs is None


def test_keys_that_are_no_more_are_left_out_of_what_earlier_versions_saved(tmp_path):
    config, path = load_config("demo/dml"), tmp_path / "config.yaml"
    content = config.to_dict()
    content["TRAINING"]["compile"], content["LOSS"]["kmeans_init"] = False, "first"
    path.write_text(yaml.safe_dump(content))
    assert read_config(path) == config_from_dict(content, "checkpoint") == config
    with pytest.raises(ValueError, match=r"unknown key 'LOSS\.kmeans_init'"):
        load_config(path)
    with pytest.raises(ValueError, match=r"unknown key 'TRAINING\.compile'"):
        load_config("demo/dml", ["TRAINING.compile=false"])
    content["LOSS"]["kmeans_init"] = "kmeans++"
    path.write_text(yaml.safe_dump(content))
    assert config_from_dict(content, "checkpoint") == config, "it mattered in training only"
    with pytest.raises(ValueError, match=r"trained with LOSS\.kmeans_init 'kmeans\+\+', which is no more"):
        read_config(path)


def test_every_key_has_a_reader():
    """A key that nothing reads would be a setting that is silently ignored."""
    sources = "\n".join(
        path.read_text()
        for folder in ("models", "datasets", "modes", "evaluation", "preprocess")
        for path in (ROOT / folder).rglob("*.py")
    )
    sources += "".join((ROOT / name).read_text() for name in ("main.py", "engine.py", "utils/trained_fold.py"))
    unread = [
        f"{name}.{field.name}"
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        if not re.search(rf"\b({name}|config|training|model_config|settings)\.{field.name}\b", sources)
    ]
    assert unread == []
