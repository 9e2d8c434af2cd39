"""What sections of a set have in common."""

from __future__ import annotations

import pandas as pd
import pytest

from datasets.layout import Layout
from datasets.spec import DatasetSpec
from preprocess.raw.own_set import write_match
from preprocess.raw.training_panel import TrainingPanel


def test_a_section_with_ids_beside_one_with_symbols_is_named(tmp_path):
    layout = Layout(tmp_path, DatasetSpec(name="theirs", external=True))
    layout.counts_dir.mkdir(parents=True)
    for slide, genes in (("S1", ["TP53", "ERBB2"]), ("S2", ["ENSG00000141510", "ENSG00000141736"])):
        pd.DataFrame(1, index=["1x1", "2x1"], columns=genes).to_parquet(layout.new_counts_path(slide))
    with pytest.raises(
        ValueError,
        match=r"The genes of S2 have Ensembl ids .*of S1 have symbols.*Keep the counts .*elsewhere, .*--gene_map",
    ):
        write_match(layout, TrainingPanel(["TP53"], "panel.txt", None))
