"""Leaves of keys, and which of them a tile of rows holds: scores by mean keys, and lists."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels import leaves as kernels
from ..ragged import keep_in_lists
from ..samplers.pooled import pooled_queries, run_lengths
from ..tables import kept, maker_device, spaced

__all__ = ["Leaves", "SeenLeaves", "best_leaves", "leaf_scores", "lists_of_leaves", "tile_voters"]


class Leaves(NamedTuple):
    """Groups of keys that a tile holds as a whole or not at all.

    Attributes:
        keys: integer `[batch, key_heads, leaves, longest]`, the keys of each leaf.
        sizes: int64 `[leaves]`, how many of them there are; at least 1.
        mean: `[batch, key_heads, leaves, d]`, the mean keys, in the dtype of the keys at least.
        is_even: whether all leaves have `longest` keys.
    """

    keys: torch.Tensor
    sizes: torch.Tensor
    mean: torch.Tensor
    is_even: bool


class SeenLeaves(NamedTuple):
    """Which leaves each tile may hold.

    Attributes:
        num_far: how many leaves, from the first one on, are far ones.
        far: int64 `[tiles]`: a tile sees that many far leaves, the first ones.
        near: int64 `[tiles, near]`, further leaves that a tile may see.
        is_near: bool `[tiles, near]`, whether it sees them.
        num_seen: int64 `[tiles]`, how many it sees; None where nobody has counted.
    """

    num_far: int
    far: torch.Tensor
    near: torch.Tensor
    is_near: torch.Tensor
    num_seen: torch.Tensor | None = None


def tile_voters(
    query: torch.Tensor, *, tile_size: int, num_means: int, strict: bool = False,
    earlier_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the queries that choose for each tile of rows: means of runs of its rows.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        tile_size: rows of a tile.
        num_means: runs of a tile, at most.
        strict: the runs are those of the tile before instead, and the first row of the tile votes
            by itself: no voter is later than a row of the tile.
        earlier_query: `[batch, query_heads, n, d]`, rows before the first tile, or None.

    Returns:
        `[batch, query_heads, tiles, voters, d]`, in the dtype of the queries, and bool `[tiles,
        voters]`: which of them there are. Cost O(n_q d).
    """
    length = query.shape[2]
    num_tiles = -(-length // tile_size)
    if length % tile_size != 0:  # padding by nothing would copy
        query = torch.nn.functional.pad(query, (0, 0, 0, num_tiles * tile_size - length))
    tiles = query.unflatten(2, (num_tiles, tile_size))
    if not strict:
        votes = _runs_of_rows(length, tile_size, num_means, query.device)
        if length % tile_size == 0 and tile_size % num_means == 0:
            runs = tiles.unflatten(3, (num_means, -1))
            return runs.mean(dim=4), votes
        rows = spaced(num_tiles, -tile_size, length, query.device, high=tile_size)
        return pooled_queries(tiles, rows, num_means).to(query.dtype), votes
    tile = torch.arange(num_tiles, device=query.device)
    first = query[:, :, :0] if earlier_query is None else earlier_query[:, :, -tile_size:]
    before = torch.nn.functional.pad(first, (0, 0, 0, tile_size - first.shape[2])).unsqueeze(2)
    rows = torch.where(tile > 0, tile_size, first.shape[2])
    means = pooled_queries(torch.cat([before, tiles[:, :, :-1]], dim=2), rows, num_means)
    means = torch.cat([means.to(query.dtype), tiles[:, :, :, :1]], dim=3)
    votes = run_lengths(rows, tile_size, num_means) > 0
    return means, torch.nn.functional.pad(votes, (0, 1), value=True)


@kept
def _runs_of_rows(
    length: int, tile_size: int, num_means: int, device: torch.device
) -> torch.Tensor:
    """Return which runs of the tiles of some rows have any: bool `[tiles, runs]`."""
    tiles = torch.arange(-(-length // tile_size), device=maker_device(device))
    rows = (length - tiles * tile_size).clamp(max=tile_size)
    return (run_lengths(rows, tile_size, num_means) > 0).to(device)


def leaf_scores(
    voters: torch.Tensor, votes: torch.Tensor, leaves: Leaves, seen: SeenLeaves, *, scale: float
) -> torch.Tensor:
    """Return the log of the softmax mass that voters give to each leaf, by its mean key.

    A leaf of `c` keys has the logit `scale q . mean + log c`. The softmax of a voter is over the
    leaves that its tile sees; the masses of a tile's voters add up.

    Args:
        voters: `[batch, query_heads, tiles, voters, d]`.
        votes: bool `[tiles, voters]`.
        leaves: the leaves.
        seen: which of them each tile sees.
        scale: factor of the logits.

    Returns:
        `[batch, query_heads, tiles, far + near]`, natural log; `-inf` for a leaf that is not seen.
        Far leaves come first, then the near ones of each tile.
    """
    return kernels.leaf_masses(
        voters, votes, leaves.mean.to(voters.dtype), leaves.sizes, seen.far, seen.near,
        seen.is_near, scale=scale, num_far=seen.num_far,
    )  # fmt: skip


def best_leaves(
    voters: torch.Tensor, votes: torch.Tensor, leaves: Leaves, seen: SeenLeaves, *, scale: float,
    num_leaves: int,
) -> torch.Tensor:  # fmt: skip
    """Return the leaves of every tile with the best `leaf_scores`.

    Returns:
        int64 `[batch, query_heads, tiles, num_leaves]` (fewer where there are fewer leaves), those
        that the tile sees first; where it sees fewer, the last ones are any. On CUDA with Triton
        they are in no order of their scores, elsewhere the best come first.
        Cost O(tiles voters leaves d) time; see `kernels.leaves.best_leaves`.
    """
    return kernels.best_leaves(
        voters, votes, leaves.mean.to(voters.dtype), leaves.sizes, seen.far, seen.near,
        seen.is_near, scale=scale, num_far=seen.num_far, num_leaves=num_leaves,
        is_even=leaves.is_even,
    )  # fmt: skip


def lists_of_leaves(
    chosen: torch.Tensor, leaves: Leaves, seen: SeenLeaves
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys of chosen leaves as lists of tiles.

    Args:
        chosen: from `best_leaves`.
        leaves: the leaves.
        seen: which of them each tile sees.

    Returns:
        int32 `[batch, query_heads, tiles, chosen * longest]`, and int64 counts, one dimension less.
    """
    batch, heads, num_tiles, num_chosen = chosen.shape
    key_heads, _, longest = leaves.keys.shape[1:]
    flat = chosen.reshape(batch, key_heads, -1, 1).expand(-1, -1, -1, longest)
    index = leaves.keys.int().gather(2, flat).view(batch, heads, num_tiles, num_chosen * longest)
    # leaves that are not seen have the last scores
    num_seen = seen.num_seen
    if num_seen is None:
        num_seen = seen.far + seen.is_near.sum(dim=-1)
    count = (num_seen.clamp(max=num_chosen) * longest).expand(batch, heads, -1)
    if leaves.is_even:
        return index, count
    slot = torch.arange(longest, device=chosen.device)
    is_there = slot < leaves.sizes[chosen].unsqueeze(-1)
    return keep_in_lists(index, count, is_there.flatten(3))
