"""The doctor on the data folder: slides, counts against spots against features, the gene panel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from datasets.features.cache import read_identity
from datasets.features.places import find_cache
from datasets.features.reader import FeatureReader
from datasets.features.verify import expected_size, verify_cache
from datasets.layout import Layout
from datasets.spots import SlideRecord
from datasets.tables.gene_list import checked_genes
from datasets.tables.genes_in_common import genes_in_common
from datasets.tables.slide_table import load_slide
from datasets.tables.summary import summarise, with_genes
from datasets.targets import note_on_counts, other_panel
from modes.checks.findings import Findings
from modes.prediction.model import needs_of
from modes.training.run_data import OF_CONFIGURATION
from utils.config import Config
from utils.files import load_names
from utils.text import some


def check_slides(layout: Layout, findings: Findings) -> list[str]:
    """Find the slides that can be used, and compare them with those that the data set is known to have."""
    slides = findings.attempt("data", layout.slides_on_disk)
    if slides is None:
        return []
    spec = layout.spec
    patients = Counter(spec.patient_of(slide) for slide in slides)
    listed = ", ".join(f"{patient} ({count})" for patient, count in patients.items())
    of_all = f"{len(slides)} of {len(spec.slides)}" if spec.slides else str(len(slides))
    findings.ok("data", f"{layout.name} in {layout.root}: {of_all} slides; patients (slides): {listed}.")
    left_out = layout.left_out_note()
    if left_out:
        findings.warning("data", left_out)
    if unread := layout.unread_counts_note():
        findings.warning("data", unread)
    return slides


def read_tables(layout: Layout, slides: Sequence[str], findings: Findings) -> list[SlideRecord]:
    """Read the tables of every slide whose counts and spots can be used."""
    records, problems, odd, start = [], [], [], 0
    expected = layout.spec.expected_spots
    for slide in slides:
        try:
            table = load_slide(layout, slide)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        summary = summarise(table)  # the counts themselves would fill the memory, slide after slide
        records.append(SlideRecord(with_genes(table, ()), start, start + table.n_obs, (0, 0), summary=summary))
        start += table.n_obs
        if expected and not expected[0] <= table.n_obs <= expected[1]:
            odd.append(f"{slide} ({table.n_obs})")
    findings.problems("tables", problems)
    if odd and expected:
        findings.warning(
            "tables",
            f"spots outside the known {expected[0]} to {expected[1]}: {some(odd, 12)}. Compare these slides with the "
            "original download.",
        )
    if note := note_on_counts(records):
        findings.warning("tables", note.removeprefix("WARNING: "))
    if records:
        without = sum(len(record.table.uns["dropped"]["spots_without_counts"]) for record in records)
        dropped = f"; {without} listed spots have no counts and are left out" if without else ""
        findings.ok("tables", f"counts and spot tables fit: {start} spots on {len(records)} slides{dropped}.")
        not_selected = {r.name: len(r.table.uns["not_selected"]) for r in records if r.table.uns["not_selected"]}
        if not_selected:
            findings.warning(
                "tables",
                f"{sum(not_selected.values())} spots with counts are marked selected = 0 in the spot tables and left out: "
                f"{some([f'{slide} ({count})' for slide, count in not_selected.items()], 12)}.",
            )
    return records


def check_panel(config: Config, layout: Layout, records: Sequence[SlideRecord], findings: Findings) -> None:
    """Check the genes measured on every slide, and the panel file, which the paper's protocol cannot do without."""
    measured = {record.name: set(record.counts.genes) for record in records}
    is_chosen = config.DATA.genes is None and config.EVALUATION.protocol != "paper"
    wanted = config.DATA.num_genes if is_chosen else 1
    shared = findings.attempt("genes", lambda: genes_in_common(measured, wanted, flag=OF_CONFIGURATION))
    if shared is None:
        return
    if config.DATA.genes is not None:
        given = findings.attempt("genes", lambda: checked_genes(str(config.DATA.genes), measured))
        if given:
            findings.ok("genes", f"DATA.genes lists {len(given)} genes, measured on every slide.")
        return
    if is_chosen:
        findings.ok("genes", f"{len(shared)} genes are measured on every slide; each fold chooses {wanted} of them.")
        return
    panel = findings.attempt("genes", lambda: load_names(layout.panel_path))
    if panel is None:
        return
    known = set(shared)
    missing = [gene for gene in panel if gene not in known]
    if missing:
        where = [slide for slide, genes in measured.items() if not genes >= set(panel)]
        which = f"--type {layout.name} --data_dir {layout.data_dir}"
        findings.problem(
            "genes",
            f"{len(missing)} of {len(panel)} genes of {layout.panel_path} have no counts on every slide: {some(missing)} "
            f"(on {some(where, 3)}). {other_panel(which)}",
        )
        return
    findings.ok("genes", f"{layout.panel_path} lists {len(panel)} genes, measured on every slide.")


def check_features(config: Config, layout: Layout, records: Sequence[SlideRecord], findings: Findings) -> str | None:
    """Check features and token caches against spots, images and each other; returns the SHA-256 of their weights."""
    needs, encoder = needs_of(config), config.DATA.encoder
    reader = FeatureReader(layout, encoder, with_neighbors=needs.neighbors)
    missing = {kind: _without(layout, kind, records) for kind in reader.kinds}
    problems = [
        f"{len(slides)} of {len(records)} slides have no {kind} features: {some(slides, 12)}. Run: "
        + layout.repair(kind, None if len(slides) == len(records) else ",".join(slides), encoder)
        for kind, slides in missing.items()
        if slides
    ]
    for record in records:
        if any(record.name in slides for slides in missing.values()):
            continue
        try:
            reader.verify(record.name, record.table)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    findings.problems("features", problems)
    if not problems:
        origin = f"weights {reader.sha256[:12]}" if reader.sha256 else "published files, which do not say which weights"
        findings.ok(
            "features", f"{' and '.join(reader.kinds)} features of {encoder} for {len(records)} slides ({origin})."
        )
    if needs.tokens:
        _check_tokens(layout, records, reader, findings)
    return reader.sha256


def _without(layout: Layout, kind: str, records: Sequence[SlideRecord]) -> list[str]:
    """Slides that have neither a cache nor published features of the kind."""
    names = [record.name for record in records]
    return [n for n in names if not find_cache(layout, kind, n).exists() and layout.published_path(kind, n) is None]


def _check_tokens(layout: Layout, records: Sequence[SlideRecord], reader: FeatureReader, findings: Findings) -> None:
    cached = [record for record in records if find_cache(layout, "token", record.name).exists()]
    problems = []
    expected = {"kind": "token", "encoder": reader.encoder, **expected_size(layout)}
    expected |= {"encoder_sha256": reader.sha256} if reader.sha256 else {}
    for record in cached:
        repair = partial(layout.repair, "token", record.name, reader.encoder)
        path, table = find_cache(layout, "token", record.name), record.table
        try:
            verify_cache(path, expected, list(table.obs_names), table.obsm["center"], repair)
        except ValueError as error:
            problems.append(str(error))
    findings.problems("tokens", problems)
    if cached and len(cached) < len(records):
        missing = [record.name for record in records if not find_cache(layout, "token", record.name).exists()]
        findings.warning(
            "tokens",
            f"{len(missing)} of {len(records)} slides have no token cache ({some(missing, 12)}), so that of the others is not "
            f"used either. Run: {layout.repair('token', ','.join(missing), reader.encoder)}",
        )
    elif cached and not problems:
        identity = read_identity(find_cache(layout, "token", cached[0].name))
        findings.ok("tokens", f"token caches of {len(cached)} slides, {identity.views} of 8 views.")
