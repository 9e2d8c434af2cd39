"""Pictures of one fold or external test, made from what it left on disk, and their list beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure

from evaluation import aggregation
from evaluation.fold_files import FoldRecord, prediction_files, read_fold
from evaluation.predictions import MEASURED, read_prediction, slide_of, tissue_image
from evaluation.report import figures
from evaluation.report.maps import Tissue, gene_maps
from evaluation.report.style import save_figure
from utils.files import reading, sha256, write_text
from utils.text import check_genes, some
from utils.untrusted.text import cells_of, text_of

INDEX = "index.json"
_DRAWING = 2  # counted up whenever the same results come to be drawn otherwise


@dataclass(frozen=True)
class Picture:
    """One saved figure. name: file name without suffix; kind: "curves", "distribution", "bars", "patients", "clusters",
    "map" or "scatter"; group: "chosen", "best" or "worst" for genes; alt: what it shows, for who cannot see it."""

    name: str
    kind: str
    caption: str
    alt: str
    group: str = ""


def write_figures(fold_dir: str | Path, *, genes: Sequence[str] = (), count: int = 2) -> list[Picture]:
    """Write the figures of a fold as PNG and SVG into its `figures/`, with their list in `figures/index.json`.

    genes: chosen genes, drawn on every test slide. count: that many of the best and of the worst genes (by the PCC of
    the fused prediction within the fold) are drawn too, each on the slide whose PCC is nearest to that mean.
    Raises ValueError for genes outside the panel, FileNotFoundError when the fold is not complete.
    """
    record = read_fold(fold_dir)
    check_genes(genes, record.genes, f"{record.path} predicts")
    pictures = draw_figures(record, f"fold {record.name}", genes, count)
    index = {"made_from": _state(record.path, genes, count), "pictures": [asdict(picture) for picture in pictures]}
    write_text(record.path / "figures" / INDEX, json.dumps(index, indent=1) + "\n")
    return pictures


def draw_figures(record: FoldRecord, where: str, genes: Sequence[str], count: int) -> list[Picture]:
    """Draw what `write_figures` does into `figures/` of the record's folder. where: what alternative texts call it."""
    pictures = []
    for picture, figure in [*_charts(record, where), *_gene_pictures(record, where, genes, count)]:
        save_figure(figure, record.path / "figures" / picture.name)
        pictures.append(picture)
    return pictures


def figures_of(fold_dir: str | Path, *, genes: Sequence[str] = (), count: int = 2) -> list[Picture]:
    """Give the figures of a fold as they are on disk, made anew when results or wishes have changed since.

    genes, count: as in `write_figures`, which also says what is raised.
    """
    found = figures_on_disk(fold_dir, genes=genes, count=count)
    return write_figures(fold_dir, genes=genes, count=count) if found is None else found


def figures_on_disk(fold_dir: str | Path, *, genes: Sequence[str] = (), count: int = 2) -> list[Picture] | None:
    """Find the figures of a fold if all are there and neither results nor wishes have changed since; otherwise None."""
    folder = Path(fold_dir) / "figures"
    if not (folder / INDEX).is_file():
        return None
    try:
        with reading(folder / INDEX, "the list of figures"):
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            pictures, made_from = [Picture(**picture) for picture in index["pictures"]], index["made_from"]
    except ValueError:  # damaged; then they are drawn anew
        return None
    is_whole = all((folder / f"{picture.name}.png").is_file() for picture in pictures)
    return pictures if is_whole and made_from == _state(Path(fold_dir), genes, count) else None


def _state(fold_dir: Path, genes: Sequence[str], count: int) -> dict[str, object]:
    """What the figures depend on: when it is the same, so are they."""
    sources = ("result.json", "per_gene_slide.csv", "metrics.jsonl", "clusters.csv")
    hashes = {name: sha256(fold_dir / name) for name in sources if (fold_dir / name).is_file()}
    # The predictions are written before result.json by the same evaluation; their sizes tell a lost or replaced file.
    predictions = {path.name: path.stat().st_size for path in prediction_files(fold_dir)}
    return {"drawing": _DRAWING, "files": hashes, "predictions": predictions, "genes": list(genes), "count": count}


def _charts(record: FoldRecord, where: str) -> Iterable[tuple[Picture, Figure]]:
    if len(record.epochs):
        yield (
            Picture("training_curves", "curves", "", f"Loss terms, MSE and PCC(A) over the epochs of {where}"),
            figures.training_curves(record.epochs.to_dict("records"), selected_epoch=record.result.get("epoch")),
        )
    table = aggregation.gene_table(record.per_gene_slide, record.protocol)
    yield (
        Picture("pcc_distribution", "distribution", "PCC over genes", f"PCC of every gene by scale, {where}"),
        figures.pcc_distribution(pcc_by_scale(table)),
    )
    fused = aggregation.select(table)
    slides = aggregation.select(record.per_gene_slide)
    spread = slides.groupby("gene")["pearson"].std().reindex(fused["gene"])
    yield (
        Picture("gene_bars", "bars", "Best and worst genes", f"The genes of highest and lowest PCC, {where}"),
        figures.gene_bars(list(fused["gene"]), fused["pearson"].to_numpy(), spread=spread.to_numpy()),
    )
    scores = slides.groupby(["patient", "slide"], sort=False)["pearson"].mean()
    by_patient = {name: group.tolist() for name, group in scores.groupby(level="patient", sort=False)}
    yield (
        Picture("patients", "patients", "Slides and patients", f"PCC(A) of every slide and patient, {where}"),
        figures.patient_dots(by_patient, mean=float(record.result["pcc_all"] or np.nan), interval=None),
    )
    if (record.path / "clusters.csv").is_file():
        clusters = read_clusters(record.path / "clusters.csv")
        group = "patient" if clusters["patient"].nunique() > 1 else "slide"
        if clusters[group].nunique() > 1:  # else all of them are of one, and nothing is to be seen
            alt = f"{group.capitalize()}s of which the clusters of a batch are made, image and gene vectors, {where}"
            yield (
                Picture("clusters", "clusters", f"{len(clusters)} training spots, clustered by each modality.", alt),
                figures.cluster_composition(*(clusters[name] for name in ("image_cluster", "gene_cluster", group))),
            )


def read_clusters(path: Path) -> pd.DataFrame:
    """Read to which cluster each spot of a batch belongs: slide, patient, image_cluster, gene_cluster.

    Raises ValueError naming the file if a column is missing, or a cluster is no whole number from 0 on.
    """
    with reading(path, "a table of clusters", "Move it elsewhere: nothing but the figure of the clusters is lost."):
        table = cells_of(text_of(path), ",")[["slide", "patient", "image_cluster", "gene_cluster"]]
        for name in ("image_cluster", "gene_cluster"):
            if not table[name].str.fullmatch(r"\d{1,9}").all():
                raise ValueError(f"{name} should be whole numbers, found {some(sorted(set(table[name])))}")
            table[name] = table[name].astype(np.int64)
        return table


def pcc_by_scale(gene_table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Collect scale -> PCC (G,) of every gene against the smoothed target, for the scales that were predicted."""
    scales = [scale for scale in gene_table["scale"].unique() if scale != "training_mean"]
    return {scale: aggregation.select(gene_table, scale)["pearson"].to_numpy() for scale in scales}


def _gene_pictures(
    record: FoldRecord, where: str, genes: Sequence[str], count: int
) -> Iterable[tuple[Picture, Figure]]:
    """Maps and scatter of chosen, best and worst genes; slides are read one at a time."""
    slides = aggregation.select(record.per_gene_slide).pivot(index="slide", columns="gene", values="pearson")
    wishes = [(slide, gene, "chosen") for gene in genes for slide in slides.index]
    means = aggregation.fused_gene_pcc(record.per_gene_slide).dropna().sort_values(ascending=False, kind="stable")
    count = min(count, len(means) // 2)
    for group, names in (("best", means.index[:count]), ("worst", means.index[len(means) - count :])):
        wishes += [((slides[gene] - means[gene]).abs().idxmin(), gene, group) for gene in names]
    opened: dict[str, AnnData | None] = {}
    for slide, gene, group in wishes:
        if slide not in opened:
            # One slide at a time is held: a Visium slide takes hundreds of megabytes.
            opened = {slide: _prediction(record, slide)}
        if opened[slide] is not None:
            yield from _one_gene(opened[slide], gene, group, where, float(slides.loc[slide, gene]))


def _prediction(record: FoldRecord, slide: str) -> AnnData | None:
    """The prediction file of a slide, or None where the run kept none."""
    path = record.path / "predictions" / f"{slide}.h5ad"
    if not path.is_file():
        return None
    adata = read_prediction(path)
    return adata if MEASURED in adata.layers else None


def _one_gene(adata: AnnData, gene: str, group: str, where: str, pearson: float) -> Iterable[tuple[Picture, Figure]]:
    column = adata.var_names.get_loc(gene)
    slide, unit = slide_of(adata), str(adata.uns["unit"])
    measured, predicted = np.asarray(adata.layers[MEASURED])[:, column], np.asarray(adata.X)[:, column]
    image, image_scale, diameter = tissue_image(adata)
    tissue = Tissue(slide, np.asarray(adata.obsm["spatial"]), diameter, image, image_scale)
    stem = f"{group}_{re.sub(r'[^A-Za-z0-9._-]+', '_', gene)}_{slide}"
    caption = f"{gene} on slide {slide}" + ("" if group == "chosen" else f", among the {group} genes of {where}")
    yield (
        Picture(f"map_{stem}", "map", caption, f"Measured, predicted and error of {gene} on slide {slide}", group),
        gene_maps(tissue, gene, measured=measured, predicted=predicted, unit=unit, pearson=pearson),
    )
    yield (
        Picture(f"scatter_{stem}", "scatter", caption, f"Predicted against measured {gene}, slide {slide}", group),
        figures.scatter(gene, measured=measured, predicted=predicted, unit=unit, pearson=pearson),
    )
