"""Heavy columns: the keys that a few dozen sampled queries attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import check_budget, resolve_budget
from ..component import check_positive_int
from ..errors import UnsupportedError
from ..masks import HeavyMask, ListMask
from ..precision import without_autocast
from ..randomness import uniform
from ..rectangles import causal_levels, even_runs, odd_runs
from .base import AbstractDetector, default_scale

__all__ = ["HeavyColumns", "column_scores"]

_CHUNK_BYTES = 64 << 20  # of the scores of stacked rectangles held at once


def column_scores(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Return the softmax mass of every key over some query rows.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        rows: int64 `[R]`, the rows that vote.
        scale: factor of the logits.

    Returns:
        Floating point `[batch, query_heads, n_k]`, sums over the rows; in float32 at least.
    """
    return _scores(query[:, :, rows], key, scale, None)


def _scores(
    voters: torch.Tensor, key: torch.Tensor, scale: float, num_absent: torch.Tensor | None
) -> torch.Tensor:
    """Return `column_scores` of all voters; -1 for the first `num_absent` (`[batch]`) keys."""
    batch, key_heads, num_keys, head_dim = key.shape
    dtype = torch.promote_types(key.dtype, torch.float32)
    chosen = voters.to(dtype) * scale
    chosen = chosen.reshape(batch, key_heads, -1, head_dim)  # rows of a group side by side
    with without_autocast(key):
        logits = chosen @ key.to(dtype).transpose(-1, -2)
    if num_absent is None:
        mass = torch.softmax(logits, dim=-1)
        return mass.view(batch, voters.shape[1], -1, num_keys).sum(dim=2)
    is_absent = torch.arange(num_keys, device=key.device) < num_absent.view(-1, 1, 1, 1)
    # finite: where no key is there, no NaN is born
    mass = torch.softmax(logits.masked_fill(is_absent, torch.finfo(dtype).min), dim=-1)
    scores = mass.view(batch, voters.shape[1], -1, num_keys).sum(dim=2)
    return scores.masked_fill(is_absent.squeeze(2), -1.0)


@dataclass(frozen=True, kw_only=True)
class HeavyColumns(AbstractDetector):
    """Whole columns of the attention matrix, chosen by the exact attention of sampled rows.

    `num_queries` rows attend exactly to all keys; the keys with the largest total mass are held by
    every row. On language-model heads a few hundred such columns carry most of the mass of a
    rectangle, sinks included, and 16 rows find almost the same columns as 256.

    Under `is_causal` the columns are chosen for the rectangles of Algorithm 4 (rows of a run
    against the keys before the run), on every level, and a tile of `tile_size` rows holds the best
    of each rectangle it lies in, `num_columns` in all, together with its own `tile_size` keys,
    which no choice made without looking ahead could have seen. No key moves the choice of an
    earlier row. The strict form lets only queries vote that come before the rectangle's rows.

    Args:
        num_columns: columns held by a row; a float is a fraction of the keys.
        num_queries: rows that vote, for each rectangle.
        tile_size: rows of a tile in the causal form.

    Cost: O(num_queries n d) time and O(num_queries n) memory; times log2(n / tile_size) under
    `is_causal`. The rows are random, one in each of `num_queries` equal runs (without a generator:
    the middle one). No gradient.
    Source: the column statistics of heavy-hitter caches (H2O, arXiv 2306.14048) taken to prefill.

    Example:
        >>> q, k = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)
        >>> q[..., 0], k[:, :, 5, 0] = 1.0, 9.0
        >>> HeavyColumns(num_columns=1).find(q, k).to_dense()[0, 0, 0].nonzero().item()
        5
    """

    takes_stream: ClassVar[bool] = True
    row_budget: ClassVar[str | None] = "num_columns"
    finds: ClassVar[tuple[str, ...]] = ("columns",)

    num_columns: int | float = 256
    num_queries: int = 64
    tile_size: int = 64

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self, "num_columns", self.num_columns)
        check_positive_int(self, "num_queries", self.num_queries)
        check_positive_int(self, "tile_size", self.tile_size)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the columns; see the class and `AbstractDetector.find`."""
        scale = default_scale(query, scale)
        if is_causal:
            return self._causal(query, key, scale, generator, strict=False)
        return self._columns_mask(
            self._best(query, key, scale, generator, num_columns=self._count(key)), query, key
        )

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return columns for which only earlier queries voted."""
        scale = default_scale(query, scale)
        if is_causal:
            return self._causal(query, key, scale, generator, strict=True)
        if earlier_query is None:
            raise UnsupportedError(
                "strict_causal=True: heavy_columns lets queries before the rows vote, and here "
                f"there are none ({query.shape[2]} queries against {key.shape[2]} keys that all "
                "come before them); pass the whole sequence at once, or use strict_causal=False"
            )
        return self._columns_mask(
            self._best(earlier_query, key, scale, generator, num_columns=self._count(key)), query,
            key,
        )  # fmt: skip

    def _count(self, key: torch.Tensor) -> int:
        return resolve_budget(self.num_columns, key.shape[2])

    def _columns_mask(
        self, index: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> ListMask:
        return ListMask.columns(
            index, num_query_heads=query.shape[1], num_queries=query.shape[2],
            num_keys=key.shape[2],
        )  # fmt: skip

    def _best(
        self, voters: torch.Tensor, key: torch.Tensor, scale: float,
        generator: torch.Generator | None, num_absent: torch.Tensor | None = None, *,
        num_columns: int,
    ) -> torch.Tensor:  # fmt: skip
        """Return the best columns, best first: int32 `[batch, query_heads, columns]`."""
        count = min(num_columns, key.shape[2])
        with torch.no_grad():
            rows = _one_in_each_run(voters.shape[2], self.num_queries, voters.device, generator)
            chosen = voters[:, :, rows]
            best = []
            # logits and softmax of every voter, and what topk sorts
            needed = 4 * (2 * len(rows) + 4) * voters.shape[1] * key.shape[2]
            step = max(1, _CHUNK_BYTES // needed)
            for start in range(0, len(key), step):
                part = slice(start, start + step)
                absent = None if num_absent is None else num_absent[part]
                scores = _scores(chosen[part], key[part], scale, absent)
                best.append(scores.topk(count, dim=-1).indices.int())
            return best[0] if len(best) == 1 else torch.cat(best)

    def _causal(
        self, query: torch.Tensor, key: torch.Tensor, scale: float,
        generator: torch.Generator | None, *, strict: bool,
    ) -> ListMask:  # fmt: skip
        batch, heads, num_queries, _ = query.shape
        num_keys, offset = key.shape[2], key.shape[2] - num_queries
        size = min(self.tile_size, num_queries)
        num_tiles = -(-num_queries // size)
        tile = torch.arange(num_tiles, device=query.device)
        shape = (batch, heads, num_tiles)
        levels = causal_levels(num_queries, size)
        # the first rows come before every key where there are more of them: absent keys stand in
        missing = max(0, -offset)
        own = key[:, :, max(0, offset) :]
        own = torch.nn.functional.pad(own, (0, 0, missing, 0)) if missing else own
        # rectangles over a tile: one for each set bit of its number, and the keys before row 0
        bit = torch.arange(len(levels) + 1, device=query.device)
        bits = (tile.unsqueeze(-1) >> bit) & 1
        first_key = (tile.unsqueeze(-1) >> (bit + 1)) * (2 * size << bit)
        num_present = ((size << bit) - (missing - first_key).clamp(min=0)).clamp(min=0)
        bits = bits * (num_present > 0)
        larger = bits.flip(-1).cumsum(-1).flip(-1)[:, 1:] + (1 if offset > 0 else 0)
        covering = (bits.sum(-1) + (1 if offset > 0 else 0)).clamp(min=1)
        # one buffer for all; what has no slot goes to an extra last column
        num_columns = self._count(key)
        longest = num_columns + size
        lists = torch.zeros(
            (batch, heads, num_tiles, longest + 1), dtype=torch.int32, device=query.device
        )
        used = torch.zeros_like(tile)

        def share(rank: torch.Tensor | int) -> torch.Tensor:
            """Columns of the rectangle before which `rank` larger ones were served."""
            return (num_columns - 1 - rank) // covering + 1

        def write(index: torch.Tensor, count: torch.Tensor, skipped: torch.Tensor | int) -> None:
            """Append `count` keys of each tile, after the first `skipped`; lists `[B, H, T, L]`."""
            nonlocal used
            slot = torch.arange(index.shape[-1], device=query.device) - skipped
            is_kept = (slot >= 0) & (slot < count.unsqueeze(-1))
            target = torch.where(is_kept, used.unsqueeze(-1) + slot, longest)
            lists.scatter_(-1, target.expand(*shape, -1), index.expand(*shape, -1))
            used = used + count

        if offset > 0:
            if strict:
                self.find_strict(query, key[:, :, :offset], scale=scale)  # refuses: no voters
            best = self._best(query, key[:, :, :offset], scale, generator, num_columns=num_columns)
            write(best.unsqueeze(2), share(0).clamp(max=best.shape[-1]), 0)
        for number, level in enumerate(levels):
            voters, keys = (even_runs if strict else odd_runs)(query, level), even_runs(own, level)
            begin = torch.arange(level.full + 1, device=query.device) * 2 * level.size
            num_absent = (missing - begin).clamp(min=0) if missing else None
            parts = []
            if level.full:
                absent = None if num_absent is None else num_absent[:-1].repeat(batch)
                best = self._best(voters, keys, scale, generator, absent, num_columns=num_columns)
                parts.append(best.unflatten(0, (batch, level.full)).transpose(1, 2))
            if level.ragged:
                first = 2 * level.size * level.full
                middle = first + level.size
                voting = query[:, :, first:middle] if strict else query[:, :, middle:]
                absent = None if num_absent is None else num_absent[-1:].repeat(batch)
                best = self._best(
                    voting,
                    own[:, :, first:middle],
                    scale,
                    generator,
                    absent,
                    num_columns=num_columns,
                )
                parts.append(best.unsqueeze(2))
            columns = torch.cat(parts, dim=2)  # [B, H, rectangles, columns]
            rectangle = (tile >> (number + 1)).clamp(max=columns.shape[2] - 1)
            start = (first_key[:, number] + offset).int()
            count = torch.minimum(share(larger[:, number]), num_present[:, number])
            count = count.clamp(max=columns.shape[-1]) * bits[:, number]
            write(columns[:, :, rectangle] + start.unsqueeze(-1), count, 0)
        begin_own = tile * size + offset
        own_keys = begin_own.unsqueeze(-1) + torch.arange(size, device=query.device)
        skipped = (-begin_own).clamp(0, size)
        count = (num_keys - begin_own).clamp(max=size) - skipped
        write(own_keys.int(), count, skipped.unsqueeze(-1))
        return ListMask(
            batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
            is_causal=True, key_index=lists[..., :longest], key_count=used.expand(shape),
            tile_size=size,
        )  # fmt: skip


def _one_in_each_run(
    length: int, count: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """Return one index of each of `count` equal runs of `range(length)`: int64 `[R]`."""
    count = min(count, length)
    bounds = torch.arange(count + 1, device=device) * length // count
    if generator is None:
        return (bounds[:-1] + bounds[1:] - 1) // 2
    within = uniform((count,), device, generator) * (bounds[1:] - bounds[:-1])
    return bounds[:-1] + within.long()
