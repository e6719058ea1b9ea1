"""Heavy masks: which entries of `Q K^T` are computed exactly.

A mask `M` is a set of (query, key) pairs. Four forms cover the detectors, and each is stored by
what defines it rather than by its entries, so no mask ever needs `n_q x n_k` memory:

- `RangeMask`: rows in tiles, keys in an order; every tile holds one range of that order
  (hash blocks, buckets, clusters);
- `BandMask`: a band around the diagonal plus the first positions (window, sinks);
- `ListMask`: key lists of tiles of consecutive rows, from one list for a head down to one list
  for each row (columns, block lists, single entries);
- `UnionMask`: several of them.

Under `is_causal` every form also requires `key position <= query position`, bottom-right aligned
when `n_q != n_k`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import TypedDict

import torch

from .errors import ArgumentError, ArgumentTypeError
from .ragged import keep_in_lists, spread_heads

__all__ = ["BandMask", "HeavyMask", "ListMask", "RangeMask", "UnionMask"]

_NNZ_CHUNK_ENTRIES = 1 << 24  # bools held at once while entries are counted


@dataclass(frozen=True, kw_only=True, eq=False)
class HeavyMask(ABC):
    """A set of heavy entries, per batch item and query head.

    Args:
        batch_size: number of batch items.
        num_query_heads: number of query heads.
        num_queries: `n_q`.
        num_keys: `n_k`.
        is_causal: whether entries above the diagonal are left out.
        query_offset: key position of query row 0; None aligns the last query with the last key
            (bottom right), `n_k - n_q`.
    """

    batch_size: int
    num_query_heads: int
    num_queries: int
    num_keys: int
    is_causal: bool = False
    query_offset: int | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the mask's tensors live."""

    @abstractmethod
    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Dense rows `[start, stop)` without the causal test."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the dense rows `[start, stop)`: bool `[batch, query_heads, rows, n_k]`."""
        dense = self._rows(start, stop)
        if self.is_causal:
            position = torch.arange(start, stop, device=self.device) + self.position_offset
            key_position = torch.arange(self.num_keys, device=self.device)
            dense = dense & (key_position <= position[:, None])
        return dense

    @property
    def position_offset(self) -> int:
        """Key position of query row 0."""
        if self.query_offset is not None:
            return self.query_offset
        return self.num_keys - self.num_queries

    def to_dense(self) -> torch.Tensor:
        """Return the mask as bool `[batch, query_heads, n_q, n_k]`; for tests and pictures."""
        return self.rows(0, self.num_queries)

    def nnz(self) -> torch.Tensor:
        """Return the number of heavy entries of every head: int64 `[batch, query_heads]`.

        Counted over row chunks: O(n_q n_k) time, bounded memory.
        """
        heads = self.batch_size * self.num_query_heads
        step = max(1, _NNZ_CHUNK_ENTRIES // max(1, heads * self.num_keys))
        total = torch.zeros(
            self.batch_size, self.num_query_heads, dtype=torch.int64, device=self.device
        )
        for start in range(0, self.num_queries, step):
            total += self.rows(start, min(start + step, self.num_queries)).sum(dim=(-2, -1))
        return total

    def parts(self) -> Iterator[HeavyMask]:
        """Yield the masks whose union this is: itself, unless it is a `UnionMask`."""
        yield self

    def __or__(self, other: HeavyMask) -> HeavyMask:
        """Return the union of two masks over the same problem."""
        if not isinstance(other, HeavyMask):
            return NotImplemented
        return UnionMask.of(self, other)

    def _same_problem(self, other: HeavyMask) -> bool:
        mine, its = _problem(self), _problem(other)
        if not (self._has_positions and other._has_positions):
            # a mask that does not depend on positions fits any offset
            mine["query_offset"] = its["query_offset"] = None
        else:
            mine["query_offset"], its["query_offset"] = self.position_offset, other.position_offset
        return mine == its and self.device == other.device

    @property
    def _has_positions(self) -> bool:
        return self.is_causal


class _Problem(TypedDict):
    batch_size: int
    num_query_heads: int
    num_queries: int
    num_keys: int
    is_causal: bool
    query_offset: int | None


def _problem(mask: HeavyMask) -> _Problem:
    return _Problem(
        batch_size=mask.batch_size, num_query_heads=mask.num_query_heads,
        num_queries=mask.num_queries, num_keys=mask.num_keys, is_causal=mask.is_causal,
        query_offset=mask.query_offset,
    )  # fmt: skip


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
        if start.device.type == "cpu":
            num_tiles = int(tile.max()) + 1  # reading a value is free there, empty tiles are not
        slots = torch.full((batch_size, heads, num_tiles * tile_size), -1, device=start.device)
        # rows without keys get tiles too, with an empty range: the residual may still reach them
        slots.scatter_(-1, tile * tile_size + in_tile, order)
        tile_bounds = []
        for bound in (start, stop):
            per_tile = torch.zeros((batch_size, heads, num_tiles), dtype=torch.int64).to(bound)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class BandMask(HeavyMask):
    """Keys at most `left` before and `right` after the query, and the first `num_sinks` keys.

    Args:
        left: keys before the query's own position.
        right: keys after it.
        num_sinks: leading keys that every row holds.
        on_device: device of the problem (the mask itself stores no tensor).
    """

    left: int
    right: int
    num_sinks: int = 0
    on_device: torch.device

    @property
    def device(self) -> torch.device:
        """Device of the problem."""
        return self.on_device

    @property
    def _has_positions(self) -> bool:
        return True

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        position = torch.arange(start, stop, device=self.device)[:, None] + self.position_offset
        key_position = torch.arange(self.num_keys, device=self.device)
        offset = key_position - position
        dense = (-self.left <= offset) & (offset <= self.right)
        dense = dense | (key_position < self.num_sinks)
        return dense.expand(self.batch_size, self.num_query_heads, *dense.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class ListMask(HeavyMask):
    """Key lists of tiles of consecutive rows.

    Args:
        key_index: integer `[batch, heads, tiles, L]`, distinct keys of each tile, where `heads`
            is the number of query heads or of key heads (a list shared by a group) and `tiles`
            is `ceil(n_q / tile_size)`; expanded (stride 0) dimensions are welcome and kept.
        key_count: integer `[batch, heads, tiles]`; slots from `key_count` on are unused.
        tile_size: rows of a tile; `n_q` or more for one list a head, 1 for one list a row.
    """

    key_index: torch.Tensor
    key_count: torch.Tensor
    tile_size: int

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.key_index.device

    @classmethod
    def columns(
        cls, index: torch.Tensor, *, num_query_heads: int, num_queries: int, num_keys: int,
        is_causal: bool = False,
    ) -> ListMask:  # fmt: skip
        """Return the mask of whole columns: `index` is integer `[batch, heads, columns]`."""
        batch_size, heads, count = index.shape
        return cls(
            batch_size=batch_size, num_query_heads=num_query_heads, num_queries=num_queries,
            num_keys=num_keys, is_causal=is_causal, key_index=index.unsqueeze(2),
            key_count=torch.full((batch_size, heads, 1), count, device=index.device),
            tile_size=max(1, num_queries),
        )  # fmt: skip

    @classmethod
    def entries(
        cls, index: torch.Tensor, count: torch.Tensor, *, num_query_heads: int, num_keys: int,
        is_causal: bool = False,
    ) -> ListMask:  # fmt: skip
        """Return the mask of single entries: `index` `[batch, heads, n_q, L]`, `count` one less."""
        return cls(
            batch_size=index.shape[0], num_query_heads=num_query_heads,
            num_queries=index.shape[2], num_keys=num_keys, is_causal=is_causal,
            key_index=index, key_count=count, tile_size=1,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, dense: torch.Tensor, *, is_causal: bool = False) -> ListMask:
        """Return the mask of a dense bool `[batch, query_heads, n_q, n_k]`; small problems."""
        if dense.dtype != torch.bool or dense.dim() != 4:
            raise ArgumentTypeError(
                "dense: expected a bool tensor [batch, query_heads, n_q, n_k], got "
                f"{dense.dtype} with shape {tuple(dense.shape)}; convert it with `.bool()`"
            )
        if is_causal:
            num_queries, num_keys = dense.shape[-2:]
            dense = dense.tril(num_keys - num_queries)
        count = dense.sum(dim=-1)
        longest = int(count.max()) if count.numel() else 0
        # a stable sort of "absent" puts the present keys first, in increasing order
        index = (~dense).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :longest]
        return cls.entries(
            index, count, num_query_heads=dense.shape[1], num_keys=dense.shape[-1],
            is_causal=is_causal,
        )  # fmt: skip

    def retile(self, tile_size: int) -> ListMask:
        """Return the same mask over smaller tiles; `tile_size` must divide the present one.

        A list that covers all rows may be cut into tiles of any size, at no memory.
        """
        if tile_size == self.tile_size:
            return self
        num_tiles = max(1, -(-self.num_queries // tile_size))
        if self.tile_size >= self.num_queries:
            index = self.key_index[:, :, :1].expand(-1, -1, num_tiles, -1)
            count = self.key_count[:, :, :1].expand(-1, -1, num_tiles)
        elif self.tile_size % tile_size == 0:
            tile = torch.arange(num_tiles, device=self.device) * tile_size // self.tile_size
            index, count = self.key_index[:, :, tile], self.key_count[:, :, tile]
        else:
            raise ArgumentError(
                f"tile_size: {tile_size} does not divide the mask's tile size {self.tile_size}"
            )
        return ListMask(**_problem(self), key_index=index, key_count=count, tile_size=tile_size)

    def restricted(self, row_start: int, num_rows: int, key_start: int, num_keys: int) -> ListMask:
        """Return the part of the mask in a rectangle, as a mask over that rectangle, uncausal."""
        if self.tile_size >= self.num_queries:
            # one list for all rows, wherever the rectangle begins
            whole, tile_size, tiles = self, max(1, num_rows), slice(0, 1)
        else:
            tile_size = gcd(self.tile_size, row_start)
            whole = self.retile(tile_size)
            first = row_start // tile_size
            tiles = slice(first, first - (-num_rows // tile_size))
        index = whole.key_index[:, :, tiles].long() - key_start
        index, count = keep_in_lists(
            index, whole.key_count[:, :, tiles], (index >= 0) & (index < num_keys)
        )
        return ListMask(
            batch_size=self.batch_size, num_query_heads=self.num_query_heads,
            num_queries=num_rows, num_keys=num_keys, key_index=index, key_count=count,
            tile_size=tile_size,
        )  # fmt: skip

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        tile = torch.arange(start, stop, device=self.device) // self.tile_size
        index = spread_heads(self.key_index, self.num_query_heads)[:, :, tile].long()
        count = spread_heads(self.key_count, self.num_query_heads)[:, :, tile]
        slots = torch.arange(index.shape[-1], device=self.device)
        # unused slots write to an extra last column
        index = torch.where(slots < count.unsqueeze(-1), index, self.num_keys)
        dense = torch.zeros(
            self.batch_size, self.num_query_heads, stop - start, self.num_keys + 1,
            dtype=torch.bool, device=self.device,
        )  # fmt: skip
        return dense.scatter_(-1, index.expand(self.batch_size, -1, -1, -1), True)[..., :-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class UnionMask(HeavyMask):
    """The union of several masks over one problem; made by `mask_a | mask_b`.

    Args:
        members: the masks, none of them a union.
    """

    members: tuple[HeavyMask, ...]

    @classmethod
    def of(cls, *masks: HeavyMask) -> HeavyMask:
        """Return the union of the masks, flattened; a single mask is returned as it is."""
        members = [part for mask in masks for part in mask.parts()]
        first = next((mask for mask in members if mask._has_positions), members[0])
        for other in members:
            if not first._same_problem(other):
                raise ArgumentError(
                    "mask: a union needs masks of one problem, got "
                    f"{_problem(first)} and {_problem(other)}; find both with the same query, key "
                    "and is_causal"
                )
        if len(members) == 1:
            return first
        return cls(**_problem(first), members=tuple(members))

    @property
    def device(self) -> torch.device:
        """Where the members' tensors live."""
        return self.members[0].device

    def parts(self) -> Iterator[HeavyMask]:
        """Yield the members."""
        yield from self.members

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        dense = self.members[0]._rows(start, stop)
        for member in self.members[1:]:
            dense = dense | member._rows(start, stop)
        return dense
