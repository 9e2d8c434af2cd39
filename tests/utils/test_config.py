"""Strict, typed configuration: precedence, every kind of mistake, no key without a reader."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from utils.config import LARGE, SECTIONS, config_from_dict, load_config, read_config, save_config, with_overrides

ROOT = Path(__file__).resolve().parents[2]


def test_paper_values_are_the_defaults():
    her2st, skinst, stnet = (load_config(f"{name}/dml") for name in ("her2st", "skinst", "stnet"))
    assert (her2st.LOSS.k, skinst.LOSS.k, stnet.LOSS.k) == (18, 25, 90)
    assert {c.LOSS.group_weight for c in (her2st, skinst, stnet)} == {0.8}
    assert {c.LOSS.group_temperature for c in (her2st, skinst, stnet)} == {0.07}
    assert (her2st.TRAINING.batch_size, skinst.TRAINING.batch_size, stnet.TRAINING.batch_size) == (512, 256, 512)
    sizes = [
        (c.MODEL.neighbor_heads, c.MODEL.neighbor_mlp_ratio, c.MODEL.neighbor_dropout) for c in (her2st, stnet, skinst)
    ]
    assert sizes == [(4, 4, 0.3), (8, 4, 0.3), (16, 1, 0.3)]
    sizes = [
        (c.MODEL.global_depth, c.MODEL.global_heads, c.MODEL.global_mlp_ratio, c.MODEL.global_dropout)
        for c in (her2st, stnet, skinst)
    ]
    assert sizes == [(5, 8, 4, 0.3), (3, 8, 2, 0.1), (2, 16, 1, 0.1)]


def test_command_line_beats_yaml_beats_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("LOSS:\n  k: 7\n  group_weight: 0.5\n")
    config = load_config(path, ["LOSS.k=9", "TRAINING.learning_rate=1e-3"])
    assert (config.LOSS.k, config.LOSS.group_weight, config.TRAINING.learning_rate) == (9, 0.5, 1e-3)
    assert config.TRAINING.epochs == 200


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
