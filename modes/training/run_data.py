"""What all folds of a run share: its slides, their features and tokens, the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch

from datasets.batches import BatchMaker, check_batch_sizes, epoch_rows
from datasets.digests import check_told_apart, digests_of
from datasets.features.neighbor_files import Residence
from datasets.features.places import find_cache
from datasets.features.reader import FeatureReader
from datasets.layout import Layout
from datasets.spots import SlideRecord, SpotStore, named, slide_of_row
from datasets.tables.expression import panel_of_sums
from datasets.tables.gene_list import check_given_genes, given_genes
from datasets.tables.genes_in_common import genes_in_common
from datasets.targets import check_panel, note_on_counts
from datasets.tokens import WITHOUT_TOKENS, CachedTokens, CutPatches, open_tokens
from models.patch_encoders.build import PatchEncoder, PatchEncoderSpec, patch_encoder_spec
from modes.prediction.model import POOLED, has_pooled_target, needs_of
from modes.prediction.slide import Encode
from modes.training.compose import find_patch_encoder_weights, groups_spots, make_encode, make_patch_encoder
from modes.training.memory import Demand, demand, tokens_of_spot
from utils.cli import say
from utils.config import Config
from utils.devices import Precision
from utils.files import load_names
from utils.parallel.team import ALONE, Team
from utils.runs import generator_for
from utils.trained_fold import SplitRecord

# For the counts of all genes until the panel is known: the tables of four sections of the bulb take 1.0 s instead of 1.7 s.
_SPARE_BYTES = 1 << 30
# Token caches of so many bytes in all are read before a training begins, which takes seconds and is needed for its first epochs
# anyway. Larger ones are compared block by block when a step first reads them: to read them first would take minutes. The
# doctor does.
TOKENS_READ_FIRST = 1 << 32
OF_CONFIGURATION = "--set DATA.num_genes=N, N"


@dataclass
class RunData:
    """Data and devices of a run; everything that does not depend on the fold. team: the processes that share each batch."""

    config: Config
    config_name: str
    layout: Layout
    device: torch.device
    store: SpotStore
    maker: BatchMaker
    encode: Encode
    token_dim: int
    team: Team = ALONE

    @property
    def precision(self) -> Precision:
        """A new one of the configured kind: its gradient scaler belongs to one training."""
        return Precision(self.config.TRAINING.precision, self.device)

    @cached_property
    def digests(self) -> dict[str, dict[str, str]]:
        """Of the data of every slide, as `datasets.digests.digests_of`."""
        source = self.maker.source
        tokens = source.store if isinstance(source, CachedTokens) else None
        return digests_of(self.store, [slide.name for slide in self.store.slides], tokens)

    @property
    def token_source(self) -> dict[str, object]:
        """Where the target tokens come from and in which variant, for `split.json`: what a run was trained on."""
        source = self.maker.source
        if not needs_of(self.config).tokens:
            return {"source": POOLED if has_pooled_target(self.config) else "none"}
        if not isinstance(source, CachedTokens):
            return {"source": "encoder", "views": CutPatches.num_views, "token_pool": 1}
        identity = source.store.identity
        return {
            "source": "cache",
            "views": identity.views,
            "token_pool": identity.token_pool,
            "dtype": identity.dtype,
            "precision": identity.precision,
        }

    @property
    def token_pool(self) -> int:
        """By how much the grid of patch tokens is pooled in the token caches; 1 where the encoder runs."""
        source = self.maker.source
        return source.store.identity.token_pool if isinstance(source, CachedTokens) else 1


def open_run_data(
    config: Config,
    config_name: str,
    layout: Layout,
    slides: Sequence[str],
    device: torch.device,
    folds: Sequence[SplitRecord] = (),
    team: Team = ALONE,
    *,
    genes: Sequence[str] | None = None,
    is_rehearsal: bool = False,
) -> RunData:
    """Read and verify tables, features and tokens of the slides; nothing is read from disk again but tokens, and neighbor
    features that do not fit into memory.

    folds: those that will be trained; k and the gene panel are checked against them, and the counts of their panels are
    held, beside those of `genes`; without folds and genes those of all genes. The cheap comes first: the encoder and its
    weights, then tables and headers of caches, then k and panel, and only then the features are read.
    is_rehearsal: no step will be made, so patches for the encoder are not cut; everything is checked all the same.
    Raises ValueError or FileNotFoundError for whatever cannot be used, with the command that repairs it.
    """
    needs = needs_of(config)
    spec = patch_encoder_spec(config.DATA.encoder)
    if needs.tokens and runs_encoder(config, layout, slides):
        _check_encoder_can_run(config)
    panel = fixed_panel(config, layout) if folds else None
    reader = FeatureReader(layout, config.DATA.encoder, with_neighbors=needs.neighbors)
    is_whole = genes is None and not folds
    records = reader.read_tables(
        slides,
        keep=None if is_whole else [*(genes or ()), *(panel or ())],
        spare_bytes=_SPARE_BYTES if folds and panel is None else 0,
    )
    if (note := note_on_counts(records)) and not is_rehearsal:
        say(note)
    check_clusters(config, records, folds)
    if folds:
        genes_in_common(_measured(records))
    check_fixed_panel(config, records, panel or [])
    if folds and panel is None:
        panels = [choose_panel(config, layout, named(records, fold.fitted_slides)) for fold in folds]
        records = reader.read_genes(records, set(genes or ()).union(*panels))
    need = _demand(config, layout, spec, records, device)
    reserve = need.on_device if device.type == "cuda" else 0
    store = reader.read_features(records, _residence(config, need, device))
    _check_width(store, spec, layout)
    source: CachedTokens | CutPatches | None = None
    encoder: PatchEncoder | None = None
    if needs.tokens:
        encoder = _online_encoder(config, layout, store, device)
        if encoder is None or not is_rehearsal:
            source = _open_source(config, layout, store, device, reserve)
    if folds and isinstance(source, CachedTokens) and source.store.nbytes <= TOKENS_READ_FIRST:
        source.check(TOKENS_READ_FIRST)
    if encoder is not None:
        token_dim = encoder.dim
    else:
        token_dim = source.dim if isinstance(source, CachedTokens) else store.target_features.shape[1]
    run_data = RunData(
        config=config,
        config_name=config_name,
        layout=layout,
        device=device,
        store=store,
        maker=BatchMaker(store, source, device, config.DATA.residence, reserve),
        encode=make_encode(encoder),
        token_dim=token_dim,
        team=team,
    )
    check_told_apart(records, run_data.digests)
    return run_data


def fixed_panel(config: Config, layout: Layout) -> list[str] | None:
    """Return the panel that is the same for all folds: the given one, or that of the data folder (paper); else None.

    Raises ValueError or FileNotFoundError where it cannot be read.
    """
    if config.DATA.genes is not None:
        return given_genes(config.DATA.genes)
    return load_names(layout.panel_path) if config.EVALUATION.protocol == "paper" else None


def check_fixed_panel(config: Config, records: Sequence[SlideRecord], panel: Sequence[str]) -> None:
    """Raise ValueError that names the genes of a fixed panel that the slides do not hold, before features are read."""
    if config.DATA.genes is not None:
        check_given_genes(panel, _measured(records))
    for record in records:
        check_panel(record.table, panel)


def _measured(records: Sequence[SlideRecord]) -> dict[str, pd.Index]:
    """All genes in the counts of each slide."""
    return {record.name: record.counts.genes for record in records}


def _check_encoder_can_run(config: Config) -> None:
    """Raise FileNotFoundError where the weights are missing, with the variant that trains without them."""
    try:
        find_patch_encoder_weights(config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nThe encoder would run in every step: not every slide has a token cache. {WITHOUT_TOKENS}"
        ) from error


def choose_panel(config: Config, layout: Layout, outer: Sequence[SlideRecord]) -> list[str]:
    """Choose the gene panel: the given one, the file of the data folder (paper), or the highest means over the training
    patients (clean), whose slides are `outer`. ValueError as `genes_in_common` where these have too few."""
    panel = fixed_panel(config, layout)
    if panel is None:
        panel = panel_of_sums((record.counts.log_sums for record in outer), config.DATA.num_genes)
        if len(panel) < config.DATA.num_genes:
            genes_in_common(_measured(outer), config.DATA.num_genes, flag=OF_CONFIGURATION)
    return panel


def _demand(
    config: Config, layout: Layout, spec: PatchEncoderSpec, records: Sequence[SlideRecord], device: torch.device
) -> Demand:
    slides = [record.name for record in records]
    return demand(
        config,
        spec,
        spots=records[-1].stop,
        slide_sizes=[record.stop - record.start for record in records],
        online=needs_of(config).tokens and runs_encoder(config, layout, slides),
        half=Precision(config.TRAINING.precision, device).dtype != torch.float32,
        num_tokens=tokens_of_spot(layout, slides, spec) if needs_of(config).tokens else None,
    )


def _residence(config: Config, need: Demand, device: torch.device) -> Residence:
    """Where neighbor features are held; beside them the host holds all that is read first, and on the CPU the training."""
    is_pinned = device.type == "cuda"
    return Residence(config.DATA.residence, need.on_host(device), config.DATA.num_workers, is_pinned)


def _online_encoder(config: Config, layout: Layout, store: SpotStore, device: torch.device) -> PatchEncoder | None:
    """The frozen encoder, where it runs in every step; ValueError if the features are of other weights."""
    if not runs_encoder(config, layout, [slide.name for slide in store.slides]):
        return None
    encoder = make_patch_encoder(config, device)
    if store.encoder.sha256 not in ("unknown", encoder.weights_sha256):
        raise ValueError(
            f"the features in {layout.root} were made with other weights of {encoder.name} (sha256 "
            f"{store.encoder.sha256[:12]}...) than the ones found now ({encoder.weights_sha256[:12]}...). Give the same file "
            f"with --weights, or keep those features elsewhere and run:\n{layout.repair('all', None, encoder.name)}"
        )
    return encoder


def _open_source(
    config: Config, layout: Layout, store: SpotStore, device: torch.device, reserve: int
) -> CachedTokens | CutPatches:
    """The source of target tokens: their caches, or the patches for the frozen encoder."""
    return open_tokens(
        layout,
        store,
        device,
        choice=config.DATA.tokens,
        residence=config.DATA.residence,
        num_workers=config.DATA.num_workers,
        reserve=reserve,
    )


def runs_encoder(config: Config, layout: Layout, slides: Sequence[str]) -> bool:
    """Whether the frozen encoder will run in training: without a token cache of every slide, or when asked for."""
    missing = [slide for slide in slides if not find_cache(layout, "token", slide).exists()]
    return config.DATA.tokens == "online" or (config.DATA.tokens == "auto" and bool(missing))


def _check_width(store: SpotStore, spec: PatchEncoderSpec, layout: Layout) -> None:
    """Published features do not say which encoder made them; only their width can contradict the configuration."""
    width = store.target_features.shape[1]
    if store.encoder.sha256 == "unknown" and width != spec.pooled_dim:
        raise ValueError(
            f"the features in {layout.root} have width {width}, those of {spec.name} have {spec.pooled_dim}: another encoder "
            "made them (published features do not say which). Name it with --encoder, or extract those of "
            f"{spec.name}: {layout.repair('all', None, spec.name)}"
        )


def check_clusters(config: Config, records: Sequence[SlideRecord], folds: Sequence[SplitRecord]) -> None:
    """Hold k against the smallest batch of every fold, before the first feature is read; ValueError with the remedy."""
    if not groups_spots(config):
        return
    for split in folds:
        rows = torch.cat([record.rows for record in records if record.name in split.train_slides])
        sizes = [
            len(batch)
            for batch in epoch_rows(
                slide_of_row(records),
                rows,
                batch_size=config.TRAINING.batch_size,
                minimum=config.LOSS.k,
                slides_per_batch=config.TRAINING.slides_per_batch,
                generator=generator_for(config.GENERAL.seed, split.fold, 1, "batches"),
            )
        ]
        check_batch_sizes(sizes, config.LOSS.k, split.name)
