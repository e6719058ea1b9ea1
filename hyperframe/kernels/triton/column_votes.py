"""Softmax mass of the keys that short segments see, summed over their voters, in one kernel.

A program has the voters of some segments, of all heads that share a key head, and goes over the
keys twice: for the normalisers, and for the masses. Scores are made with keys as rows and voters as
columns, in an order that gives all voters of a segment to one thread: neither sum costs an exchange
in the loop. For long rows of keys `votes` cuts the keys into chunks instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E, load_rows
from .forward import finite
from .line_sums import by_run, edges, key_order
from .votes import FARTHEST

__all__ = ["column_votes_kernel"]


@triton.jit
def scores_of_keys(
    q, k_ptr, k_row, key, num_keys, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products of some keys with rows: `[keys, rows]`; behind the last one, its own."""
    k = load_rows(
        k_ptr, tl.minimum(key, num_keys - 1)[:, None], k_row, tl.arange(0, BLOCK_D)[None, :], k_ptr,
        num_keys, D, BLOCK_D, False, WIDE,
    )  # fmt: skip
    return tl.dot(k, tl.trans(q), input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["num_heads", "num_keys", "num_segments", "num_voters", "row_blocks", "width"]
)
def column_votes_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, begin_ptr, stop_ptr, out_ptr, num_heads,
    heads_per_key, num_keys, num_segments, num_voters, row_blocks, width, scale, D: tl.constexpr,
    BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write votes of up to 64 blocks of keys: float32 `[batch, heads, groups, segments, width]`."""
    row_block = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    key_heads = num_heads // heads_per_key
    batch = tl.program_id(2) // key_heads
    key_head = tl.program_id(2) % key_heads
    k_ptr += batch.to(tl.int64) * k_batch + key_head.to(tl.int64) * k_head
    head = batch * num_heads + key_head * heads_per_key
    units: tl.constexpr = ROWS // VOTERS
    local = key_order(ROWS)
    segment = (row_block * units + local // VOTERS) // heads_per_key
    voter = local % VOTERS
    is_row = (segment < num_segments) & (voter < num_voters)
    place = (head + (row_block * units + local // VOTERS) % heads_per_key).to(tl.int64) * groups
    place = ((place + group) * num_segments + segment) * num_voters + voter
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(
        voter_ptr + place[:, None] * D + dim[None, :], mask=is_row[:, None] & (dim < D)[None, :],
        other=0.0,
    )  # fmt: skip
    stop = tl.load(stop_ptr + group * num_segments + segment, mask=is_row, other=0)
    begin = tl.load(begin_ptr + group)
    end = tl.max(stop, 0)
    factor = scale * LOG2_E
    sign = tl.where(factor < 0.0, -1.0, 1.0)
    lane = tl.arange(0, BLOCK_N)
    top = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    tested = edges(tl.where(is_row, stop, 0), begin, end, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        key = start + lane
        score = scores_of_keys(q, k_ptr, k_row, key, num_keys, D, BLOCK_D, WIDE, PRECISION)
        # the first block's maximum serves them all, up to where the sum would overflow
        if start == begin:
            # written unlike the test below: together they would be made in every block
            signed = tl.where(key[:, None] - stop[None, :] < 0, score * sign, float("-inf"))
            top = finite(tl.max(signed, 0) * tl.abs(factor))
        logits = score * factor - top[None, :]
        if ((tested >> ((start - begin) // BLOCK_N)) & 1) != 0:
            logits = tl.where(key[:, None] < stop[None, :], logits, float("-inf"))
            total += tl.exp2(tl.minimum(logits, FARTHEST))
        else:
            # a row sees all of the block or nothing, not even what is not a number
            limit = tl.where(start < stop, FARTHEST, float("-inf"))
            total += tl.exp2(tl.minimum(logits, limit[None, :]))
    every = tl.sum(total, 0)
    some = is_row & (every > 0.0)
    lse = tl.where(some, top + tl.log2(tl.where(some, every, 1.0)), float("inf"))
    unit = row_block * units + tl.arange(0, units)
    segment = unit // heads_per_key
    has_unit = segment < num_segments
    unit_stop = tl.load(stop_ptr + group * num_segments + segment, mask=has_unit, other=0)
    place = (head + unit % heads_per_key).to(tl.int64) * groups + group
    out_ptr += ((place * num_segments + segment) * width)[None, :]
    for start in range(begin, end, BLOCK_N):
        key = start + lane
        score = scores_of_keys(q, k_ptr, k_row, key, num_keys, D, BLOCK_D, WIDE, PRECISION)
        mass = tl.exp2(score * factor - lse[None, :])
        votes = tl.sum(by_run(mass, BLOCK_N, ROWS, VOTERS), 2)
        is_there = (key[:, None] < unit_stop[None, :]) & (key - begin < width)[:, None]
        tl.store(out_ptr + (key - begin)[:, None], votes, mask=is_there)
