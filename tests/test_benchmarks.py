"""Every benchmark runs, writes what it found, and finds its fast version equal to the slow one. No time is asserted."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks import table
from benchmarks.common import in_child
from benchmarks.fabricated import SECTION_SIZES, round_section
from benchmarks.flops import forward_flops, step_flops
from utils.config import Config

ROOT = Path(__file__).resolve().parents[1]
EQUALITY = {
    "targets": lambda extra: extra["difference"] < 1e-6,
    "data_path": lambda extra: extra["same_numbers"],
    "step": lambda extra: extra["gradient_differences"]["float32"] < 1e-3,
    "epoch": lambda extra: extra["loss_difference"] < 0.02,
    "extraction": lambda extra: extra["same_features"],
    "predict": lambda extra: extra["difference"] < 1e-5,
    "evaluation": lambda extra: extra["difference"] < 1e-4,
    "kmeans": lambda extra: extra["all_equal"],
    "loading": lambda extra: extra["are_equal"],
    "prepare": lambda extra: extra["are_kept"],
    "cpu_step": lambda extra: len(extra["losses"]) == 1,
    "scale": lambda extra: extra["loss_difference"] < 1e-5,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, _takes_shortcuts) -> Path:
    """Trial results of all benchmarks."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GENE_DML_HER2ST", raising=False)
        for name in EQUALITY:
            importlib.import_module(f"benchmarks.bench_{name}").main(
                ["--quick", "--device", "cpu", "--threads", "1", "--out", str(folder)]
            )
    return folder


def test_there_is_a_test_for_every_benchmark():
    assert sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")) == sorted(
        f"bench_{name}" for name in EQUALITY
    )


@pytest.mark.parametrize("name", EQUALITY)
def test_a_benchmark_says_what_was_measured_on_what(results, name):
    text = (results / f"{name}.json").read_text()
    content = json.loads(text)
    assert content["is_quick"]
    assert content["command"] == f"python benchmarks/bench_{name}.py --quick --device cpu --threads 1"
    assert {"cpu", "cores", "torch_threads", "omp_num_threads", "load_before"} <= content["machine"].keys()
    assert {"torch", "numpy", "python", "commit"} <= content["versions"].keys()
    assert len(content["rows"]) >= 2 and content["settings"]
    assert all(row.keys() == content["rows"][0].keys() for row in content["rows"])
    assert all(goal["is_met"] is None for goal in content["goals"]), "a trial decides nothing"
    assert os.uname().nodename not in text and str(ROOT) not in text, "results name no machine and no folder"


@pytest.mark.parametrize("name", EQUALITY)
def test_the_fast_version_equals_the_slow_one(results, name):
    assert EQUALITY[name](json.loads((results / f"{name}.json").read_text())["extra"])


def test_the_page_is_made_from_the_results(results, tmp_path):
    measured = tmp_path / "measured"
    measured.mkdir()
    for path in results.glob("*.json"):
        content = json.loads(path.read_text())
        (measured / path.name).write_text(json.dumps({**content, "is_quick": False}))
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\nBefore.\n\n{table.BEGIN}\nold numbers\n{table.END}\n\nAfter.\n")
    for _ in range(2):  # twice: the marks survive
        table.main(["--results", str(measured), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("# Speed\n\nBefore.") and text.endswith("After.\n") and "old numbers" not in text
    for path in measured.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["title"] in text and f"`{content['command']}`" in text
        assert all(note in text for note in content["notes"])
    with pytest.raises(FileNotFoundError, match="make bench"):
        table.main(["--results", str(results), "--page", str(page)])  # only trials


def test_committed_results_come_from_whole_runs():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text())
        assert not content["is_quick"], f"{path.name} is a trial"
        assert not re.search(r"/(work|home|tmp|root)/", path.read_text()), f"{path.name} names a folder"


def hold(megabytes: int) -> int:
    return len(bytearray(megabytes * 1_000_000))


def test_the_memory_of_a_child_is_its_own():
    ballast = bytearray(300_000_000)  # of the parent: a child that counted it would start 300 MB higher
    found = in_child(hold, 200)
    assert found.value == 200_000_000
    assert 190e6 < found.taken_bytes < 300e6
    with pytest.raises(RuntimeError, match="hold failed in its process: TypeError"):
        in_child(hold, "many")
    assert len(ballast) == 300_000_000


def test_the_arithmetic_of_the_model_is_that_of_the_reference():
    """GFLOP per spot, forward, at UNI size: neighbor encoder 2.5, fusion 1.4, projection 0.23; global 24 a slide of 182."""
    sizes = {"dim": 1024, "tokens": 197, "tiles": 25, "genes": 250, "batch": 1}
    found = forward_flops(Config().MODEL, lengths=[182], **sizes)
    assert found["neighbor encoder"] == pytest.approx(2.5e9, rel=0.03)
    assert found["fusion"] == pytest.approx(1.4e9, rel=0.05)
    assert found["projection"] == pytest.approx(0.23e9, rel=0.03)
    whole = forward_flops(Config().MODEL, lengths=[182], **{**sizes, "batch": 182})["global encoder"]
    assert whole == pytest.approx(24e9, rel=0.03)
    assert found["global encoder"] < whole, "one spot asks less of the last layer than all do"
    assert step_flops(found, dim=1024, width=512, tokens=197, batch=1) < 3 * sum(found.values())


def test_flops_of_the_encoders_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from models.contract import Sizes
    from models.gene_dml import build_gene_dml

    config = Config().MODEL
    model = build_gene_dml(config, Sizes(64, 64, num_genes=10, num_neighbors=5)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.neighbor_encoder.layers[0].attention.to_qkv(torch.zeros(3, 25, 64))
        model.fusion(torch.zeros(3, 40, 512))
    expected = forward_flops(config, dim=64, tokens=14, tiles=25, genes=10, batch=3, lengths=[3])["fusion"]
    qkv = 3 * 25 * 6 * 64 * 64
    attention = 4 * 512 * 3 * 40**2  # which the counter may not see on a CPU
    assert counter.get_total_flops() - qkv in (pytest.approx(expected), pytest.approx(expected - attention))


def test_fabricated_sections_have_the_sizes_of_the_public_download():
    assert len(SECTION_SIZES) == 36 and sum(SECTION_SIZES.values()) == 13_620
    grid = round_section(SECTION_SIZES["F3"])
    assert len({tuple(cell) for cell in grid.tolist()}) == 712
