"""A balanced tree of keys: leaves of keys that queries see alike, chosen for tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..budget import check_budget
from ..clustering.pca_tree import pca_order
from ..component import check_positive_int
from .leaf_detector import AbstractLeafDetector

__all__ = ["PCATree"]


@dataclass(frozen=True, kw_only=True)
class PCATree(AbstractLeafDetector):
    """The leaves of a balanced tree of keys that a tile's queries attend to most.

    Keys are multiplied by `(E q q^T)^(1/2)`, so that distances are those of logits, and a tree
    splits them at the median along the leading direction, node by node, down to leaves of
    `leaf_size` keys. For each tile of `tile_size` rows, the means of `num_means` runs of its
    queries give every leaf a softmax mass by its mean key and its number of keys; the tile holds
    the `num_leaves` best leaves, the same for all of its rows. Query heads that share a key head
    share its tree, by the queries of all of them.

    Under `is_causal` there is a forest: a tree for each chunk of `chunk_size` keys, and for each
    even block of `tile_size`, `2 tile_size`, ... `chunk_size / 2` keys. The keys before a tile are
    chunks, then one such block of a size at most; the tile chooses among all their leaves and holds
    its own keys, too. (Where `n_k - n_q` is no multiple of `tile_size`, it also holds the first
    keys, as many as that leaves over.) A tree sees no key outside of its block, so no key moves the
    choice of an earlier row.

    The strict form lets the tile before and the tile's own first row choose, and takes the metric
    from queries before all rows that use it: those before the rectangle, or in a single pass those
    of the first block. Where there are none, the metric is that of the keys.

    Args:
        tile_size: rows of a tile.
        num_means: means of queries that choose for a tile.
        chunk_size: keys of the largest trees under `is_causal`; `tile_size` times a power of two.
        leaf_size: keys of a leaf, at most; leaves of one tree differ by one key at most.
        num_leaves: leaves held by a tile; a float is a fraction of all of them.

    Cost: O(n d (d + log(n / leaf_size))) time to build the tree, under `is_causal` at most
    `log2(chunk_size / tile_size)` times that; O(n_q n_k d num_means / (tile_size leaf_size)) to
    choose: a quadratic term, with 1/256 of the products of exact attention by default. Memory is
    linear. Deterministic; no gradient.
    Source: ours; principal direction trees (Sproull 1991) in the metric of the queries.

    Example:
        >>> k = torch.eye(4).repeat(8, 1).view(1, 1, 32, 4)
        >>> q = 9 * k[:, :, :1]  # likes every fourth key
        >>> mask = PCATree(leaf_size=8, num_leaves=1).find(q, k)
        >>> mask.to_dense()[0, 0, 0].nonzero().flatten().tolist()
        [0, 4, 8, 12, 16, 20, 24, 28]
    """

    leaf_size: int = 16
    num_leaves: int | float = 16

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        check_positive_int(self, "leaf_size", self.leaf_size)
        check_budget(self, "num_leaves", self.num_leaves)

    def _sizes(self) -> tuple[int, int | float]:
        return self.leaf_size, self.num_leaves

    def _order(self, points: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return pca_order(points, leaf_size=self.leaf_size)
