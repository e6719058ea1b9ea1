"""sortLSH: the published detector of HyperAttention (Definition 1 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..component import check_bool, check_positive_int
from ..errors import ArgumentError
from ..masks import BandMask, HeavyMask, RangeMask, UnionMask
from ..precision import without_autocast
from ..ragged import spread_heads
from ..randomness import normal
from .base import AbstractDetector

__all__ = ["SortLSH", "hamming_sorted_codes", "inverse_gray"]

_ROW_TILE = 32  # rows of a tile where every row names its own range of keys


def inverse_gray(pattern: torch.Tensor) -> torch.Tensor:
    """Return the rank of a bit pattern in the reflected Gray code.

    Patterns of neighbouring ranks, also of the last and the first, differ in exactly one bit.

    Args:
        pattern: non-negative int64, any shape.

    Example:
        >>> inverse_gray(torch.tensor([0b00, 0b01, 0b11, 0b10])).tolist()
        [0, 1, 2, 3]
    """
    rank = pattern
    for shift in (1, 2, 4, 8, 16, 32):
        rank = rank ^ (rank >> shift)
    return rank


def hamming_sorted_codes(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Return the Hamming sorted LSH codes of Definition 1.

    For two vectors at the angle theta, `Pr[H(x) = H(y)] = (1 - theta/pi)^r` and
    `Pr[H(x) = H(y) +- 1 mod 2^r] = 2 theta/pi (1 - theta/pi)^(r-1)`.

    Args:
        x: `[..., n, d]`.
        projection: `[..., d, r]`, standard normal; broadcast against `x`.

    Returns:
        int64 `[..., n]` in `[0, 2^r)`.
    """
    with without_autocast(x):
        signs = torch.matmul(x.to(projection.dtype), projection) > 0
    bits = torch.arange(projection.shape[-1], device=x.device)
    return inverse_gray((signs.long() << bits).sum(dim=-1))


@dataclass(frozen=True, kw_only=True)
class SortLSH(AbstractDetector):
    """Entries whose query and key fall into the same block after sorting by hash code.

    Queries and keys are hashed by random hyperplanes, sorted by code, and cut into blocks of
    equal rank; a query holds the keys of its block. Vectors at a small angle share a block with
    good probability. (On heads of language models the heavy keys are often not at a small angle
    to their query; see the documentation.)

    The blocks of Algorithm 1 are made of ranks among all rows, so they suit problems without a
    mask: non-causal attention and the rectangles of the causal recursion. Under `is_causal` a row
    holds its own key and the keys of its own bucket in runs of half a block: its own run up to its
    position, and the one before. Nothing later moves those. Buckets are codes there, neighbouring
    ones joined until they hold about a block each. (One block of all keys, where `block_size` is
    no smaller than their number, is the same in every form.) The strict form of a rectangle places
    each query among the sorted keys by its own code instead of by its rank.

    Args:
        block_size: keys held by a row, at most.
        num_projections: hyperplanes `r`, 1 to 62; there are `2^r` buckets.
        centre_keys: subtract the mean key before hashing (softmax does not see the difference).
            Not available under `is_causal`, where a mean would look ahead: there keys and queries
            are hashed as they are.
        num_rounds: independent hashes; a row holds the union of their blocks.

    Cost: O(rounds (n d r + n log n)) time, O(rounds n) memory. Random; no gradient.
    Source: HyperAttention, Definition 1 and Algorithm 1. The Gray code there must be applied
    inversely for neighbouring buckets to be neighbours, as here. Departure: blocks are balanced
    when `block_size` does not divide n, and each head has its own hyperplanes.

    Example:
        >>> q = k = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
        >>> mask = SortLSH(block_size=16).find(q, k, generator=torch.Generator().manual_seed(0))
        >>> mask.nnz().tolist()
        [[1024, 1024]]
    """

    block_size: int = 256
    num_projections: int = 7
    centre_keys: bool = False
    num_rounds: int = 1

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)
        check_positive_int(self, "num_rounds", self.num_rounds)
        check_bool(self, "centre_keys", self.centre_keys)
        check_positive_int(self, "num_projections", self.num_projections)
        if self.num_projections > 62:
            raise ArgumentError(
                f"sort_lsh: num_projections={self.num_projections} does not fit a 64-bit code; "
                "pass at most 62"
            )

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return one block mask for each round; see the class and `AbstractDetector.find`."""
        form = self._bucket_mask if is_causal else self._block_mask
        return self._each_round(form, query, key, generator, is_causal=is_causal)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return masks in which a row's keys depend on its own query alone."""
        form = self._bucket_mask if is_causal else self._placed_mask
        return self._each_round(form, query, key, generator, is_causal=is_causal)

    def _each_round(
        self, form: Callable[[torch.Tensor, torch.Tensor], HeavyMask], query: torch.Tensor,
        key: torch.Tensor, generator: torch.Generator | None, *, is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        """Unite the masks that a form makes of the codes of each round."""
        codes = self._codes(query, key, generator, centre=self.centre_keys and not is_causal)
        return UnionMask.of(*(form(q_code, k_code) for q_code, k_code in codes))

    def _codes(
        self, query: torch.Tensor, key: torch.Tensor, generator: torch.Generator | None,
        *, centre: bool,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
        """Codes of queries `[B, Hq, n_q]` and keys `[B, Hkv, n_k]`, a pair for each round."""
        batch, key_heads, _, head_dim = key.shape
        if centre:
            key = key - key.mean(dim=2, keepdim=True)
        shape = (self.num_rounds, batch, key_heads, head_dim, self.num_projections)
        projection = normal(shape, key.device, generator)
        if key.dtype == torch.float64:
            projection = projection.double()
        return [
            (
                hamming_sorted_codes(query, spread_heads(of_round, query.shape[1])),
                hamming_sorted_codes(key, of_round),
            )
            for of_round in projection
        ]

    def _num_blocks(self, num_keys: int) -> int:
        return -(-num_keys // self.block_size)

    def _block_mask(self, query_code: torch.Tensor, key_code: torch.Tensor) -> RangeMask:
        """Blocks of equal rank: Algorithm 1."""
        batch, heads, num_queries = query_code.shape
        num_keys = key_code.shape[-1]
        blocks = self._num_blocks(num_keys)
        query_block, key_block = -(-num_queries // blocks), -(-num_keys // blocks)
        order = query_code.sort(dim=-1, stable=True).indices
        bounds = torch.arange(blocks + 1, device=order.device)
        # block b owns the queries and the keys of the ranks [b, b + 1) / blocks
        query_bounds, key_bounds = bounds * num_queries // blocks, bounds * num_keys // blocks
        if num_queries % blocks:
            rank = query_bounds[:-1, None] + torch.arange(query_block, device=order.device)
            is_own = rank < query_bounds[1:, None]
            order = torch.where(is_own, order[..., rank.clamp(max=num_queries - 1)], -1).flatten(2)
        start, stop = key_bounds[:-1], key_bounds[1:]
        return RangeMask(
            batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
            query_order=order, key_order=key_code.sort(dim=-1, stable=True).indices,
            start=start.expand(batch, heads, -1), stop=stop.expand(batch, heads, -1),
            tile_size=query_block, max_keys=key_block,
        )  # fmt: skip

    def _placed_mask(self, query_code: torch.Tensor, key_code: torch.Tensor) -> RangeMask:
        """Blocks of sorted keys; every query goes to the block around its own code."""
        num_keys = key_code.shape[-1]
        blocks = self._num_blocks(num_keys)
        key_block = -(-num_keys // blocks)
        ordered, order = key_code.sort(dim=-1, stable=True)
        ordered = spread_heads(ordered, query_code.shape[1]).contiguous()
        code = query_code.contiguous()
        first = torch.searchsorted(ordered, code)
        last = torch.searchsorted(ordered, code, right=True)
        start = ((first + last) // 2).clamp(max=num_keys - 1) // key_block * key_block
        return RangeMask.of_rows(
            start, start, (start + key_block).clamp(max=num_keys), order, max_keys=key_block,
            max_groups=blocks, tile_size=_ROW_TILE,
        )  # fmt: skip

    def _bucket_mask(self, query_code: torch.Tensor, key_code: torch.Tensor) -> HeavyMask:
        """Runs of half a block inside a bucket, in the order of positions (causal)."""
        num_queries, num_keys = query_code.shape[-1], key_code.shape[-1]
        if num_keys <= self.block_size:
            return replace(self._block_mask(query_code, key_code), is_causal=True)
        # the row's own key, which need not be in its own bucket, counts as one of the block
        own = BandMask(
            batch_size=query_code.shape[0], num_query_heads=query_code.shape[1],
            num_queries=num_queries, num_keys=num_keys, is_causal=True, left=0, right=0,
            on_device=query_code.device,
        )  # fmt: skip
        if self.block_size == 1:
            return own
        # fewer, larger buckets: a code without its last bits is a run of neighbouring codes
        bits = min(self.num_projections, self._num_blocks(num_keys).bit_length() - 1)
        query_code, key_code = (
            code >> (self.num_projections - bits) for code in (query_code, key_code)
        )
        run = max(1, (self.block_size - 1) // 2)
        runs_before = 1 if self.block_size > 2 else 0
        order = key_code.sort(dim=-1, stable=True).indices
        # the sort is stable: inside a bucket, keys stand in the order of their positions
        ordered = spread_heads(key_code.gather(-1, order), query_code.shape[1]).contiguous()
        code = query_code.contiguous()
        bucket_start = torch.searchsorted(ordered, code)
        bucket_stop = torch.searchsorted(ordered, code, right=True)
        position = torch.arange(num_queries, device=code.device) + num_keys - num_queries
        seen = _count_at_or_before(
            spread_heads(order, query_code.shape[1]), bucket_start, bucket_stop, position
        )
        current = (seen - 1).div(run, rounding_mode="floor")
        start = bucket_start + (current - runs_before).clamp(min=0) * run
        stop = torch.minimum(bucket_start + (current + 1) * run, bucket_stop)
        runs = RangeMask.of_rows(
            bucket_start + current.clamp(min=0) * run, start, torch.where(seen > 0, stop, start),
            order, max_keys=(runs_before + 1) * run, tile_size=_ROW_TILE, is_causal=True,
            max_groups=num_keys // run + (1 << bits),
        )  # fmt: skip
        return runs | own


def _count_at_or_before(
    order: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Count, in each ascending run `order[start:stop]`, the entries at or before `position`.

    A bisection over all rows at once; `start`, `stop` are `[B, H, n_q]`, `order` `[B, H, n_k]`.
    """
    low, high = start, stop
    for _ in range(int(order.shape[-1]).bit_length()):
        middle = (low + high) // 2
        at = order.gather(-1, middle.clamp(max=order.shape[-1] - 1))
        goes_right = (middle < high) & (at <= position)
        low, high = torch.where(goes_right, middle + 1, low), torch.where(goes_right, high, middle)
    return low - start
