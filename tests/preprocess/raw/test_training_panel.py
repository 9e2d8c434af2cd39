"""Panels that --panel names: text with one gene a line, and what is said of other lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from preprocess.raw.training_panel import training_panel


def panel_of(path: Path) -> list[str]:
    return training_panel(path.parent, "mine", path, None, None).genes


def test_one_gene_a_line_in_every_spelling_of_a_text(tmp_path):
    path = tmp_path / "panel.txt"
    for text in ("TP53\nERBB2\n", "\ufeffTP53\r\n\r\nERBB2", "  TP53 \rERBB2\r"):
        path.write_bytes(text.encode())
        assert panel_of(path) == ["TP53", "ERBB2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('TP53\n"ERBB2"\n', r"panel\.txt, line 2: .*ERBB2.* holds quotes\. Expected one name a line, without quotes"),
        ("'TP53'\n'ERBB2'\n", r"panel\.txt, line 1: .*TP53.* holds quotes"),
        ("TP53,ERBB2,CD3E\n", r"panel\.txt, line 1: 'TP53,ERBB2,CD3E' holds a comma\. Expected one name a line"),
        ("TP53\n\nERBB2;CD3E\n", r"panel\.txt, line 3: 'ERBB2;CD3E' holds a semicolon"),
        ("TP53\tENSG00000141510\n", r"panel\.txt, line 1: .* holds a tab"),
        ("TP53\nTP53\n", "should hold distinct gene names, one a line; found 2, 1 distinct"),
    ],
)
def test_lists_of_another_form_are_told_with_the_line(tmp_path, text, message):
    path = tmp_path / "panel.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        panel_of(path)
