"""k-means with equal clusters: mini-batch steps, then an order that is cut into equal blocks."""

from __future__ import annotations

import torch

from ..precision import without_autocast
from ..randomness import uniform
from .pca_tree import num_equal_runs, pca_order
from .runs import equal_runs, gather_runs

__all__ = ["kmeans_centres", "kmeans_order", "nearest_centres"]


def nearest_centres(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the nearest centre of every point: int64 `[..., n]`.

    Args:
        points: `[..., n, d]`.
        centres: `[..., k, d]`.

    Cost O(n k d) time, O(n k) memory. Among equal distances, any.
    """
    with without_autocast(points):
        product = points @ centres.transpose(-1, -2)
    # |p - c|^2 without |p|^2, halved
    return (product - 0.5 * centres.square().sum(dim=-1).unsqueeze(-2)).argmax(dim=-1)


def kmeans_centres(
    points: torch.Tensor, num_centres: int, *, num_steps: int, batch_size: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return centres of points by mini-batch k-means.

    Starts from the means of equal runs of the points. Each step takes one random point out of each
    of `batch_size` equal runs, and moves every centre to the mean of all points that were nearest
    to it when they were taken, and of the run it started from.

    Args:
        points: `[..., n, d]`, clustered apart for each leading index; all take the same places.
        num_centres: how many, at most n.
        num_steps: steps; 0 leaves the means of the runs.
        batch_size: points of a step; all of them where there are no more.
        generator: source of the draws; None takes the middle of each run.

    Returns:
        `[..., num_centres, d]`, in float32 at least.
        Cost O(n d + num_steps batch_size num_centres d).
    Source: mini-batch k-means (Sculley, 2010).
    """
    runs = equal_runs(points.shape[-2], num_centres, points.device)
    x = points.to(torch.promote_types(points.dtype, torch.float32))
    members = gather_runs(x.transpose(-1, -2), runs).movedim(-3, -1)  # [..., runs, longest, d]
    is_there = torch.arange(runs.longest, device=x.device) < runs.sizes.unsqueeze(-1)
    sums = torch.where(is_there.unsqueeze(-1), members, 0).sum(dim=-2)
    weight = runs.sizes.to(x.dtype).unsqueeze(-1)
    number = torch.arange(num_centres, device=x.device)
    with without_autocast(x):
        for _ in range(num_steps):
            taken = _one_of_each_run(x.shape[-2], batch_size, x.device, generator)
            batch = x[..., taken, :]
            nearest = nearest_centres(batch, sums / weight)
            # a product, not a scatter: the same bits in every run on a GPU
            belongs = (nearest.unsqueeze(-1) == number).to(x.dtype)
            sums = sums + belongs.transpose(-1, -2) @ batch
            weight = weight + belongs.sum(dim=-2).unsqueeze(-1)
    return sums / weight


def kmeans_order(
    points: torch.Tensor, *, block_size: int, num_steps: int = 8, batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """Order points so that equal runs of `block_size` are clusters, as far as equal runs can be.

    The points, in the order of `pca_order`, are sorted by their nearest centre (`kmeans_centres`,
    one for each block) and cut: a cluster of more than a block fills several, and a smaller one
    shares its block with its neighbours in the tree.

    Args:
        points: `[..., n, d]`, clustered apart for each leading index.
        block_size: points of a block, at most.
        num_steps: as in `kmeans_centres`.
        batch_size: as in `kmeans_centres`.
        generator: as in `kmeans_centres`.

    Returns:
        int64 `[..., n]`, the point at each place; blocks are `equal_runs(n, ceil(n / block_size))`.
        Cost O(n (n / block_size) d) time and O(n n / block_size) memory: for blocks of bounded n.
        No gradient.

    Example:
        >>> points = torch.tensor([[5.0], [1.0], [4.0], [0.0]])
        >>> kmeans_order(points, block_size=2).view(2, 2).sort().values.tolist()
        [[1, 3], [0, 2]]
    """
    num_blocks = num_equal_runs(points.shape[-2], block_size)
    with torch.no_grad():
        x = points.to(torch.promote_types(points.dtype, torch.float32))
        order = pca_order(x, leaf_size=block_size)
        x = x.gather(-2, order.unsqueeze(-1).expand_as(x))
        centres = kmeans_centres(
            x, num_blocks, num_steps=num_steps, batch_size=batch_size, generator=generator
        )
        cluster = nearest_centres(x, centres)
        return order.gather(-1, cluster.sort(dim=-1, stable=True).indices)


def _one_of_each_run(
    length: int, count: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """Return one place of each of `count` equal runs of `range(length)`: int64."""
    runs = equal_runs(length, min(count, length), device)
    if generator is None:
        slot = (runs.sizes - 1) // 2
    else:
        slot = (uniform((len(runs.sizes),), device, generator) * runs.sizes).long()
    return runs.place.gather(-1, slot.unsqueeze(-1)).squeeze(-1)
