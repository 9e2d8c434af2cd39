"""A tiny training on fabricated features, without an encoder: its configuration, its features, its options."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from datasets.features.cache import write_cache
from datasets.features.identity import CacheIdentity
from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from modes.train import TrainOptions

DIM, TOKENS, VIEWS = 16, 5, 2
TINY = """
DATA: {type: demo, patch_size: 64, num_neighbors: 3, num_genes: 16, encoder: uni}
MODEL:
  {projection_dim: 16, neighbor_depth: 1, neighbor_mlp_ratio: 1, global_depth: 2, global_mlp_ratio: 1, fusion_mlp_dim: 16,
   gene_mlp_dim: 16, predictor_dim: 16}
LOSS: {k: 4, use_kmeans: true}
TRAINING: {batch_size: 32, epochs: 4, learning_rate: 1.0e-3}
"""


def fabricate(layout: Layout, slide: str) -> None:
    """Features that carry some of the expression, so that there is something to learn; fast, no encoder."""
    table = load_slide(layout, slide)
    random = np.random.default_rng(sum(map(ord, slide)))
    signal_ = np.log1p(table.X.toarray()[:, :DIM]).astype(np.float32)
    target = signal_ + random.normal(0, 0.3, signal_.shape).astype(np.float32)
    neighbor = target[:, None] + random.normal(0, 0.3, (len(target), 9, DIM)).astype(np.float32)
    token = target[:, None, None] + random.normal(0, 0.3, (len(target), VIEWS, TOKENS, DIM)).astype(np.float32)
    with open_slide(layout.image_path(slide)) as image:
        size, fingerprint = image.size, image.fingerprint()
    for kind, values in (("target", target), ("neighbor", neighbor), ("token", token)):
        identity = CacheIdentity(
            kind=kind,
            encoder="uni",
            encoder_sha256="fabricated",
            image_size=size,
            image_fingerprint=fingerprint,
            patch_size=64,
            microns_per_pixel=None,
            num_neighbors=3,
            views=VIEWS if kind == "token" else 1,
            dtype="float32",
        )
        write_cache(layout.cache_path(kind, slide), identity, list(table.obs_names), table.obsm["center"], [values])


def options(**changes) -> TrainOptions:
    base = TrainOptions(
        config_name="tiny",
        run_name="run",
        device=torch.device("cpu"),
        folds=None,
        resume=False,
        checkpoint_seconds=0.0,
        with_report=False,
    )
    return replace(base, **changes)


def with_(config, **sections):
    """The configuration with changed keys: with_(config, LOSS={"k": 3})."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})
