"""BigBird: neighbouring blocks, the first keys, and random blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_non_negative_int, check_positive_int
from ..masks import HeavyMask, ListMask, UnionMask
from ..randomness import Stream
from ..tables import kept
from .base import AbstractDetector
from .blocks import BlockLists, first_blocks, lists_of_blocks, mask_of_lists

__all__ = ["BigBird"]


@dataclass(frozen=True, kw_only=True)
class BigBird(AbstractDetector):
    """Blocks of rows hold the blocks around them, some random blocks, and the first keys.

    Block `b` is the positions from `b * block_size` to the next block, counted from the first key
    of the call, padding included; rows stand at the positions of the keys that they are aligned
    with, at the last row and the last key. Rows of block `b` hold

    - the blocks from `b - window_blocks` to `b + window_blocks`; causal: up to `b`;
    - `num_random` distinct blocks among all others, each set of them equally likely; causal: among
      those before the window; all of them where there are fewer. They depend on `seed`, the key
      head and `b` alone, and without a causal mask on the number of blocks;
    - the first `num_global` real keys, whatever block they lie in.

    Rows before the first key hold what block 0 holds. There are no global rows, which would attend
    to everything: each costs O(n_k), and under a causal mask they are not in the pattern.

    Args:
        block_size: positions of a block; the last block may be shorter.
        window_blocks: blocks held on each side of a block.
        num_global: leading real keys, which every row holds.
        num_random: random blocks of each block.
        seed: seed of the random blocks. The same seed gives the same blocks in every call and on
            every device; the generator of the call is not used.

    Cost: O((n_q / tile) (2 window_blocks + 1 + num_random) block_size) memory for each key head. A
    tile has `block_size` rows if the first row stands where a block begins; otherwise, as in some
    rectangles of the causal recursion, it has the largest common divisor of `block_size` and the
    position of that row. Deterministic, strictly causal.
    Source: BigBird (arXiv 2007.14062), its internal transformer construction with global keys.

    Example:
        >>> q = k = torch.zeros(1, 1, 64, 4)
        >>> bird = BigBird(block_size=4, num_global=1, num_random=2)
        >>> mask = bird.find(q, k, is_causal=True)
        >>> mask.to_dense()[0, 0, 31].sum().item() in (16, 17)
        True
        >>> torch.equal(mask.to_dense(), bird.find(q, k, is_causal=True).to_dense())
        True
    """

    registry_name: ClassVar[str | None] = "bigbird"
    is_positional: ClassVar[bool] = True
    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    block_size: int = 64
    window_blocks: int = 1
    num_global: int = 64
    num_random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)
        check_non_negative_int(self, "window_blocks", self.window_blocks)
        check_non_negative_int(self, "num_global", self.num_global)
        check_non_negative_int(self, "num_random", self.num_random)
        check_non_negative_int(self, "seed", self.seed)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the pattern; queries and keys are read for their shapes only."""
        num_blocks = None if is_causal else -(-key.shape[2] // self.block_size)
        return self._part(
            query, key, key.shape[2] - query.shape[2], 0, self.num_global, num_blocks, is_causal
        )

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the call's blocks that lies here, and the first real keys."""
        num_blocks = None if is_causal else -(-num_keys // self.block_size)
        return self._part(
            query, key, query_start, key_start, self.num_global, num_blocks, is_causal
        )

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the causal pattern that lies in a rectangle."""
        num_global = max(0, self.num_global - (key_start - first_key))
        return self._part(query, key, query_start, key_start, num_global, None, False)

    def _part(
        self, query: torch.Tensor, key: torch.Tensor, query_start: int, key_start: int,
        num_global: int, num_blocks: int | None, is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        """Mask of a run of rows and keys; `num_blocks` of the call, or None: earlier blocks."""
        lists = _bigbird(
            self, query_start, query.shape[2], key_start, key.shape[2], key.shape[1], num_blocks,
            query.device,
        )  # fmt: skip
        mask = mask_of_lists(
            lists, query, key, block_size=self.block_size, query_start=query_start,
            key_start=key_start, is_causal=is_causal,
        )  # fmt: skip
        num_global = min(num_global, key.shape[2])
        if num_global == 0:
            return mask
        shape = key.shape[:2]
        first_keys = ListMask(
            batch_size=shape[0], num_query_heads=query.shape[1], num_queries=query.shape[2],
            num_keys=key.shape[2], is_causal=is_causal, query_offset=query_start - key_start,
            key_index=torch.arange(num_global, device=key.device).expand(*shape, 1, -1),
            key_count=torch.full((1, 1, 1), num_global, device=key.device).expand(*shape, -1),
            tile_size=max(1, query.shape[2]),
        )  # fmt: skip
        return UnionMask.of(first_keys, mask)


@kept
def _bigbird(
    detector: BigBird, query_start: int, num_queries: int, key_start: int, num_keys: int,
    heads: int, num_blocks: int | None, device: torch.device,
) -> BlockLists:  # fmt: skip
    reach = detector.window_blocks
    own = first_blocks(detector.block_size, query_start, num_queries)
    window = own.unsqueeze(-1) + torch.arange(-reach, 1 if num_blocks is None else reach + 1)
    # the window inside the sequence: what random blocks leave out
    first = (own - reach).clamp(min=0)
    last = own if num_blocks is None else (own + reach).clamp(max=num_blocks - 1)
    num_others = first if num_blocks is None else num_blocks - (last + 1 - first)
    # block by block, so that what a block draws does not depend on how many follow
    last_block = max(0, query_start + num_queries - 1) // detector.block_size
    shape = (last_block + 1, heads, detector.num_random)
    drawn = Stream(detector.seed).uniform(shape, torch.device("cpu"))[own].transpose(0, 1)
    place = _distinct(drawn, num_others)
    random = torch.where(place < first.unsqueeze(-1), place, place + (last + 1 - first)[:, None])
    blocks = torch.cat([window.expand(heads, -1, -1), random.masked_fill(place < 0, -1)], dim=-1)
    return lists_of_blocks(
        blocks, block_size=detector.block_size, key_start=key_start, num_keys=num_keys,
        device=device,
    )  # fmt: skip


def _distinct(drawn: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Choose distinct numbers below `size`, every set equally likely (Floyd's algorithm).

    Args:
        drawn: float64 `[heads, tiles, count]`, uniform in [0, 1).
        size: int64 `[tiles]`.

    Returns:
        int64 `[heads, tiles, count]`; -1 where there are no more numbers.
    """
    count = drawn.shape[-1]
    chosen = torch.full_like(drawn, -1, dtype=torch.int64)
    for number in range(count):
        top = (size - count).clamp(min=0) + number
        pick = (drawn[..., number] * (top + 1)).long()
        is_taken = (chosen == pick.unsqueeze(-1)).any(dim=-1)
        chosen[..., number] = torch.where(top < size, torch.where(is_taken, top, pick), -1)
    return chosen
