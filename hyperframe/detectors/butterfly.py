"""Butterfly: blocks whose numbers differ in one bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_positive_int
from ..masks import HeavyMask, ListMask
from ..tables import kept
from .base import AbstractDetector
from .blocks import BlockLists, first_blocks, lists_of_blocks, mask_of_lists

__all__ = ["Butterfly"]


@dataclass(frozen=True, kw_only=True)
class Butterfly(AbstractDetector):
    """Each block of rows holds its own block and those whose number differs from its in one bit.

    Block `b` is the positions from `b * block_size` to the next block, counted from the first key
    of the call, padding included; rows stand at the positions of the keys that they are aligned
    with, at the last row and the last key. Rows of block `b` hold the blocks `b` and `b XOR 2^k`
    for all k; causal: those up to `b`, which are the numbers with one set bit of `b` cleared. Any
    two of `m` blocks are at most `log2(m)` layers apart. Rows before the first key hold what block
    0 holds.

    Args:
        block_size: positions of a block; the last block may be shorter.

    Cost: O((n_q / tile) log2(n_k / block_size) block_size) memory. A tile has `block_size` rows if
    the first row stands where a block begins; otherwise, as in some rectangles of the causal
    recursion, it has the largest common divisor of `block_size` and the position of that row.
    Deterministic, strictly causal.
    Source: the flat block butterfly of Pixelated Butterfly (arXiv 2112.00029), at its largest
    stride and without the low-rank term.

    Example:
        >>> q = k = torch.zeros(1, 1, 8, 4)
        >>> mask = Butterfly(block_size=1).find(q, k)
        >>> mask.to_dense()[0, 0, 5].nonzero().flatten().tolist()
        [1, 4, 5, 7]
        >>> mask.nnz().item()
        32
    """

    is_positional: ClassVar[bool] = True
    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    block_size: int = 64

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the blocks; queries and keys are read for their shapes only."""
        return self._part(query, key, key.shape[2] - query.shape[2], 0, is_causal, is_causal)

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the whole call's pattern that lies in these rows and keys."""
        return self._part(query, key, query_start, key_start, is_causal, is_causal)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the causal pattern that lies in a rectangle."""
        return self._part(query, key, query_start, key_start, True, False)

    def _part(
        self, query: torch.Tensor, key: torch.Tensor, query_start: int, key_start: int,
        earlier_only: bool, is_causal: bool,
    ) -> ListMask:  # fmt: skip
        lists = _butterfly(
            self.block_size, query_start, query.shape[2], key_start, key.shape[2], earlier_only,
            query.device,
        )  # fmt: skip
        return mask_of_lists(
            lists, query, key, block_size=self.block_size, query_start=query_start,
            key_start=key_start, is_causal=is_causal,
        )  # fmt: skip


@kept
def _butterfly(
    block_size: int, query_start: int, num_queries: int, key_start: int, num_keys: int,
    earlier_only: bool, device: torch.device,
) -> BlockLists:  # fmt: skip
    own = first_blocks(block_size, query_start, num_queries)
    highest = max(query_start + num_queries, key_start + num_keys) // block_size
    bits = 0
    while 1 << bits <= highest:
        bits += 1
    flips = torch.tensor([0, *(1 << bit for bit in range(bits))])
    blocks = own.unsqueeze(-1) ^ flips
    if earlier_only:
        blocks = torch.where(blocks <= own.unsqueeze(-1), blocks, -1)
    return lists_of_blocks(
        blocks.unsqueeze(0), block_size=block_size, key_start=key_start, num_keys=num_keys,
        device=device,
    )  # fmt: skip
