"""Antidiagonal: key blocks by the sums of their strided antidiagonals (XAttention)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..budget import check_budget, resolve_budget
from ..component import check_fraction, check_positive_int
from ..errors import ArgumentError
from ..masks import HeavyMask
from ..precision import without_autocast
from .base import default_scale
from .block_scores import AbstractBlockScores
from .blocks import best_blocks, filled_runs

__all__ = ["Antidiagonal", "antidiagonal_scores"]


def antidiagonal_scores(
    query: torch.Tensor, key: torch.Tensor, *, stride: int, scale: float
) -> torch.Tensor:
    """Return the mean logit of the strided antidiagonals of every pair of blocks.

    Args:
        query: `[batch, query_heads, tiles, tile_size, d]`, from `filled_runs`.
        key: `[batch, key_heads, blocks, block_size, d]`.
        stride: entries of row `r` and key `c` of their blocks count where
            `r + c + 1` is a multiple of it; divides both sizes.
        scale: factor of the logits.

    Returns:
        Floating point `[batch, query_heads, tiles, blocks]`, in float32 at least.
    """
    features = _key_features(key, stride)
    return _products(_query_features(query, stride, scale, key.shape[3]), features)


def _query_features(
    query: torch.Tensor, stride: int, scale: float, block_size: int
) -> torch.Tensor:  # fmt: skip
    """Sums of every `stride`-th row, side by side: `[batch, heads, tiles, stride * d]`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    sums: torch.Tensor = query.unflatten(3, (-1, stride)).sum(dim=3, dtype=dtype)
    return (sums * (scale * stride / (query.shape[3] * block_size))).flatten(3)


def _key_features(key: torch.Tensor, stride: int) -> torch.Tensor:
    """Sums of every `stride`-th key, the last first: `[batch, heads, blocks, stride * d]`."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    sums: torch.Tensor = key.unflatten(3, (-1, stride)).sum(dim=3, dtype=dtype)
    return sums.flip(3).flatten(3)


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Products of features of tiles and blocks: `[batch, query_heads, tiles, blocks]`."""
    batch, heads, tiles, size = query.shape
    with without_autocast(query):
        grouped = query.reshape(batch, key.shape[1], -1, size) @ key.transpose(-1, -2)
    return grouped.view(batch, heads, tiles, -1)


@dataclass(frozen=True, kw_only=True)
class Antidiagonal(AbstractBlockScores):
    """Blocks of keys whose strided antidiagonals hold the largest logits.

    A tile of `tile_size` rows and a block of `block_size` keys meet in a rectangle of logits. Its
    score is the mean over every `stride`-th antidiagonal of it: the entries whose row and key
    numbers in the rectangle, plus 1, add up to a multiple of `stride`. They pass through every row
    and every key, and cross any column, row or diagonal that is heavy. The softmax of the scores
    over the blocks estimates their shares of the mass, and a tile holds the best blocks.

    Under `is_causal` a tile chooses among the whole blocks before its first row, and holds the rest
    of its keys: its own, and those of a block that begins before them. The strict form scores by
    the `tile_size` queries that end with the tile's first one.

    Args:
        block_size: keys of a block.
        num_blocks: blocks (a float: fraction of them) that a tile chooses, at most.
        stride: distance of the antidiagonals; divides `block_size` and `tile_size`. 1 is the mean
            of all logits of the rectangle.
        top_p: hold the fewest blocks that reach this share of the estimated mass (under
            `is_causal`: of the blocks to choose from); 1 holds `num_blocks`.
        tile_size: rows of a tile.

    Cost: O(n_q n_k d stride / (tile_size block_size)) time: quadratic, by default a 128th of the
    logits of exact attention. Scores are made for some tiles at a time; memory O(n d + n_q
    num_blocks block_size / tile_size). Short tiles and blocks at the end count their last row or
    key repeatedly. Deterministic. No gradient.
    Source: XAttention (arXiv 2503.16428), which takes the softmax over pieces of `stride` keys and
    adds it up in blocks. Here it is taken over whole blocks: on language-model heads that finds
    blocks as good, and by default it costs a 16th.

    Example:
        >>> q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 8, 2)
        >>> q[..., 0], k[:, :, 4:6, 0] = 1.0, 9.0
        >>> best = Antidiagonal(block_size=2, num_blocks=1, stride=2, tile_size=4)
        >>> best.find(q, k).to_dense()[0, 0, 0].nonzero().flatten().tolist()
        [4, 5]
    """

    block_size: int = 16
    num_blocks: int | float = 16
    stride: int = 8
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)
        check_budget(self, "num_blocks", self.num_blocks)
        check_positive_int(self, "stride", self.stride)
        check_fraction(self, "top_p", self.top_p)
        check_positive_int(self, "tile_size", self.tile_size)
        for name, size in (("block_size", self.block_size), ("tile_size", self.tile_size)):
            if size % self.stride:
                raise ArgumentError(
                    f"antidiagonal: stride={self.stride} does not divide {name}={size}, so that "
                    f"antidiagonals would miss some of its rows or keys; pass a divisor of {size}"
                )

    def _find(
        self, voters: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        num_tiles = -(-query.shape[2] // self.tile_size)
        count = resolve_budget(self.num_blocks, -(-key.shape[2] // self.block_size))
        with torch.no_grad():
            rows = filled_runs(voters, self.tile_size, num_tiles)
            tiles = _query_features(rows, self.stride, default_scale(query, scale), self.block_size)
            keys = filled_runs(key, self.block_size, -(-key.shape[2] // self.block_size))
            features = _key_features(keys, self.stride)
            return best_blocks(
                lambda part: _products(tiles[:, :, part], features), query, key,
                block_size=self.block_size, num_blocks=count, tile_size=self.tile_size,
                is_causal=is_causal, top_p=self.top_p,
            )  # fmt: skip
