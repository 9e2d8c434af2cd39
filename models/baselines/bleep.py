"""BLEEP: image and expression in one space, and the expression of the nearest training spots as the prediction.

After "Spatially Resolved Gene Expression Prediction from Histology Images via Bi-modal Contrastive Learning" (NeurIPS
2023). Heads, width, dropout, temperature and number of neighbors are those of its published configuration. Otherwise than
there, the patch encoder is frozen and that of all other models, and so are the optimiser and the choice of the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.baselines.closed_form import retrieve
from models.baselines.fitted_model import MEMORY_BUDGET, FittedModel
from models.contract import TARGET, Embeddings, ModelInputs, Needs, Prediction, Sizes
from models.encoders import ProjectionHead
from models.layers.precision import full_precision, unit
from models.layers.standardise import Standardise
from models.losses import instance_loss
from utils.config import Model

WIDTH = 256
DROPOUT = 0.1
TEMPERATURE = 1.0
NUM_NEAREST = 50


class Bleep(FittedModel):
    """Two projection heads, trained to meet, and a bank of training spots in which a patch is looked up.

    The prediction is the mean expression of the spots of the bank whose gene embeddings have the greatest cosine with the
    image embedding, each weighted by exp(cosine / temperature). The published code weights them equally, or by the squared
    distance of vectors that are not normalised, which leaves little beside the nearest one.
    """

    bank: Tensor
    bank_expression: Tensor

    def __init__(self, feature_dim: int, num_genes: int) -> None:
        """feature_dim: of the pooled features, which are standardised by the training spots."""
        super().__init__()
        self.needs = Needs(training_spots=True)
        self.standardise = Standardise(feature_dim)
        self.image_head = ProjectionHead(input_dim=feature_dim, dim=WIDTH, dropout=DROPOUT)
        self.gene_head = ProjectionHead(input_dim=num_genes, dim=WIDTH, dropout=DROPOUT)
        self._register_fitted("bank", (None, WIDTH))
        self._register_fitted("bank_expression", (None, num_genes))

    def standardise_inputs(self, features: Tensor | Iterable[Tensor]) -> None:
        """Take mean and deviation of the training spots' features; see the contract."""
        self.standardise.fit(features)

    @torch.no_grad()
    def remember(self, inputs: ModelInputs, expression: Tensor) -> None:  # noqa: ARG002 - of the contract
        """Fill the bank: unit gene embeddings of the training spots beside their expression; see the contract."""
        assert not self.training, "the embeddings of the bank are those of evaluation mode"
        with torch.autocast(expression.device.type, enabled=False):
            self._store(bank=unit(self.gene_head(expression)), bank_expression=expression)
        self._store(num_training_spots=len(expression))

    def forward(self, inputs: ModelInputs, expression: Tensor | None = None) -> Prediction:
        """Look B spots up (evaluation mode), or give the embeddings of their image and expression (training mode).

        Nothing is looked up in training, where the bank would be that of other weights. What is looked up is float32 under
        autocast, too. Raises ValueError in evaluation mode before `remember`.
        """
        assert inputs.target_features is not None, "the model reads the pooled features"
        features = self.standardise(inputs.target_features.to(self.image_head.norm.weight.dtype))
        if self.training:
            assert expression is not None, "training compares the image with the expression"
            image, gene = full_precision(self.image_head(features)), full_precision(self.gene_head(expression))
            nothing = torch.full_like(expression, torch.nan)
            return Prediction(fused=nothing, embeddings=Embeddings(scales={TARGET: image}, gene=gene))
        self._check_is_fitted()
        with torch.autocast(features.device.type, enabled=False):
            count = min(NUM_NEAREST, len(self.bank))
            queries = unit(self.image_head(features))
            (fused,) = retrieve(queries, self.bank, self.bank_expression, [count], TEMPERATURE, MEMORY_BUDGET)
        return Prediction(fused=fused)


def bleep_loss(prediction: Prediction, _expression: Tensor) -> dict[str, Tensor]:
    """Soft-target contrastive loss of image and gene embeddings, the mean of `instance_loss` over the spots."""
    assert prediction.embeddings is not None, "training gives embeddings"
    image, gene = prediction.embeddings.scales[TARGET], prediction.embeddings.gene
    instance = instance_loss(image, gene, TEMPERATURE).mean()
    return {"instance": instance, "total": instance}


def build_bleep(_config: Model, sizes: Sizes) -> Bleep:
    """Build BLEEP with random heads and an empty bank."""
    return Bleep(sizes.feature_dim, sizes.num_genes)
