"""sortLSH: the published detector of HyperAttention (Definition 1 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_bool, check_positive_int
from ..errors import ArgumentError
from ..kernels.hashing import (
    HashOrders,
    hamming_sorted_codes,
    hash_orders,
    inverse_gray,
    rounded_planes,
)
from ..masks import BandMask, BlockMask, HeavyMask, RangeMask, UnionMask
from ..ragged import spread_heads
from ..randomness import normal
from ..rectangles import Level, Places, level_rectangles
from .base import AbstractDetector

__all__ = [
    "SortLSH",
    "block_mask",
    "bucket_mask",
    "hamming_sorted_codes",
    "inverse_gray",
    "placed_mask",
]

_ROW_TILE = 32  # rows of a tile where every row names its own range of keys


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

    takes_stream: ClassVar[bool] = True
    finds: ClassVar[tuple[str, ...]] = ("neighbours",)

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
        num_queries, num_keys = query.shape[2], key.shape[2]
        if is_causal and num_keys > self.block_size:
            return UnionMask.of(
                *(
                    bucket_mask(*codes, block_size=self.block_size, num_bits=self.num_projections)
                    for codes in self._codes(query, key, generator, centre=False)
                )
            )
        centre = self.centre_keys and not is_causal
        runs, everything = (max(num_queries, num_keys),), ((0, num_queries, 0, num_keys),)
        masks = []
        for planes in self._hyperplanes(key, generator):
            threshold = None
            if centre:
                # k . p > mean . p: the signs of centred keys, without a copy of the keys
                dtype = torch.promote_types(key.dtype, torch.float32)
                mean = key.mean(dim=2, dtype=dtype).unsqueeze(-1)
                threshold = (mean * rounded_planes(planes, key.dtype)).sum(dim=-2)
            orders = hash_orders(query, key, planes, runs=runs, key_threshold=threshold)
            masks.append(
                block_mask(orders, everything, block_size=self.block_size, is_causal=is_causal)
            )
        return UnionMask.of(*masks)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return masks in which a row's keys depend on its own query alone."""
        if is_causal:
            return self.find(query, key, is_causal=True, generator=generator)
        codes = self._codes(query, key, generator, centre=self.centre_keys)
        return UnionMask.of(*(placed_mask(*pair, block_size=self.block_size) for pair in codes))

    def find_levels(
        self, query: torch.Tensor, key: torch.Tensor, *, leaf: int, levels: Sequence[Level],
        scale: float | None = None, generator: torch.Generator | None = None,
    ) -> list[BlockMask] | None:  # fmt: skip
        """Return a mask of blocks for every level of the causal recursion, from one hash pass.

        All levels share the hyperplanes of their head: a row has the same code on every level,
        where `find_rectangle` would hash each rectangle anew. Samples stay independent. None for
        several rounds, and for centred keys, whose mean over all keys would look ahead.
        """
        if self.num_rounds > 1 or self.centre_keys or not levels:
            return None
        (planes,) = self._hyperplanes(key, generator)
        sizes = tuple(level.size for level in levels)
        orders = hash_orders(query, key, planes, runs=sizes, alternate=True)
        return [
            block_mask(orders, places, block_size=self.block_size, number=number)
            for number, places in enumerate(
                level_rectangles(level, key.shape[2]) for level in levels
            )
        ]

    def _codes(
        self, query: torch.Tensor, key: torch.Tensor, generator: torch.Generator | None,
        *, centre: bool,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
        """Codes of queries `[B, Hq, n_q]` and keys `[B, Hkv, n_k]`, a pair for each round."""
        rounds = rounded_planes(self._hyperplanes(key, generator), key.dtype)
        if centre:
            key = key - key.mean(dim=2, keepdim=True)
        return [
            (
                hamming_sorted_codes(query, spread_heads(planes, query.shape[1])),
                hamming_sorted_codes(key, planes),
            )
            for planes in rounds
        ]

    def _hyperplanes(self, key: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Draw float32 `[rounds, B, Hkv, d, r]`."""
        batch, key_heads, _, head_dim = key.shape
        shape = (self.num_rounds, batch, key_heads, head_dim, self.num_projections)
        return normal(shape, key.device, generator)


def block_mask(
    orders: HashOrders, rectangles: tuple[Places, ...], *, block_size: int, number: int = 0,
    is_causal: bool = False,
) -> BlockMask:  # fmt: skip
    """Return blocks of equal rank: Algorithm 1.

    Args:
        orders: rows and keys sorted by code, inside of the runs of one or more sizes.
        rectangles: where the blocks lie; see `BlockMask`.
        block_size: keys of a block, at most.
        number: which of the run sizes.
        is_causal: see `HeavyMask`.
    """
    query_order, key_order, key_rank = (order[number] for order in orders)
    batch, heads, num_queries = query_order.shape
    return BlockMask(
        batch_size=batch, num_query_heads=heads, num_queries=num_queries,
        num_keys=key_order.shape[-1], is_causal=is_causal, query_order=query_order,
        key_order=key_order, key_rank=key_rank, rectangles=rectangles, block_size=block_size,
    )  # fmt: skip


def placed_mask(
    query_code: torch.Tensor, key_code: torch.Tensor, *, block_size: int
) -> RangeMask:  # fmt: skip
    """Return blocks of sorted keys; every query goes to the block around its own code.

    Args:
        query_code: int64 `[batch, query_heads, n_q]`.
        key_code: int64 `[batch, key_heads, n_k]`.
        block_size: keys of a block, at most.
    """
    num_keys = key_code.shape[-1]
    blocks = -(-num_keys // block_size)
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


def bucket_mask(
    query_code: torch.Tensor, key_code: torch.Tensor, *, block_size: int, num_bits: int
) -> HeavyMask:
    """Return each row's own key, and runs of half a block inside its bucket, by position (causal).

    Args:
        query_code: int64 `[batch, query_heads, n_q]`.
        key_code: int64 `[batch, key_heads, n_k]`.
        block_size: keys of a row, at most.
        num_bits: bits of a code.
    """
    num_queries, num_keys = query_code.shape[-1], key_code.shape[-1]
    # the row's own key, which need not be in its own bucket, counts as one of the block
    own = BandMask(
        batch_size=query_code.shape[0], num_query_heads=query_code.shape[1],
        num_queries=num_queries, num_keys=num_keys, is_causal=True, left=0, right=0,
        on_device=query_code.device,
    )  # fmt: skip
    if block_size == 1:
        return own
    # fewer, larger buckets: a code without its last bits is a run of neighbouring codes
    bits = min(num_bits, (-(-num_keys // block_size)).bit_length() - 1)
    query_code, key_code = (code >> (num_bits - bits) for code in (query_code, key_code))
    run = max(1, (block_size - 1) // 2)
    runs_before = 1 if block_size > 2 else 0
    sorted_code, order = key_code.sort(dim=-1, stable=True)
    # the sort is stable: inside a bucket, keys stand in the order of their positions
    ordered = spread_heads(sorted_code, query_code.shape[1]).contiguous()
    code = query_code.contiguous()
    bucket_start = torch.searchsorted(ordered, code)
    bucket_stop = torch.searchsorted(ordered, code, right=True)
    position = torch.arange(num_queries, device=code.device) + num_keys - num_queries
    # codes and positions as one number, which ascends: what stands at or before a row in its bucket
    place = spread_heads(sorted_code * num_keys + order, query_code.shape[1]).contiguous()
    last = code * num_keys + position.clamp(min=-1)
    seen = torch.searchsorted(place, last, right=True) - bucket_start
    current = (seen - 1).div(run, rounding_mode="floor")
    start = bucket_start + (current - runs_before).clamp(min=0) * run
    stop = torch.minimum(bucket_start + (current + 1) * run, bucket_stop)
    runs = RangeMask.of_rows(
        bucket_start + current.clamp(min=0) * run, start, torch.where(seen > 0, stop, start),
        order, max_keys=(runs_before + 1) * run, tile_size=_ROW_TILE, is_causal=True,
        max_groups=num_keys // run + (1 << bits),
    )  # fmt: skip
    return runs | own
