"""Clusters of keys that queries see alike, by k-means, chosen for tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import check_budget
from ..clustering.kmeans import kmeans_order
from ..component import check_non_negative_int, check_positive_int
from .leaf_detector import AbstractLeafDetector

__all__ = ["KMeans"]


@dataclass(frozen=True, kw_only=True)
class KMeans(AbstractLeafDetector):
    """Equal blocks of keys that k-means puts together; a tile of rows holds the best of them.

    The blocks stand to k-means as the leaves of `pca_tree` to its tree: keys are clustered in the
    metric of the queries, as points `(E q q^T)^(1/2) k`, in each block of `chunk_size` consecutive
    keys by itself, sorted by cluster and cut into blocks of `block_size`. For each tile of
    `tile_size` rows, the means of `num_means` runs of its queries give every block a softmax mass
    by its mean key, and the tile holds the `num_blocks` best blocks, the same for all of its rows.

    Under `is_causal` a tile chooses among blocks made of keys before it, and holds its own keys,
    too; no key moves the choice of an earlier row. The strict form lets only the tile before and
    the tile's own first row choose. See `pca_tree` for both.

    Args:
        tile_size: rows of a tile.
        num_means: means of queries that choose for a tile.
        chunk_size: keys that are clustered together, at most; `tile_size` times a power of two.
        block_size: keys of a block, at most.
        num_blocks: blocks held by a tile; a float is a fraction of all of them.
        num_steps: mini-batch steps of k-means; 0 leaves the leaves of the tree it starts from.
        batch_size: keys of a step.

    Cost: O(n d (d + chunk_size / block_size + num_steps batch_size / block_size)) time to cluster,
    under `is_causal` about twice that; O(n_q n_k d num_means / (tile_size block_size)) to choose: a
    quadratic term, with 1/512 of the products of exact attention by default. Memory is linear.
    Random (without a generator: fixed). No gradient.
    Source: clustered attention (Routing Transformer, arXiv 2003.05997), its clusters made equal,
    and chosen by scores instead of by a common centre.

    Example:
        >>> k = torch.eye(4).repeat(8, 1).view(1, 1, 32, 4)
        >>> q = 9 * k[:, :, :1]  # likes every fourth key
        >>> mask = KMeans(block_size=8, num_blocks=1).find(q, k)
        >>> mask.to_dense()[0, 0, 0].nonzero().flatten().tolist()
        [0, 4, 8, 12, 16, 20, 24, 28]
    """

    registry_name: ClassVar[str | None] = "kmeans"

    block_size: int = 32
    num_blocks: int | float = 8
    num_steps: int = 8
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        check_positive_int(self, "block_size", self.block_size)
        check_budget(self, "num_blocks", self.num_blocks)
        check_non_negative_int(self, "num_steps", self.num_steps)
        check_positive_int(self, "batch_size", self.batch_size)

    def _sizes(self) -> tuple[int, int | float]:
        return self.block_size, self.num_blocks

    def _longest_block(self, num_keys: int) -> int:
        return min(self.chunk_size, num_keys)

    def _order(self, points: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return kmeans_order(
            points, block_size=self.block_size, num_steps=self.num_steps,
            batch_size=self.batch_size, generator=generator,
        )  # fmt: skip
