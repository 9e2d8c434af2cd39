"""--mode doctor: everything that can be known about a run before its first step, with remedies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets.layout import Layout
from datasets.spots import SlideRecord
from models.patch_encoders.build import PatchEncoderSpec
from modes.checks.checkpoint import check_checkpoints, check_fields_of_view, check_shared_tissue
from modes.checks.data import check_features, check_panel, check_slides, read_tables
from modes.checks.findings import FINISHED, PROBLEM, WARNING, Findings
from modes.checks.left_over import check_left_over
from modes.checks.machine import check_device, check_memory, check_patch_encoder_files, check_token_cache
from modes.checks.rehearsal import rehearse
from modes.checks.tissue import check_spots_on_images
from modes.parallel.folds import check_nobody_works_on
from modes.prediction.model import needs_of
from modes.prediction.summary import check_scored_folds
from modes.training.compose import open_layout
from modes.training.memory import demand, tokens_of_spot
from modes.training.plan import lacks_validation, plan_folds
from modes.training.run_data import check_clusters, runs_encoder
from utils.cli import say
from utils.config import Config
from utils.devices import Precision
from utils.runs import FinishedRun, check_run, read_versions, result_of
from utils.trained_fold import SplitRecord


@dataclass(frozen=True)
class Question:
    """What the doctor is asked beside the configuration. config_name: as given. run_dir: where a training would write."""

    config_name: str
    run_dir: Path
    resume: bool = False
    gpu: int | None = None
    device: str | None = None
    fold: int | None = None
    model_path: str | None = None
    test_name: str | None = None


def doctor(config: Config, question: Question) -> None:
    """Say every finding, one line each; ValueError (exit status 2) when something would stop a run."""
    findings = examine(config, question)
    for finding in findings.found:
        say(str(finding))
    problems, warnings = findings.count(PROBLEM), findings.count(WARNING)
    if problems:
        raise ValueError(f"{problems} problem(s) would stop this run; each is listed above with what to do about it.")
    if findings.count(FINISHED):
        raise ValueError(f"This run is finished, so the same command trains nothing ({warnings} warning(s)).")
    say(f"Nothing would stop this run ({warnings} warning(s)).")


def examine(config: Config, question: Question) -> Findings:
    """Collect all findings, from the data folder to the memory; what depends on something missing is left out."""
    findings = Findings()
    device = check_device(question.gpu, question.device, findings)
    if question.model_path is None:
        findings.attempt("run", lambda: _check_run(config, question, findings))
    layout = findings.attempt("data", lambda: open_layout(config, question.config_name, question.test_name))
    if layout is None:
        return findings
    slides = check_slides(layout, findings)
    records = read_tables(layout, slides, findings)
    have_features = False
    if records:
        before = findings.count(PROBLEM)
        check_features(config, layout, records, findings)
        have_features = findings.count(PROBLEM) == before
        check_spots_on_images(layout, records, findings)
        check_shared_tissue(config, layout, slides, findings)
        check_fields_of_view(layout, slides, findings)
    spec = check_patch_encoder_files(config, layout, slides, have_features, findings)
    is_training = question.test_name is None and question.model_path is None
    folds = _check_training(config, question, layout, slides, records, findings) if records and is_training else None
    if records and spec is not None:
        _check_sizes(config, layout, records, spec, device, findings)
    check_left_over(layout, question.run_dir if is_training else None, findings)
    if folds and device is not None and not findings.count(PROBLEM):
        precision = Precision(config.TRAINING.precision, device)
        rehearse(config, question.config_name, question.run_dir, layout, slides, folds, precision, findings)
    if question.model_path is not None:
        check_checkpoints(question.model_path, question.fold, config, layout, slides, findings)
    return findings


def _check_run(config: Config, question: Question, findings: Findings) -> None:
    """Whether the run may start or go on; that it is finished is no problem."""
    asked = [] if question.fold is None else [f"fold_{question.fold}"]
    try:
        check_run(question.run_dir, config, question.resume, asked)
    except FinishedRun as finished:
        findings.finished("run", str(finished))
        return
    check_scored_folds(question.run_dir, in_full=True)
    if (noted := question.run_dir / "versions.json").is_file():
        try:
            read_versions(noted)
        except ValueError as error:  # stops nothing
            findings.warning("run", f"{error} The next start keeps it beside a new one.")
    if question.resume and (result := result_of(question.run_dir, asked)):
        findings.ok("run", f"{question.run_dir} is finished, so --resume only makes its summary again: {result}.")


def _check_training(
    config: Config,
    question: Question,
    layout: Layout,
    slides: Sequence[str],
    records: Sequence[SlideRecord],
    findings: Findings,
) -> list[SplitRecord] | None:
    """Genes, folds, and clusters against the batches of each; records: of those slides whose tables fit; gives the folds."""
    check_panel(config, layout, records, findings)
    folds = findings.attempt("folds", lambda: _folds(config, layout, slides, question.fold, findings))
    if folds:
        findings.attempt("run", lambda: check_nobody_works_on(question.run_dir, folds))
    if folds and len(records) == len(slides):
        findings.attempt("clusters", lambda: check_clusters(config, records, folds))
    return folds


def _check_sizes(
    config: Config,
    layout: Layout,
    records: Sequence[SlideRecord],
    spec: PatchEncoderSpec,
    device: torch.device | None,
    findings: Findings,
) -> None:
    """What the slides need of disk and memory."""
    spots, slides = records[-1].stop, [record.name for record in records]
    check_token_cache(config, layout, spots, slides, spec, findings)
    if device is None:
        return
    online = needs_of(config).tokens and runs_encoder(config, layout, slides)
    precision = findings.attempt("device", lambda: Precision(config.TRAINING.precision, device))
    if precision is not None:
        sizes = [record.stop - record.start for record in records]
        half = precision.dtype != torch.float32
        need = findings.attempt(
            "memory",
            lambda: demand(config, spec, spots, sizes, online, half, tokens_of_spot(layout, slides, spec)),
        )
        if need is not None:
            check_memory(need, device, findings, config.DATA.residence)


def _folds(
    config: Config, layout: Layout, slides: Sequence[str], wanted: int | None, findings: Findings
) -> list[SplitRecord]:
    """The folds that can be run, said with their patients; of these the one that is wanted, or all."""
    folds, notices = plan_folds(config, layout.spec, {slide: layout.spec.patient_of(slide) for slide in slides})
    for notice in notices:
        findings.warning("folds", notice)
    names = ", ".join(f"{fold.fold} ({fold.name})" for fold in folds)
    if wanted is not None and wanted not in [fold.fold for fold in folds]:
        raise ValueError(f"fold {wanted} cannot be run; these can: {names}. Choose one of them with --fold.")
    alone = [fold.name for fold in folds if lacks_validation(config, fold)]
    if alone:
        findings.warning(
            "folds",
            f"{', '.join(alone)}: one training patient, none of whom can be held out to choose the epoch; all "
            f"{config.TRAINING.epochs} epochs are trained. Choose a number with --fixed_epochs N.",
        )
    findings.ok("folds", f"{len(folds)} can be run: {names}.")
    return [fold for fold in folds if wanted in (None, fold.fold)]
