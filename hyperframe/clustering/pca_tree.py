"""Balanced trees of points: halves along the leading direction, down to small equal leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..precision import without_autocast

__all__ = ["num_equal_runs", "pca_order", "pca_orders"]


def num_equal_runs(length: int, longest: int) -> int:
    """Return how many equal runs, none above `longest`, `length` places have; at least 1."""
    return max(1, -(-length // longest))


def pca_order(points: torch.Tensor, *, leaf_size: int, num_steps: int = 4) -> torch.Tensor:
    """Order points so that equal runs of `leaf_size` are the leaves of a balanced tree.

    A node sorts its points along its leading direction (power iterations from the axis of largest
    variance) and gives half of its leaves, and their points, to each child. With `m =
    ceil(n / leaf_size)` leaves, leaf `i` is the run `[i n / m, (i + 1) n / m)` of the order,
    rounded down: `equal_runs(n, m)`.

    Args:
        points: `[..., n, d]`, a tree for each leading index.
        leaf_size: points of a leaf, at most.
        num_steps: power iterations at every node.

    Returns:
        int64 `[..., n]`, the point at each place. Deterministic; no gradient.
        Cost O(n d num_steps log(n / leaf_size)) time, as batched products and sorts, O(n d) memory.

    Example:
        >>> pca_order(torch.tensor([[5.0], [1.0], [4.0], [0.0]]), leaf_size=2).view(2, 2).tolist()
        [[3, 1], [2, 0]]
    """
    *lead, length, dim = points.shape
    x = points.detach().reshape(-1, length, dim)
    x = x.to(torch.promote_types(points.dtype, torch.float32))
    order = torch.arange(length, device=x.device).expand(len(x), -1)
    num_leaves = num_equal_runs(length, leaf_size)
    with torch.no_grad(), without_autocast(x):
        for level in range((num_leaves - 1).bit_length()):
            moved = _split(x, 1 << level, num_leaves, num_steps)
            order = order.gather(-1, moved)
            x = x.gather(1, moved.unsqueeze(-1).expand_as(x))
    return order.reshape(*lead, length)


def pca_orders(
    points: Sequence[torch.Tensor], leaf_sizes: Sequence[int], *, num_steps: int = 4
) -> list[torch.Tensor]:
    """Order several sets of trees of different lengths, splitting all nodes of a size together.

    On a GPU a tree of few points costs its launches; here all trees cost those of the longest one.

    Args:
        points: `[*lead, trees, n, d]` each, with `lead`, `d` and dtype in common.
        leaf_sizes: of each set; its `n` is that times a power of two, and the longest `n` is a
            power of two times every other one.
        num_steps: power iterations at every node.

    Returns:
        What `pca_order` returns for each of them, up to rounding: int64 `[*lead, trees, n]`.
        Cost as the sum of theirs; memory O(sum of trees n d).

    Example:
        >>> line = torch.tensor([5.0, 1.0, 4.0, 0.0])
        >>> orders = pca_orders([line.view(1, 4, 1), line.view(2, 2, 1)], [2, 1])
        >>> [order.flatten().tolist() for order in orders]
        [[3, 1, 2, 0], [1, 0, 1, 0]]
    """
    lengths = [x.shape[-2] for x in points]
    dtype = torch.promote_types(points[0].dtype, torch.float32)
    trees = [x.detach().to(dtype).flatten(0, -4) if x.dim() > 3 else x[None] for x in points]
    places = [
        torch.arange(n, device=x.device).expand(x.shape[:-1])
        for x, n in zip(trees, lengths, strict=True)
    ]
    batch, dim, size = len(trees[0]), trees[0].shape[-1], max(lengths)
    while size > min(leaf_sizes):
        now = [i for i, n in enumerate(lengths) if leaf_sizes[i] < size <= n]
        if now:
            with torch.no_grad(), without_autocast(trees[0]):
                nodes = torch.cat([trees[i].reshape(batch, -1, size, dim) for i in now], dim=1)
                along = _along_leading_direction(nodes, None, num_steps)
                moved = along.sort(dim=-1, stable=True).indices
                nodes = nodes.gather(2, moved.unsqueeze(-1).expand_as(nodes))
                place = torch.cat([places[i].reshape(batch, -1, size) for i in now], dim=1)
                place = place.gather(2, moved)
            counts = [trees[i].shape[1:-1].numel() // size for i in now]
            pieces = zip(now, nodes.split(counts, 1), place.split(counts, 1), strict=True)
            for i, x, moved_place in pieces:
                trees[i], places[i] = x, moved_place
        size //= 2
    return [place.reshape(x.shape[:-1]) for place, x in zip(places, points, strict=True)]


def _split(x: torch.Tensor, num_nodes: int, num_leaves: int, num_steps: int) -> torch.Tensor:
    """Sort the points of every node along its leading direction: int64 `[N, n]`, old places."""
    length = x.shape[1]
    if num_leaves % num_nodes == 0 and length % num_nodes == 0:
        nodes = x.unflatten(1, (num_nodes, -1))
        start = torch.arange(num_nodes, device=x.device) * (length // num_nodes)
        along = _along_leading_direction(nodes, None, num_steps)
        return (along.sort(dim=-1, stable=True).indices + start.unsqueeze(-1)).flatten(1)
    # nodes of unequal sizes: padded to the longest, the absent places last
    first_leaf = torch.arange(num_nodes + 1, device=x.device) * num_leaves // num_nodes
    bounds = first_leaf * length // num_leaves
    most_leaves = -(-num_leaves // num_nodes)
    longest = -(-most_leaves * length // num_leaves)
    place = bounds[:-1, None] + torch.arange(longest, device=x.device)
    is_there = place < bounds[1:, None]
    nodes = x[:, place.clamp(max=length - 1)] * is_there.unsqueeze(-1)
    along = _along_leading_direction(nodes, is_there, num_steps)
    along = along.masked_fill(~is_there, float("inf"))
    moved = along.sort(dim=-1, stable=True).indices + bounds[:-1, None]
    places = torch.arange(length, device=x.device)
    leaf = ((places + 1) * num_leaves - 1) // length
    node = ((leaf + 1) * num_nodes - 1) // num_leaves
    return moved.flatten(1)[:, node * longest + places - bounds[node]]


def _along_leading_direction(
    nodes: torch.Tensor, is_there: torch.Tensor | None, num_steps: int
) -> torch.Tensor:
    """Project the points of nodes, `[N, nodes, w, d]`, absent ones zero: `[N, nodes, w]`."""
    if is_there is None:
        centred = nodes - nodes.mean(dim=2, keepdim=True)
    else:
        count = is_there.sum(dim=-1).clamp(min=1)[:, None, None]
        centred = nodes - nodes.sum(dim=2, keepdim=True) / count
        centred = centred * is_there.unsqueeze(-1)
    # no product over- or underflows, and the direction does not change
    largest = centred.abs().amax(dim=(2, 3), keepdim=True)
    centred = centred / torch.where(largest > 0, largest, 1)
    variance = centred.square().sum(dim=2)
    direction = (variance >= variance.amax(dim=-1, keepdim=True)).to(nodes.dtype).unsqueeze(-1)
    for _ in range(num_steps):
        direction = centred.transpose(-1, -2) @ (centred @ direction)
        norm = torch.linalg.vector_norm(direction, dim=-2, keepdim=True)
        direction = direction / torch.where(norm > 0, norm, 1)
    # NaN and infinities are places like others; absent ones come after them
    return (centred @ direction).squeeze(-1).nan_to_num(nan=0.0)
