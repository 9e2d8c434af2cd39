"""Grouping spots by similarity: k-means with matrix products, and normalised cuts.

Labels carry no gradient; the returned centroids do, through the final mean of the members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LLOYD_STEPS = 10
# Distances come from matrix products, whose rounding may differ from column to column; differences below this share of
# the largest squared length count as ties. It lies far above float64 rounding and far below what float32 input can hold.
TIE_TOLERANCE = 1e-12
# The same for devices without float64.
SINGLE_TIE_TOLERANCE = 1e-6

EmptyPolicy = Literal["drop", "zero"]


@dataclass(frozen=True)
class Clusters:
    """labels: (N,) int64. centroids: (k, D) means of the members, zero for an empty cluster. is_used: (k,) bool, False
    for a cluster that left the grouping because it was empty."""

    labels: Tensor
    centroids: Tensor
    is_used: Tensor


def kmeans(
    points: Tensor,
    k: int,
    *,
    empty: EmptyPolicy = "drop",
    steps: int = LLOYD_STEPS,
) -> Clusters:
    """Lloyd's k-means with a fixed number of steps and without waiting for the device.

    points: (N, D). The start is the first k rows; batches are shuffled, so these are random rows. Each step assigns every
    point to the nearest centroid (the least index on ties) and then takes means. The labels are those of the last
    assignment and the centroids are the means of exactly those labels.
    empty: "drop" takes an empty cluster out of all later distances (and `is_used` out of the softmax); "zero" keeps a
    zero vector as its centroid, as the published code does.
    Raises ValueError if there are fewer points than clusters.
    """
    _check_count(points, k)
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        data = points.detach().to(_distance_dtype(points.device))
        centroids = data[:k]
        is_used = torch.ones(k, dtype=torch.bool, device=data.device)
        tolerance = TIE_TOLERANCE if data.dtype == torch.float64 else SINGLE_TIE_TOLERANCE
        margin = tolerance * data.square().sum(dim=1).amax()
        for _ in range(steps):
            labels = _nearest(data, centroids, is_used, margin)
            centroids, counts = _means(data, labels, k)
            if empty == "drop":
                is_used = is_used & (counts > 0)
    return _with_gradient(points, labels, k, is_used)


def spectral(points: Tensor, k: int, *, empty: EmptyPolicy = "drop") -> Clusters:
    """Normalised cuts of the |cosine| similarity: k-means on the first k generalised eigenvectors.

    points: (N, D) of non-zero length. Section 11 of the golden README. The eigenvectors need a solver that waits for
    the device and takes N^3 operations, so this is for batches, not for whole slides. Raises as `kmeans` does.
    """
    _check_count(points, k)
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        vectors = cut_eigenvectors(cosine_similarity(points.detach()), k)
        grouped = kmeans(vectors, k, empty=empty)
    return _with_gradient(points, grouped.labels, k, grouped.is_used)


def cosine_similarity(points: Tensor) -> Tensor:
    """max(s, s^T) with s_ij = |x_i . x_j| / ||x_j||^2 and a zero diagonal; (N, N)."""
    points = points.to(_distance_dtype(points.device))
    share = (points @ points.t()).abs() / points.square().sum(dim=1)
    # A step that overflowed in half precision must reach the loss scaler as a bad loss, not stop in the eigen solver.
    share = torch.nan_to_num(share)
    return torch.maximum(share, share.t()).fill_diagonal_(0.0)


def cut_eigenvectors(similarity: Tensor, k: int) -> Tensor:
    """Find the first k eigenvectors (ascending) of the normalised Laplacian, as generalised ones, [0, 0] scaled to 1; (N, k).

    A spot that resembles no other has degree zero; its row is left zero.
    """
    degree = similarity.sum(dim=1)
    scale = torch.where(degree > 0, degree.clamp_min(torch.finfo(degree.dtype).tiny).rsqrt(), 0.0)
    laplacian = scale[:, None] * (torch.diag(degree) - similarity) * scale[None, :]
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :k] * scale[:, None]
    reference = vectors[0, 0]
    return vectors / torch.where(reference != 0, reference, 1.0)


def _check_count(points: Tensor, k: int) -> None:
    if not 1 <= k <= points.shape[0]:
        raise ValueError(
            f"{points.shape[0]} spots cannot form {k} clusters: the number of clusters must lie between 1 and the number of "
            "spots of the smallest batch. Lower --k (LOSS.k) or raise --batch_size (TRAINING.batch_size)."
        )


def _distance_dtype(device: torch.device) -> torch.dtype:
    """float64, so that matrix products give the labels of the plain sum of squares; mps has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _nearest(data: Tensor, centroids: Tensor, is_used: Tensor, margin: Tensor) -> Tensor:
    """Least index among the nearest used centroids, (N,).

    ||x - c||^2 without ||x||^2, which is the same for all centroids of a point. Distances that differ by less than the
    margin are ties.
    """
    offsets = centroids.square().sum(dim=1).masked_fill(~is_used, float("inf"))
    distance = torch.addmm(offsets, data, centroids.t(), alpha=-2)
    return (distance <= distance.amin(dim=1, keepdim=True) + margin).byte().argmax(dim=1)


def _membership(labels: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(k, device=labels.device)[:, None] == labels[None, :]).to(dtype)


def _means(data: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Means (k, D) of the members and their number (k,); zero for an empty cluster."""
    membership = _membership(labels, k, data.dtype)
    counts = membership.sum(dim=1)
    return membership @ data / counts.clamp_min(1)[:, None], counts


def _with_gradient(points: Tensor, labels: Tensor, k: int, is_used: Tensor) -> Clusters:
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        centroids, _ = _means(points, labels, k)
    return Clusters(labels=labels, centroids=centroids, is_used=is_used)
