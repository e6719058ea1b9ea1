"""k-means with equal blocks: clusters are found, blocks are equal, and no worse than the tree's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.clustering import kmeans_centres, kmeans_order, nearest_centres, pca_order

sklearn_cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the oracle")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clustered(
    num_clusters: int, size: int, *, dim: int = 8, seed: int = 0, noise: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around random centres, in a random order, and their clusters."""
    g = generator(seed)
    centres = 4 * torch.randn(num_clusters, dim, generator=g)
    label = torch.arange(num_clusters).repeat(size)[
        torch.randperm(num_clusters * size, generator=g)
    ]
    return centres[label] + noise * torch.randn(len(label), dim, generator=g), label


def inertia(points: torch.Tensor, order: torch.Tensor, block: int) -> float:
    """Mean squared distance of points to the means of their blocks."""
    blocks = points[order].view(-1, block, points.shape[-1])
    return float((blocks - blocks.mean(dim=1, keepdim=True)).square().sum(-1).mean())


@given(
    length=st.integers(1, 70),
    block_size=st.integers(1, 80),
    num_steps=st.integers(0, 3),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 1000),
    rounding=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_every_point_has_one_place(
    length: int, block_size: int, num_steps: int, batch_size: int, seed: int, rounding: float
) -> None:
    points = torch.randn(2, length, 3, generator=generator(seed))
    if rounding:
        points = (points / rounding).round()
    order = kmeans_order(
        points, block_size=block_size, num_steps=num_steps, batch_size=batch_size,
        generator=generator(seed),
    )  # fmt: skip
    assert torch.equal(order.sort(dim=-1).values, torch.arange(length).expand(2, -1))


def test_the_nearest_centre_is_the_nearest() -> None:
    g = generator()
    points, centres = torch.randn(3, 50, 4, generator=g), torch.randn(3, 7, 4, generator=g)
    expected = torch.cdist(points.double(), centres.double()).argmin(dim=-1)
    assert torch.equal(nearest_centres(points, centres), expected)


@pytest.mark.parametrize("with_generator", [False, True])
def test_separated_clusters_of_one_block_each_become_the_blocks(with_generator: bool) -> None:
    points, label = clustered(16, 32)
    order = kmeans_order(
        points, block_size=32, num_steps=20, generator=generator() if with_generator else None
    )
    blocks = label[order].view(16, 32)
    pure = (blocks == blocks.mode(dim=-1, keepdim=True).values).double().mean()
    # a random order has purity of about 5/32
    assert pure > 0.9


def test_clusters_of_points_come_near_those_of_scikit_learn() -> None:
    points, _ = clustered(16, 64, noise=1.5, seed=4)
    oracle = sklearn_cluster.KMeans(n_clusters=32, n_init=3, random_state=0).fit(points.numpy())
    ours = inertia(points, kmeans_order(points, block_size=32, num_steps=20), 32)
    random = inertia(points, torch.randperm(1024, generator=generator()), 32)
    # the oracle's clusters may have any size; ours have 32 points
    free = oracle.inertia_ / 1024
    assert free < ours < free + 0.15 * (random - free)


def test_steps_bring_centres_nearer_to_the_points() -> None:
    points, _ = clustered(20, 26, noise=0.5)
    ordered = points[pca_order(points, leaf_size=32)]

    def distance(num_steps: int, batch_size: int = 256) -> float:
        centres = kmeans_centres(ordered, 20, num_steps=num_steps, batch_size=batch_size)
        nearest = centres[nearest_centres(ordered, centres)]
        return float((ordered - nearest).square().sum(dim=-1).mean())

    assert distance(20) < 0.9 * distance(0)
    assert distance(20, batch_size=1000) < 0.9 * distance(0)


def test_centres_without_steps_are_the_means_of_equal_runs() -> None:
    points = torch.randn(2, 11, 3, generator=generator(), dtype=torch.float64)
    centres = kmeans_centres(points, 4, num_steps=0, batch_size=5)
    bounds = [0, 2, 5, 8, 11]
    for number in range(4):
        part = points[:, bounds[number] : bounds[number + 1]]
        torch.testing.assert_close(centres[:, number], part.mean(dim=1))


def test_draws_come_from_the_generator_and_without_one_nothing_is_random() -> None:
    points = torch.randn(300, 4, generator=generator(1))

    def order(seed: int | None) -> torch.Tensor:
        g = None if seed is None else generator(seed)
        return kmeans_order(points, block_size=16, batch_size=20, generator=g)

    assert torch.equal(order(None), order(None))
    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4))


def test_blocks_of_a_stack_do_not_see_one_another() -> None:
    points = torch.randn(3, 100, 4, generator=generator(2), dtype=torch.float64)
    order = kmeans_order(points, block_size=8, batch_size=30, generator=generator(9))
    points[1] *= -7
    changed = kmeans_order(points, block_size=8, batch_size=30, generator=generator(9))
    assert torch.equal(order[::2], changed[::2])
    assert torch.equal(kmeans_order(points[0], block_size=8, batch_size=30, generator=generator(9)),
                       order[0])  # fmt: skip
