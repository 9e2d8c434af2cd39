"""K-means of the instance groups: one batch of unit vectors, ten Lloyd steps.

    python benchmarks/bench_kmeans.py

The slow version is the obvious one of the published code: all differences of points and centroids at once, (N, k, D).
It stands for 90, 120 and 1 090 ms at k = 18, 25 and 90 with 512 x 512 points.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python benchmarks/x.py` works

import torch
from torch import Tensor

from benchmarks.common import Report, begin, finish, flags, machine, seconds_of
from models.clustering import LLOYD_STEPS, kmeans
from utils.cli import run

PUBLISHED_MS = {18: 90, 25: 120, 90: 1090}


def naive_kmeans(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Labels (N,) and centroids (k, D) of Lloyd's steps from the first k rows; empty clusters are never nearest."""
    centroids, is_used = points[:k], torch.ones(k, dtype=torch.bool, device=points.device)
    for _ in range(LLOYD_STEPS):
        distances = (points[:, None, :] - centroids[None, :, :]).square().sum(dim=-1)
        labels = distances.masked_fill(~is_used, float("inf")).argmin(dim=1)
        members = [points[labels == i] for i in range(k)]
        is_used = is_used & torch.tensor([len(found) > 0 for found in members], device=points.device)
        centroids = torch.stack([found.mean(dim=0) if len(found) else torch.zeros_like(points[0]) for found in members])
    return labels, centroids


def batch_of_vectors(count: int, dim: int, device: torch.device) -> Tensor:
    """(N, D) unit vectors in soft groups, as the shared head gives them."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(24, dim, generator=generator)
    points = groups[torch.randint(24, (count,), generator=generator)] + torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(points, dim=1).to(device)


def main(argv: list[str] | None = None) -> Path:
    arguments = flags(__doc__).parse_args(argv)
    device = begin(arguments)
    started_on = machine(device)
    count, dim, repeats = (64, 32, 1) if arguments.quick else (512, 512, 5)
    points = batch_of_vectors(count, dim, device)
    rows, all_equal = [], True
    for k in (4, 9) if arguments.quick else PUBLISHED_MS:
        labels, centroids = naive_kmeans(points.double(), k)
        found = kmeans(points, k)
        is_equal = torch.equal(labels, found.labels) and torch.allclose(centroids.float(), found.centroids, atol=1e-6)
        all_equal = all_equal and is_equal
        slow = seconds_of(lambda k=k: naive_kmeans(points, k), device, repeats=repeats)
        fast = seconds_of(lambda k=k: kmeans(points, k), device, repeats=2 * repeats + 1)
        rows.append(
            {
                "k": k,
                "published code (ms)": PUBLISHED_MS.get(k),
                "naive version (ms)": 1e3 * slow,
                "here (ms)": 1e3 * fast,
                "times faster": slow / fast,
                "same clusters": is_equal,
            }
        )
    report = Report(
        name="kmeans",
        title="K-means of a batch",
        settings={"points": f"{count} x {dim}", "Lloyd steps": LLOYD_STEPS},
        rows=rows,
        notes=[
            "Here distances are matrix products in float64, which gives the labels of the exact sums of squares.",
            "The labels and centroids of both agree (compared in float64).",
        ],
        extra={"all_equal": all_equal},
    )
    assert all_equal, "the fast k-means groups otherwise than the slow one"
    return finish(report, arguments, device, started_on)


if __name__ == "__main__":
    run(main)
