"""What a run is finished with."""

from __future__ import annotations

from modes.prediction import summary


def test_what_macos_leaves_beside_predictions_is_none(tiny_run, tmp_path, monkeypatch):
    run, shown = tiny_run.copy(tmp_path), []
    (folder,) = {path.parent for path in run.glob("fold_0/predictions/*.h5ad")}
    (folder / "._A1.h5ad").write_bytes(b"\0\5\x16\7")
    monkeypatch.setattr(summary, "write_explorer", lambda _, predictions, **__: shown.extend(predictions))
    monkeypatch.setattr(summary, "write_report", lambda *_, **__: None)
    summary.finish_run(run)
    assert shown and not [path for path in shown if path.name.startswith(".")]
