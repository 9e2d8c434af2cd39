"""--mode predict: one H&E slide without counts in, one AnnData file of predicted expression out.

The frozen encoder runs while the slide is read, once over every distinct tile; a tile that is the neighbor of one spot and
the patch of another is one. The global encoder wants the pooled features of all spots first: tokens and neighbor features
that are too many to be held until then are encoded in a second pass. Nothing is cached, and memory does not grow with the
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.field_of_view import MOST_MICRONS, compare_fields_of_view, pixels_of_width
from datasets.images.slides import Slide, open_slide
from evaluation.predictions import read_prediction, tissue_image, write_prediction
from modes.prediction.encode import open_patch_encoder
from modes.prediction.ensemble import (
    Member,
    describe_peak,
    field_of_view_of,
    load_members,
    peak_memory,
    provenance_of,
    shared_genes,
    width_to_match,
)
from modes.prediction.place_spots import THUMBNAIL_PX, SlideSpots, spots_of_file, spots_on_tissue
from modes.prediction.predicted import evidence_of, note_on_seen_image, predict_spots
from utils.checkpoint import checkpoints_of_runs
from utils.cli import say
from utils.files import check_writable, require_file, safe_name
from utils.text import UNIT, check_genes

TISSUE, EXPLORER = "tissue.png", "explorer.html"  # beside the file, after its name
_BYTES_A_NUMBER = 4  # of the fused prediction; what the scales take compressed varies


@dataclass(frozen=True)
class PredictOptions:
    """image: the slide.  out: the .h5ad.  spots: file of positions; without it a grid is laid over the tissue.

    pitch_px, pitch_um: distance of two spots of that grid (default: one patch beside the other).  mpp: micrometres per
    pixel, default that of the slide's metadata.  match_mpp: scale patches to the training's field of view.
    exchanged_pixels: the positions are of a published external set, whose two pixel columns are exchanged.
    min_tissue: share of a patch that must be tissue.  region: areas or a mask; only spots in it are predicted.
    geojson: the genes' predictions as QuPath detections.  genes: maps of these are drawn beside the file.
    overwrite: replace a file that is there.
    """

    image: str | Path
    out: str | Path
    spots: str | Path | None = None
    exchanged_pixels: bool = False
    pitch_px: float | None = None
    pitch_um: float | None = None
    mpp: float | None = None
    match_mpp: bool = False
    min_tissue: float | None = None
    region: str | Path | None = None
    geojson: str | Path | None = None
    genes: tuple[str, ...] = ()
    overwrite: bool = False


def predict(
    model_path: str | Path | Sequence[str | Path],
    options: PredictOptions,
    fold: int | None,
    overrides: Sequence[str],
    device: torch.device,
) -> Path:
    """Predict a slide with the mean of the finished folds of a run, or of several runs; returns the file written.

    Everything that can be wrong is found before the encoder runs, also with the file to be written.
    Raises ValueError, FileNotFoundError, or OSError where `options.out` cannot be written.
    """
    out = _check_options(options)
    checkpoints, notes = checkpoints_of_runs(model_path, fold)
    members = load_members(checkpoints, overrides, device)
    for member in members:
        member.load()
    genes = shared_genes(members)
    check_genes(options.genes, genes, "the run predicts")
    evidence = evidence_of(members, genes)
    for note in [*notes, *evidence.notes]:
        say(note)
    image = require_file(options.image, "--image should be the slide to predict.")
    name = safe_name(image.stem, "The name of the slide, that of --image without its ending,")
    with open_slide(image) as slide:
        leakage = note_on_seen_image(members, slide.fingerprint())
        if leakage is not None:
            say(leakage)
        mpp = options.mpp or slide.microns_per_pixel
        covered_px, view_note = covered_by_patch(members, mpp, options.match_mpp)
        say(view_note)
        spots = find_spots(slide, options, mpp, covered_px)
        say(spots.note)
        say(f"What is taken for tissue: {draw_tissue(slide, spots, covered_px, out)}")
        check_writable(out, needed=_BYTES_A_NUMBER * len(spots.table) * len(genes))
        encoder = open_patch_encoder(members[0], device)
        found = predict_spots(members, genes, slide, spots.centers, spots.table.obsm["grid"], encoder, covered_px)
        picture, scale = slide.thumbnail(THUMBNAIL_PX)
    write_prediction(
        out,
        slide=name,
        spot_ids=list(spots.table.obs_names),
        genes=genes,
        predictions=found.scales,
        trust=evidence.trust(genes, found.std, found.novelty),
        spatial_px=spots.table.obsm["spatial"],
        grid_xy=spots.table.obsm["grid"],
        measured=None,
        measured_unsmoothed=None,
        image=picture,
        image_scale=scale,
        spot_diameter_px=spots.spot_diameter_px,
        unit=UNIT,
        provenance={
            **provenance_of(members, notes),
            "leakage": leakage,
            "trust": " ".join(evidence.notes) or None,
            "image": image.name,
            "image_size": list(slide.size),
            "microns_per_pixel": mpp,
            "patch_covers_px": covered_px,
            "field_of_view": view_note,
            "spots": spots.note,
        },
    )
    maps, explorer = draw_maps(out, options.genes), write_explorer_of(out, options.genes)
    if options.geojson is not None:
        say(f"For QuPath: {write_geojson(out, options.geojson, options.genes)}")
    say(
        f"{out}: {len(spots.table)} spots x {len(genes)} genes, {UNIT}; {describe_members(members)}. "
        + (f"Maps: {', '.join(path.name for path in maps)}. " if maps else "")
        + f"All genes: {explorer.name}. "
        + describe_peak(peak_memory())
    )
    return out


def describe_members(members: Sequence[Member]) -> str:
    """Say whose prediction it is, in a few words."""
    runs = list(dict.fromkeys(member.run_name for member in members))
    if len(runs) > 1:
        return f"mean of {len(runs)} runs ({', '.join(runs)}) with {len(members)} models"
    return f"mean of {len(members)} folds" if len(members) > 1 else members[0].name.replace("_", " ")


def _check_options(options: PredictOptions) -> Path:
    """Contradicting or impossible flags, all in one message; returns the path to write."""
    problems = []
    out = Path(options.out)
    if out.suffix != ".h5ad":
        problems.append(f"--out {out} should end with .h5ad.")
    grid_flags = {
        "--pitch_px": options.pitch_px, "--pitch_um": options.pitch_um, "--min_tissue": options.min_tissue
    }  # fmt: skip
    given = [name for name, value in grid_flags.items() if value is not None]
    if options.spots is not None and given:
        problems.append(f"{', '.join(given)} shape the grid on the tissue, but --spots gives the positions.")
    if options.exchanged_pixels and options.spots is None:
        problems.append("--exchanged_pixels is about the columns of --spots, which is not given.")
    if options.pitch_px is not None and options.pitch_um is not None:
        problems.append("--pitch_px and --pitch_um are both given; give one of them.")
    for name, value in {**grid_flags, "--mpp": options.mpp}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            problems.append(f"{name} should be more than zero, found {value:g}.")
    if options.mpp is not None and not options.mpp < MOST_MICRONS:
        problems.append(f"--mpp is micrometres per pixel, less than {MOST_MICRONS}, found {options.mpp:g}.")
    if options.min_tissue is not None and options.min_tissue > 1:
        problems.append(f"--min_tissue is a share of a patch, at most 1, found {options.min_tissue:g}.")
    geojson = None if options.geojson is None else Path(options.geojson)
    if geojson is not None and geojson.suffix != ".geojson":
        problems.append(f"--geojson {geojson} should end with .geojson.")
    if geojson is not None and not options.genes:
        problems.append("--geojson writes the genes of --genes, which is not given.")
    for name, path in (("--out", out), ("--geojson", geojson)):
        if path is not None and path.exists() and not options.overwrite:
            problems.append(f"{name} {path} exists. Give another name, or keep that file elsewhere.")
    if problems:
        raise ValueError("\n".join(problems))
    pictures = [_beside(out, f"{_in_file_name(gene)}.svg") for gene in options.genes]
    for path in filter(None, (out, geojson, _beside(out, EXPLORER), _beside(out, TISSUE), *pictures)):
        check_writable(path)
    return out


def covered_by_patch(members: Sequence[Member], mpp: float | None, match_mpp: bool) -> tuple[int, str]:
    """Find the level-0 px that a patch covers, and say how wide it was in training and is here.

    mpp: micrometres per pixel of the slide, None if not known.  match_mpp: cover as many micrometres as in training.
    Raises ValueError where that is asked for and a size is not known.
    """
    patch_px, trained = members[0].config.DATA.patch_size, field_of_view_of(members)
    if match_mpp or members[0].config.DATA.patch_um is not None:
        if mpp is None:
            raise ValueError(
                "To match the training, --match_mpp needs the size of a pixel, which the slide does not tell. Give --mpp."
            )
        covered = pixels_of_width(width_to_match(members), mpp)
        return covered, f"A patch covers {covered} px ({covered * mpp:.0f} um), scaled to {patch_px} px as in training."
    sentence, differs = compare_fields_of_view(trained, None if mpp is None else patch_px * mpp, "this slide")
    return patch_px, f"WARNING: {sentence} --match_mpp rescales the patches." if differs else sentence


def find_spots(slide: Slide, options: PredictOptions, mpp: float | None, covered_px: int) -> SlideSpots:
    """Take the spots of the file, or those of a grid on the tissue, within the region that is wanted.

    Raises as `spots_of_file`, `spots_on_tissue`, `read_region`.
    """
    if options.spots is not None:
        spots = spots_of_file(slide, Path(options.spots), covered_px, options.exchanged_pixels)
    else:
        spots = spots_on_tissue(
            slide,
            pitch_px=options.pitch_px,
            pitch_um=options.pitch_um,
            mpp=mpp,
            covered_px=covered_px,
            min_tissue=options.min_tissue,
        )
    if options.region is None:
        return spots
    from datasets.images.region import read_region  # most predictions are of the whole slide

    return spots.within(read_region(options.region, slide.size), Path(options.region))


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}_{name}")


def _in_file_name(gene: str) -> str:
    return gene.replace("/", "-")


def draw_tissue(slide: Slide, spots: SlideSpots, covered_px: int, out: Path) -> Path:
    """Draw the tissue found and the spots beside the file, so that a thumbnail or a control in a corner is seen."""
    from datasets.images.overlay import write_tissue  # what is refused before draws nothing

    path = _beside(out, TISSUE)
    write_tissue(slide, spots.tissue, spots.centers, covered_px, path)
    return path


def draw_maps(out: Path, genes: Sequence[str]) -> list[Path]:
    """Draw PNG and SVG maps of the genes beside the file; returns the PNGs."""
    if not genes:
        return []
    # Here, because most predictions draw nothing and need no matplotlib.
    from evaluation.report.maps import Tissue, predicted_map
    from evaluation.report.style import save_figure

    adata = read_prediction(out)
    image, scale, diameter = tissue_image(adata)
    tissue = Tissue(next(iter(adata.uns["spatial"])), adata.obsm["spatial"], diameter, image, scale)
    paths = []
    for gene in genes:
        figure = predicted_map(tissue, gene, predicted=np.asarray(adata[:, gene].X).ravel(), unit=UNIT)
        paths.append(save_figure(figure, _beside(out, _in_file_name(gene)))[0])
    return paths


def write_explorer_of(out: Path, genes: Sequence[str]) -> Path:
    """Write the page that shows every gene of the file; `genes` are on it however large the slide is."""
    from evaluation.report.explorer import write_explorer  # what is refused before needs no Bokeh

    return write_explorer(_beside(out, EXPLORER), [out], title=f"Genes of {out.stem}", genes=genes)


def write_geojson(out: Path, path: str | Path, genes: Sequence[str]) -> Path:
    """Write the predictions of the genes as QuPath detections, with the novelty of the spots where it is known."""
    from evaluation.report.qupath import write_detections

    adata = read_prediction(out)
    measurements = {gene: np.asarray(adata[:, gene].X).ravel() for gene in genes}
    if "novelty" in adata.obs:
        measurements["novelty"] = adata.obs["novelty"].to_numpy()
    _, _, diameter = tissue_image(adata)
    return write_detections(path, list(adata.obs_names), adata.obsm["spatial"], diameter, measurements)
