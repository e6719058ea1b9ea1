"""The tile oracle: the best list of keys that a tile of rows can share, found by looking at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...component import check_positive_int
from ...detectors import AbstractDetector
from ...detectors.base import default_scale
from ...masks import HeavyMask, ListMask
from ...precision import without_autocast

__all__ = ["TileOracle"]

_CHUNK_BYTES = 128 << 20  # of scores of tiles held at once


@dataclass(frozen=True, kw_only=True)
class TileOracle(AbstractDetector):
    """The keys with the most softmax mass over all rows of a tile: a yardstick, not registered.

    Exact probabilities of all rows of a tile are added up, entries that `beside` holds anyway are
    left out, and the `budget` largest sums are the tile's keys. No list of that length that the
    rows of a tile share holds more mass. It looks at later queries, in the strict form too: what is
    compared with it may not, and so cannot be better by chance.

    Args:
        budget: keys of a tile.
        tile_size: rows of a tile.
        beside: the detector in union with which it is used; None is none.

    Cost: O(n_q n_k d) time, quadratic; 128 MiB of scores at once, or one tile's. Deterministic.

    Example:
        >>> q, k = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 3.0, 2.0]).view(1, 1, 3, 1)
        >>> TileOracle(budget=1).find(q, k).to_dense()[0, 0].tolist()
        [[False, True, False], [False, True, False]]
    """

    takes_stream: ClassVar[bool] = True

    budget: int = 256
    tile_size: int = 64
    beside: AbstractDetector | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "budget", self.budget)
        check_positive_int(self, "tile_size", self.tile_size)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return a list of keys for every tile of every query head."""
        batch, heads, num_queries, _ = query.shape
        num_keys, size = key.shape[2], min(self.tile_size, max(1, query.shape[2]))
        num_tiles = max(1, -(-num_queries // size))
        longest = min(self.budget, num_keys)
        held = None
        if self.beside is not None:
            held = self.beside.find(
                query, key, scale=scale, is_causal=is_causal, generator=generator
            )
        index = torch.zeros(
            (batch, heads, num_tiles, longest), dtype=torch.int32, device=query.device
        )
        count = torch.zeros(index.shape[:3], dtype=torch.int32, device=query.device)
        step = max(1, _CHUNK_BYTES // max(1, 12 * batch * heads * size * num_keys))
        for first in range(0, num_tiles, step):
            rows = slice(first * size, min((first + step) * size, num_queries))
            mass = _row_mass(query, key, rows, default_scale(query, scale), is_causal=is_causal)
            if held is not None:
                mass.masked_fill_(held.rows(rows.start, rows.stop), 0.0)
            lacking = -mass.shape[2] % size
            mass = torch.nn.functional.pad(mass, (0, 0, 0, lacking))
            best = mass.unflatten(2, (-1, size)).sum(dim=3).topk(longest, dim=-1)
            tiles = slice(first, first + best.indices.shape[2])
            index[:, :, tiles] = best.indices.int()
            # what no row of the tile sees, or sees no mass in, is not worth a slot
            count[:, :, tiles] = (best.values > 0).sum(dim=-1, dtype=torch.int32)
        return ListMask(
            batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
            is_causal=is_causal, key_index=index, key_count=count, tile_size=size,
        )  # fmt: skip

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return what `find` does; see the class."""
        return self.find(query, key, scale=scale, is_causal=is_causal, generator=generator)


def _row_mass(
    query: torch.Tensor, key: torch.Tensor, rows: slice, scale: float, *, is_causal: bool
) -> torch.Tensor:
    """Return the probabilities of some rows, in float32 at least: `[B, H, rows, n_k]`."""
    (batch, heads, num_queries, head_dim), num_keys = query.shape, key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    chosen = query[:, :, rows].to(dtype) * scale
    with torch.no_grad(), without_autocast(query):
        grouped = chosen.reshape(batch, key.shape[1], -1, head_dim)
        logits = (grouped @ key.to(dtype).transpose(-1, -2)).view(batch, heads, -1, num_keys)
        if is_causal:
            row = torch.arange(rows.start, rows.stop, device=query.device) + num_keys - num_queries
            hidden = torch.arange(num_keys, device=query.device) > row.unsqueeze(-1)
            logits.masked_fill_(hidden, float("-inf"))
        return logits.softmax(dim=-1).nan_to_num_(nan=0.0)  # rows that see nothing
