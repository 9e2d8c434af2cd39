"""Clustering against the recordings and against the obvious, slow k-means: ties, duplicates, empty and uneven groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.clustering import cosine_similarity, cut_eigenvectors, kmeans, spectral


def slow_kmeans(points: Tensor, k: int, *, steps: int = 10, empty: str = "drop") -> tuple[Tensor, Tensor, list[bool]]:
    """Sums of squares, one point and one cluster at a time."""
    centroids = [points[j].clone() for j in range(k)]
    used = [True] * k
    labels = []
    for _ in range(steps):
        labels = []
        for point in points:
            best, best_distance = -1, float("inf")
            for j in range(k):
                distance = float(((point - centroids[j]) ** 2).sum())
                if used[j] and distance < best_distance:
                    best, best_distance = j, distance
            labels.append(best)
        for j in range(k):
            members = [point for point, label in zip(points, labels, strict=True) if label == j]
            centroids[j] = torch.stack(members).mean(dim=0) if members else torch.zeros_like(points[0])
            if not members and empty == "drop":
                used[j] = False
    return torch.tensor(labels), torch.stack(centroids), used


@pytest.fixture
def recording(golden, tools):
    return tools.as_tensors(golden("kmeans"))


def test_labels_centroids_and_gradient_equal_the_recording(recording, tools):
    points = recording["x"].clone().requires_grad_()
    found = kmeans(points, int(recording["k"]), empty="zero")
    assert torch.equal(found.labels, recording["labels"].long())
    tools.close(found.centroids, recording["centroids"])
    (found.centroids * recording["loss_weight"]).sum().backward()
    tools.close(points.grad, recording["grad_x"], tolerance=tools.GRADIENT_TOLERANCE)
    assert not found.labels.requires_grad


@pytest.mark.parametrize("case", ["", "_empty", "_k6"])
def test_every_step_equals_the_recording(recording, tools, case):
    points = recording[f"x{case}"]
    labels, centroids = recording[f"labels{case}_per_iter"].long(), recording[f"centroids{case}_per_iter"]
    for step in range(len(labels)):
        found = kmeans(points, centroids.shape[1], empty="zero", steps=step + 1)
        assert torch.equal(found.labels, labels[step])
        tools.close(found.centroids, centroids[step])


def random_points(count: int, dim: int, seed: int) -> Tensor:
    points = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=1)


@pytest.mark.parametrize("empty", ["drop", "zero"])
@pytest.mark.parametrize(("count", "k"), [(37, 5), (64, 18), (12, 12), (9, 1), (26, 25)])
def test_equal_to_the_slow_version(count, k, empty):
    points = random_points(count, 6, seed=count)
    found = kmeans(points, k, empty=empty)
    labels, centroids, used = slow_kmeans(points.double(), k, empty=empty)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centroids.double(), centroids, atol=1e-6, rtol=0)
    assert found.is_used.tolist() == used


@pytest.mark.parametrize("empty", ["drop", "zero"])
def test_ties_go_to_the_least_index(empty):
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0))
    points = torch.cat([grid[[12, 3, 7, 16]], grid])
    for k in (2, 3, 4, 7):
        found = kmeans(points, k, empty=empty)
        labels, centroids, used = slow_kmeans(points.double(), k, empty=empty)
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.centroids.double(), centroids)
        assert found.is_used.tolist() == used


@pytest.mark.parametrize("empty", ["drop", "zero"])
@pytest.mark.parametrize("dim", [3, 17, 64])
def test_duplicate_starting_rows_leave_empty_clusters(empty, dim):
    """Equal centroids tie exactly, wherever the matrix product puts their columns; rows 0, 1, 3, ... share a point."""
    points = random_points(61, dim, seed=4)
    points[[1, 3, 8, 20]] = points[0].clone()
    for k in (4, 21):
        found = kmeans(points, k, empty=empty)
        labels, centroids, used = slow_kmeans(points.double(), k, empty=empty)
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.centroids.double(), centroids, atol=1e-6, rtol=0)
        assert found.is_used.tolist() == used
        assert empty == "zero" or not all(used)


def test_points_that_are_all_the_same_form_one_cluster():
    found = kmeans(torch.ones(10, 3), 4)
    assert found.labels.tolist() == [0] * 10
    assert found.is_used.tolist() == [True, False, False, False]


def test_a_far_offset_does_not_blur_the_distances():
    points = random_points(40, 5, seed=9).double() * 0.01
    assert torch.equal(kmeans(points + 100, 6).labels, kmeans(points, 6).labels)


def test_gradient_goes_through_the_final_mean_only():
    points = random_points(20, 4, seed=2).double().requires_grad_()
    found = kmeans(points, 3)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (found.centroids * weight).sum().backward()
    counts = torch.bincount(found.labels, minlength=3).double()
    torch.testing.assert_close(points.grad, (weight / counts[:, None])[found.labels])


def test_half_precision_and_autocast_give_float32_centroids_and_the_same_labels():
    points = random_points(48, 16, seed=5)
    expected = kmeans(points, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kmeans(points, 7)
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.centroids, expected.centroids)
    assert kmeans(points.bfloat16(), 7).centroids.dtype == torch.float32


def test_bad_arguments_are_refused():
    points = random_points(5, 3, seed=0)
    with pytest.raises(ValueError, match=r"5 spots cannot form 6 clusters.*Lower --k.*--batch_size"):
        kmeans(points, 6)
    with pytest.raises(ValueError, match=r"5 spots cannot form 0 clusters"):
        spectral(points, 0)


def test_spectral_clustering_equals_the_recording(golden, tools):
    recording = tools.as_tensors(golden("spectral"))
    points, k = recording["x"], int(recording["k"])
    similarity = cosine_similarity(points)
    tools.close(similarity, recording["similarity"])
    vectors = cut_eigenvectors(similarity, k)
    for column in range(k):
        found, expected = vectors[:, column], recording["eigvec"][:, column]
        tools.close(found * torch.sign((found * expected).sum()), expected)
    found = spectral(points, k, empty="zero")
    assert torch.equal(found.labels, recording["labels"].long())
    tools.close(found.centroids, recording["centroids"])


def test_spectral_clustering_separates_blocks_and_passes_gradients():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3).repeat_interleave(8, dim=0)[torch.randperm(24, generator=generator)]
    points = torch.nn.functional.normalize(directions + 0.05 * torch.rand(24, 3, generator=generator), dim=1)
    points.requires_grad_()
    found = spectral(points, 3)
    truth = directions.argmax(dim=1)
    assert len({(a, b) for a, b in zip(truth.tolist(), found.labels.tolist(), strict=True)}) == 3
    found.centroids.sum().backward()
    torch.testing.assert_close(points.grad, torch.full((24, 3), 1 / 8))


def test_spectral_clustering_of_a_spot_that_resembles_no_other_is_finite():
    points = torch.eye(4)[[0, 0, 0, 1, 1, 2]]
    vectors = cut_eigenvectors(cosine_similarity(points), 3)
    assert torch.isfinite(vectors).all()
    assert torch.isfinite(spectral(points, 3).centroids).all()
