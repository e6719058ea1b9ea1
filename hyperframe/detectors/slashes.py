"""The parts of `vertical_slash`: rows that vote, what runs of keys catch, and keys on diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.select import select_top
from ..randomness import uniform
from .blocks import delayed

__all__ = [
    "Cut",
    "caught_mass",
    "diagonal_keys",
    "voters_of_runs",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """How the rows of a call are cut into tiles and segments."""

    num_tiles: int
    tiles_each: int  # tiles of a segment
    tile_size: int
    num_segments: int
    shift: int  # key position of row 0
    is_causal: bool
    run: int  # keys of a run of diagonals
    first_offset: int  # smallest offset of a diagonal
    stop_offset: int  # one past the largest one
    device: torch.device

    @property
    def rows(self) -> int:
        """Rows of a segment."""
        return self.tiles_each * self.tile_size

    @property
    def begin(self) -> torch.Tensor:
        """Key position of the first row of each segment: int64 `[segments]`."""
        return torch.arange(self.num_segments, device=self.device) * self.rows + self.shift

    @property
    def first(self) -> torch.Tensor:
        """Key position of the first row of each tile: int64 `[tiles]`."""
        return torch.arange(self.num_tiles, device=self.device) * self.tile_size + self.shift

    def num_before(self, num_keys: int) -> torch.Tensor:
        """Keys for which the rows of each segment may vote: int64 `[segments]`."""
        if self.is_causal:
            return self.begin.clamp(min=0)
        return torch.full_like(self.begin, num_keys)


def voters_of_runs(
    query: torch.Tensor, earlier_query: torch.Tensor | None, generator: torch.Generator | None, *,
    size: int, count: int, num_voters: int, strict: bool,
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
    first = torch.arange(count, device=query.device).unsqueeze(-1) * size
    length = (query.shape[2] - first).clamp(max=size)
    if strict:
        query, length = delayed(query, earlier_query, size - 1), torch.full_like(first, size)
    drawn: torch.Tensor | float = 0.5
    if generator is not None:
        drawn = uniform((count, num_voters), query.device, generator)
    number = torch.arange(num_voters, dtype=torch.float64, device=query.device)
    within = ((number + drawn) * length / num_voters).long()
    row = first + torch.minimum(within, length - 1)
    voters = query[:, :, row.flatten()].unflatten(2, (count, num_voters))
    if strict:
        known = 0 if earlier_query is None else earlier_query.shape[2]
        row = (row - (size - 1)).clamp(min=-known)
    return voters, row


def caught_mass(votes: torch.Tensor, run: int, tile_size: int) -> torch.Tensor:
    """Return the mass that runs of keys catch in a tile, going by the mass of runs of diagonals.

    A key at offset `o` before the first row of a tile lies on the diagonals `o` to
    `o + tile_size - 1`. Mass counts as spread evenly over a run of diagonals.

    Args:
        votes: `[..., runs]`, the mass of the runs of `run` diagonals from some offset on.
        run: keys of a run; divides `tile_size`.
        tile_size: rows of a tile.

    Returns:
        `[..., runs]`: run `r` is the keys of the offsets `[r * run, (r + 1) * run)` from that one.
    """
    width = tile_size // run
    padded = torch.nn.functional.pad(votes, (0, width))
    box = padded.unfold(-1, width, 1).sum(dim=-1)
    # rows and keys that meet in the first and in the last block are about half of a block's
    return box[..., :-1] * ((run + 1) / 2) + box[..., 1:] * ((run - 1) / 2)


def diagonal_keys(
    cut: Cut, votes: torch.Tensor, mine: torch.Tensor, *, count: int, min_offset: int, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys of the best runs of diagonals before each tile.

    Args:
        cut: how the rows are cut.
        votes: `[batch, heads, votings, runs]`, the mass that the runs catch, from `caught_mass`.
        mine: int64 `[tiles]`, the voting that each tile goes by.
        count: keys of a tile, at most.
        min_offset: runs nearer than this to all rows of a tile are left out.
        num_keys: keys of the call.

    Returns:
        int32 `[batch, heads, tiles, keys]`, ascending, and how many of them are used, int64
        `[batch, heads, tiles]`. Runs without mass are not.
    """
    offset = torch.arange(votes.shape[-1], device=votes.device) * cut.run + cut.first_offset
    farthest = offset + cut.run + cut.tile_size - 2  # of the last key and the last row
    is_near = (offset > -min_offset) & (farthest < min_offset)
    some = torch.where((votes > 0) & ~is_near, votes, -1.0)
    every = torch.full((), votes.shape[-1], device=votes.device)
    best, _, _ = select_top(some, every, count=count // cut.run)
    # the farthest run first, and in each the farthest key, so that keys ascend; what is no run is
    # behind all of them and has no key
    within = torch.arange(cut.run - 1, -1, -1, device=votes.device)
    back = (best.flip(-1)[:, :, mine] * cut.run + cut.first_offset).unsqueeze(-1) + within
    keys = (cut.first.view(-1, 1) - back.flatten(3)).int()
    lead = (keys < 0).sum(dim=-1, keepdim=True)
    slot = torch.arange(keys.shape[-1], device=votes.device)
    keys = keys.gather(-1, (slot + lead).clamp(max=keys.shape[-1] - 1))
    is_held = (slot + lead < keys.shape[-1]) & (keys < num_keys)
    return keys.clamp(min=0, max=num_keys - 1), is_held.sum(dim=-1)
