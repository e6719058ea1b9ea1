"""Vertical and slash lines: columns and diagonals that sampled queries attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch

from ..budget import check_budget, resolve_budget
from ..component import check_non_negative_int, check_positive_int
from ..kernels.select import select_top
from ..kernels.slashes import caught_votes, line_lists
from ..kernels.votes import Lines, column_votes, line_votes
from ..masks import HeavyMask, ListMask, UnionMask
from ..masks.base import Problem
from ..tables import spaced
from .base import AbstractDetector, default_scale
from .blocks import filled_runs
from .slashes import Cut, CutTables, cut_tables, voters_of_runs

__all__ = ["VerticalSlash"]

_CHUNK_BYTES = 256 << 20  # of votes of tiles for the keys of their segments, held at once
_LONGEST_RUN = 16  # keys of a run of diagonals


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(AbstractDetector):
    """Columns and diagonals of the attention matrix, chosen by the attention of sampled rows.

    The rows are cut into at most `num_segments` segments of whole tiles. `num_queries` rows of each
    segment vote by their softmax scores over all keys. The columns with most of their mass are
    held by the rows of the segment; diagonals (the keys at one distance before each row) by the
    votes of all segments. Votes for a column of the segment before do not count for diagonals.

    A tile shares its keys, so it holds diagonals as runs of up to 16 keys at fixed distances before
    its first row: those that catch most of the diagonals' mass, `num_diagonals` keys in all. One
    sharp diagonal takes `tile_size + 15` keys; the wider a diagonal is, the less is lost.

    Under `is_causal` the rows of a segment vote for columns before it, and the votes of the
    segments before it choose its diagonals. Up to a quarter of a tile's columns, or `num_near` keys
    beside them, are keys of its own segment before the tile, voted for by `near_queries` rows of
    the tile. The tile's own keys are held as well. No key moves the choice of an earlier row. In
    the strict form the voters are from the rows, as many as a segment (or tile) has, that end with
    its first one.

    Args:
        num_columns: columns held by a row; a float is a fraction of the keys.
        num_diagonals: keys on diagonals held by a row.
        num_queries: rows that vote, in each segment and each tile.
        num_segments: segments of rows with columns and diagonals of their own, at most.
        min_offset: diagonals, and keys of the own segment, that are nearer than this to all rows of
            a tile are left to others: to a sliding window beside of this width.
        tile_size: rows of a tile.
        num_near: keys of the own segment that a tile holds under `is_causal`, at most, beside its
            columns; None takes a quarter of the columns, in their place.
        near_queries: rows of a tile that vote for those; None is `num_queries`.
        min_segment: rows of a segment, at least; there are fewer segments then.

    Cost: O(num_segments num_queries n_k d) time; under `is_causal` another O(n_q^2 near_queries d /
    (num_segments tile_size)) for the keys of the own segments, where the segments are longer than
    a tile. Scores of some segments are held at a time; memory O(n d + n_q (num_columns +
    num_diagonals) / tile_size + num_segments n_k / run), and up to 512 MiB. On CUDA with Triton two
    dozen launches (`kernels.votes`), where runs have 8 keys or more. The rows are random, one in
    each of `num_queries` equal runs (without a generator: the middle one). No gradient.
    Source: the vertical-slash pattern of MInference (arXiv 2407.02490), where the last 64 queries
    choose for all rows. Here rows of the own segment choose, without looking ahead.

    Example:
        >>> q = torch.eye(32).expand(1, 1, 32, 32) * 9
        >>> k = q.roll(-5, dims=2)  # row i attends to key i - 5
        >>> slash = VerticalSlash(num_columns=1, num_diagonals=8, tile_size=8)
        >>> mask = slash.find(q, k, is_causal=True)
        >>> mask.to_dense()[0, 0, 16:].diagonal(offset=11).sum().item()
        16
    """

    takes_stream: ClassVar[bool] = True
    finds: ClassVar[tuple[str, ...]] = ("columns", "diagonals")

    num_columns: int | float = 192
    num_diagonals: int = 64
    num_queries: int = 8
    num_segments: int = 64
    min_offset: int = 0
    tile_size: int = 64
    num_near: int | None = None
    near_queries: int | None = None
    min_segment: int = 1

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self, "num_columns", self.num_columns)
        check_positive_int(self, "num_diagonals", self.num_diagonals)
        check_positive_int(self, "num_queries", self.num_queries)
        check_positive_int(self, "num_segments", self.num_segments)
        check_non_negative_int(self, "min_offset", self.min_offset)
        check_positive_int(self, "tile_size", self.tile_size)
        if self.num_near is not None:
            check_non_negative_int(self, "num_near", self.num_near)
        if self.near_queries is not None:
            check_positive_int(self, "near_queries", self.near_queries)
        check_positive_int(self, "min_segment", self.min_segment)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return columns and diagonals; see the class and `AbstractDetector.find`."""
        with torch.no_grad():
            return self._find(query, key, scale, is_causal, generator, None, strict=False)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return columns and diagonals for which no later query voted."""
        with torch.no_grad():
            return self._find(query, key, scale, is_causal, generator, earlier_query, strict=True)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return columns and diagonals of a rectangle; positions matter to `min_offset` only."""
        shift = max(query_start - key_start, key.shape[2])
        with torch.no_grad():
            return self._find(
                query, key, scale, False, generator, earlier_query, strict=strict, shift=shift
            )

    def _find(
        self, query: torch.Tensor, key: torch.Tensor, scale: float | None, is_causal: bool,
        generator: torch.Generator | None, earlier_query: torch.Tensor | None, *, strict: bool,
        shift: int | None = None,
    ) -> HeavyMask:  # fmt: skip
        batch, heads, num_queries, _ = query.shape
        num_keys, size = key.shape[2], self.tile_size
        shift = num_keys - num_queries if shift is None else shift
        num_tiles = -(-num_queries // size)
        tiles_each = max(-(-num_tiles // self.num_segments), -(-self.min_segment // size))
        tiles_each = min(tiles_each, max(1, num_tiles))
        cut = Cut(
            num_tiles=num_tiles, tiles_each=tiles_each, tile_size=size,
            num_segments=-(-num_tiles // tiles_each), shift=shift,
            run=gcd(size, self.num_diagonals, _LONGEST_RUN),
            first_offset=1 if is_causal else shift - num_keys + 1,
            stop_offset=shift + num_queries,
        )  # fmt: skip
        source = (query, earlier_query if strict else None, generator)
        scale, votes_each = default_scale(query, scale), self.num_queries
        voting = voters_of_runs(
            *source, size=cut.rows, count=cut.num_segments, num_voters=votes_each, strict=strict
        )
        num_runs = -(-(cut.stop_offset - cut.first_offset) // cut.run)
        lines = Lines(
            num_columns=min(resolve_budget(self.num_columns, num_keys), num_keys), run=cut.run,
            first_offset=cut.first_offset, num_runs=max(num_runs, self.num_diagonals // cut.run),
        )  # fmt: skip
        columns, votes = line_votes(
            *voting, key, lines, scale=scale, is_causal=is_causal, segment=cut.rows, shift=shift
        )
        wanted = resolve_budget(self.num_columns, num_keys)
        width = min(cut.rows - size, num_keys) if is_causal else 0
        is_shared = self.num_near is None
        num_near = min(max(1, wanted // 4) if self.num_near is None else self.num_near, width)
        tables = cut_tables(
            num_tiles, tiles_each, size, shift, num_keys, lines.num_columns, num_near, is_shared,
            self.min_offset, is_causal, query.device,
        )  # fmt: skip
        near = None
        if num_near:
            voters, _ = voters_of_runs(
                *source, size=size, count=num_tiles, strict=strict,
                num_voters=votes_each if self.near_queries is None else self.near_queries,
            )  # fmt: skip
            near = (*self._near(cut, tables, voters, key, scale, width, num_near), tables.begin)
        caught = caught_votes(
            votes, earlier="with" if strict else "before" if is_causal else "all", run=cut.run,
            tile_size=size, first_offset=cut.first_offset, min_offset=self.min_offset,
        )  # fmt: skip
        rows = caught.shape[:-1]
        length = caught.shape[-1]
        every = spaced(rows.numel(), 0, length, query.device, dtype=torch.int32)
        runs, _, _ = select_top(caught, every.view(rows), count=self.num_diagonals // cut.run)
        lists = line_lists(columns, tables.column_count, near, runs, cut.lines, num_keys=num_keys)
        problem = Problem(
            batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
            is_causal=is_causal, query_offset=None,
        )  # fmt: skip
        masks = [
            ListMask(**problem, key_index=index, key_count=count, tile_size=size)
            for index, count in lists
        ]
        if is_causal:
            masks.append(ListMask.own_keys(problem, tile_size=size, device=query.device))
        return UnionMask.of(*masks)

    def _near(
        self, cut: Cut, tables: CutTables, voters: torch.Tensor, key: torch.Tensor, scale: float,
        width: int, count: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Columns of each tile among the keys of its segment before it, and how many there are.

        They are counted from the first key of the segment.
        """
        rows = filled_runs(voters.flatten(3), cut.tiles_each, cut.num_segments)
        rows = rows.unflatten(4, (voters.shape[3], -1))  # [B, H, S, tiles, R, d]
        step = max(1, _CHUNK_BYTES // (4 * rows[:, :, 0, :, 0, 0].numel() * max(1, width)))
        found, held = [], []
        for start in range(0, cut.num_segments, step):
            part = slice(start, start + step)
            votes = column_votes(
                rows[:, :, part], key, tables.begin[part], tables.stop[part], scale=scale,
                width=width,
            )  # fmt: skip
            best, _, taken = select_top(votes, tables.seen[part], count=count)
            found.append(best)
            held.append(taken)
        index = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        taken = held[0] if len(held) == 1 else torch.cat(held, dim=2)
        return index.flatten(2, 3)[:, :, : cut.num_tiles], taken.flatten(2)[..., : cut.num_tiles]
