"""Block list: the user's own pattern, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..component import check_positive_int
from ..errors import ArgumentError, ArgumentTypeError
from ..masks import HeavyMask, ListMask
from .base import AbstractDetector

__all__ = ["BlockList"]


@dataclass(frozen=True, kw_only=True)
class BlockList(AbstractDetector):
    """A fixed list of (query block, key block) pairs; blocks are runs of `block_size` positions.

    Args:
        blocks: pairs `(query_block, key_block)` held by every head, or triples
            `(head, query_block, key_block)` for single query heads; both may be mixed. Blocks are
            counted from 0 at the first query and the first key of the call, padding included.
        block_size: positions of a block; the last block of a sequence may be shorter.

    Cost: O(pairs x block_size) memory. Deterministic, strictly causal. Use `from_mask` to write
    the list from a boolean array.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> BlockList(blocks=((0, 0), (1, 0)), block_size=2).find(q, k).nnz().item()
        8
    """

    is_positional: ClassVar[bool] = True
    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    blocks: tuple[tuple[int, ...], ...] = ()
    block_size: int = 64

    def __post_init__(self) -> None:
        """Check the parameters and store the pairs as tuples, sorted and without repetition."""
        check_positive_int(self, "block_size", self.block_size)
        given: Any = self.blocks
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise ArgumentTypeError(
                f"block_list: blocks={given!r} has type {type(given).__name__}; pass a "
                "tuple of (query_block, key_block) pairs, or use BlockList.from_mask(mask)"
            )
        pairs = set()
        for entry in given:
            pair = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
            if len(pair) not in (2, 3) or any(
                isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in pair
            ):
                raise ArgumentError(
                    f"block_list: the entry {entry!r} of blocks is no pair (query_block, "
                    "key_block) and no triple (head, query_block, key_block) of integers that are "
                    "not negative; write blocks as such tuples"
                )
            pairs.add(pair)
        object.__setattr__(self, "blocks", tuple(sorted(pairs)))

    @classmethod
    def from_mask(cls, mask: torch.Tensor, *, block_size: int = 64) -> BlockList:
        """Return the detector of a boolean array of blocks.

        Args:
            mask: bool `[query_blocks, key_blocks]`, or `[heads, query_blocks, key_blocks]`; True
                holds the whole block.
            block_size: positions of a block.
        """
        given: Any = mask
        if not isinstance(given, torch.Tensor) or given.dtype != torch.bool:
            found = getattr(mask, "dtype", type(mask).__name__)
            raise ArgumentTypeError(
                f"block_list: mask has type {found}; pass a torch tensor of dtype bool "
                "[query_blocks, key_blocks] or [heads, query_blocks, key_blocks]"
            )
        if mask.dim() not in (2, 3):
            raise ArgumentError(
                f"block_list: mask has shape {tuple(mask.shape)}; pass [query_blocks, key_blocks] "
                "or [heads, query_blocks, key_blocks]"
            )
        blocks = tuple(tuple(entry) for entry in mask.nonzero().tolist())
        return cls(blocks=blocks, block_size=block_size)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the blocks as a mask; queries and keys are read for their shapes only.

        Raises:
            ArgumentError: a block or head lies outside this problem.
        """
        self._check_inside(query.shape[1], query.shape[2], key.shape[2])
        return self._mask(query, key, query.shape[2], key.shape[2], is_causal=is_causal)

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the whole call's pattern that lies in these rows and keys.

        Raises:
            ArgumentError: a block or head lies outside the whole call.
        """
        self._check_inside(query.shape[1], num_queries, num_keys)
        part = self._part(query, key, first_row, key_start)
        return replace(part, is_causal=is_causal, query_offset=query_start - key_start)

    def _check_inside(self, heads: int, num_queries: int, num_keys: int) -> None:
        limits = (heads, -(-num_queries // self.block_size), -(-num_keys // self.block_size))
        for pair in self.blocks:
            full = pair if len(pair) == 3 else (0, *pair)
            if any(at >= limit for at, limit in zip(full, limits, strict=True)):
                raise ArgumentError(
                    f"block_list: the block {pair} lies outside the problem, which has "
                    f"{limits[0]} heads, {limits[1]} query blocks and {limits[2]} key blocks of "
                    f"{self.block_size}; leave it out, or change block_size"
                )

    def _check_heads(self, heads: int) -> None:
        for pair in self.blocks:
            if len(pair) == 3 and pair[0] >= heads:
                raise ArgumentError(
                    f"block_list: the block {pair} names head {pair[0]}, but the problem has "
                    f"{heads} query heads, counted from 0; leave it out"
                )

    def _mask(
        self, query: torch.Tensor, key: torch.Tensor, num_queries: int, num_keys: int,
        *, is_causal: bool = False,
    ) -> ListMask:  # fmt: skip
        """The pattern over the first queries and keys; blocks outside of them are left out."""
        heads = query.shape[1]
        list_heads = heads if any(len(pair) == 3 for pair in self.blocks) else key.shape[1]
        num_tiles = -(-num_queries // self.block_size)
        num_key_blocks = -(-num_keys // self.block_size)
        lists: list[list[set[int]]] = [[set() for _ in range(num_tiles)] for _ in range(list_heads)]
        for pair in self.blocks:
            row, column = pair[-2:]
            if row < num_tiles and column < num_key_blocks:
                for head in [pair[0]] if len(pair) == 3 else range(list_heads):
                    lists[head][row].add(column)
        longest = max([0, *(len(found) for rows in lists for found in rows)])
        table = torch.tensor(
            [[sorted(found) + [-1] * (longest - len(found)) for found in rows] for rows in lists],
            dtype=torch.int64,
        ).view(list_heads, num_tiles, longest)
        within = torch.arange(self.block_size)
        index = (table.unsqueeze(-1) * self.block_size + within).flatten(2)
        is_key = (table >= 0).unsqueeze(-1).expand(-1, -1, -1, self.block_size).flatten(2)
        # blocks ascend, so the keys that a short last block lacks are at the end of the list
        count = (is_key & (index < num_keys)).sum(dim=-1)
        batch = query.shape[0]
        return ListMask(
            batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
            is_causal=is_causal,
            key_index=index.clamp(0, num_keys - 1).to(query.device).expand(batch, -1, -1, -1),
            key_count=count.to(query.device).expand(batch, -1, -1), tile_size=self.block_size,
        )  # fmt: skip

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the pattern that lies in a rectangle of the whole problem."""
        self._check_heads(query.shape[1])
        return self._part(query, key, first_row, key_start)

    def _part(
        self, query: torch.Tensor, key: torch.Tensor, first_row: int, key_start: int
    ) -> ListMask:
        num_queries, num_keys = query.shape[2], key.shape[2]
        whole = self._mask(query, key, first_row + num_queries, key_start + num_keys)
        return whole.restricted(first_row, num_queries, key_start, num_keys)
