"""Chosen rows of a mask, densely: what looks at a few rows of a large mask."""

from __future__ import annotations

import torch

from ..ragged import spread_heads
from .band import BandMask
from .base import HeavyMask
from .block import BlockMask
from .entry import EntryMask
from .list import ListMask
from .range import RangeMask

__all__ = ["rows_at"]

_CHUNK_ENTRIES = 1 << 24  # bools of a form of mask that is not known here, held at once


def rows_at(mask: HeavyMask, index: torch.Tensor) -> torch.Tensor:
    """Return rows of a mask that differ from head to head.

    Args:
        mask: the mask.
        index: int64 `[batch, query_heads, R]`, rows of each head.

    Returns:
        bool `[batch, query_heads, R, n_k]`, as `mask.to_dense()` has them at these rows.

    Cost: O(R n_k) for a head; O(n_q n_k) time for a form of mask that is defined elsewhere.
    """
    dense = torch.zeros((*index.shape, mask.num_keys), dtype=torch.bool, device=index.device)
    for part in mask.parts():
        dense = dense | _rows_at(part, index)
    if mask.is_causal:
        key_position = torch.arange(mask.num_keys, device=index.device)
        dense = dense & (key_position <= (index + mask.position_offset).unsqueeze(-1))
    return dense


def _rows_at(mask: HeavyMask, index: torch.Tensor) -> torch.Tensor:
    """Return the rows without the causal test, or with it."""
    if isinstance(mask, BlockMask):
        mask = mask.to_ranges()
    key_position = torch.arange(mask.num_keys, device=index.device)
    if isinstance(mask, RangeMask):
        first, last = (bound.gather(-1, index).unsqueeze(-1) for bound in mask.row_ranges())
        rank = spread_heads(mask.key_rank(), mask.num_query_heads).unsqueeze(2)
        return (first <= rank) & (rank < last)
    if isinstance(mask, BandMask):
        offset = key_position - (index + mask.position_offset).unsqueeze(-1)
        return (-mask.left <= offset) & (offset <= mask.right) | (key_position < mask.num_sinks)
    if isinstance(mask, (ListMask, EntryMask)):
        return _listed(mask, index)
    return _any_form(mask, index)


def _listed(mask: ListMask | EntryMask, index: torch.Tensor) -> torch.Tensor:
    batch, heads, _ = index.shape
    lists = mask.key_index.expand(batch, -1, -1, -1)
    item = torch.arange(batch, device=index.device).view(-1, 1, 1)
    group = heads // lists.shape[1]
    head = torch.div(torch.arange(heads, device=index.device), group, rounding_mode="floor")
    place = (item, head.view(-1, 1), torch.div(index, mask.tile_size, rounding_mode="floor"))
    keys = lists[place].long()  # [B, H, R, L]
    count = mask.key_count.expand(batch, -1, -1)[place].unsqueeze(-1)
    is_held = torch.arange(keys.shape[-1], device=index.device) < count
    if isinstance(mask, EntryMask):
        bits = mask.row_bits.expand(batch, -1, -1, -1)[place]
        is_held = is_held & ((bits >> (index % mask.tile_size).unsqueeze(-1)) & 1 == 1)
    # what is not held writes to an extra last column
    keys = torch.where(is_held, keys, mask.num_keys)
    shape = (*index.shape, mask.num_keys + 1)
    dense = torch.zeros(shape, dtype=torch.bool, device=index.device)
    return dense.scatter_(-1, keys, True)[..., :-1]


def _any_form(mask: HeavyMask, index: torch.Tensor) -> torch.Tensor:
    """Look through all rows, some at a time."""
    dense = torch.zeros((*index.shape, mask.num_keys), dtype=torch.bool, device=index.device)
    step = max(1, _CHUNK_ENTRIES // max(1, index.shape[0] * index.shape[1] * mask.num_keys))
    for start in range(0, mask.num_queries, step):
        stop = min(start + step, mask.num_queries)
        inside = ((index >= start) & (index < stop)).unsqueeze(-1)
        place = (index - start).clamp(0, stop - start - 1).unsqueeze(-1)
        rows = mask.rows(start, stop).gather(2, place.expand(dense.shape))
        dense = torch.where(inside, rows, dense)
    return dense
