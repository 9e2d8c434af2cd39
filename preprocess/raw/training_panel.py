"""The genes that an external slide is brought to: those that the models of a training set, or of a run, predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.known_sets import SPECS
from datasets.layout import Layout
from datasets.spec import DatasetSpec
from datasets.tables.gene_list import names_of_lines
from preprocess.raw.gene_map import read_gene_map, symbols_of, without_version
from preprocess.raw.space_ranger.matrices import GeneCounts
from utils.checkpoint import chosen_checkpoints, load_checkpoint
from utils.cli import say
from utils.config import Data
from utils.files import load_names, require_file
from utils.text import checked_names, is_ensembl, some


@dataclass(frozen=True)
class TrainingPanel:
    """genes: those that the models predict, in order; empty where none are named: nothing here needs them.  source: where
    they are listed.  type: the models' data set.

    trained, config_name: of the run that is the source, if it is one: what its features are, and its configuration.
    """

    genes: list[str]
    source: str
    type: str | None
    trained: Data | None = None
    config_name: str | None = None


def training_panel(
    data_dir: Path, name: str, panel: Path | None, training_type: str | None, model_path: Path | None
) -> TrainingPanel:
    """Find the panel that the flags mean: a file, the genes file of a data set, or the genes of a run's checkpoints.

    The clean protocol gives every fold a panel of its own; then it is the genes of any fold, in order of appearance.
    A data set without a genes file has no panel; its type is known all the same.
    Raises ValueError / FileNotFoundError if the flags mean two, or a panel cannot be read.
    """
    if panel is not None and model_path is not None:
        raise ValueError("--panel and --model_path are both given; give the one that holds the genes of the model.")
    if model_path is not None:
        return _panel_of_run(model_path)
    training_type = training_type or (SPECS[name].training_type if name in SPECS else None)
    if panel is not None:
        return TrainingPanel(_read_panel(panel), str(panel), training_type)
    path = None if training_type is None else Layout(data_dir, DatasetSpec(name=training_type)).panel_path
    if path is None or not path.is_file():
        return TrainingPanel([], "no panel", training_type)
    return TrainingPanel(load_names(path), str(path), training_type)


def _read_panel(path: Path) -> list[str]:
    if path.suffix == ".npy":
        return load_names(path)
    genes = names_of_lines(
        require_file(path, "--panel should be a .npy array of names or a text file, one gene a line.")
    )
    if not genes or len(set(genes)) < len(genes):
        raise ValueError(
            f"{path} should hold distinct gene names, one a line; found {len(genes)}, {len(set(genes))} distinct."
        )
    return checked_names(genes, "genes", path)


def _panel_of_run(model_path: Path) -> TrainingPanel:
    paths, notes = chosen_checkpoints(model_path)
    for note in notes:
        say(note)
    folds = [load_checkpoint(path, memory_map=True) for path in paths]
    genes = list(dict.fromkeys(gene for fold in folds for gene in fold.genes))
    data = folds[0].config.DATA
    return TrainingPanel(genes, str(model_path), data.type, data, folds[0].config_name)


def choose_names(counts: GeneCounts, panel: TrainingPanel, gene_map: Path | None) -> tuple[list[str], list[str]]:
    """Choose a name for every gene in the words of the panel (symbols or Ensembl ids), and sentences about the choice.

    Without a panel it is the symbol, by --gene_map where that is given. Raises ValueError with examples of both if no gene
    is in common.
    """
    if not panel.genes:
        return counts.symbols if gene_map is None else symbols_of(counts.ids, read_gene_map(gene_map)), []
    ids = [without_version(gene) for gene in counts.ids]
    named = {"symbols": counts.symbols, "Ensembl ids": ids}
    if gene_map is not None:
        named["symbols by --gene_map"] = symbols_of(counts.ids, read_gene_map(gene_map))
    wanted = {without_version(gene) for gene in panel.genes}
    shared = {what: len(wanted & set(names)) for what, names in named.items()}
    best = max(shared, key=lambda what: shared[what])
    if shared[best] == 0:
        raise ValueError(_nothing_in_common(counts, panel))
    notes = []
    panel_is_ensembl = np.mean([is_ensembl(gene) for gene in panel.genes]) > 0.5
    if best != "symbols" or counts.symbols == counts.ids:
        notes.append(f"genes are matched by {best}: the panel lists {'Ensembl ids' if panel_is_ensembl else 'symbols'}")
    # The panel's own spelling, which may carry versions.
    spelling = {without_version(gene): gene for gene in panel.genes}
    return [spelling.get(gene, gene) for gene in named[best]], notes


def _nothing_in_common(counts: GeneCounts, panel: TrainingPanel) -> str:
    message = (
        f"No gene of the panel ({panel.source}: {some(panel.genes, 3)}) is in {counts.path} "
        f"(symbols {some(counts.symbols, 3)}; ids {some(counts.ids, 3)}). "
    )
    upper = {gene.upper() for gene in panel.genes} & {gene.upper() for gene in counts.symbols}
    if upper:
        return (
            message + f"{len(upper)} symbols differ only in upper and lower case: the slide may be of another species."
        )
    if all(is_ensembl(gene) for gene in counts.symbols[:100]) != all(is_ensembl(gene) for gene in panel.genes[:100]):
        return message + (
            "One lists Ensembl ids, the other symbols, and this file does not have both. Give a table with both: "
            "--gene_map FILE (a features.tsv.gz of any Space Ranger output)."
        )
    return message + "They are of different species or assays; choose another --panel."
