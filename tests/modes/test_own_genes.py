"""A panel of the user's own, from the command line to the summary of the run."""

from __future__ import annotations

import json

import pytest

from tests.command_line import Left, call_main


@pytest.fixture
def call_train(tiny_run, tmp_path):
    """Train ridge on two folds of the tiny set, by the command line."""

    def call(*arguments: object) -> Left:
        return call_main(
            *("--mode", "train", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir),
            *("--log_path", tmp_path / "logs", "--model", "ridge", "--folds", "0,1", "--device", "cpu", "--no_report"),
            *arguments,
        )

    return call


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_a_given_list_is_the_panel_of_every_fold(call_train, tiny_run, tmp_path, protocol):
    genes = (tiny_run.path / "fold_0" / "genes.txt").read_text().split()[:6][::-1]
    listed = tmp_path / "genes.txt"
    listed.write_text("\n".join(genes))
    wanted = ("--protocol", protocol, "--set", f"DATA.genes={listed}")
    assert call_train(*wanted).status == 0
    run = tmp_path / "logs" / "tiny" / "exp_0"
    for fold in (0, 1):
        assert (run / f"fold_{fold}" / "genes.txt").read_text().split() == genes
        assert json.loads((run / f"fold_{fold}" / "split.json").read_text())["panel"] == "given"
    notes = "\n".join(json.loads((run / "summary.json").read_text())["notes"])
    assert f"The panel of every fold was given by the user ({listed})" in notes
    assert "these 6 genes alone" in notes and "chosen from all slides" not in notes
    listed.write_text("\n".join(genes[:-1]))
    changed = call_train(*wanted, "--resume")
    assert changed.status and f"genes of the panel: no longer {genes[-1]} (fold_0, fold_1)" in changed.said
    short = call_train("--protocol", protocol, "--genes", ",".join(genes), "--resume")
    assert short.status and "DATA.genes: the run has" in short.said


def test_genes_that_are_not_there_are_refused_before_anything_is_written(call_train, tiny_run, tmp_path):
    gene, other = (tiny_run.path / "fold_0" / "genes.txt").read_text().split()[:2]
    left = call_train("--genes", f"{gene},{other}X")
    assert left.status and f"{other}X is on no slide (near: {other}" in left.said
    assert not (tmp_path / "logs").exists()
    checked = call_main(
        *("--mode", "doctor", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir),
        *("--genes", f"{gene},{other}X", "--device", "cpu"),
    )
    assert checked.status and f"{other}X is on no slide" in checked.said
