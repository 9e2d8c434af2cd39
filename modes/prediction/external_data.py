"""What an external test needs before it predicts: folder, genes in common, verified features, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from datasets.features.neighbor_files import ON_DISK
from datasets.features.patch_encoder import BatchedPatchEncoder
from datasets.features.places import find_cache
from datasets.features.reader import FeatureReader
from datasets.field_of_view import compare_fields_of_view, field_of_view
from datasets.known_sets import get_spec, leaking_slides
from datasets.layout import Layout
from datasets.spots import SpotStore
from datasets.tables.counts import gene_names
from datasets.targets import note_on_counts
from datasets.tokens import CachedTokens, open_tokens
from modes.prediction.encode import open_patch_encoder
from modes.prediction.ensemble import Member, field_of_view_of, shared_genes
from modes.prediction.predicted import who_has_seen
from utils.cli import say
from utils.commands import extraction_command
from utils.config import Config
from utils.files import safe_name
from utils.text import some
from utils.trained_fold import NO_SCORE

_FEWEST_GENES = 2


@dataclass
class ExternalTest:
    """Members and data of one external test. genes: those that are scored, in the order of the first fold's panel.

    fold_notes: on folds that were left out, or taken although they are not finished.
    """

    members: list[Member]
    layout: Layout
    store: SpotStore
    genes: list[str]
    missing: list[str]
    device: torch.device
    tokens: CachedTokens | None
    encoder: BatchedPatchEncoder | None  # where there is no token cache
    fold_notes: list[str]
    left_out: str | None  # on slides that cannot be used

    @property
    def config(self) -> Config:
        """The configuration of the first fold; what the features depend on is the same in all."""
        return self.members[0].config


def external_layout(member: Member, test_name: str, patch_um: float | None = None) -> Layout:
    """Find <data_dir>/test/<test_name>, or, for the name of a training set that is prepared as such, its own folder.

    patch_um: width of a patch in micrometres, None for that of the run (DATA.patch_um), if any.
    Raises ValueError for a data set that is not known, and for the one that the fold was trained on.
    """
    data = member.config.DATA
    spec = get_spec(safe_name(test_name, "Test set"), data.data_dir)
    open_folder = partial(
        Layout,
        data.data_dir,
        spec,
        patch_size=data.patch_size,
        num_neighbors=data.num_neighbors,
        encoder=data.encoder,
        patch_um=data.patch_um if patch_um is None else patch_um,
        extraction=partial(extraction_command, config_name=member.fold.config_name),
    )
    external, internal = open_folder(test_name=test_name), open_folder()
    if spec.external or external.root.is_dir() or not internal.root.is_dir():
        return external
    if test_name == data.type:
        raise ValueError(
            f"--test_name {test_name}: the run was trained on these slides. Its folds are tested on the patients they have "
            "not seen by: python main.py --mode test --model_path RUN"
        )
    return internal


def open_test(members: list[Member], layout: Layout, device: torch.device, fold_notes: list[str]) -> ExternalTest:
    """Find the genes that can be scored; read and verify counts, spots and features of the slides.

    Raises ValueError / FileNotFoundError for whatever cannot be used, and if no gene of the panel is measured.
    """
    slides, left_out = layout.slides_on_disk(), layout.left_out_note()
    genes, missing = measured_genes(layout, slides, shared_genes(members))
    member, made = members[0], members[0].fold.encoder
    sha256 = None if made.sha256 == "unknown" else made.sha256
    reader = FeatureReader(layout, made.name, sha256, with_neighbors=member.needs.neighbors)
    store = reader.read_features(reader.read_tables(slides, genes), ON_DISK)
    tokens, encoder = None, None
    if member.needs.tokens:
        tokens = cached_tokens(member, layout, store, device)
        encoder = None if tokens else open_patch_encoder(member, device)
    return ExternalTest(members, layout, store, genes, missing, device, tokens, encoder, fold_notes, left_out)


def measured_genes(layout: Layout, slides: Sequence[str], panel: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the panel into genes that every slide has measured and the others. Raises ValueError if fewer than 2 are."""
    of_slide = {slide: set(gene_names(layout.counts_path(slide))) for slide in slides}
    measured = set.intersection(*of_slide.values())
    genes = [gene for gene in panel if gene in measured]
    of_panel = {slide: len(found.intersection(panel)) for slide, found in of_slide.items()}
    if not any(of_panel.values()):
        raise ValueError(
            f"None of the {len(panel)} genes that the run predicts ({some(panel, 3)}) is in the counts of {layout.name} "
            f"({some(sorted(set.union(*of_slide.values())), 3)}). If one lists Ensembl ids and the other symbols, prepare the "
            f"set with a panel of symbols: python preprocess/prepare_visium.py --model_path RUN (it matches either)."
        )
    if len(genes) < _FEWEST_GENES:
        fewest = min(of_panel, key=lambda slide: of_panel[slide])
        raise ValueError(
            f"The slides of {layout.name} share {len(genes)} of the {len(panel)} genes that the run predicts; expected at "
            f"least {_FEWEST_GENES}, since values are relative to the genes measured. Slide {fewest} has the fewest, "
            f"{of_panel[fewest]}: check the names of genes in its counts, or leave it out."
        )
    return genes, [gene for gene in panel if gene not in measured]


def cached_tokens(member: Member, layout: Layout, store: SpotStore, device: torch.device) -> CachedTokens | None:
    """Open the token caches if every slide has one, or DATA.tokens=cache; None where the encoder will run on the patches.

    Raises FileNotFoundError if caches are asked for and missing, ValueError if one does not fit the spots or the features,
    or is pooled by another factor than the tokens of the training.
    """
    config = member.config
    has_all = all(find_cache(layout, "token", slide.name).exists() for slide in store.slides)
    if config.DATA.tokens == "online" or (config.DATA.tokens == "auto" and not has_all):
        say("Target tokens: the frozen encoder runs on every patch once.")
        return None
    source = open_tokens(
        layout,
        store,
        device,
        choice="cache",
        residence="host",  # each token is read once for each fold
        num_workers=config.DATA.num_workers,
    )
    assert isinstance(source, CachedTokens), "asked for the caches"
    pool, trained = source.store.identity.token_pool, member.fold.encoder.token_pool
    if pool != trained:
        raise ValueError(
            f"The token caches of {layout.name} are pooled by {pool}, the run was trained on tokens pooled by "
            f"{trained}. Keep them elsewhere and extract with --token_pool {trained}."
        )
    return source


def warnings_of(test: ExternalTest) -> list[str]:
    """Collect what a reader must know before the scores: what was left out, leaks, fields of view, features of no origin."""
    layout, config = test.layout, test.config
    without_counts = note_on_counts(test.store.slides)
    notes = [*test.fold_notes, *(note for note in (test.left_out, without_counts) if note)]
    notes += [f"The model was {NO_SCORE}."] if test.members[0].fold.split.is_final else []
    patients = {patient for member in test.members for patient in member.fold.split.fitted_patients}
    slides = {record.name: record.patient for record in test.store.slides}
    leaks = _leaking_images(test) | leaking_slides(config.DATA.type, patients, slides)
    if leaks:
        notes.append(
            f"LEAKAGE: the run has been trained on the tissue of {len(leaks)} of {len(slides)} slides, so these scores are "
            f"not those of unseen tissue: {'; '.join(leaks.values())}."
        )
    notes += _note_on_genes(test.genes, test.missing)
    meant = layout.spec.training_type
    if meant is not None and meant != config.DATA.type:
        notes.append(f"{layout.name} is meant for models of {meant}; this run was trained on {config.DATA.type}.")
    for record in test.store.slides:
        pixels, covered = {record.name: record.table.obsm["spatial"]}, {record.name: record.covered_px}
        here = field_of_view(layout, pixels, covered)
        sentence, differs = compare_fields_of_view(field_of_view_of(test.members), here, record.name)
        notes.append(f"WARNING: {sentence} --match_mpp rescales the patches." if differs else sentence)
        published = [k for k in ("target", "neighbor") if not find_cache(layout, k, record.name).exists()]
        if published and layout.published_path("target", record.name) and layout.spec.exchanged_pixels:
            notes.append(
                f"WARNING: {record.name} is read from published features, which were extracted in another spot order than "
                "they are read in; make them from the image with preprocess/extract_features_uni.py --mode external."
            )
    return notes


def _note_on_genes(genes: Sequence[str], missing: Sequence[str]) -> list[str]:
    """Say how many genes of the panel are scored, where some are missing."""
    if not missing:
        return []
    panel = len(genes) + len(missing)
    sentence = f"{len(genes)} of the {panel} genes that the run predicts are measured in every slide and scored; not measured: "
    sentence += f"{some(missing)}."
    if 2 * len(genes) >= panel:
        return [sentence]
    return [
        f"WARNING: only {sentence} Values are relative to the {len(genes)} genes alone, so the scores are not comparable with "
        "those of the run itself."
    ]


def _leaking_images(test: ExternalTest) -> dict[str, str]:
    """Find the slides whose image is one of a training: slide -> sentence that says so."""
    seen = {record.name: who_has_seen(test.members, record.fingerprint) for record in test.store.slides}
    return {
        slide: f"{slide} is the image of {next(iter(by.values()))}, a training slide of {', '.join(by)}"
        for slide, by in seen.items()
        if by
    }
