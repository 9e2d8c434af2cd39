"""--resume on other data: refused before anything is written, with what has changed and what to do."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from datasets.features.cache import opened, write_cache
from modes.train import TrainOptions, train
from tests.checkpoints import edit
from utils.checkpoint import load_checkpoint
from utils.config import load_config


@dataclass(frozen=True)
class Started:
    """A run of two folds whose second one still waits for its scores, and a data folder of its own."""

    path: Path
    data_dir: Path
    config_name: str

    def edit(self, fold: int, change) -> None:
        """Change the content of both checkpoints of a fold in place."""
        for name in ("last.pt", "best.pt"):
            edit(self.path / f"fold_{fold}" / name, change)

    def edit_split(self, fold: int, change) -> None:
        path = self.path / f"fold_{fold}" / "split.json"
        split = json.loads(path.read_text())
        change(split)
        path.write_text(json.dumps(split))

    def resume(self, *folds: int) -> Path:
        overrides = [f"DATA.data_dir={self.data_dir}", f"GENERAL.log_path={self.path.parents[1]}"]
        options = TrainOptions("tiny", "run", torch.device("cpu"), list(folds), True, 60.0, with_report=False)
        return train(load_config(self.config_name, overrides), options)

    def refuses(self, *patterns: str, folds: tuple[int, ...] = (0, 1)) -> None:
        before = {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}
        with pytest.raises(ValueError) as error:
            self.resume(*folds)
        for pattern in ("--resume: the data have changed", *patterns, "Restore them .*--run_name NAME"):
            assert re.search(pattern, str(error.value)), f"{pattern!r} is not in:\n{error.value}"
        assert {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()} == before


@pytest.fixture
def started(tiny_run, tmp_path) -> Started:
    path = Path(shutil.copytree(tiny_run.path, tmp_path / "logs" / "tiny" / "run"))
    (path / "fold_1" / "result.json").unlink()
    return Started(path, Path(shutil.copytree(tiny_run.data_dir, tmp_path / "data")), tiny_run.config_name)


def test_the_same_data_go_on_and_come_to_the_same(started, tiny_run):
    started.resume(0, 1)
    ours, theirs = (json.loads((run / "fold_1" / "result.json").read_text()) for run in (started.path, tiny_run.path))
    assert ours == theirs


@pytest.mark.parametrize("name", ["last.pt", "split.json"])
def test_what_cannot_be_read_of_an_unfinished_fold_can_be_moved_away(started, tiny_run, name):
    path = started.path / "fold_1" / name
    for damaged in (path.read_bytes()[:-9], b"", b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"fold_1/{name}\b.* Restore it; or move it elsewhere: "):
            started.resume(0, 1)
    path.rename(started.path / name)
    if name == "last.pt":
        (started.path / "fold_1" / "best.pt").rename(started.path / "best.pt")
    started.resume(0, 1)
    for file in ("result.json", "metrics.jsonl", "split.json"):
        assert (started.path / "fold_1" / file).read_bytes() == (tiny_run.path / "fold_1" / file).read_bytes()


def test_slides_that_came_or_went(started):
    for folder in ("ST-cnts", "ST-spotfiles"):
        for path in (started.data_dir / "demo" / folder).glob("C1*"):
            path.rename(path.with_name("hidden"))
    started.refuses(
        r"training patients: no longer C \(fold_0, fold_1\)", r"training slides: no longer C1 \(fold_0, fold_1\)"
    )


def test_a_complete_fold_on_other_slides_stops_the_others_too(started):
    """Fold 0 is complete and stays so; fold 1 may not be trained on more than fold 0 was."""

    def without_c(content: dict) -> None:
        for key in ("train", "validation"):
            content["fold"][f"{key}_patients"] = [p for p in content["fold"][f"{key}_patients"] if p != "C"]
            content["fold"][f"{key}_slides"] = [s for s in content["fold"][f"{key}_slides"] if s != "C1"]

    started.edit(0, without_c)
    started.refuses(r"training patients: now also C \(fold_0\)", folds=(1,))


@pytest.mark.parametrize("is_config_edited", [False, True])
def test_folds_that_were_trained_with_other_settings(started, tmp_path, is_config_edited):
    """A fold that was copied in, and a configuration that was changed by hand under folds of the former one."""
    if is_config_edited:
        saved, asked = started.path / "config.yaml", tmp_path / "asked.yaml"
        saved.write_text(saved.read_text().replace("learning_rate: 0.001", "learning_rate: 0.5"))
        asked.write_text(Path(started.config_name).read_text().replace("1.0e-3", "0.5"))
        started = replace(started, config_name=str(asked))
    else:
        started.edit(0, lambda content: content["config"]["TRAINING"].update(learning_rate=0.5))
    before = {path: path.stat().st_mtime_ns for path in started.path.rglob("*")}
    with pytest.raises(
        ValueError, match=r"fold_0/best.pt was trained with other settings.*\n  TRAINING.learning_rate: "
    ):
        started.resume(1)
    assert {path: path.stat().st_mtime_ns for path in started.path.rglob("*")} == before


def test_a_test_patient_without_slides(started):
    def of_another(content: dict) -> None:
        content["fold"] |= {"fold": 7, "test_patients": ["H"]}

    started.edit(1, of_another)
    (started.path / "fold_1").rename(started.path / "fold_7")
    started.refuses(r"test patients: no slide of H is there \(fold_7\)")


def test_another_encoder(started):
    started.edit(1, lambda content: content["encoder"].update(name="uni", sha256="0" * 64))
    started.refuses(r"encoder: name efficientnet-lite0 instead of uni", rf"encoder: sha256 \w+ instead of {'0' * 64}")


def test_tokens_pooled_otherwise(started):
    started.edit(1, lambda content: content["encoder"].update(token_pool=4))
    started.edit_split(1, lambda split: split["tokens"].update(token_pool=4))
    started.refuses(r"tokens: token_pool 1 instead of 4 \(fold_1\)")


@pytest.mark.parametrize(("key", "value"), [("views", 8), ("dtype", "float32"), ("source", "encoder")])
def test_other_views_or_precision_of_the_tokens(started, key, value):
    started.edit_split(1, lambda split: split["tokens"].update({key: value}))
    started.refuses(rf"tokens: {key} \w+ instead of {value} \(fold_1\)")


def test_another_panel(started):
    started.edit(1, lambda content: content["genes"].reverse())
    started.refuses(r"genes of the panel: in another order")
    started.edit(1, lambda content: content["genes"].__setitem__(0, "OTHER"))
    started.refuses(r"genes of the panel: no longer OTHER, now also \w+")


def test_before_the_first_checkpoint_the_split_on_disk_counts(started):
    for name in ("last.pt", "best.pt"):
        (started.path / "fold_1" / name).unlink()
    genes = started.path / "fold_1" / "genes.txt"
    genes.write_text(genes.read_text() + "OTHER\n")
    started.refuses(r"genes of the panel: no longer OTHER")


def test_other_counts_of_the_same_genes(started):
    path = started.data_dir / "demo" / "ST-cnts" / "C1_sub.parquet"
    counts = pd.read_parquet(path)
    first, second = load_checkpoint(started.path / "fold_1" / "last.pt").genes[:2]
    counts[[first, second]] = counts[[second, first]].to_numpy()  # the panel stays
    counts.to_parquet(path)
    started.refuses(r"slide C1: other counts than then \(fold_0, fold_1\)")
    started.refuses(r"slide C1: other counts", folds=(0,))  # complete
    for fold in (0, 1):  # as of a version without digests
        started.edit(fold, lambda content: content["fold"].pop("digests"))
    started.refuses(r"counts: the expression of the training slides has another mean")


def test_another_panel_file_stops_a_run_whose_folds_are_complete(started, tiny_run):
    """In the paper protocol the panel is one file for all folds, so a fold to come would be trained on another one."""
    shutil.copy(tiny_run.path / "fold_1" / "result.json", started.path / "fold_1")
    (started.path / "config.yaml").write_text(
        (started.path / "config.yaml").read_text().replace("protocol: clean", "protocol: paper")
    )
    paper = started.path.parents[2] / "paper.yaml"
    paper.write_text(Path(started.config_name).read_text() + "EVALUATION: {protocol: paper}\n")
    panel = started.data_dir / "demo" / "genes_demo.npy"
    for fold in (0, 1):
        started.edit(fold, lambda content: content.update(genes=np.load(panel).tolist()))
        started.edit(fold, lambda content: content["config"]["EVALUATION"].update(protocol="paper"))
    np.save(panel, np.load(panel)[1:])
    Started(started.path, started.data_dir, str(paper)).refuses(
        r"genes of the panel: no longer \w+ \(fold_0, fold_1\)", folds=(2,)
    )


def test_other_tokens_of_a_slide_are_refused_by_its_name(started):
    (path,) = started.data_dir.glob("demo/token_features*/B1.h5")
    with opened(path) as cache:
        identity, ids, centers, tokens = cache.identity, cache.spot_ids, cache.centers, cache.read()
    tokens[0, 0, 0, 0] += 1
    write_cache(path, identity, ids, centers, [tokens])
    started.refuses(r"slide B1: other tokens than then \(fold_0, fold_1\)")
