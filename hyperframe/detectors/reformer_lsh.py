"""Reformer's hash: the nearest of random directions and their opposites, several rounds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_positive_int
from ..errors import ArgumentError
from ..kernels.hashing import rounded_planes
from ..masks import HeavyMask
from ..precision import without_autocast
from ..ragged import spread_heads
from ..randomness import normal
from .base import AbstractDetector
from .hash_rounds import mask_of_rounds, placed_rounds

__all__ = ["ReformerLSH", "rotation_codes"]


def rotation_codes(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return the bucket of every row: the largest coordinate of `[x R; -x R]`.

    Args:
        x: `[..., n, d]`.
        rotation: `[..., d, buckets / 2]`, standard normal; broadcast against `x`.

    Returns:
        int64 `[..., n]` in `[0, buckets)`; lengths of rows do not matter.

    Example:
        >>> x = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [1.0, -9.0]])
        >>> rotation_codes(x, torch.eye(2)).tolist()
        [0, 2, 3]
    """
    with without_autocast(x):
        product = torch.matmul(x.to(rotation.dtype), rotation)
    largest = product.abs().argmax(dim=-1, keepdim=True)
    is_opposite = product.gather(-1, largest) < 0
    return (largest + is_opposite * rotation.shape[-1]).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class ReformerLSH(AbstractDetector):
    """Entries whose query and key fall into the same block after sorting by Reformer's buckets.

    In each round queries and keys are rotated at random, `x R`; the bucket of a vector is the
    largest of the `num_buckets` coordinates of `[x R; -x R]`. Rows and keys are sorted by bucket,
    then by position, and cut into blocks of equal rank; a query holds the keys of its block in
    every round, an entry that several rounds find once.

    The forms are those of `sort_lsh` for these buckets. Under `is_causal` a row holds its own key
    and, in its own bucket, its run of half a block up to its position and the run before; nothing
    later moves those. The strict form of a rectangle places each query among the sorted keys by its
    own bucket instead of by its rank.

    Args:
        block_size: keys held by a row in each round, at most.
        num_buckets: buckets of a round, an even number.
        num_rounds: independent rotations.

    Cost: O(rounds (n d num_buckets + n log n)) time, O(n (num_buckets + rounds)) memory. Random; no
    gradient.
    Source: Reformer (Kitaev et al. 2020, arXiv 2001.04451), Section 2. Departures: queries are not
    made equal to keys; blocks are runs of equal rank instead of a run and the one before it; each
    head has its own rotations.

    Example:
        >>> q = k = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
        >>> mask = ReformerLSH(block_size=8, num_rounds=1).find(
        ...     q, k, generator=torch.Generator().manual_seed(0))
        >>> mask.nnz().tolist()
        [[512, 512]]
    """

    takes_stream: ClassVar[bool] = True

    block_size: int = 64
    num_buckets: int = 64
    num_rounds: int = 4

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)
        check_positive_int(self, "num_rounds", self.num_rounds)
        check_positive_int(self, "num_buckets", self.num_buckets)
        if self.num_buckets % 2:
            raise ArgumentError(
                f"reformer_lsh: num_buckets={self.num_buckets} is odd, but every direction has an "
                "opposite; pass an even number"
            )

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return one mask for each round; see the class and `AbstractDetector.find`."""
        return mask_of_rounds(
            self._codes(query, key, generator), num_queries=query.shape[2],
            num_keys=key.shape[2], block_size=self.block_size,
            num_bits=(self.num_buckets - 1).bit_length(), is_causal=is_causal,
        )  # fmt: skip

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return masks in which a row's keys depend on its own query alone."""
        if is_causal:
            return self.find(query, key, is_causal=True, generator=generator)
        codes = self._codes(query, key, generator)
        return placed_rounds(codes, block_size=self.block_size)

    def _codes(
        self, query: torch.Tensor, key: torch.Tensor, generator: torch.Generator | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Buckets of queries `[B, Hq, n_q]` and keys `[B, Hkv, n_k]`, a pair for each round."""
        batch, key_heads, _, head_dim = key.shape
        shape = (self.num_rounds, batch, key_heads, head_dim, self.num_buckets // 2)
        rotations = rounded_planes(normal(shape, key.device, generator), key.dtype)
        with torch.no_grad():
            return [
                (
                    rotation_codes(query, spread_heads(rotation, query.shape[1])),
                    rotation_codes(key, rotation),
                )
                for rotation in rotations
            ]
