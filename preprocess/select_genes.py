"""Choose a gene panel from the counts of a prepared data set, and write how it was made beside it.

    python preprocess/select_genes.py --config her2st/dml --method mean
    python preprocess/select_genes.py --type her2st --method hvg --num_genes 250 --fold 0

Without --fold all slides are used, as in the paper, and the panel goes to genes_<type>.npy. With --fold only the training
patients of that fold are, so that nothing of the test patients enters, and it goes to genes_<type>_fold<F>.npy. Only genes
that every slide of the data set has are chosen.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse
import warnings
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
import scanpy
from anndata import AnnData

from datasets.folds import Fold, available_folds, make_folds
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.expression import genes_by_mean, highest_mean_panel
from datasets.tables.genes_in_common import genes_in_common
from datasets.tables.slide_table import load_slide
from preprocess.raw.panels import PANEL_METHODS, write_panel
from utils.cli import progress, run, say
from utils.config import load_config
from utils.text import some

LEAST_SPOTS = 10  # of a slide, for a dispersion


def select_genes(
    layout: Layout,
    *,
    method: str = "mean",
    num_genes: int = 250,
    fold: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Choose a panel and write it. Returns the genes, in alphabetical order.

    Raises ValueError if the fold does not exist, another panel is there already, and as `genes_in_common`.
    """
    slides = [slide for slide in layout.slides_with_counts() if layout.spots_path(slide).is_file()]
    if not slides:
        raise FileNotFoundError(f"{layout.root} holds no slide with counts and a spot table.")
    chosen = None if fold is None else find_fold(layout, slides, fold)
    used = slides if chosen is None else [s for s in slides if layout.spec.patient_of(s) in chosen.train_patients]
    path = out or (
        layout.panel_path if fold is None else layout.panel_path.with_stem(f"{layout.panel_path.stem}_fold{fold}")
    )
    if path.suffix != ".npy":
        raise ValueError(f"--out {path} should end in .npy; the record of how it was made goes beside it as .json.")
    tables = [load_slide(layout, slide) for slide in progress(slides, description="counts", unit="slide")]
    shared = genes_in_common({table.uns["slide"]: table.var_names for table in tables}, num_genes)
    panel = choose([table[:, shared] for table in tables if table.uns["slide"] in used], method, num_genes)
    how = {
        "data_set": layout.name,
        "slides": used,
        "spots": sum(table.n_obs for table in tables if table.uns["slide"] in used),
        "genes_in_common": len(shared),
    }
    if chosen is not None:
        how |= {"fold": chosen.index, "train_patients": chosen.train_patients, "left_out": chosen.test_patients}
    done = write_panel(path, panel, overwrite=overwrite, method=method, **how)
    if "is kept: it holds this panel" not in done and "is kept" in done:
        raise ValueError(done)
    say(f"{done} From {len(used)} slides of {len({layout.spec.patient_of(s) for s in used})} patients.")
    return panel


def find_fold(layout: Layout, slides: Sequence[str], index: int) -> Fold:
    """Find the fold with this index, as training counts them, its training patients restricted to those with counts."""
    spec = layout.spec
    patients = list(spec.patients) or sorted({spec.patient_of(slide) for slide in layout.slides_on_disk()})
    with_counts = {spec.patient_of(slide) for slide in slides} & set(patients)
    folds, notices = available_folds(
        make_folds(patients, spec.fold_scheme, spec.num_folds, spec.fold_seed), with_counts
    )
    for fold in folds:
        if fold.index == index:
            return fold
    possible = ", ".join(f"{fold.index} ({fold.name})" for fold in folds)
    raise ValueError(f"--fold {index} does not exist or has no slides; possible are {possible}. {' '.join(notices)}")


def choose(slides: Sequence[AnnData], method: str, num_genes: int) -> list[str]:
    """Choose the panel by one of `PANEL_METHODS`, alphabetical. All slides have the same genes."""
    if method in ("mean", "mean_raw"):
        return highest_mean_panel(slides, num_genes, "log" if method == "mean" else "raw")
    variable = genes_by_variability(slides, num_genes)
    if method == "hvg":
        return sorted(variable[:num_genes])
    rank_of_mean = {gene: rank for rank, gene in enumerate(genes_by_mean(slides))}
    worse = {gene: max(rank, rank_of_mean[gene]) for rank, gene in enumerate(variable)}
    return sorted(sorted(worse, key=lambda gene: (worse[gene], gene))[:num_genes])


def genes_by_variability(slides: Sequence[AnnData], num_genes: int) -> list[str]:
    """Rank genes, most variable first, by scanpy's dispersion within each slide.

    Slides are the batches: first the genes that are among the `num_genes` most variable of the most slides, then by mean
    normalised dispersion, then by name. Differences between slides (staining, depth) thus do not make a gene variable.
    Slides with fewer than `LEAST_SPOTS` spots with counts, or where no two genes vary, are left out, which is said.
    Raises ValueError if no slide is left.
    """
    normalised = [_log_normalised(slide) for slide in slides]
    used = [slide for slide in normalised if _can_be_ranked(slide)]
    if left_out := [slide.uns["slide"] for slide in normalised if not _can_be_ranked(slide)]:
        message = f"too few spots to tell which genes vary ({LEAST_SPOTS} with counts are needed): {some(left_out)}."
        if not used:
            raise ValueError(f"All slides have {message} Choose --method mean.")
        say(f"Left out of the ranking by variability, {message}")
    joined = anndata.concat(used, label="slide", keys=[slide.uns["slide"] for slide in used], index_unique=":")
    with warnings.catch_warnings():
        # scanpy sorts and fills tables of its own in ways that pandas is about to change
        warnings.simplefilter("ignore", FutureWarning)
        scanpy.pp.highly_variable_genes(joined, n_top_genes=num_genes, flavor="seurat", batch_key="slide")
    found = pd.DataFrame(
        {
            "slides": -joined.var["highly_variable_nbatches"].astype(int),
            "dispersion": -joined.var["dispersions_norm"].astype(float).fillna(-np.inf),
            "name": joined.var_names,
        }
    )
    return found.sort_values(["slides", "dispersion", "name"])["name"].tolist()


def _log_normalised(slide: AnnData) -> AnnData:
    """The spots that have counts, as log(1 + counts per 10 000), float32."""
    result = AnnData(
        slide.X.astype(np.float32), obs=slide.obs[[]], var=slide.var[[]], uns={"slide": slide.uns["slide"]}
    )
    result = result[np.asarray(result.X.sum(axis=1)).ravel() > 0].copy()
    if result.n_obs:
        scanpy.pp.normalize_total(result, target_sum=1e4)
        scanpy.pp.log1p(result)
    return result


def _can_be_ranked(slide: AnnData) -> bool:
    """Whether scanpy finds a dispersion in it."""
    if slide.n_obs < LEAST_SPOTS:
        return False
    varies = slide.X.max(axis=0).toarray() > slide.X.min(axis=0).toarray()
    return int(varies.sum()) > 1


def main() -> None:
    """Read the command line and choose a panel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="configuration, for example her2st/dml: gives type, data_dir and num_genes")
    which.add_argument("--type", help="data set: a folder below --data_dir")
    parser.add_argument(
        "--method", choices=list(PANEL_METHODS), default="mean", help="rule of choice (default: mean, the paper's)"
    )
    parser.add_argument(
        "--num_genes", type=int, help="genes of the panel (default: that of the configuration, else 250)"
    )
    parser.add_argument("--fold", type=int, help="use the training patients of this fold only")
    parser.add_argument(
        "--data_dir", type=Path, help="folder of all data sets (default: that of the configuration, else data)"
    )
    parser.add_argument("--out", type=Path, help="file to write, .npy")
    parser.add_argument("--overwrite", action="store_true", help="replace a panel that is there")
    given = parser.parse_args()
    data = load_config(given.config).DATA if given.config else None
    data_dir = given.data_dir or Path(data.data_dir if data else "data")
    select_genes(
        Layout(data_dir, get_spec(data.type if data else given.type, data_dir)),
        method=given.method,
        num_genes=given.num_genes if given.num_genes is not None else data.num_genes if data else 250,
        fold=given.fold,
        out=given.out,
        overwrite=given.overwrite,
    )


if __name__ == "__main__":
    run(main)
