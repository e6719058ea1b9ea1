"""The parts of `vertical_slash`: how rows are cut, and which of them vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels.slashes import LineCut, run_voters
from ..randomness import Stream, uniform
from ..tables import kept, maker_device
from .blocks import delayed

__all__ = ["Cut", "CutTables", "cut_tables", "voters_of_runs"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """How the rows of a call are cut into tiles and segments."""

    num_tiles: int
    tiles_each: int  # tiles of a segment
    tile_size: int
    num_segments: int
    shift: int  # key position of row 0
    run: int  # keys of a run of diagonals
    first_offset: int  # smallest offset of a diagonal
    stop_offset: int  # one past the largest one

    @property
    def rows(self) -> int:
        """Rows of a segment."""
        return self.tiles_each * self.tile_size

    @property
    def lines(self) -> LineCut:
        """What the kernels need to know of it."""
        return LineCut(self.tiles_each, self.tile_size, self.run, self.first_offset, self.shift)


class CutTables(NamedTuple):
    """Positions of tiles and segments, on their device; not to be written to."""

    begin: torch.Tensor  # int32 [segments], the first key of the own rows
    stop: torch.Tensor  # int32 [segments, tiles_each], where the near keys of a tile end
    seen: torch.Tensor  # int32 [segments, tiles_each], how many there are
    column_count: torch.Tensor  # int32 [tiles], columns of a tile that come before its segment


@kept
def cut_tables(
    num_tiles: int, tiles_each: int, tile_size: int, shift: int, num_keys: int, num_columns: int,
    num_near: int, is_shared: bool, min_offset: int, is_causal: bool, device: torch.device,
) -> CutTables:  # fmt: skip
    """Return what follows from the positions of tiles.

    Args:
        num_tiles: tiles of the call.
        tiles_each: tiles of a segment.
        tile_size: rows of a tile.
        shift: key position of row 0.
        num_keys: keys of the call.
        num_columns: columns of a tile, at most.
        num_near: keys of its segment before it that a tile holds, at most.
        is_shared: whether those take the place of columns.
        min_offset: near keys that are nearer than this to all rows of the tile are left out.
        is_causal: whether only keys before a segment are its columns.
        device: where the tables are used.
    """
    where = maker_device(device)
    num_segments = -(-num_tiles // tiles_each)
    first = torch.arange(num_segments, device=where) * (tiles_each * tile_size) + shift
    begin = first.clamp(0, num_keys)
    stop = torch.arange(tiles_each, device=where) * tile_size - max(0, min_offset - tile_size)
    stop = (first.unsqueeze(-1) + stop).clamp(max=num_keys).maximum(begin.unsqueeze(-1))
    seen = stop - begin.unsqueeze(-1)
    share = seen.clamp(max=num_near if is_shared else 0).flatten()[:num_tiles]
    before = first.clamp(min=0) if is_causal else torch.full_like(first, num_keys)
    tile = torch.arange(num_tiles, device=where) // tiles_each
    count = torch.minimum(num_columns - share, before[tile])
    return CutTables(*(table.int().to(device) for table in (begin, stop, seen, count)))


def voters_of_runs(
    query: torch.Tensor, earlier_query: torch.Tensor | None,
    generator: torch.Generator | Stream | None, *, size: int, count: int, num_voters: int,
    strict: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the rows that vote for runs of rows: one in each of `num_voters` equal parts.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        earlier_query: queries before those, for the strict form, or None.
        generator: source of the draws; None takes the middle of each part.
        size: rows of a run.
        count: how many runs.
        num_voters: rows that vote for a run.
        strict: the voters are of the `size` rows that end with the run's first one.

    Returns:
        `[batch, query_heads, count, num_voters, d]`, and their rows, int64 `[count, num_voters]`.
    """
    drawn: torch.Tensor | tuple[torch.Tensor, int] | None = None
    if isinstance(generator, Stream):
        drawn = generator.next_draw(query.device)
    elif generator is not None:
        drawn = uniform((count, num_voters), query.device, generator)
    if not strict:
        return run_voters(query, drawn, size=size, count=count, num_voters=num_voters)
    rows = delayed(query, earlier_query, size - 1)
    voters, row = run_voters(rows, drawn, size=size, count=count, num_voters=num_voters)
    known = 0 if earlier_query is None else earlier_query.shape[2]
    return voters, (row - (size - 1)).clamp(min=-known)
