"""The doctor on what the files cannot say by themselves: tissue in two data sets, fields of view, a checkpoint's fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.features.cache import read_identity
from datasets.features.places import find_cache
from datasets.field_of_view import TOLERANCE, compare_fields_of_view
from datasets.known_sets import SAME_TISSUE, get_spec, leaking_slides
from datasets.layout import Layout
from modes.checks.findings import Findings
from utils.checkpoint import chosen_checkpoints, load_checkpoint
from utils.config import Config
from utils.text import some
from utils.trained_fold import TrainedFold


def check_shared_tissue(config: Config, layout: Layout, slides: Sequence[str], findings: Findings) -> None:
    """Warn when the same tissue is prepared twice below data_dir, under the names of two data sets."""
    mine = {layout.spec.patient_of(slide) for slide in slides}
    for (first, second), pairs in SAME_TISSUE.items():
        if layout.name not in (first, second):
            continue
        other = second if layout.name == first else first
        partner = pairs if layout.name == first else {there: here for here, there in pairs.items()}
        theirs = _patients_of(config, other)
        both = [
            f"{patient} = {partner[patient]}" for patient in sorted(mine & set(partner)) if partner[patient] in theirs
        ]
        if both:
            findings.warning(
                "tissue",
                f"{layout.name} and {other} hold the same tissue: {', '.join(both)}. Train on one and test on the other only "
                "without these patients; --mode external_test names them.",
            )


def _patients_of(config: Config, name: str) -> set[str]:
    """Patients of another data set below data_dir; none where it is not prepared."""
    spec = get_spec(name, config.DATA.data_dir)
    other = Layout(config.DATA.data_dir, spec, patch_size=config.DATA.patch_size)
    if not other.counts_dir.is_dir():
        return set()
    return {spec.patient_of(slide) for slide in other.slides_with_counts() if not spec.slides or slide in spec.slides}


def fields_of_view(layout: Layout, slides: Sequence[str]) -> dict[str, float]:
    """Find {slide: width of its patch in micrometres}, from cache (what the image said) or data set; unknown left out."""
    found = {}
    for slide in slides:
        path = find_cache(layout, "target", slide)
        try:
            identity = read_identity(path) if path.exists() else None
        except ValueError:  # a damaged cache has been told by then
            identity = None
        microns = (identity.microns_per_pixel if identity else None) or layout.spec.microns_of(slide)
        if microns:
            found[slide] = microns * ((identity.covered_px if identity else None) or layout.patch_size)
    return found


def check_fields_of_view(layout: Layout, slides: Sequence[str], findings: Findings) -> dict[str, float]:
    """Warn when patches of the slides differ by more than `TOLERANCE` in width; returns the widths in micrometres."""
    found = fields_of_view(layout, slides)
    if not found:
        findings.warning(
            "view",
            f"the size of a pixel is not known for any slide of {layout.name}, so fields of view cannot be compared. Write "
            f"microns_per_pixel into {layout.spec_path}, if you know it.",
        )
        return found
    least, greatest = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    widths = f"patches are {found[least]:.0f} um ({least}) to {found[greatest]:.0f} um ({greatest}) wide"
    if found[greatest] > (1 + TOLERANCE) * found[least]:
        large = [slide for slide, width in found.items() if width > (1 + TOLERANCE) * found[least]]
        findings.warning(
            "view",
            f"{widths}: cells look smaller on {some(large, 12)}. The published work trains so; slides scanned anew or scaled "
            "to one pixel size would be better.",
        )
    else:
        findings.ok("view", f"{widths} on {len(found)} of {len(slides)} slides.")
    return found


def check_checkpoints(
    model_path: str, fold: int | None, config: Config, layout: Layout, slides: Sequence[str], findings: Findings
) -> None:
    """Compare the folds of a run with the configuration's data: tissue seen in training, encoder, sizes, field of view."""
    folds = findings.attempt("model", lambda: _read_folds(model_path, fold, findings))
    if not folds:
        return
    path, trained = next(iter(folds.items()))
    data_type = trained.config.DATA.type
    findings.ok(
        "model",
        f"{len(folds)} fold(s) of {model_path}: {trained.config.MODEL.name} trained on {data_type}, "
        f"{len(trained.genes)} genes, features of {trained.encoder.name}.",
    )
    _check_same_inputs(path, trained, config, findings)
    if data_type != layout.name:
        patients = {patient for each in folds.values() for patient in each.split.fitted_patients}
        leaks = leaking_slides(data_type, patients, {slide: layout.spec.patient_of(slide) for slide in slides})
        if leaks:
            findings.warning(
                "tissue",
                f"{len(leaks)} of {len(slides)} slides show tissue that the run has been trained on: "
                f"{'; '.join(list(leaks.values())[:4])}{'; ...' if len(leaks) > 4 else ''}. Leave them out of a test.",
            )
    widths = fields_of_view(layout, slides)
    here = sum(widths.values()) / len(widths) if widths else None
    sentence, differs = compare_fields_of_view(trained.field_of_view_um, here, layout.name)
    if differs:
        findings.warning("view", f"{sentence} --mode predict --match_mpp scales the patches to those of the training.")
    elif here is not None and trained.field_of_view_um:
        findings.ok("view", sentence)


def _read_folds(model_path: str, fold: int | None, findings: Findings) -> dict[Path, TrainedFold]:
    chosen, notes = chosen_checkpoints(model_path, fold)
    for note in notes:
        findings.warning("model", note)
    return {checkpoint: load_checkpoint(checkpoint, memory_map=True).without_weights() for checkpoint in chosen}


def _check_same_inputs(path: Path, trained: TrainedFold, config: Config, findings: Findings) -> None:
    made, data = trained.encoder, trained.config.DATA
    differences = [
        f"{what} {mine} here, {theirs} in training"
        for what, mine, theirs in (
            ("encoder", config.DATA.encoder, made.name),
            ("DATA.patch_size", config.DATA.patch_size, data.patch_size),
            ("DATA.patch_um", config.DATA.patch_um, data.patch_um),
            ("DATA.num_neighbors", config.DATA.num_neighbors, data.num_neighbors),
        )
        if mine != theirs
    ]
    if differences:
        findings.problem(
            "model",
            f"{path} cannot use the features of this configuration: {'; '.join(differences)}. Extract features with the "
            f"run's own: python preprocess/extract_features_uni.py --config {trained.config_name} --encoder {made.name} "
            "--extract_mode all",
        )
