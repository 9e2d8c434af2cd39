"""The data of the cluster figure: how one batch is grouped."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from models.contract import ExpressionModel
from models.losses import GeneDMLLoss
from modes.training.compose import forward
from modes.training.run_data import RunData
from modes.training.split import Split
from utils.files import write_atomically
from utils.runs import generator_for


def write_clusters(path: Path, run_data: RunData, split: Split, model: ExpressionModel, expression: Tensor) -> None:
    """Write how a batch of training spots is grouped by its image and by its gene vectors, one row a spot.

    expression (R, G): the targets, on the device.
    """
    config, store = run_data.config, run_data.store
    generator = generator_for(config.GENERAL.seed, split.record.fold, "clusters")
    rows = store.rows_of(split.record.train_slides)
    rows = rows[torch.randperm(len(rows), generator=generator)][: config.TRAINING.batch_size]
    batch = run_data.maker.spots(rows, torch.zeros_like(rows), expression, with_slides=True)
    model.eval()
    with torch.inference_mode(), run_data.precision.autocast():
        embeddings = forward(model, run_data.encode, batch).embeddings
        assert embeddings is not None, "the model groups spots (`groups_spots`)"
        image, gene = GeneDMLLoss(config.LOSS).clusters(embeddings)
    slides = [store.slides[i] for i in store.slide_of_row[rows].tolist()]
    table = pd.DataFrame(
        {
            "slide": [slide.name for slide in slides],
            "patient": [slide.patient for slide in slides],
            "image_cluster": image.labels.tolist(),
            "gene_cluster": gene.labels.tolist(),
        }
    )
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))
