"""The doctor's last check: what a training does before its first step, by the functions of the training itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.layout import Layout
from datasets.tokens import CachedTokens
from modes.checks.findings import Findings
from modes.checks.machine import gigabytes
from modes.training.checkpoints import FoldCheckpoints
from modes.training.compose import Optimization, is_closed_form
from modes.training.fold import new_model, untrained_fold
from modes.training.resume import check_continues, check_started_folds
from modes.training.run_data import RunData, open_run_data
from modes.training.split import prepare_split
from utils.checkpoint import is_complete
from utils.config import Config
from utils.devices import Precision
from utils.trained_fold import SplitRecord

_TOKENS_READ = 1 << 36  # bytes of token caches that are read at most: a minute or some, by the disk


def rehearse(
    config: Config,
    config_name: str,
    run_dir: Path,
    layout: Layout,
    slides: Sequence[str],
    folds: Sequence[SplitRecord],
    precision: Precision,
    findings: Findings,
) -> None:
    """Read counts and features of all slides, and prepare each fold up to its first step; whatever is raised is a problem.

    Nothing goes to a GPU, and nothing is written.
    """

    def all_folds() -> None:
        host = torch.device("cpu")
        run_data = open_run_data(config, config_name, layout, slides, host, folds, is_rehearsal=True)
        if isinstance(tokens := run_data.maker.source, CachedTokens):
            _read_tokens(tokens, findings)
        check_started_folds(run_dir, run_data)
        for record in folds:
            if not is_complete(run_dir / record.folder):
                _rehearse_fold(run_data, record, run_dir / record.folder, precision)
        findings.ok("training", f"ready for the first step of {len(folds)} fold(s): everything it needs has been read.")

    findings.attempt("training", all_folds)


def _read_tokens(tokens: CachedTokens, findings: Findings) -> None:
    """Read the tokens, which a training reads step by step, as far as that takes minutes and not hours."""
    step, size = tokens.check(_TOKENS_READ), gigabytes(tokens.store.nbytes)
    if step == 1:
        findings.ok("tokens", f"all {size} of the token caches are finite and what was written.")
    else:
        findings.warning(
            "tokens",
            f"of {size} of token caches one spot in {step} was read, and is finite and what was written. The others were not: "
            "a training compares each when it first reads it, and stops at a fault.",
        )


def _rehearse_fold(run_data: RunData, record: SplitRecord, folder: Path, precision: Precision) -> None:
    split = prepare_split(run_data, record)
    check_continues(folder, split)
    model = new_model(run_data, split)
    if not is_closed_form(run_data.config):
        checkpoints = FoldCheckpoints(folder, untrained_fold(run_data, split), 0.0)
        checkpoints.check_room(model)
        checkpoints.restore(model, Optimization.of(model, run_data.config, precision))
