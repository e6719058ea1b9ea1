"""Key blocks for tiles of rows, by positions or by scores: what detectors of blocks share."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import torch

from ..masks import HeavyMask, ListMask, UnionMask
from ..precision import without_autocast

__all__ = [
    "BlockLists",
    "TileScores",
    "best_blocks",
    "delayed",
    "filled_runs",
    "first_blocks",
    "lists_of_blocks",
    "mask_of_lists",
]

_CHUNK_BYTES = 64 << 20  # of the scores of tiles held at once

TileScores = Callable[[slice], torch.Tensor]
"""Scores of all key blocks for some tiles of rows: `[batch, query_heads, tiles, blocks]`."""


class BlockLists(NamedTuple):
    """Key blocks of tiles of rows, cut to a run of keys; small, so that they can be kept.

    Attributes:
        blocks: int32 `[heads, tiles, blocks]`, ascending, the used ones first.
        is_cut: bool `[heads, tiles]`, whether the run begins inside of the first block.
        num_held: int32 `[heads, tiles]`, keys of all blocks that lie in the run.
        length: the largest number of them, or a bound of it.
    """

    blocks: torch.Tensor
    is_cut: torch.Tensor
    num_held: torch.Tensor
    length: int


def first_blocks(block_size: int, query_start: int, num_queries: int) -> torch.Tensor:
    """Return the block of every tile of rows: int64 `[tiles]`, on the host.

    A tile has `gcd(block_size, query_start)` rows, so that none lies in two blocks. Rows before
    the first key belong to block 0.
    """
    tile_size = gcd(block_size, query_start)
    first = torch.arange(-(-num_queries // tile_size)) * tile_size + query_start
    return first.clamp(min=0) // block_size


def lists_of_blocks(
    blocks: torch.Tensor, *, block_size: int, key_start: int, num_keys: int, device: torch.device
) -> BlockLists:
    """Return what lies in a run of keys of some blocks.

    Args:
        blocks: int64 `[heads, tiles, blocks]` on the host, distinct in each tile; blocks outside of
            the keys, as -1, are left out.
        block_size: positions of a block.
        key_start: position of the first key.
        num_keys: keys of the run.
        device: where the lists go.
    """
    key_stop = key_start + num_keys
    # what lies outside goes to the end, and has no keys there
    blocks = torch.where((blocks + 1) * block_size > key_start, blocks, key_stop)
    blocks = blocks.sort(dim=-1).values
    first = (blocks * block_size).clamp(min=key_start)
    held = (((blocks + 1) * block_size).clamp(max=key_stop) - first).clamp(min=0)
    is_cut = blocks[..., 0] * block_size < key_start
    num_held = held.sum(dim=-1)
    length = min(blocks.shape[-1] * block_size, num_keys)
    if not torch.compiler.is_compiling():
        # on the host, where reading a value is free
        length = int(num_held.max())
        blocks = blocks[..., : int((held > 0).sum(dim=-1).max())]
    return BlockLists(blocks.int().to(device), is_cut.to(device), num_held.int().to(device), length)


def mask_of_lists(
    lists: BlockLists, query: torch.Tensor, key: torch.Tensor, *, block_size: int,
    query_start: int, key_start: int, is_causal: bool,
) -> ListMask:  # fmt: skip
    """Return the mask of some blocks, its lists shared by all batch items.

    Args:
        lists: from `lists_of_blocks`, for one head or for every key head.
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`, the run of keys.
        block_size: positions of a block.
        query_start: position of the first query.
        key_start: position of the first key.
        is_causal: see `HeavyMask`.
    """
    batch, key_heads, num_keys, _ = key.shape
    # one block more, so that a list may begin inside of its first one
    blocks = torch.nn.functional.pad(lists.blocks, (0, 1))
    within = torch.arange(block_size, dtype=torch.int32, device=key.device) - key_start
    keys = (blocks.unsqueeze(-1) * block_size + within).flatten(2)
    # blocks ascend: keys that a list lacks are at the front of its first block or at its end
    index, cut = keys[..., : lists.length], key_start % block_size
    if cut:
        behind = keys[..., cut : cut + lists.length]
        index = torch.where(lists.is_cut.unsqueeze(-1), behind, index)
    index = index.clamp(0, num_keys - 1)
    return ListMask(
        batch_size=batch, num_query_heads=query.shape[1], num_queries=query.shape[2],
        num_keys=num_keys, is_causal=is_causal, query_offset=query_start - key_start,
        key_index=index.expand(batch, key_heads, -1, -1),
        key_count=lists.num_held.expand(batch, key_heads, -1),
        tile_size=gcd(block_size, query_start),
    )  # fmt: skip


def delayed(
    query: torch.Tensor, earlier_query: torch.Tensor | None, count: int
) -> torch.Tensor:  # fmt: skip
    """Return queries of which number `i` is row `i - count`, and the first one known before that.

    Run `t` of `count + 1` of them has no row after the first one of tile `t` of as many rows: the
    voters of a strictly causal choice. `[batch, query_heads, n_q + count, d]`.
    """
    if count == 0:
        return query
    known = query if earlier_query is None else torch.cat([earlier_query[:, :, -count:], query], 2)
    lacking = query.shape[2] + count - known.shape[2]
    return torch.cat([known[:, :, :1].expand(-1, -1, lacking, -1), known], dim=2)


def filled_runs(rows: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """Cut `[..., n, d]` into runs: `[..., count, size, d]`; repeats of the last row fill them."""
    lacking = count * size - rows.shape[-2]
    if lacking > 0:
        last = rows[..., -1:, :]
        rows = torch.cat([rows, last.expand(*rows.shape[:-2], lacking, rows.shape[-1])], dim=-2)
    runs: torch.Tensor = rows[..., : count * size, :].unflatten(-2, (count, size))
    return runs


def best_blocks(
    scores: TileScores, query: torch.Tensor, key: torch.Tensor, *, block_size: int,
    num_blocks: int, tile_size: int, is_causal: bool, top_p: float = 1.0,
) -> HeavyMask:  # fmt: skip
    """Return the key blocks of the best scores for every tile of rows.

    Block `b` is the keys from `b * block_size` on, the last one may be shorter. Under `is_causal` a
    tile chooses among the whole blocks before its first row, and holds all keys from there to its
    last row as well, at most `tile_size + block_size - 1`.

    Args:
        scores: called with slices of the tiles; larger is better. A natural log of estimated mass
            where `top_p` is below 1.
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        block_size: keys of a block.
        num_blocks: blocks that a tile chooses, at most.
        tile_size: rows of a tile.
        is_causal: see `HeavyMask`.
        top_p: the fewest blocks are held whose estimated mass reaches this share.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys, device = key.shape[2], query.device
    offset = num_keys - num_queries
    num_tiles, total = -(-num_queries // tile_size), -(-num_keys // block_size)
    start = torch.arange(num_tiles, device=device) * tile_size + offset
    choice = torch.full_like(start, total)
    if is_causal:
        choice = start.clamp(min=0) // block_size
    longest = min(num_blocks, total)
    place, rank = torch.arange(total, device=device), torch.arange(longest, device=device)
    step = max(1, _CHUNK_BYTES // (16 * batch * heads * total))
    chosen = []
    for first in range(0, num_tiles, step):
        tiles = slice(first, first + step)
        score = scores(tiles)
        # an overflow must not rank behind what is left out
        score = score.clamp(min=torch.finfo(score.dtype).min)
        score = score.masked_fill(place >= choice[tiles, None], float("-inf"))
        best = score.topk(longest, dim=-1)
        is_held = (rank < choice[tiles, None]).expand_as(best.indices)
        if top_p < 1:
            share = torch.exp(best.values - score.logsumexp(dim=-1, keepdim=True))
            with without_autocast(share):
                before = share @ share.new_ones(longest, longest).triu(1)
            is_held = is_held & (before < top_p)
        # in order, so that a shorter last block is the last one and leaves no gap
        chosen.append(torch.where(is_held, best.indices, total).sort(dim=-1).values.int())
    block = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)
    within = torch.arange(block_size, dtype=torch.int32, device=device)
    index = (block.unsqueeze(-1) * block_size + within).flatten(-2)
    blocks = ListMask(
        batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, key_index=index.clamp(max=num_keys - 1),
        key_count=(index < num_keys).sum(dim=-1, dtype=torch.int32), tile_size=tile_size,
    )  # fmt: skip
    if not is_causal:
        return blocks
    is_aligned = tile_size % block_size == 0 and offset % block_size == 0
    begin = choice * block_size
    slot = torch.arange(tile_size + (0 if is_aligned else block_size - 1), device=device)
    own = (begin.unsqueeze(-1) + slot).clamp(max=num_keys - 1).int()
    count = (start + tile_size).clamp(min=0, max=num_keys) - begin
    shape = (batch, key.shape[1], num_tiles)
    own_keys = ListMask(
        batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
        is_causal=True, key_index=own.expand(*shape, -1), key_count=count.int().expand(shape),
        tile_size=tile_size,
    )  # fmt: skip
    return UnionMask.of(blocks, own_keys)
