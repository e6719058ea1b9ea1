"""Pooled top-k: the key blocks that pooled queries of a tile attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import check_budget
from ..component import check_positive_int
from ..errors import ArgumentError
from ..tables import consecutive, spaced
from .leaf_detector import AbstractLeafDetector, Blocks
from .leaves import Leaves

__all__ = ["PooledTopK"]


@dataclass(frozen=True, kw_only=True)
class PooledTopK(AbstractLeafDetector):
    """Blocks of consecutive keys, by the softmax scores of a tile's pooled queries on mean keys.

    Every `block_size` keys in a row are a block. The means of `num_means` runs of a tile's queries
    attend to the mean keys of the blocks; the tile holds the `num_blocks` blocks with the largest
    mass, summed over the runs, each with a softmax of its own. Causality is that of
    `AbstractLeafDetector`.

    Means blur single heavy keys. As a first stage of `refined`, beside columns, its blocks are
    candidates that columns do not find.

    Args:
        tile_size: rows of a tile.
        num_means: runs of a tile whose mean queries choose; 1 pools the whole tile.
        chunk_size: as in `AbstractLeafDetector`; without effect where `block_size` divides
            `tile_size`, since all chunks then have the same blocks.
        block_size: keys of a block.
        num_blocks: blocks held by a tile; a float is a fraction of all of them.
        pool_step: every how manyth row of a tile, and key of a block, the means are of, from the
            first one on.

    Cost: O(n_q n_k d num_means / (tile_size block_size)) time, by default 1/256 of the logits;
    memory O(n). Deterministic. No gradient.
    Source: block scores from pooled queries and keys (MInference, arXiv 2407.02490; SeerAttention).

    Example:
        >>> q, k = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
        >>> q[..., 0], k[:, :, 32:48, 0] = 1.0, 9.0
        >>> mask = PooledTopK(num_blocks=1).find(q, k)
        >>> mask.to_dense()[0, 0, 0].nonzero().squeeze(1).tolist() == list(range(32, 48))
        True
    """

    registry_name: ClassVar[str | None] = "pooled_topk"

    block_size: int = 16
    num_blocks: int | float = 16
    pool_step: int = 1

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        check_positive_int(self, "block_size", self.block_size)
        check_budget(self, "num_blocks", self.num_blocks)
        check_positive_int(self, "pool_step", self.pool_step)
        if self.tile_size % self.pool_step:
            raise ArgumentError(
                f"{self.name}: pool_step={self.pool_step} does not divide "
                f"tile_size={self.tile_size}; pass a divisor of it"
            )

    def _sizes(self) -> tuple[int, int | float]:
        return self.block_size, self.num_blocks

    def _pool_step(self) -> int:
        return self.pool_step

    def _points(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key  # their order is that of the positions

    def _largest_chunk(self) -> int:
        # whole blocks in every tile are the same in every chunk: no tile needs a cover of chunks
        return self.tile_size if self.tile_size % self.block_size == 0 else self.chunk_size

    def _order(self, points: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        place = torch.arange(points.shape[3], device=points.device)
        return place.expand(points.shape[:4])

    def _leaves(
        self, key: torch.Tensor, points: torch.Tensor, blocks: list[Blocks],
        generator: torch.Generator | None,
    ) -> Leaves:  # fmt: skip
        run, size = blocks[0], self.block_size
        if len(blocks) > 1 or run.step != run.size or run.size % size:
            return super()._leaves(key, points, blocks, generator)
        # all leaves are blocks of the same size, one behind the other
        count, stop = run.blocks * run.size // size, run.start + run.blocks * run.size
        index = consecutive(run.start, stop, key.device)
        keys = key[:, :, run.start : stop].unflatten(2, (count, size))
        # added in float32, and rounded as the keys are
        mean = keys[:, :, :, :: self.pool_step].mean(dim=3)
        index = index.view(count, size).expand(*key.shape[:2], -1, -1)
        return Leaves(index, spaced(count, 0, size, key.device), mean.detach(), True)
