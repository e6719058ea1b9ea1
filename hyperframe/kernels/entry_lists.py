"""Entries that are known by columns, as lists of keys of tiles of rows."""

from __future__ import annotations

import torch

from .ops import sketch as _schema  # noqa: F401  (defines the operator implemented here)
from .sketch import runs_kernels

__all__ = ["entry_lists", "list_bytes", "torch_entry_lists"]

_MOST_SLOTS = 4096  # of a column and of a tile, with kernels


def list_bytes(row: torch.Tensor, strength: torch.Tensor, longest: int) -> int:
    """Return about how many bytes `entry_lists` holds for each slot of a column."""
    return 32 if runs_kernels(strength) and max(row.shape[-1], longest) <= _MOST_SLOTS else 64


def entry_lists(
    row: torch.Tensor, strength: torch.Tensor, *, num_queries: int, tile_size: int, longest: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return for every tile of rows the keys of its entries, and which rows hold each.

    A pair of a tile and a key is as strong as its strongest entry; a tile keeps the strongest
    pairs, and of equally strong ones those of the first keys.

    Args:
        row: int64 or int32 `[heads, n_k, C]`, distinct rows of a column, -1 for none.
        strength: float32, the same shape; no NaN where a row is given.
        num_queries: `n_q`.
        tile_size: rows of a tile, at most 64.
        longest: keys of a tile, at most.
        is_causal: drop entries whose key is later than their row, bottom-right aligned.

    Returns:
        int32 `[heads, tiles, longest]`, keys, ascending; int64, the same shape, whose bits say
        which rows of the tile hold the key; int32 `[heads, tiles]`, how many keys there are.
        Nothing is said of the slots behind them, but that their keys exist. No gradient.
        Cost: O(n_k C) time and 32 bytes of memory for each slot with Triton on CUDA, for up to
        4,096 slots of columns and of tiles, however many of the entries lie in the same tiles;
        elsewhere sorts of all slots.
    """
    index, bits, count = torch.ops.hyperframe.entry_lists(
        row, strength, num_queries, tile_size, longest, is_causal
    )
    return index, bits, count


@torch.library.impl("hyperframe::entry_lists", "default")
def _run(
    row: torch.Tensor, strength: torch.Tensor, num_queries: int, tile_size: int, longest: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (row, strength, num_queries, tile_size, longest, is_causal)
    if runs_kernels(strength):
        from .triton import entry_lists as kernels

        if kernels.supports_lists(row, strength, longest):
            with torch.cuda.device(row.device):
                return kernels.triton_lists(*given)
    return torch_entry_lists(*given)


def torch_entry_lists(
    row: torch.Tensor, strength: torch.Tensor, num_queries: int, tile_size: int, longest: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `entry_lists` says, on any device: sort columns by row, then all pairs by tile."""
    heads, num_keys, width = row.shape
    num_tiles, device = -(-num_queries // tile_size), row.device
    row = row.long()
    is_used = row >= 0
    if is_causal:
        position = torch.arange(num_keys, device=device) + num_queries - num_keys
        is_used = is_used & (row >= position[:, None])
    row, order = torch.where(is_used, row, num_tiles * tile_size).sort(dim=-1)
    strength = strength.gather(-1, order)
    tile = row // tile_size
    bits = torch.ones_like(row) << (row % tile_size)
    # what a tile has of a column is a run: the first of a run learns what all of it hold
    is_first = torch.ones_like(tile, dtype=torch.bool)
    is_first[..., 1:] = tile[..., 1:] != tile[..., :-1]
    reach = 1
    while reach < min(width, tile_size):
        is_same = tile[..., reach:] == tile[..., :-reach]
        later = torch.where(is_same, bits[..., reach:], 0)
        bits = torch.cat([bits[..., :-reach] | later, bits[..., -reach:]], dim=-1)
        later = torch.where(is_same, strength[..., reach:], -torch.inf)
        strength = torch.cat(
            [torch.maximum(strength[..., :-reach], later), strength[..., -reach:]], dim=-1
        )
        reach *= 2
    pair = torch.where(is_first, tile, num_tiles) << 32 | _descending(strength)
    pair, place = pair.flatten(1).sort(dim=-1, stable=True)
    bound = torch.arange(num_tiles + 1, device=device) << 32
    bound = torch.searchsorted(pair, bound.expand(heads, -1).contiguous())
    count = (bound[:, 1:] - bound[:, :-1]).clamp(max=longest)
    slot = torch.arange(longest, device=device)
    is_kept = slot < count.unsqueeze(-1)
    taken = (bound[:, :-1].unsqueeze(-1) + slot).clamp(max=pair.shape[-1] - 1)
    place = place.gather(-1, taken.flatten(1)).view(taken.shape)
    key = torch.where(is_kept, place // width, num_keys)
    key, order = key.sort(dim=-1)
    bits = bits.flatten(1).gather(-1, place.flatten(1)).view(taken.shape).gather(-1, order)
    return key.clamp(max=num_keys - 1).int(), bits, count.int()


def _descending(strength: torch.Tensor) -> torch.Tensor:
    """Return int64 from 0 to 2^32 - 1 that descend as float32 values ascend."""
    bits = strength.contiguous().view(torch.int32).long()
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # from -2^31
    return (1 << 31) - 1 - ascending
