"""Tiles of rows that hold ranges of an order of the keys: hash blocks, buckets, clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ragged import spread_heads
from .base import HeavyMask

__all__ = ["RangeMask"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RangeMask(HeavyMask):
    """Tiles of query rows, each holding one contiguous range of an order of the keys.

    Args:
        query_order: int64 `[batch, query_heads, tiles * tile_size]`; tile `t` owns the rows
            `query_order[t * tile_size : (t + 1) * tile_size]`; every row once, also one without
            keys, and -1 for an empty slot.
        key_order: int64 `[batch, key_heads, n_k]`, a permutation of the keys.
        start: int64 `[batch, query_heads, tiles]`, first rank of each tile's range.
        stop: int64 `[batch, query_heads, tiles]`, one past the last rank; `start` or less for
            an empty range.
        tile_size: rows of a tile.
        max_keys: an upper bound of `stop - start`, known without reading the device.
    """

    query_order: torch.Tensor
    key_order: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    tile_size: int
    max_keys: int

    @classmethod
    def of_rows(
        cls, group: torch.Tensor, start: torch.Tensor, stop: torch.Tensor,
        key_order: torch.Tensor, *, max_keys: int, max_groups: int, tile_size: int,
        is_causal: bool = False, query_offset: int | None = None,
    ) -> RangeMask:  # fmt: skip
        """Return the mask in which every row names its own range: rows of one range share tiles.

        Rows are sorted by group and every group is padded to whole tiles, so that the shapes are
        known beforehand: at most `n_q / tile_size + max_groups` tiles.

        Args:
            group: int64 `[batch, query_heads, n_q]`, in `[0, n_k)`; rows of one group must have
                one range.
            start: int64, the same shape.
            stop: int64, the same shape; a row with `stop <= start` has no keys.
            key_order: int64 `[batch, key_heads, n_k]`.
            max_keys: bound of the range lengths.
            max_groups: bound of the number of groups.
            tile_size: rows of a tile.
            is_causal: see `HeavyMask`.
            query_offset: see `HeavyMask`.
        """
        batch_size, heads, num_queries = start.shape
        num_keys = key_order.shape[-1]
        has_keys = stop > start
        label = torch.where(has_keys, group, num_keys)
        ordered, order = label.sort(dim=-1, stable=True)
        place = torch.arange(num_queries, device=start.device).expand_as(ordered)
        is_first = torch.ones_like(has_keys)
        is_first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        in_group = place - torch.where(is_first, place, 0).cummax(dim=-1).values
        in_tile = in_group % tile_size
        tile = (in_tile == 0).cumsum(dim=-1) - 1
        num_tiles = -(-num_queries // tile_size) + min(max_groups + 1, num_queries)
        if start.device.type == "cpu" and not torch.compiler.is_compiling():
            num_tiles = int(tile.max()) + 1  # reading a value is free there, empty tiles are not
        slots = torch.full((batch_size, heads, num_tiles * tile_size), -1, device=start.device)
        # rows without keys get tiles too, with an empty range: the residual may still reach them
        slots.scatter_(-1, tile * tile_size + in_tile, order)
        tile_bounds = []
        for bound in (start, stop):
            per_tile = bound.new_zeros((batch_size, heads, num_tiles))
            by_order = torch.where(has_keys, bound, 0).gather(-1, order)
            tile_bounds.append(per_tile.scatter_(-1, tile, by_order))
        return cls(
            batch_size=batch_size, num_query_heads=heads, num_queries=num_queries,
            num_keys=num_keys, is_causal=is_causal, query_offset=query_offset, query_order=slots,
            key_order=key_order, start=tile_bounds[0], stop=tile_bounds[1], tile_size=tile_size,
            max_keys=min(max_keys, num_keys),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.query_order.device

    def key_rank(self) -> torch.Tensor:
        """Return the rank of every key: int64 `[batch, key_heads, n_k]`."""
        ranks = torch.arange(self.num_keys, device=self.device).expand_as(self.key_order)
        return torch.empty_like(self.key_order).scatter_(-1, self.key_order, ranks)

    def row_ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `start` and `stop` of every row: int64 `[batch, query_heads, n_q]` each."""
        shape = (self.batch_size, self.num_query_heads, self.num_queries + 1)
        # empty slots write to the extra last row
        slots = torch.where(self.query_order < 0, self.num_queries, self.query_order)
        bounds = []
        for per_tile in (self.start, self.stop):
            per_slot = per_tile.repeat_interleave(self.tile_size, dim=-1)
            per_row = torch.zeros(shape, dtype=torch.int64, device=self.device)
            bounds.append(per_row.scatter_(-1, slots, per_slot)[..., :-1])
        return bounds[0], bounds[1]

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        first, last = (bound[:, :, start:stop, None] for bound in self.row_ranges())
        rank = spread_heads(self.key_rank(), self.num_query_heads).unsqueeze(2)
        return (first <= rank) & (rank < last)
