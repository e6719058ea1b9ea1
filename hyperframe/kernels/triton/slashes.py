"""The steps of `vertical_slash` around its votes, each in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import padded, power_of_two
from .random import uniform_draws

__all__ = ["triton_caught_votes", "triton_line_lists", "triton_run_voters"]

_RUNS = 128  # of a program
_SEGMENTS = 8  # summed at a time
_EARLIER = {"before": 0, "with": 1, "all": 2}


@triton.jit(do_not_specialize=["stream", "num_queries", "size", "places", "num_voters", "heads"])
def run_voters_kernel(
    q_ptr, q_batch, q_head, q_row, drawn_ptr, seed_ptr, stream, voter_ptr, row_ptr, num_queries,
    size, places, num_voters, heads, HAS_DRAWN: tl.constexpr, HAS_SEED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the voters of runs: `[batch, heads, runs * voters, D]`, and write their rows."""
    flat = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    is_place = place < places
    first = place // num_voters * size
    length = tl.minimum(num_queries - first, size)
    drawn = tl.zeros([BLOCK], tl.float64) + 0.5
    if HAS_DRAWN:
        drawn = tl.load(drawn_ptr + place, mask=is_place, other=0.0)
    if HAS_SEED:
        drawn = uniform_draws(tl.load(seed_ptr), tl.cast(stream, tl.int64), place.to(tl.int64))
    within = ((place % num_voters).to(tl.float64) + drawn) * length.to(tl.float64)
    within = (within / tl.cast(num_voters, tl.float64)).to(tl.int64)
    row = first + tl.minimum(within, length - 1)
    if flat == 0:
        tl.store(row_ptr + place, row, mask=is_place)
    q_ptr += (flat // heads).to(tl.int64) * q_batch + (flat % heads).to(tl.int64) * q_head
    used = is_place[:, None] & (dim < D)[None, :]
    voter = tl.load(q_ptr + row[:, None] * q_row + dim[None, :], mask=used, other=0.0)
    voter_ptr += (flat.to(tl.int64) * places + place)[:, None] * D + dim[None, :]
    tl.store(voter_ptr, voter, mask=used)


@triton.jit(do_not_specialize=["num_segments", "runs", "first_offset", "min_offset"])
def caught_votes_kernel(
    votes_ptr, caught_ptr, num_segments, runs, first_offset, min_offset, RUN: tl.constexpr,
    TILE: tl.constexpr, EARLIER: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up votes over segments and over the runs that meet in a tile."""
    flat = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    votes_ptr += flat * num_segments * runs
    caught_ptr += flat * (1 if EARLIER == 2 else num_segments) * runs
    offset = run * RUN + first_offset
    is_near = (offset > -min_offset) & (offset + (RUN + TILE - 2) < min_offset)
    before = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_segments, SEGMENTS):
        segment = start + tl.arange(0, SEGMENTS)
        # sums that end before a segment are those of all rows moved down by one: nothing is taken
        # off again, which would leave a rounding error
        source = segment - (1 if EARLIER == 0 else 0)
        is_there = ((source >= 0) & (source < num_segments))[:, None]
        box = tl.zeros([SEGMENTS, BLOCK], tl.float32)
        next_box = tl.zeros([SEGMENTS, BLOCK], tl.float32)
        for step in tl.static_range(TILE // RUN + 1):
            at = run + step
            vote = tl.load(
                votes_ptr + source[:, None] * runs + at[None, :],
                mask=is_there & (at < runs)[None, :], other=0.0,
            )  # fmt: skip
            if step < TILE // RUN:
                box += vote
            if step > 0:
                next_box += vote
        caught = box * ((RUN + 1) / 2) + next_box * ((RUN - 1) / 2)
        if EARLIER == 2:
            before += tl.sum(caught, 0)
        else:
            sums = tl.cumsum(caught, 0) + before[None, :]
            before += tl.sum(caught, 0)
            sums = tl.where((sums > 0) & (is_near == 0)[None, :], sums, -1.0)
            kept = (segment < num_segments)[:, None] & (run < runs)[None, :]
            tl.store(caught_ptr + segment[:, None] * runs + run[None, :], sums, mask=kept)
    if EARLIER == 2:
        before = tl.where((before > 0) & (is_near == 0), before, -1.0)
        tl.store(caught_ptr + run, before, mask=run < runs)


@triton.jit(
    do_not_specialize=[
        "heads", "tiles", "tiles_each", "tile_size", "shift", "first_offset", "num_columns",
        "num_near", "num_runs", "num_keys",
    ]
)  # fmt: skip
def line_lists_kernel(
    column_ptr, column_batch, column_head, column_segment, column_count_ptr,
    near_ptr, near_batch, near_head, near_tile, near_count_ptr, near_count_batch,
    near_count_head, near_count_tile, near_begin_ptr, run_ptr, run_batch, run_head, run_segment,
    index_ptr, count_ptr, key_ptr, held_ptr, heads, tiles, tiles_each, tile_size, shift,
    first_offset, num_columns, num_near, num_runs, num_keys, HAS_NEAR: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
    DIAGONALS: tl.constexpr,
):  # fmt: skip
    """Write the lists of one tile; slots that are not used hold key 0."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    segment = tile // tiles_each
    wide = program.to(tl.int64)
    index_ptr += wide * (num_columns + num_near)
    column_ptr += batch * column_batch + head * column_head
    column_ptr += segment.to(tl.int64) * column_segment
    lane = tl.arange(0, BLOCK)
    count = 0
    if HAS_NEAR:
        near_ptr += batch * near_batch + head * near_head + tile.to(tl.int64) * near_tile
        near_count_ptr += batch * near_count_batch + head * near_count_head
        count = tl.load(near_count_ptr + tile.to(tl.int64) * near_count_tile).to(tl.int32)
        begin = tl.load(near_begin_ptr + segment).to(tl.int32)
        for start in range(0, count, BLOCK):
            slot = start + lane
            key = tl.load(near_ptr + slot, mask=slot < count, other=0).to(tl.int32) + begin
            tl.store(index_ptr + slot, tl.minimum(key, num_keys - 1), mask=slot < count)
    columns = tl.minimum(tl.load(column_count_ptr + tile).to(tl.int32), num_columns)
    for start in range(0, num_columns + num_near - count, BLOCK):
        slot = start + lane
        key = tl.load(column_ptr + slot, mask=slot < columns, other=0).to(tl.int32)
        key = tl.minimum(key, num_keys - 1)
        tl.store(index_ptr + count + slot, key, mask=slot < num_columns + num_near - count)
    tl.store(count_ptr + wide, count + columns)

    run_ptr += batch * run_batch + head * run_head + segment.to(tl.int64) * run_segment
    slot = tl.arange(0, DIAGONALS)
    slots = num_runs * RUN
    # the farthest run first, and in each the farthest key, so that keys ascend
    run = tl.load(run_ptr + (num_runs - 1 - slot // RUN), mask=slot < slots, other=0).to(tl.int32)
    back = run * RUN + first_offset + (RUN - 1 - slot % RUN)
    key = tile * tile_size + shift - back
    # what is no run, or begins before the first key, is in front
    lead = tl.sum(((key < 0) & (slot < slots)).to(tl.int32), 0)
    is_key = (key >= 0) & (key < num_keys) & (slot < slots) & (slot >= lead)
    held = tl.sum(is_key.to(tl.int32), 0)
    key_ptr += wide * slots
    tl.store(key_ptr + slot - lead, key, mask=is_key)
    tl.store(key_ptr + slot, slot * 0, mask=(slot >= held) & (slot < slots))
    tl.store(held_ptr + wide, held)


def triton_run_voters(
    query: torch.Tensor, drawn: torch.Tensor | None, seed: torch.Tensor | None, stream: int,
    size: int, count: int, num_voters: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.slashes.run_voters` says; no host sync."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, num_queries, dim = query.shape
    device, places, width = query.device, count * num_voters, padded(dim)
    voters = torch.empty((batch, heads, count, num_voters, dim), dtype=query.dtype, device=device)
    row = torch.empty((count, num_voters), dtype=torch.int64, device=device)
    if voters.numel():
        block = max(4, min(power_of_two(places), 4096 // width))
        run_voters_kernel[(-(-places // block), batch * heads)](
            query, *query.stride()[:3], row if drawn is None else drawn.contiguous(),
            row if seed is None else seed, stream, voters, row, num_queries, size, places,
            num_voters, heads, HAS_DRAWN=drawn is not None, HAS_SEED=seed is not None, D=dim,
            BLOCK_D=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return voters, row


def triton_caught_votes(
    votes: torch.Tensor, earlier: str, run: int, tile_size: int, first_offset: int, min_offset: int
) -> torch.Tensor:
    """Do what `hyperframe.kernels.slashes.caught_votes` says for float32; no host sync."""
    votes = votes.contiguous()
    batch, heads, segments, runs = votes.shape
    shape = (batch, heads, 1 if earlier == "all" else segments, runs)
    caught = torch.empty(shape, dtype=votes.dtype, device=votes.device)
    if caught.numel():
        caught_votes_kernel[(-(-runs // _RUNS), batch * heads)](
            votes, caught, segments, runs, first_offset, min_offset, RUN=run, TILE=tile_size,
            EARLIER=_EARLIER[earlier], SEGMENTS=_SEGMENTS, BLOCK=_RUNS, num_warps=4,
        )  # fmt: skip
    return caught


def triton_line_lists(
    columns: torch.Tensor, column_count: torch.Tensor, near: torch.Tensor | None,
    near_count: torch.Tensor | None, near_begin: torch.Tensor | None, runs: torch.Tensor,
    cut: list[int], num_keys: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Do what `hyperframe.kernels.slashes.line_lists` says; no host sync."""
    tiles_each, tile_size, run, first_offset, shift = cut
    columns, runs = columns.contiguous(), runs.contiguous()
    batch, heads, _, num_columns = columns.shape
    tiles, num_runs, device = column_count.shape[0], runs.shape[-1], columns.device
    has_near = near is not None and near_count is not None and near_begin is not None
    if near is None or near_count is None or near_begin is None:
        # read by nobody
        near, near_count, near_begin = columns[..., :0], columns[..., 0], columns
    near = near if near.stride(-1) == 1 else near.contiguous()
    lists = (batch, heads, tiles)
    index, keys = (
        torch.empty((*lists, slots), dtype=torch.int32, device=device)
        for slots in (num_columns + near.shape[-1], num_runs * run)
    )
    count, held = (torch.empty(lists, dtype=torch.int32, device=device) for _ in range(2))
    if count.numel():
        line_lists_kernel[(count.numel(),)](
            columns, *columns.stride()[:3], column_count, near, *near.stride()[:3], near_count,
            *near_count.stride(), near_begin, runs, *runs.stride()[:2],
            0 if runs.shape[2] == 1 else runs.stride(2), index, count, keys, held, heads, tiles,
            tiles_each, tile_size, shift, first_offset, num_columns, near.shape[-1], num_runs,
            num_keys, HAS_NEAR=has_near, RUN=run, BLOCK=128,
            DIAGONALS=power_of_two(max(1, num_runs * run)), num_warps=2,
        )  # fmt: skip
    return index, count, keys, held
