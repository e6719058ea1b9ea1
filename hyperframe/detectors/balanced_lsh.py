"""sortLSH on centred and balanced queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..clustering.metric import balancing, prefix_moments, second_moment
from ..component import check_positive_int
from ..errors import ArgumentError, UnsupportedError
from ..masks import HeavyMask
from ..precision import without_autocast
from .base import AbstractDetector
from .sort_lsh import SortLSH

__all__ = ["BalancedLSH"]


@dataclass(frozen=True, kw_only=True)
class BalancedLSH(AbstractDetector):
    """sortLSH of vectors whose angles say more: queries and keys made alike before hashing.

    The mean key is subtracted from all keys (softmax does not see it), the mean query from all
    queries, and queries are multiplied by a symmetric `A`, keys by its inverse, so that both have
    one second moment. Inner products of what was centred stay as they were. Then `sort_lsh` hashes
    and sorts. On heads of language models queries and keys lie in two narrow cones that point
    apart; this takes the cones away.

    Means and moments are those of the rows and keys of the problem: of a rectangle in the causal
    recursion. Under `is_causal` they are those of prefixes: keys and queries at the positions
    `[c, 2c)` go by the positions before `c`, for `c = checkpoint, 2 checkpoint, 4 checkpoint, ...`,
    and those before the first checkpoint by the first key and the first query. So no key and no
    later query moves the choice of an earlier row. (Vectors of different `c` are balanced a little
    differently.) In the strict form of a rectangle the queries before it give mean and moment.

    Args:
        block_size: keys held by a row, at most.
        num_projections: hyperplanes, 1 to 62; there are `2^num_projections` buckets.
        num_rounds: independent hashes; a row holds the union of their blocks.
        checkpoint: positions behind which the causal form begins to balance.

    Cost: that of `sort_lsh` and O(n d^2) time, O(n d) memory; square roots of `d x d` matrices, one
    for every doubling of n under `is_causal`. Random; no gradient.
    Source: HyperAttention, Definition 1 and Algorithm 1; centring and balancing are ours.

    Example:
        >>> q = k = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
        >>> detector, shift = BalancedLSH(block_size=16), 9.0
        >>> masks = [detector.find(q, x, generator=torch.Generator().manual_seed(0))
        ...          for x in (k, k + shift)]
        >>> torch.equal(*(mask.to_dense() for mask in masks))
        True
    """

    takes_stream: ClassVar[bool] = True

    block_size: int = 256
    num_projections: int = 7
    num_rounds: int = 1
    checkpoint: int = 64

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)
        check_positive_int(self, "num_rounds", self.num_rounds)
        check_positive_int(self, "checkpoint", self.checkpoint)
        check_positive_int(self, "num_projections", self.num_projections)
        if self.num_projections > 62:
            raise ArgumentError(
                f"balanced_lsh: num_projections={self.num_projections} does not fit a 64-bit code; "
                "pass at most 62"
            )

    @property
    def _sort(self) -> SortLSH:
        return SortLSH(
            block_size=self.block_size, num_projections=self.num_projections,
            num_rounds=self.num_rounds,
        )  # fmt: skip

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the blocks of `sort_lsh` for balanced queries and keys."""
        with torch.no_grad():
            if is_causal:
                query, key = _balance_prefixes(query, key, self.checkpoint)
            else:
                query, key = _balance(query, key, query)
        return self._sort.find(query, key, is_causal=is_causal, generator=generator)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return masks in which a row depends on its own query and earlier ones."""
        if is_causal:
            return self.find(query, key, is_causal=True, generator=generator)
        if earlier_query is None:
            raise UnsupportedError(
                "strict_causal=True: balanced_lsh takes the mean and the moment of queries before "
                f"the rows, and here there are none ({query.shape[2]} queries against "
                f"{key.shape[2]} keys that all come before them); pass the whole sequence at once, "
                "use sort_lsh, or strict_causal=False"
            )
        with torch.no_grad():
            query, key = _balance(query, key, earlier_query)
        return self._sort.find_strict(query, key, generator=generator)


def _balance(
    query: torch.Tensor, key: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and balance queries and keys, by the mean and the moment of the queries `source`."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    mean = source.mean(dim=2, keepdim=True, dtype=dtype)
    key_mean = key.mean(dim=2, keepdim=True, dtype=dtype)
    moments = second_moment(source - mean), second_moment(key - key_mean)
    return _apply(query - mean, key - key_mean, *moments, query.dtype)


def _balance_prefixes(
    query: torch.Tensor, key: torch.Tensor, checkpoint: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and balance queries and keys by prefixes of positions; see the class."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset = num_keys - num_queries
    ends, bounds = [1], [checkpoint]
    while bounds[-1] < num_keys:
        ends.append(bounds[-1])
        bounds.append(2 * bounds[-1])
    bounds[-1] = num_keys
    rows = [min(max(end - offset, 1), num_queries) for end in ends]
    mean, moment = prefix_moments(query, rows)
    key_mean, key_moment = prefix_moments(key, ends)
    dtype = torch.promote_types(key.dtype, torch.float32)
    queries, keys, start = [], [], 0
    for number, stop in enumerate(bounds):
        first = max(0, start - offset) if number else 0
        part = slice(first, max(first, stop - offset))
        balanced = _apply(
            query[:, :, part] - mean[number].unsqueeze(2).to(dtype),
            key[:, :, start:stop] - key_mean[number].unsqueeze(2).to(dtype),
            moment[number], key_moment[number], query.dtype,
        )  # fmt: skip
        queries.append(balanced[0])
        keys.append(balanced[1])
        start = stop
    return torch.cat(queries, dim=2), torch.cat(keys, dim=2)


def _apply(
    query: torch.Tensor, key: torch.Tensor, query_moment: torch.Tensor, key_moment: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Multiply what is centred by `A` and its inverse, for moments `[B, Hq or Hkv, d, d]`."""
    batch, key_heads = key.shape[:2]
    grouped = query_moment.view(batch, key_heads, -1, *query_moment.shape[2:]).mean(dim=2)
    factor, inverse = balancing(grouped, key_moment)
    with without_autocast(key):
        rows = query.reshape(batch, key_heads, -1, query.shape[-1]) @ factor.to(query.dtype)
        return rows.view(query.shape).to(dtype), (key @ inverse.to(key.dtype)).to(dtype)
