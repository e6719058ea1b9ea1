"""Blocks of equal rank of two orders, inside rectangles: sortLSH without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..ragged import take_ranges
from ..rectangles import Places
from ..tables import int_table, kept
from .base import HeavyMask, problem_of
from .key_blocks import KeyBlocks
from .range import RangeMask

__all__ = ["BlockMask", "BlockTiles"]


class BlockTiles(NamedTuple):
    """The blocks of a mask that hold rows.

    Attributes:
        table: int32 `[tiles, 5]`: query_start, query_stop, key_start, key_stop (places in the
            orders), and the number of the rectangle.
        max_rows: most rows of a tile.
        max_keys: most keys of a tile.
        counts: tiles of every rectangle; those of one stand together, in the rectangles' order.
        held_keys: keys in all tiles together.
    """

    table: torch.Tensor
    max_rows: int
    max_keys: int
    counts: tuple[int, ...]
    held_keys: int


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMask(HeavyMask):
    """Block-diagonal entries of rectangles, after rows and keys are put in an order each.

    A rectangle of `Q` rows and `K` keys has `ceil(K / block_size)` blocks. Block `b` of `blocks`
    owns its rows at the places `[b Q / blocks, (b + 1) Q / blocks)`, rounded down, and its keys at
    `[b K / blocks, (b + 1) K / blocks)`. Rows outside all rectangles hold nothing.

    Everything but the orders follows from sizes, so that neither a mask nor a plan of it computes
    or stores anything for a tile.

    Args:
        query_order: integer `[batch, query_heads, n_q]`, a permutation of the rows.
        key_order: integer `[batch, key_heads, n_k]`, a permutation of the keys.
        rectangles: `(query_start, query_stop, key_start, key_stop)`, places in the two orders; at
            least one, none empty, no two with a common row or a common key.
        block_size: keys of a block, at most.
        key_rank: integer `[batch, key_heads, n_k]`, the place of every key in `key_order`;
            computed when it is needed and was not given.

    Source: the blocks of HyperAttention, Algorithm 1, balanced; its rectangles are Algorithm 4's.
    """

    query_order: torch.Tensor
    key_order: torch.Tensor
    rectangles: tuple[Places, ...]
    block_size: int
    key_rank: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and rectangles; values are checked by `validate`."""
        rows = (self.batch_size, self.num_query_heads, self.num_queries)
        if tuple(self.query_order.shape) != rows:
            raise ArgumentError(
                f"query_order: expected [batch, query_heads, n_q] = {rows}, got shape "
                f"{tuple(self.query_order.shape)}"
            )
        shape = self.key_order.shape
        if (shape[0], shape[-1]) != (self.batch_size, self.num_keys) or len(shape) != 3:
            raise ArgumentError(
                f"key_order: expected [batch, key_heads, n_k] = ({self.batch_size}, key_heads, "
                f"{self.num_keys}), got shape {tuple(shape)}"
            )
        if self.key_rank is not None and self.key_rank.shape != shape:
            raise ArgumentError(
                f"key_rank: expected the shape of key_order, {tuple(shape)}, got "
                f"{tuple(self.key_rank.shape)}"
            )
        if self.block_size < 1:
            raise ArgumentError(f"block_size: {self.block_size} keys; pass 1 or more")
        _check_rectangles(self.rectangles, self.num_queries, self.num_keys)

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.query_order.device

    @property
    def covers_all_rows(self) -> bool:
        """Whether every row lies in a rectangle."""
        return sum(stop - start for start, stop, _, _ in self.rectangles) == self.num_queries

    @property
    def is_full(self) -> bool:
        """Whether every rectangle is one block, so that it is held entirely."""
        return all(stop - start <= self.block_size for _, _, start, stop in self.rectangles)

    def tiles(self) -> BlockTiles:
        """Return the blocks that hold rows; nobody may write into their table."""
        return _tiles(self.rectangles, self.block_size, self.device)

    def rank_of_keys(self) -> torch.Tensor:
        """Return `key_rank`, computed if it was not given."""
        if self.key_rank is not None:
            return self.key_rank
        places = torch.arange(self.num_keys, dtype=self.key_order.dtype, device=self.device)
        rank = torch.empty_like(self.key_order, memory_format=torch.contiguous_format)
        return rank.scatter_(-1, self.key_order.long(), places.expand_as(rank))

    def key_blocks(self) -> KeyBlocks:
        """Return the blocks of the key order; keys between two rectangles are one more block."""
        edge = _key_edges(self.rectangles, self.block_size, self.num_keys, self.device)
        return KeyBlocks(self.key_order, edge)

    def nnz(self) -> torch.Tensor:
        """Return the number of heavy entries of every head; see `HeavyMask.nnz`."""
        if self.is_causal:
            return super().nnz()
        table = self.tiles().table.long()
        total = ((table[:, 1] - table[:, 0]) * (table[:, 3] - table[:, 2])).sum()
        return total.expand(self.batch_size, self.num_query_heads).clone()

    def validate(self) -> BlockMask:
        """Check that the orders are permutations, and return the mask; reads the device.

        Raises:
            ArgumentTypeError: orders that are not integer.
            ArgumentError: an order that is no permutation; a rank that is not that of its key.
        """
        for name, order in (("query_order", self.query_order), ("key_order", self.key_order)):
            if order.dtype not in (torch.int32, torch.int64):
                raise ArgumentTypeError(
                    f"mask: {name} has dtype {order.dtype}; use int32 or int64, for example "
                    f"{name}.int()"
                )
            length = order.shape[-1]
            inside = ((order >= 0) & (order < length)).all()
            present = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
            present.scatter_(-1, order.long().clamp(0, length - 1), True)
            if not bool(inside & present.all()):
                raise ArgumentError(
                    f"mask: {name} is no permutation of 0..{length - 1} in every head; each row "
                    "or key needs one place"
                )
        if self.key_rank is not None:
            places = torch.arange(self.num_keys, device=self.device)
            if not bool((self.key_rank.gather(-1, self.key_order.long()) == places).all()):
                raise ArgumentError(
                    "mask: key_rank does not hold the place of every key in key_order; leave it "
                    "out to have it computed"
                )
        return self

    def to_ranges(self) -> RangeMask:
        """Return the same entries as tiles of rows that hold ranges of the key order."""
        covering = _covering_tiles(self.rectangles, self.block_size, self.num_queries, self.device)
        first, last, start, stop, _ = covering.table.long().unbind(dim=1)
        rows, used = take_ranges(self.query_order.long(), first, last, covering.max_rows)
        bounds = (self.batch_size, self.num_query_heads, -1)
        return RangeMask(
            **problem_of(self), query_order=torch.where(used, rows, -1).flatten(2),
            key_order=self.key_order.long(), start=start.expand(bounds), stop=stop.expand(bounds),
            tile_size=covering.max_rows, max_keys=covering.max_keys,
        )  # fmt: skip

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return self.to_ranges()._rows(start, stop)


@kept
def _check_rectangles(rectangles: tuple[Places, ...], num_queries: int, num_keys: int) -> None:
    if not rectangles:
        raise ArgumentError("rectangles: none was given; pass at least one")
    for axis, length, what in ((0, num_queries, "queries"), (2, num_keys, "keys")):
        before = 0
        for start, stop in sorted(places[axis : axis + 2] for places in rectangles):
            if not before <= start < stop <= length:
                raise ArgumentError(
                    f"rectangles: the {what} at the places {start}..{stop} are none, lie outside "
                    f"0..{length}, or belong to another rectangle too"
                )
            before = stop


@kept
def _key_edges(
    rectangles: tuple[Places, ...], block_size: int, num_keys: int, device: torch.device
) -> torch.Tensor:
    """Return where blocks of keys begin, whether they hold rows or not, and where the last ends."""
    edges = {0, num_keys}
    for _, _, start, stop in rectangles:
        blocks = -(-(stop - start) // block_size)
        edges.update(start + b * (stop - start) // blocks for b in range(blocks + 1))
    return torch.tensor(sorted(edges), dtype=torch.int64).to(device)


@kept
def _tiles(rectangles: tuple[Places, ...], block_size: int, device: torch.device) -> BlockTiles:
    tiles = _tile_rows(rectangles, block_size)
    max_rows, max_keys = _longest(tiles)
    counts = tuple(sum(tile[4] == r for tile in tiles) for r in range(len(rectangles)))
    held = sum(tile[3] - tile[2] for tile in tiles)
    return BlockTiles(int_table(tiles, 5, device), max_rows, max_keys, counts, held)


@kept
def _covering_tiles(
    rectangles: tuple[Places, ...], block_size: int, num_queries: int, device: torch.device
) -> BlockTiles:
    """Return the tiles, then tiles without keys for the rows outside all rectangles."""
    tiles = _tile_rows(rectangles, block_size)
    max_rows, max_keys = _longest(tiles)
    before = 0
    spans = sorted(places[:2] for places in rectangles)
    for start, stop in [*spans, (num_queries, num_queries)]:
        for first in range(before, start, max_rows):
            tiles.append((first, min(first + max_rows, start), 0, 0, -1))
        before = stop
    held = sum(tile[3] - tile[2] for tile in tiles)
    return BlockTiles(int_table(tiles, 5, device), max_rows, max_keys, (), held)


def _tile_rows(
    rectangles: tuple[Places, ...], block_size: int
) -> list[tuple[int, int, int, int, int]]:
    tiles: list[tuple[int, int, int, int, int]] = []
    for number, (query_start, query_stop, key_start, key_stop) in enumerate(rectangles):
        rows, keys = query_stop - query_start, key_stop - key_start
        blocks = -(-keys // block_size)
        row = [query_start + b * rows // blocks for b in range(blocks + 1)]
        key = [key_start + b * keys // blocks for b in range(blocks + 1)]
        bounds = zip(row, row[1:], key, key[1:], strict=False)
        # with fewer rows than blocks, some blocks have none
        tiles.extend((*block, number) for block in bounds if block[0] < block[1])
    return tiles


def _longest(tiles: list[tuple[int, int, int, int, int]]) -> tuple[int, int]:
    """Return the most rows and the most keys of a tile."""
    max_rows = max(stop - start for start, stop, _, _, _ in tiles)
    return max_rows, max(stop - start for _, _, start, stop, _ in tiles)
