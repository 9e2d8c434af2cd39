"""The data of a run have digests: a test on others, and a comparison on other counts, are refused, another storage is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from datasets.features.cache import opened, write_cache
from evaluation.comparison.runs import compare_runs
from modes.test import test as run_test
from tests.checkpoints import edit


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run.path, tmp_path / "logs" / "tiny" / "run"))


@pytest.fixture
def data_dir(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run.data_dir, tmp_path / "data"))


def change_counts(data_dir: Path, slide: str, change) -> None:
    path = data_dir / "demo" / "ST-cnts" / f"{slide}_sub.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


def one_more(counts: pd.DataFrame) -> pd.DataFrame:
    counts.iloc[0, 0] += 1
    return counts


def test_a_test_on_other_counts_names_the_slide(run, data_dir):
    slide = json.loads((run / "fold_0" / "split.json").read_text())["test_slides"][0]
    change_counts(data_dir, slide, one_more)
    with pytest.raises(ValueError, match=rf"slide {slide}: other counts than then\n.*--mode external_test"):
        run_test(str(run), 0, [f"DATA.data_dir={data_dir}"], torch.device("cpu"), with_report=False)


@pytest.mark.parametrize(("folder", "what"), [("gt", "features"), ("n", "features"), ("token", "tokens")])
def test_a_test_on_other_features_or_tokens_names_the_slide(run, data_dir, folder, what):
    slide = json.loads((run / "fold_0" / "split.json").read_text())["test_slides"][0]
    (path,) = data_dir.glob(f"demo/{folder}_features*/{slide}.h5")
    with opened(path) as cache:
        identity, ids, centers, values = cache.identity, cache.spot_ids, cache.centers, cache.read()
    values.reshape(-1)[0] += 1
    write_cache(path, identity, ids, centers, [values])
    with pytest.raises(ValueError, match=rf"slide {slide}: other {what} than then\n"):
        run_test(str(run), 0, [f"DATA.data_dir={data_dir}"], torch.device("cpu"), with_report=False)


def test_a_test_on_another_image_names_the_slide(run, data_dir):
    path = run / "fold_0" / "best.pt"
    slide = json.loads((run / "fold_0" / "split.json").read_text())["test_slides"][0]
    edit(path, lambda content: content["fold"]["digests"][slide].update(image="0" * 64))
    with pytest.raises(ValueError, match=rf"slide {slide}: other image than then\n"):
        run_test(str(run), 0, [f"DATA.data_dir={data_dir}"], torch.device("cpu"), with_report=False)


def test_the_order_of_the_genes_and_the_type_of_the_counts_are_no_change(run, data_dir):
    slide = json.loads((run / "fold_0" / "split.json").read_text())["test_slides"][0]
    change_counts(data_dir, slide, lambda counts: counts[sorted(counts, reverse=True)].astype("float64"))
    run_test(str(run), 0, [f"DATA.data_dir={data_dir}"], torch.device("cpu"), with_report=False)


def test_runs_that_were_tested_on_other_counts_are_not_compared(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    compare_runs([run, other])
    path = other / "fold_0" / "split.json"
    split = json.loads(path.read_text())
    slide = split["test_slides"][0]
    split["digests"][slide]["counts"] = "0" * 64
    path.write_text(json.dumps(split))
    with pytest.raises(ValueError, match=rf"fold 0 was tested on other counts of the slides {slide}"):
        compare_runs([run, other])
