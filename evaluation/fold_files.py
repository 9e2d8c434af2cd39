"""The files of a fold, written and read.

    split.json           fold, name, protocol, selection, the patients and slides of each part     (main)
    metrics.jsonl        one JSON object per epoch: epoch, train/.., validation/.., test/..        (main)
    genes.txt            the panel, one gene a line, in order
    per_gene_slide.csv   slide, patient, scale, truth, gene, metrics: everything else follows from it
    per_gene.csv, per_slide.csv, per_patient.csv
    result.json          the summary of the fold and the epoch; written last: where it is, the fold is complete

Undefined values are empty cells in CSV and null in JSON.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.metrics import METRIC_NAMES
from utils.checkpoint import check_fold_folders, fold_folders
from utils.cli import say
from utils.files import reading, require_file, set_aside, write_atomically, write_text
from utils.runs import plain, read_epochs, write_epochs, write_json
from utils.text import brief, checked_names, some
from utils.trained_fold import ALL_PATIENTS_FOLDER, COPIED_FOLD, FOLD_FOLDER, made_again
from utils.untrusted.text import text_of

_TABLES = ("per_gene_slide", "per_gene", "per_slide", "per_patient")
_NAMES = ("slide", "patient", "scale", "truth", "gene")  # columns of text
_SPLIT = {"fold": int, "name": str, "protocol": str, "test_patients": list}
_RESULT = {"protocol": str, "gene_lists": dict, "slides": dict, "num_slides": int, "num_spots": int, "notes": list}


@dataclass(frozen=True, eq=False)
class FoldScores:
    """All scores of one fold; `evaluation.protocol.score_fold` makes it, `write_fold` writes it.

    per_gene_slide: long: slide, patient, scale, truth, gene, METRIC_NAMES; scale "training_mean" is the constant
        prediction of the mean over the training spots, scored like a model.
    per_gene: scale, truth, gene, METRIC_NAMES, averaged over the fold in the order of the protocol.
    per_slide, per_patient: means over genes: pcc_all, pcc_h, pcc_<list>, the other metrics, undefined_pearson.
    summary: what result.json holds (`score_fold` lists the keys).
    """

    protocol: str
    genes: list[str]
    gene_lists: dict[str, list[str]]
    per_gene_slide: pd.DataFrame
    per_gene: pd.DataFrame
    per_slide: pd.DataFrame
    per_patient: pd.DataFrame
    summary: dict[str, Any]


@dataclass(frozen=True, eq=False)
class FoldRecord:
    """A complete fold as read from disk. epochs: one row per line of metrics.jsonl; empty where there was none."""

    path: Path
    index: int
    name: str
    protocol: str
    split: dict[str, Any]
    genes: list[str]
    result: dict[str, Any]
    per_gene_slide: pd.DataFrame
    epochs: pd.DataFrame

    @property
    def gene_lists(self) -> dict[str, list[str]]:
        return self.result["gene_lists"]


def write_fold(scores: FoldScores, fold_dir: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write the tables of a FoldScores and, last, result.json = its summary + `extra`; returns the path of that.

    extra: plain values that belong to the result, e.g. {"epoch": 12}; "notes" are added to those of the summary.
    A result.json of an earlier evaluation is removed first, so that it never stands beside newer tables.
    Raises ValueError when the folder holds the panel of other genes, or `extra` would hide a key of the summary.
    """
    fold_dir, extra = Path(fold_dir), dict(extra or {})
    notes = [*scores.summary["notes"], *extra.pop("notes", [])]
    if clash := sorted(set(extra) & set(scores.summary)):
        raise ValueError(f"extra values {clash} have the names of summary values; expected other names.")
    genes_path = fold_dir / "genes.txt"
    if genes_path.is_file() and read_genes(genes_path) != scores.genes:
        raise ValueError(
            f"{genes_path} lists another panel than the {len(scores.genes)} genes scored. The folder belongs to "
            "another run: choose another --run_name. If the list was damaged, move it elsewhere and repeat the command."
        )
    result_path = fold_dir / "result.json"
    result_path.unlink(missing_ok=True)
    _write_genes(genes_path, scores.genes)
    for name in _TABLES:
        write_table(getattr(scores, name), fold_dir / f"{name}.csv")
    result = plain({**scores.summary, **extra, "notes": notes})
    return write_text(result_path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def read_fold(fold_dir: str | Path) -> FoldRecord:
    """Read a complete fold.

    Raises FileNotFoundError or ValueError that names the file and what makes it whole again, and ValueError for a folder
    fold_<n> that holds another fold.
    """
    fold_dir = Path(fold_dir)
    result = _read_json(fold_dir / "result.json", _RESULT)
    split = _read_split(fold_dir)
    if result.get("protocol") != split["protocol"]:
        raise ValueError(
            f"{fold_dir}: split.json was made for the protocol {split['protocol']!r}, result.json for "
            f"{result.get('protocol')!r}; expected the same. {made_again(fold_dir / 'result.json')}"
        )
    genes, table = read_genes(fold_dir / "genes.txt"), _read_table(fold_dir / "per_gene_slide.csv")
    if differing := sorted(set(genes) ^ set(table["gene"])):
        raise ValueError(
            f"{fold_dir}: genes.txt and per_gene_slide.csv do not list the same genes: {some(differing)}. "
            + made_again(fold_dir / "genes.txt")
        )
    return FoldRecord(
        path=fold_dir,
        index=split["fold"],
        name=str(split["name"]),
        protocol=split["protocol"],
        split=split,
        genes=genes,
        result=result,
        per_gene_slide=table,
        epochs=pd.DataFrame(_records(fold_dir / "metrics.jsonl")),
    )


def mend_fold(
    fold_dir: Path, split: Mapping[str, Any], genes: Sequence[str], epochs: Sequence[Mapping[str, float]]
) -> None:
    """Write the split, the panel and the epochs of a fold again where they are lost or cannot be read.

    split, genes, epochs: as the checkpoint in the folder holds them. What can be read stays as it is, what cannot is kept
    beside the new file.
    """
    parts: tuple[tuple[str, Callable[[Path], object], Callable[[Path], object]], ...] = (
        ("split.json", lambda path: _read_json(path, _SPLIT), lambda path: write_json(path, split)),
        ("genes.txt", read_genes, lambda path: _write_genes(path, genes)),
        ("metrics.jsonl", _records, lambda path: write_epochs(path, epochs)),
    )
    for name, read, write in parts:
        path = fold_dir / name
        try:
            read(path)
            if path.is_file() or not epochs:  # models that are fitted in one step have no log
                continue
            was = "lost"
        except FileNotFoundError:
            was = "lost"
        except ValueError:
            was = f"damaged (kept as {set_aside(path).name})"
        write(path)
        without = ", without the notes of the start of the run" if name == "split.json" else ""
        say(f"Note: {path} was {was} and is written again, as the checkpoint of the fold has it{without}.")


def _write_genes(path: Path, genes: Sequence[str]) -> None:
    write_text(path, "".join(f"{gene}\n" for gene in genes))


def prediction_files(fold_dir: Path) -> list[Path]:
    """List the predictions of a fold by name, without what macOS leaves beside files."""
    return sorted((fold_dir / "predictions").glob("[!.]*.h5ad"))


def scored_folds(run_dir: Path) -> dict[int, Path]:
    """Find the folders of complete folds, {index: folder}, in the order of their index; raises as `fold_folders`."""
    return {index: path for index, path in fold_folders(run_dir).items() if (path / "result.json").is_file()}


def find_folds(run_dir: str | Path) -> tuple[list[Path], list[str]]:
    """Find the folders of complete folds, in the order of their index, and say in sentences what is not there.

    Raises FileNotFoundError when the folder does not exist, ValueError when no fold of it is complete, and as `fold_folders`.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} does not exist; expected the folder of a run, with fold_<i> folders in it.")
    found, complete = fold_folders(run_dir), scored_folds(run_dir)
    if not complete and (run_dir / ALL_PATIENTS_FOLDER).is_dir():
        raise ValueError(
            f"{run_dir} holds a model that was trained on all patients: it has no held-out scores. Give the cross-validation "
            "that it followed (--epochs_from)."
        )
    if not complete:
        raise ValueError(
            f"{run_dir} holds {len(found)} fold folders and none is complete (no result.json). "
            "Train or continue it: python main.py --mode train ... --resume"
        )
    notes = []
    if unfinished := [index for index in found if index not in complete]:
        notes.append(f"Not complete, left out: fold {', '.join(map(str, unfinished))}. Continue the run with --resume.")
    if absent := [index for index in range(max(found)) if index not in found]:
        notes.append(f"Not in this run (skipped or not asked for): fold {', '.join(map(str, absent))}.")
    return list(complete.values()), notes


def read_run(run_dir: str | Path) -> tuple[list[FoldRecord], list[str]]:
    """Read all complete folds of a run; returns them and the notes of `find_folds`.

    Raises ValueError or FileNotFoundError as `find_folds`, `read_fold` and `check_together` do.
    """
    paths, notes = find_folds(run_dir)
    records = [read_fold(path) for path in paths]
    check_together(paths)
    return records, notes


def check_together(folders: Sequence[Path]) -> None:
    """Check that folders of folds are of one run, by their records and, where they are there, their checkpoints.

    Raises ValueError for folds of both protocols and for a patient who is tested in two folds, as `check_fold_folders`, and
    ValueError or FileNotFoundError for a record that cannot be read.
    """
    check_fold_folders([path for folder in folders if (path := folder / "best.pt").is_file()])
    splits = {folder: _read_split(folder) for folder in folders}
    for what in ("protocol", "model"):  # earlier versions did not write the model
        found = {str(split[what]): folder for folder, split in splits.items() if what in split}
        if len(found) > 1:
            listed = ", ".join(f"{folder.name} is {value}" for value, folder in sorted(found.items()))
            raise ValueError(
                f"{folders[0].parent} mixes {what}s: {listed}. Expected one {what} per run; train the other one under its own "
                "--run_name."
            )
    tested: dict[str, Path] = {}
    for folder, split in splits.items():
        for patient in split["test_patients"]:
            if (other := tested.setdefault(str(patient), folder)) is not folder:
                raise ValueError(
                    f"{folder.parent}: {other.name} and {folder.name} both test patient {patient}; expected each patient "
                    f"in one fold. {COPIED_FOLD}"
                )


def read_histories(run_dir: str | Path) -> dict[int, list[dict[str, float]]]:
    """Read the epochs of the complete folds of a run, {index: records of metrics.jsonl}, and none of their tables.

    Raises ValueError or FileNotFoundError as `find_folds`, ValueError for a log that is none.
    """
    return {int(path.name.removeprefix("fold_")): _records(path / "metrics.jsonl") for path in find_folds(run_dir)[0]}


def read_genes(path: Path) -> list[str]:
    """Read a list of one gene a line; FileNotFoundError or ValueError names the file."""
    remedy = made_again(path)
    with reading(require_file(path, remedy), "a list of genes", remedy):
        return checked_names(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), "genes", path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table of scores as CSV, whole or not at all."""
    # Ten digits: beyond the float32 of the predictions, and the file stays readable.
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.10g"))


def _records(path: Path) -> list[dict[str, float]]:
    """metrics.jsonl, one record per epoch; empty when there is no such file (models fitted in one step)."""
    return read_epochs(path) if path.is_file() else []


def _read_table(path: Path) -> pd.DataFrame:
    remedy = made_again(path)
    with reading(require_file(path, remedy), "the scores of a fold", remedy):
        text = text_of(path)
        columns, *rows = csv.reader(io.StringIO(text, newline=""))
        if not text.endswith("\n") or any(len(row) != len(columns) for row in rows):
            raise ValueError(f"{path} ends early, or a line of it has another length than the first. {remedy}")
        if missing := [name for name in (*_NAMES, *METRIC_NAMES) if name not in (*columns, "mse_centered")]:
            raise ValueError(f"{path} has no column {', '.join(missing)}. {remedy}")
        table = pd.read_csv(
            io.StringIO(text),
            dtype={name: str if name in _NAMES else np.float64 for name in (*_NAMES, *METRIC_NAMES)},
            keep_default_na=False,
            na_values={name: [""] for name in columns if name not in _NAMES},
        )
    if "mse_centered" not in table:  # tables of earlier versions: what it is of the MSE, the two ratios tell
        table["mse_centered"] = table["mse"] * (1 - table["explained_variance"]) / (1 - table["r2"])
    return table


def _read_split(fold_dir: Path) -> dict[str, Any]:
    """split.json of a fold; ValueError for a folder fold_<n> that holds another fold."""
    split = _read_json(fold_dir / "split.json", _SPLIT)
    if (match := FOLD_FOLDER.fullmatch(fold_dir.name)) and int(match[1]) != split["fold"]:
        raise ValueError(
            f"{fold_dir}: split.json is of fold {split['fold']}; expected fold {int(match[1])}, as the folder is named. "
            f"{COPIED_FOLD}"
        )
    return split


def _read_json(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The object in a file of JSON; ValueError unless it holds a value of each kind."""
    remedy = made_again(path)
    with reading(require_file(path, remedy), "JSON", remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object. {remedy}")
    if missing := sorted(set(kinds) - set(content)):
        raise ValueError(f"{path} lacks {missing}. {remedy}")
    for name, kind in kinds.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{path}: {name} should be a {kind.__name__}, found {brief(content[name])}. {remedy}")
    return content
