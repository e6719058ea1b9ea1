"""Masks from the codes of several hash rounds: what detectors that bring codes have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.hashing import HashOrders
from ..masks import HeavyMask, UnionMask
from .sort_lsh import block_mask, bucket_mask, placed_mask

__all__ = ["Codes", "mask_of_rounds", "placed_rounds"]

Codes = tuple[torch.Tensor, torch.Tensor]
"""Of rows `[batch, query_heads, n_q]` and of keys `[batch, key_heads, n_k]`, integers."""


def mask_of_rounds(
    rounds: Sequence[Codes], *, num_queries: int, num_keys: int, block_size: int, num_bits: int,
    is_causal: bool,
) -> HeavyMask:  # fmt: skip
    """Return blocks of equal rank after sorting by code; under a causal mask, buckets.

    Args:
        rounds: the codes of each round.
        num_queries: rows.
        num_keys: keys.
        block_size: rows and keys of a block.
        num_bits: of the codes.
        is_causal: whether entries above the diagonal are left out.
    """
    if is_causal and num_keys > block_size:
        return UnionMask.of(
            *(bucket_mask(*codes, block_size=block_size, num_bits=num_bits) for codes in rounds)
        )
    everything = ((0, num_queries, 0, num_keys),)
    return UnionMask.of(
        *(
            block_mask(_orders(*codes), everything, block_size=block_size, is_causal=is_causal)
            for codes in rounds
        )
    )


def placed_rounds(rounds: Sequence[Codes], *, block_size: int) -> HeavyMask:
    """Return masks in which a row's keys depend on its own code alone."""
    return UnionMask.of(*(placed_mask(*codes, block_size=block_size) for codes in rounds))


def _orders(query_code: torch.Tensor, key_code: torch.Tensor) -> HashOrders:
    """Sort rows and keys by code, then by position."""
    query_order, key_order = (
        code.sort(dim=-1, stable=True).indices.int().unsqueeze(0) for code in (query_code, key_code)
    )
    place = torch.arange(key_code.shape[-1], dtype=torch.int32, device=key_code.device)
    rank = torch.empty_like(key_order).scatter_(-1, key_order.long(), place.expand_as(key_order))
    return HashOrders(query_order, key_order, rank)
