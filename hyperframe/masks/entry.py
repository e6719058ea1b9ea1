"""Single entries, by tiles of consecutive rows: keys, and which rows of the tile hold each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..ragged import spread_heads
from .base import HeavyMask, problem_of
from .list import ListMask

__all__ = ["MAX_ENTRY_TILE", "EntryMask"]

MAX_ENTRY_TILE = 64
"""Rows of a tile at most: one bit of an int64 word for each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EntryMask(HeavyMask):
    """Single entries; a tile of rows knows the keys of all its entries, and whose they are.

    The mask is the set of entries. A plan holds more: all rows of a tile share the keys that any of
    them holds (`to_lists`), and a superset of the mask that is computed exactly is never worse.

    Args:
        key_index: integer `[batch, heads, tiles, L]`, distinct ascending keys of each tile, where
            `heads` is the number of query heads or of key heads and `tiles` is
            `ceil(n_q / tile_size)`.
        key_count: integer `[batch, heads, tiles]`; slots from `key_count` on are unused.
        row_bits: int64 `[batch, heads, tiles, L]`: bit `r` says whether row `r` of the tile holds
            the key of the slot.
        tile_size: rows of a tile, at most `MAX_ENTRY_TILE`.
    """

    key_index: torch.Tensor
    key_count: torch.Tensor
    row_bits: torch.Tensor
    tile_size: int

    def __post_init__(self) -> None:
        """Check the tile size."""
        if not 1 <= self.tile_size <= MAX_ENTRY_TILE:
            raise ArgumentError(
                f"tile_size={self.tile_size}: entries are kept by tiles of 1 to {MAX_ENTRY_TILE} "
                "rows, one bit a row"
            )

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.key_index.device

    def to_lists(self) -> ListMask:
        """Return what a plan holds: every row of a tile all the keys of the tile."""
        return ListMask(
            **problem_of(self), key_index=self.key_index, key_count=self.key_count,
            tile_size=self.tile_size, is_ascending=True,
        )  # fmt: skip

    def validate(self) -> EntryMask:
        """Check that counts and used key indices are in range, and return the mask."""
        self.to_lists().validate()
        if self.row_bits.dtype != torch.int64 or self.row_bits.shape != self.key_index.shape:
            raise ArgumentError(
                f"mask: row_bits is {self.row_bits.dtype} {tuple(self.row_bits.shape)}; it must be "
                f"int64 {tuple(self.key_index.shape)}, one word for every slot of key_index"
            )
        return self

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        row = torch.arange(start, stop, device=self.device)
        tile, bit = row // self.tile_size, row % self.tile_size
        index, count, bits = (
            spread_heads(x, self.num_query_heads)[:, :, tile]
            for x in (self.key_index, self.key_count, self.row_bits)
        )
        slots = torch.arange(index.shape[-1], device=self.device)
        is_held = (slots < count.unsqueeze(-1)) & ((bits >> bit[:, None]) & 1 == 1)
        # what is not held writes to an extra last column
        index = torch.where(is_held, index.long(), self.num_keys)
        dense = torch.zeros(
            self.batch_size, self.num_query_heads, stop - start, self.num_keys + 1,
            dtype=torch.bool, device=self.device,
        )  # fmt: skip
        return dense.scatter_(-1, index.expand(self.batch_size, -1, -1, -1), True)[..., :-1]
