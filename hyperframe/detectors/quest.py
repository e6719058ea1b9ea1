"""Quest: key blocks by an upper bound of their logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..budget import check_budget, resolve_budget
from ..component import check_choice, check_positive_int
from ..errors import ArgumentError
from ..masks import HeavyMask
from ..precision import without_autocast
from .base import default_scale
from .block_scores import AbstractBlockScores
from .blocks import best_blocks, filled_runs

__all__ = ["Quest", "block_extremes", "logit_bounds"]

_REDUCTIONS = ("mean", "max")


def block_extremes(key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the largest and the smallest coordinates of every block of keys.

    Args:
        key: `[batch, key_heads, n_k, d]`.
        block_size: keys of a block; the last one may be shorter.

    Returns:
        `[batch, key_heads, blocks, 2 d]`: the maxima, then the minima; in float32 at least.
    """
    blocks = filled_runs(key, block_size, -(-key.shape[2] // block_size))
    extremes = torch.cat([blocks.amax(dim=3), blocks.amin(dim=3)], dim=-1)
    return extremes.to(torch.promote_types(key.dtype, torch.float32))


def logit_bounds(query: torch.Tensor, extremes: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Return upper bounds of the logits of queries and all keys of a block.

    `sum_d max(q_d min_d, q_d max_d)`: positive coordinates of the (scaled) query meet the maxima,
    negative ones the minima.

    Args:
        query: `[batch, query_heads, rows, d]`.
        extremes: from `block_extremes`.
        scale: factor of the logits, of either sign.

    Returns:
        `[batch, query_heads, rows, blocks]`, in the dtype of the extremes. Linear in the positive
        and negative parts of a query, so that the mean bound of queries is one product.
    """
    return _bounds(_signed_parts(query, scale, extremes.dtype), extremes)


def _signed_parts(query: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Positive parts, then negative parts of scaled queries: `[..., 2 d]`."""
    scaled = query.to(dtype) * scale
    return torch.cat([scaled.clamp(min=0), scaled.clamp(max=0)], dim=-1)


def _bounds(parts: torch.Tensor, extremes: torch.Tensor) -> torch.Tensor:
    batch, heads, rows, size = parts.shape
    with without_autocast(parts):
        grouped = parts.reshape(batch, extremes.shape[1], -1, size) @ extremes.transpose(-1, -2)
    return grouped.view(batch, heads, rows, -1)


@dataclass(frozen=True, kw_only=True)
class Quest(AbstractBlockScores):
    """Blocks of keys that may hold large logits, by the extremes of their coordinates.

    Of every block the largest and smallest value of each coordinate are kept; with them,
    `sum_d max(q_d min_d, q_d max_d)` is at least the logit of a query and any key of the block. A
    tile of rows scores blocks by the bounds of `num_queries` pooled queries (the means of equal
    runs of its rows): by their mean or by the largest. With `num_queries=tile_size` and
    `reduction="max"` the score is at least every logit of the tile and the block.

    Under `is_causal` a tile chooses among the whole blocks before its first row, and holds the rest
    of its keys: its own, and those of a block that begins before them. The strict form scores by
    the `tile_size` queries that end with the tile's first one.

    Args:
        block_size: keys of a block (a page of the paper).
        num_blocks: blocks (a float: fraction of them) that a tile chooses.
        num_queries: pooled queries of a tile; divides `tile_size`.
        reduction: "mean" or "max" of their bounds.
        tile_size: rows of a tile.

    Cost: O(2 n_q n_k d / (tile_size block_size)) time for the mean, `num_queries` times that for
    the maximum: quadratic, by default a 512th of the logits of exact attention. Scores are made for
    some tiles at a time; memory O(n d + n_q num_blocks block_size / tile_size). A short tile at the
    end counts its last row repeatedly. Deterministic. No gradient.
    Source: Quest (arXiv 2406.10774), where each single query of decoding chooses its pages.

    Example:
        >>> q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 8, 2)
        >>> q[..., 0], k[:, :, 5, 0] = 1.0, 9.0
        >>> best = Quest(block_size=2, num_blocks=1, num_queries=1, tile_size=4)
        >>> best.find(q, k).to_dense()[0, 0, 0].nonzero().flatten().tolist()
        [4, 5]
    """

    block_size: int = 16
    num_blocks: int | float = 16
    num_queries: int = 4
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "block_size", self.block_size)
        check_budget(self, "num_blocks", self.num_blocks)
        check_positive_int(self, "num_queries", self.num_queries)
        check_choice(self, "reduction", self.reduction, _REDUCTIONS)
        check_positive_int(self, "tile_size", self.tile_size)
        if self.tile_size % self.num_queries:
            raise ArgumentError(
                f"quest: num_queries={self.num_queries} does not divide "
                f"tile_size={self.tile_size} into equal runs of rows; pass a divisor of "
                f"{self.tile_size}"
            )

    def _find(
        self, voters: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        run = self.tile_size // self.num_queries
        num_tiles = -(-query.shape[2] // self.tile_size)
        count = resolve_budget(self.num_blocks, -(-key.shape[2] // self.block_size))
        with torch.no_grad():
            extremes = block_extremes(key, self.block_size)
            rows = filled_runs(voters, run, num_tiles * self.num_queries)
            pooled = rows.mean(dim=3, dtype=extremes.dtype)
            parts = _signed_parts(pooled, default_scale(query, scale), extremes.dtype)
            parts = parts.unflatten(2, (num_tiles, self.num_queries))
            if self.reduction == "mean":  # linear: one product answers for all of them
                parts = parts.mean(dim=3, keepdim=True)

            def scores(tiles: slice) -> torch.Tensor:
                chosen = parts[:, :, tiles]
                bounds = _bounds(chosen.flatten(2, 3), extremes)
                largest: torch.Tensor = bounds.unflatten(2, (-1, chosen.shape[3])).amax(dim=3)
                return largest

            return best_blocks(
                scores, query, key, block_size=self.block_size, num_blocks=count,
                tile_size=self.tile_size, is_causal=is_causal,
            )  # fmt: skip
