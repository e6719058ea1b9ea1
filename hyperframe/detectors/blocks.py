"""Lists of key blocks for tiles of rows: what detectors that go by blocks of positions share."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from ..masks import ListMask

__all__ = ["BlockLists", "first_blocks", "lists_of_blocks", "mask_of_lists"]


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
