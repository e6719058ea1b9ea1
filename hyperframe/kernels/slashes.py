"""The steps of `vertical_slash` around its votes: rows that vote, caught mass, and lists."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ..precision import without_autocast
from ..ragged import concatenate_lists
from .ops import has_triton
from .ops import slashes as _schema  # noqa: F401  (defines the operators implemented here)
from .ops.random import random_uniform

__all__ = ["LineCut", "caught_mass", "caught_votes", "line_lists", "run_voters"]

Earlier = Literal["before", "with", "all"]


class LineCut(NamedTuple):
    """How rows are cut, and where diagonals lie.

    Attributes:
        tiles_each: tiles of a segment.
        tile_size: rows of a tile.
        run: keys of a run of diagonals.
        first_offset: smallest offset of a diagonal.
        shift: key position of row 0.
    """

    tiles_each: int
    tile_size: int
    run: int
    first_offset: int
    shift: int


def run_voters(
    query: torch.Tensor, drawn: torch.Tensor | tuple[torch.Tensor, int] | None, *, size: int,
    count: int, num_voters: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the rows that vote for runs of rows: one in each of `num_voters` equal parts.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        drawn: float64 `[count, num_voters]` in [0, 1), where in its part a voter lies; None takes
            the middle of each part. Or a seed and the number of a draw, as `random_uniform` takes
            them, whose result it then is.
        size: rows of a run.
        count: how many runs; the last one may be shorter, and has a row.
        num_voters: rows that vote for a run.

    Returns:
        `[batch, query_heads, count, num_voters, d]`, and their rows, int64 `[count, num_voters]`.
        No gradient. One launch on CUDA with Triton.
    """
    seed, stream = drawn if isinstance(drawn, tuple) else (None, 0)
    voters, row = torch.ops.hyperframe.run_voters(
        query.detach(), None if isinstance(drawn, tuple) else drawn, seed, stream, size, count,
        num_voters,
    )  # fmt: skip
    return voters, row


def caught_votes(
    votes: torch.Tensor, *, earlier: Earlier, run: int, tile_size: int, first_offset: int,
    min_offset: int,
) -> torch.Tensor:  # fmt: skip
    """Return the mass that runs of keys catch in the tiles of segments, by the votes of segments.

    Args:
        votes: floating point `[batch, heads, segments, runs]`, the mass of runs of diagonals.
        earlier: whose votes count for a segment: those of the segments `"before"` it, these
            `"with"` its own, or `"all"` of them.
        run: keys of a run; divides `tile_size`.
        tile_size: rows of a tile.
        first_offset: where the first run begins.
        min_offset: runs nearer than this to all rows of a tile are left out.

    Returns:
        `[batch, heads, segments, runs]` (one segment for `"all"`); see `caught_mass`; -1 for runs
        without mass and those left out. No gradient. One launch on CUDA with Triton, for float32.
    """
    caught: torch.Tensor = torch.ops.hyperframe.caught_votes(
        votes.detach(), earlier, run, tile_size, first_offset, min_offset
    )
    return caught


def line_lists(
    columns: torch.Tensor, column_count: torch.Tensor,
    near: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None, runs: torch.Tensor, cut: LineCut,
    *, num_keys: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Return the columns and the diagonals of tiles as lists of keys.

    Args:
        columns: int32 `[batch, heads, segments, C]`, of the rows of segments.
        column_count: integer `[tiles]`, how many of them a tile holds, the first ones.
        near: None, or further keys of each tile: int32 `[batch, heads, tiles, N]`, counted from
            the position int32 `[segments]`, the third one, and their counts.
        runs: int32 `[batch, heads, segments or 1, R]`, ascending runs of diagonals; those behind
            all offsets are none.
        cut: how rows are cut.
        num_keys: keys of the call.

    Returns:
        Two lists with their counts: near keys and columns, int32 `[batch, heads, tiles, N + C]`;
        and keys on diagonals before the first row of each tile, ascending,
        `[batch, heads, tiles, R * run]`. One launch on CUDA with Triton.
    """
    near_index, near_count, near_begin = (None, None, None) if near is None else near
    index, count, keys, held = torch.ops.hyperframe.line_lists(
        columns, column_count, near_index, near_count, near_begin, runs, list(cut), num_keys
    )
    return [(index, count), (keys, held)]


def _runs_triton(tensor: torch.Tensor) -> bool:
    fits = tensor.shape[0] * tensor.shape[1] <= 65535  # programs of a grid's second dimension
    return tensor.is_cuda and torch.version.hip is None and fits and has_triton()


@torch.library.impl("hyperframe::run_voters", "default")
def _run_voters(
    query: torch.Tensor, drawn: torch.Tensor | None, seed: torch.Tensor | None, stream: int,
    size: int, count: int, num_voters: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (query, drawn, seed, stream, size, count, num_voters)
    if _runs_triton(query):
        from .triton import slashes as kernels

        with torch.cuda.device(query.device):
            return kernels.triton_run_voters(*given)
    return torch_run_voters(*given)


@torch.library.impl("hyperframe::caught_votes", "default")
def _run_caught(
    votes: torch.Tensor, earlier: Earlier, run: int, tile_size: int, first_offset: int,
    min_offset: int,
) -> torch.Tensor:  # fmt: skip
    given = (votes, earlier, run, tile_size, first_offset, min_offset)
    if _runs_triton(votes) and votes.dtype == torch.float32:
        from .triton import slashes as kernels

        with torch.cuda.device(votes.device):
            return kernels.triton_caught_votes(*given)
    return torch_caught_votes(*given)


@torch.library.impl("hyperframe::line_lists", "default")
def _run_lists(
    columns: torch.Tensor, column_count: torch.Tensor, near: torch.Tensor | None,
    near_count: torch.Tensor | None, near_begin: torch.Tensor | None, runs: torch.Tensor,
    cut: list[int], num_keys: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    given = (columns, column_count, near, near_count, near_begin, runs)
    if _runs_triton(columns):
        from .triton import slashes as kernels

        with torch.cuda.device(columns.device):
            return kernels.triton_line_lists(*given, cut, num_keys)
    return torch_line_lists(*given, LineCut(*cut), num_keys)


def torch_run_voters(
    query: torch.Tensor, drawn: torch.Tensor | None, seed: torch.Tensor | None, stream: int,
    size: int, count: int, num_voters: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `run_voters` says, on any device."""
    if seed is not None:
        drawn = random_uniform(seed, stream, (count, num_voters))
    first = torch.arange(count, device=query.device).unsqueeze(-1) * size
    length = (query.shape[2] - first).clamp(max=size)
    number = torch.arange(num_voters, dtype=torch.float64, device=query.device)
    within = ((number + (0.5 if drawn is None else drawn)) * length / num_voters).long()
    row = first + torch.minimum(within, length - 1)
    return query[:, :, row.flatten()].unflatten(2, (count, num_voters)), row


def torch_caught_votes(
    votes: torch.Tensor, earlier: Earlier, run: int, tile_size: int, first_offset: int,
    min_offset: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `caught_votes` says, on any device."""
    segments, runs = votes.shape[2:]
    if earlier == "all":
        votes = votes.sum(dim=2, keepdim=True)
    else:
        counted = votes.new_ones(segments, segments).tril(0 if earlier == "with" else -1)
        with without_autocast(votes):
            votes = counted @ votes
    caught = caught_mass(votes, run, tile_size)
    offset = torch.arange(runs, device=votes.device) * run + first_offset
    farthest = offset + run + tile_size - 2  # of the last key and the last row
    is_near = (offset > -min_offset) & (farthest < min_offset)
    return caught.masked_fill(~(caught > 0) | is_near, -1.0)


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


def torch_line_lists(
    columns: torch.Tensor, column_count: torch.Tensor, near: torch.Tensor | None,
    near_count: torch.Tensor | None, near_begin: torch.Tensor | None, runs: torch.Tensor,
    cut: LineCut, num_keys: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Do what `line_lists` says, on any device."""
    num_tiles, device = column_count.shape[0], columns.device
    tile = torch.arange(num_tiles, device=device)
    shape = (*columns.shape[:2], num_tiles)
    segment, last = tile // cut.tiles_each, max(0, num_keys - 1)
    held = columns.clamp(max=last)[:, :, segment]
    pieces = [(held, column_count.expand(shape))]
    if near is not None and near_count is not None and near_begin is not None:
        keys = (near + near_begin.int()[segment].unsqueeze(-1)).clamp(max=last)
        pieces.insert(0, (keys, near_count))
    index, count = concatenate_lists(pieces, shape, device)
    count = count.int().clone(memory_format=torch.contiguous_format)  # may be what was given
    # the farthest run first, and in each the farthest key, so that keys ascend; what is no run is
    # behind all of them and has no key
    within = torch.arange(cut.run - 1, -1, -1, device=device)
    mine = segment if runs.shape[2] > 1 else torch.zeros_like(segment)
    back = (runs.flip(-1)[:, :, mine] * cut.run + cut.first_offset).unsqueeze(-1) + within
    first = tile * cut.tile_size + cut.shift
    keys = (first.view(-1, 1) - back.flatten(3)).int()
    lead = (keys < 0).sum(dim=-1, keepdim=True)
    slot = torch.arange(keys.shape[-1], device=device)
    keys = keys.gather(-1, (slot + lead).clamp(max=keys.shape[-1] - 1))
    is_held = (slot + lead < keys.shape[-1]) & (keys < num_keys)
    return index.int(), count, keys.clamp(0, last), is_held.sum(dim=-1, dtype=torch.int32)
