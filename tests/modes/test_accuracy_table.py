"""The accuracy table of the README, made of a tiny data set; the same command continues it."""

import json

import pytest

from benchmarks import table
from benchmarks.accuracy_demo import METHODS, main
from utils.config import load_config


def arguments_of(tiny_run, tmp_path, methods: str) -> list[str]:
    return [
        *("--config_name", tiny_run.config_name, "--data_dir", str(tiny_run.data_dir), "--device", "cpu"),
        *("--log_path", str(tmp_path / "logs"), "--out", str(tmp_path / "results" / "accuracy_demo")),
        *("--methods", methods, "--seeds", "0,1", "--set", "EVALUATION.fixed_epochs=1"),
    ]


def test_methods_are_trained_compared_and_shown(tiny_run, tmp_path, capsys):
    path = main(arguments_of(tiny_run, tmp_path, "mlp,ridge_neighbor"))
    text = path.read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert list(rows)[2:] == [METHODS["mlp"][0], METHODS["ridge_neighbor"][0]]
    assert "(2)" in rows[METHODS["mlp"][0]] and "(1)" in rows[METHODS["ridge_neighbor"][0]], "seeds of each"
    assert "1 epochs fixed beforehand" in text and "the seeds 0, 1" in text and "--methods mlp,ridge_neighbor" in text
    content = json.loads((path.parent / "accuracy.json").read_text())
    found = {(row["metric"], row["method"]): row["mean"] for row in content["rows"]}
    assert f"{found['pcc_all', 'ridge_neighbor']:.3f}" in rows[METHODS["ridge_neighbor"][0]]
    assert f"{found['mse', 'mlp']:.4f}" in rows[METHODS["mlp"][0]]
    assert (path.parent / "comparison.html").is_file()

    capsys.readouterr()
    main(arguments_of(tiny_run, tmp_path, "mlp,ridge_neighbor,mean"))
    said = capsys.readouterr().out
    assert said.count("complete, nothing to do") == 3 * 3, "two seeds of mlp and one of ridge, three folds each"
    assert METHODS["mean"][0] in path.read_text()

    page, readme = tmp_path / "speed.md", tmp_path / "README.md"
    for place in (page, readme):
        place.write_text(f"Before.\n{table.BEGIN}\nold numbers\n{table.END}\nAfter.\n")
    results = path.parents[1]
    (results / "kmeans.json").write_text((table.RESULTS / "kmeans.json").read_text())
    table.main(["--results", str(results), "--page", str(page), "--readme", str(readme)])
    assert METHODS["mean"][0] in readme.read_text() and "old numbers" not in readme.read_text()
    assert METHODS["mean"][0] not in page.read_text()


def test_every_method_is_a_valid_configuration():
    """Settings are checked where they are read, and no two methods are the same."""
    configs = [load_config("demo/dml", list(settings)) for _, settings in METHODS.values()]
    assert (
        len({repr(config) for config in configs}) >= len(METHODS) - 1
    )  # k-means is switched on for all by the program


@pytest.mark.parametrize(("methods", "message"), [("mlp", "name two at least"), ("mlp,ridge_", "ridge_ unknown")])
def test_what_cannot_be_compared_is_refused(tiny_run, tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        main(arguments_of(tiny_run, tmp_path, methods))
