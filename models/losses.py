"""The losses of Gene-DML: tensors in, named terms out; computed in float32 also under autocast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.clustering import Clusters, EmptyPolicy, kmeans, spectral
from models.contract import Embeddings, Prediction
from models.layers.precision import full_precision, unit
from utils.config import Loss


def instance_loss(image: Tensor, gene: Tensor, temperature: float) -> Tensor:
    """Soft contrastive alignment of one image scale with the expression, for each spot.

    image, gene: (B, P) vectors v and g of the same spots.
    With L = g v^T / tau and Q = softmax over rows of (v v^T + g g^T) / (2 tau), entry i is half the cross entropy of
    row i of L with row i of Q plus half that of column i of L with column i of Q (those columns need not add up to 1).
    Gradients flow through Q as well. Returns (B,).
    """
    with torch.autocast(image.device.type, enabled=False):
        image, gene = full_precision(image), full_precision(gene)
        logits = gene @ image.t() / temperature
        targets = torch.softmax((image @ image.t() + gene @ gene.t()) / (2 * temperature), dim=1)
        gene_rows = -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1)
        image_rows = -(targets * torch.log_softmax(logits, dim=0)).sum(dim=0)
        return (gene_rows + image_rows) / 2


def multi_scale_instance_loss(scales: dict[str, Tensor], gene: Tensor, temperature: float) -> Tensor:
    """Mean of `instance_loss` over spots and over the scales there are; a scalar."""
    return torch.stack([instance_loss(image, gene, temperature).mean() for image in scales.values()]).mean()


def centroid_cross_entropy(vectors: Tensor, clusters: Clusters, labels: Tensor, temperature: float) -> Tensor:
    """Mean cross entropy of vectors . centroids / t with the labels of the *other* modality; unused clusters are left out.

    vectors: (B, P). clusters: of the modality the vectors are compared with. labels: (B,) hard labels.
    """
    logits = vectors @ clusters.centroids.t() / temperature
    return functional.cross_entropy(logits.masked_fill(~clusters.is_used, float("-inf")), labels)


def group_loss(
    fused: Tensor,
    gene: Tensor,
    *,
    image_clusters: Clusters,
    gene_clusters: Clusters,
    temperature: float,
) -> Tensor:
    """Cross-level instance-group alignment, a scalar.

    fused, gene: (B, P) fused and gene vectors. l = (CE(fused . c_gene / t, y_gene) + CE(gene . c_image / t, y_image)) / 2
    with the centroids c and labels y of each modality; gradients flow through the vectors and through the centroids.
    """
    with torch.autocast(fused.device.type, enabled=False):
        fused, gene = full_precision(fused), full_precision(gene)
        image_term = centroid_cross_entropy(fused, gene_clusters, gene_clusters.labels, temperature)
        gene_term = centroid_cross_entropy(gene, image_clusters, image_clusters.labels, temperature)
        return (image_term + gene_term) / 2


def prediction_loss(predicted: Tensor, expression: Tensor) -> Tensor:
    """Mean square error over spots and genes, in the squared unit of the targets."""
    with torch.autocast(predicted.device.type, enabled=False):
        return functional.mse_loss(full_precision(predicted), full_precision(expression))


def fused_loss(prediction: Prediction, expression: Tensor) -> dict[str, Tensor]:
    """Mean squared error of the fused prediction, which is the whole loss of a model with one head."""
    error = prediction_loss(prediction.fused, expression)
    return {"prediction": error, "total": error}


@dataclass(frozen=True)
class GeneDMLLoss:
    """Total = prediction + instance_weight * instance + group_weight * group + auxiliary.

    The auxiliary heads see detached vectors, so their term trains them and changes no other gradient.
    settings: Config.LOSS. With its normalize_fused the fused vector that meets the gene centroids is brought to length 1
    (what is clustered has length 1 in either case). empty: what becomes of a cluster without members.
    """

    settings: Loss
    empty: EmptyPolicy = "drop"

    def __call__(self, prediction: Prediction, expression: Tensor) -> dict[str, Tensor]:
        """Named, unweighted terms and "total", all scalars.

        prediction: of B spots; expression: (B, G) measured. Terms: "prediction"; "instance" and "group" if the
        prediction has embeddings and their weight is not zero; "auxiliary" if it has predictions of single scales.
        Raises ValueError if B is smaller than k.
        """
        terms = {"prediction": prediction_loss(prediction.fused, expression)}
        weights = {
            "prediction": 1.0,
            "auxiliary": 1.0,
            "instance": self.settings.instance_weight,
            "group": self.settings.group_weight,
        }
        if prediction.embeddings is not None:
            terms.update(self._alignment(prediction.embeddings))
        if prediction.scales:
            errors = [prediction_loss(values, expression) for values in prediction.scales.values()]
            terms["auxiliary"] = torch.stack(errors).sum()
        terms["total"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return terms

    def _alignment(self, embeddings: Embeddings) -> dict[str, Tensor]:
        terms, settings = {}, self.settings
        if settings.instance_weight != 0:
            terms["instance"] = multi_scale_instance_loss(
                embeddings.scales, embeddings.gene, settings.instance_temperature
            )
        if settings.group_weight != 0:
            assert embeddings.fused is not None, "the model has no vectors to group spots in"
            image_clusters, gene_clusters = self.clusters(embeddings)
            terms["group"] = group_loss(
                unit(embeddings.fused) if settings.normalize_fused else embeddings.fused,
                embeddings.gene,
                image_clusters=image_clusters,
                gene_clusters=gene_clusters,
                temperature=settings.group_temperature,
            )
        return terms

    def clusters(self, embeddings: Embeddings) -> tuple[Clusters, Clusters]:
        """Group spots by their image and by their gene vectors."""
        assert embeddings.fused_cluster is not None and embeddings.gene_cluster is not None
        return self.cluster(embeddings.fused_cluster), self.cluster(embeddings.gene_cluster)

    def cluster(self, vectors: Tensor) -> Clusters:
        """Group the rows (B, P) of one modality as configured."""
        if not self.settings.use_kmeans:
            return spectral(vectors, self.settings.k, empty=self.empty)
        return kmeans(vectors, self.settings.k, empty=self.empty)
