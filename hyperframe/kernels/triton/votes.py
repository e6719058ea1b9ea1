"""Softmax mass of runs of keys, summed over the few rows of a segment: normalisers, then masses.

The voters of several segments fill a tile of 64 rows, so that a block of keys serves them all. The
keys are cut into chunks, a program each: `normalisers_kernel` leaves the log-sum-exp of a chunk,
`combine_kernel` joins those of a row, `votes_kernel` makes the scores anew and adds up their
exponentials over voters. It writes the masses, or only the largest of every group of keys: enough
to choose groups by, and a sixteenth of the memory. `listed_kernel` does the same for lists.

Logs are in units of log2. The voters of a segment are spread over the rows of a tile so that one
thread holds two of them, and neighbouring threads the others: few exchanges add them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E, load_rows
from .forward import finite

NUM_ROWS: tl.constexpr = tl.constexpr(64)  # of a tile of voters

FARTHEST: tl.constexpr = tl.constexpr(96.0)  # above a shift, in log2 units: 2^31 terms still fit


@triton.jit
def place_of_row(row, VOTERS: tl.constexpr):
    """Return segment and voter of the rows of a tile; `VOTERS` is a power of two, 64 at most."""
    if VOTERS == 1:
        return row, row * 0
    else:
        lanes: tl.constexpr = VOTERS // 2 if VOTERS < 16 else 8
        warps: tl.constexpr = VOTERS // 2 // lanes
        lane = row % 8
        warp = row // 16
        voter = row // 8 % 2 + 2 * (lane % lanes + lanes * (warp % warps))
        return lane // lanes + 8 // lanes * (warp // warps), voter


@triton.jit
def over_voters(x, VOTERS: tl.constexpr, N: tl.constexpr):
    """Return the sums over the voters of each segment of a tile: `[64 / VOTERS, N]`."""
    if VOTERS == 1:
        return x
    else:
        lanes: tl.constexpr = VOTERS // 2 if VOTERS < 16 else 8
        warps: tl.constexpr = VOTERS // 2 // lanes
        x = tl.reshape(x, [4 // warps, warps, 2, 8 // lanes, lanes, N])
        x = tl.sum(tl.sum(tl.sum(x, 2), 3), 1)
        return tl.reshape(x, [NUM_ROWS // VOTERS, N])


@triton.jit
def load_voters(
    voter_ptr, segment, voter, num_segments, num_voters, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Load rows of voters of a group of segments, 0 where there are none; and say where they are.

    `voter_ptr` points at the `[segments, voters, D]` of the group.
    """
    is_row = (segment < num_segments) & (voter < num_voters)
    dim = tl.arange(0, BLOCK_D)
    place = (segment * num_voters + voter).to(tl.int64) * D
    q = tl.load(
        voter_ptr + place[:, None] + dim[None, :], mask=is_row[:, None] & (dim < D)[None, :],
        other=0.0,
    )  # fmt: skip
    return q, is_row


@triton.jit
def block_scores(
    q, k_ptr, k_row, bias_ptr, key, num_keys, factor, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the logits of some keys in units of log2; those that are not there repeat the last."""
    key = tl.minimum(key, num_keys - 1)
    k = load_rows(
        k_ptr, key[:, None], k_row, tl.arange(0, BLOCK_D)[None, :], k_ptr, num_keys, D, BLOCK_D,
        False, WIDE,
    )  # fmt: skip
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    if HAS_BIAS:
        logits += tl.load(bias_ptr + key)[None, :]
    return logits


@triton.jit
def chunk_of(begin, chunk, chunk_size, stop, is_row, BLOCK_N: tl.constexpr):
    """Return the first key of a chunk, the end of the blocks that no row has to test, and its end.

    Rows see the keys before their stop.
    """
    first = begin + chunk * chunk_size
    end = tl.minimum(first + chunk_size, tl.max(stop, 0))
    free = tl.minimum(tl.min(tl.where(is_row, stop, 0x7FFFFFFF), 0), end)
    middle = first + tl.maximum(free - first, 0) // BLOCK_N * BLOCK_N
    return first, middle, end


@triton.jit
def add_block(logits, top, total):
    """Return the running maximum and sum of the rows with the logits of one more block."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
    return new_top, total


@triton.jit
def log_sum(top, total):
    """Return the log-sum-exp of rows from the largest term and the sum; `-inf` without any."""
    return tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))


_SIZES = [
    "num_heads", "num_keys", "num_segments", "num_voters", "row_blocks", "chunk_size", "slots",
    "out_slots", "num_groups", "width",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def normalisers_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, bias_ptr, begin_ptr, stop_ptr, partial_ptr,
    num_heads, heads_per_key, num_keys, num_segments, num_voters, row_blocks, chunk_size, slots,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of a chunk for each row: float32 `[rows, slots]`.

    Rows are `[batch, heads, groups, segments, VOTERS]`.
    """
    row_block = tl.program_id(0) % row_blocks
    chunk = tl.program_id(0) // row_blocks
    group = tl.program_id(1)
    head = tl.program_id(2)
    flat = head.to(tl.int64) * tl.num_programs(1) + group
    k_ptr += (head // num_heads).to(tl.int64) * k_batch
    k_ptr += (head % num_heads // heads_per_key).to(tl.int64) * k_head
    local, voter = place_of_row(tl.arange(0, NUM_ROWS), VOTERS)
    segment = row_block * (NUM_ROWS // VOTERS) + local
    q, is_row = load_voters(
        voter_ptr + flat * num_segments * num_voters * D, segment, voter, num_segments, num_voters,
        D, BLOCK_D,
    )  # fmt: skip
    stop = tl.load(stop_ptr + group * num_segments + segment, mask=is_row, other=0)
    begin = tl.load(begin_ptr + group)
    first, middle, end = chunk_of(begin, chunk, chunk_size, stop, is_row, BLOCK_N)
    factor = scale * LOG2_E
    top = tl.full([NUM_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([NUM_ROWS], tl.float32)
    lane = tl.arange(0, BLOCK_N)
    for start in range(first, middle, BLOCK_N):
        logits = block_scores(
            q, k_ptr, k_row, bias_ptr, start + lane, num_keys, factor, D, BLOCK_D, HAS_BIAS, WIDE,
            PRECISION,
        )  # fmt: skip
        # the first block's maximum serves them all, up to where the sum would overflow: no exchange
        if start == first:
            top = finite(tl.max(logits, 1))
        total += tl.sum(tl.exp2(tl.minimum(logits - top[:, None], FARTHEST)), 1)
    for start in range(middle, end, BLOCK_N):
        key = start + lane
        logits = block_scores(
            q, k_ptr, k_row, bias_ptr, key, num_keys, factor, D, BLOCK_D, HAS_BIAS, WIDE,
            PRECISION,
        )  # fmt: skip
        seen = key[None, :] < stop[:, None]
        top, total = add_block(tl.where(seen, logits, float("-inf")), top, total)
    place = (flat * num_segments + segment) * VOTERS + voter
    tl.store(partial_ptr + place * slots + chunk, log_sum(top, total), mask=segment < num_segments)


@triton.jit
def joined(x):
    """Return the log-sum-exp of each row of `[rows, n]` in units of log2."""
    top = tl.max(x, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return log_sum(shift, tl.sum(tl.exp2(x - shift[:, None]), 1))


@triton.jit(do_not_specialize=["num_rows", "num_segments", "num_voters", "slots"])
def combine_kernel(
    partial_ptr, voted_ptr, lse_ptr, num_rows, num_segments, num_voters, slots,
    VOTERS: tl.constexpr, HAS_VOTED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the log normalisers of rows, `+inf` for those that give no mass.

    `num_segments` are those of all groups, `voted` says for each and its voters whether they count.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    used = row < num_rows
    voter = row % VOTERS
    segment = row // VOTERS % num_segments
    is_row = used & (voter < num_voters)
    place = segment * num_voters + voter
    source = partial_ptr + row.to(tl.int64)[:, None] * slots + slot[None, :]
    inside = used[:, None] & (slot < slots)[None, :]
    lse = joined(tl.load(source, mask=inside, other=float("-inf")))
    gives = is_row
    if HAS_VOTED:
        gives = gives & (tl.load(voted_ptr + place, mask=is_row, other=0) != 0)
    tl.store(lse_ptr + row, tl.where(gives & (lse > float("-inf")), lse, float("inf")), mask=used)


@triton.jit
def store_votes(
    votes, out_ptr, first, start, key, stop, has_segment, begin, width, out_slots,
    SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store the masses of a block, `[segments, BLOCK_N]`, or the largest of groups of keys."""
    offset = key - begin
    is_there = (key[None, :] < stop[:, None]) & (offset < width)[None, :]
    if GROUP == 0:
        target = out_ptr + first[:, None] + offset[None, :]
        tl.store(target, votes, mask=has_segment[:, None] & is_there)
    else:
        # what is not a number is still seen
        votes = tl.where(is_there, tl.where(votes == votes, votes, 0.0), -1.0)
        groups: tl.constexpr = BLOCK_N // GROUP
        largest = tl.max(tl.reshape(votes, [SEGMENTS, groups, GROUP]), 2)
        number = (start - begin) // GROUP + tl.arange(0, groups)
        tl.store(
            out_ptr + first[:, None] + number[None, :], largest,
            mask=has_segment[:, None] & (number < out_slots)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def votes_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, bias_ptr, begin_ptr, stop_ptr, lse_ptr, out_ptr,
    num_heads, heads_per_key, num_keys, num_segments, num_voters, row_blocks, chunk_size, width,
    out_slots, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, VOTERS: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the votes of a chunk: float32 `[batch, heads, groups, segments, out_slots]`.

    `GROUP` keys give one value, the largest; 0 for all of them.
    """
    row_block = tl.program_id(0) % row_blocks
    chunk = tl.program_id(0) // row_blocks
    group = tl.program_id(1)
    head = tl.program_id(2)
    flat = head.to(tl.int64) * tl.num_programs(1) + group
    k_ptr += (head // num_heads).to(tl.int64) * k_batch
    k_ptr += (head % num_heads // heads_per_key).to(tl.int64) * k_head
    segs: tl.constexpr = NUM_ROWS // VOTERS
    local, voter = place_of_row(tl.arange(0, NUM_ROWS), VOTERS)
    segment = row_block * segs + local
    q, is_row = load_voters(
        voter_ptr + flat * num_segments * num_voters * D, segment, voter, num_segments, num_voters,
        D, BLOCK_D,
    )  # fmt: skip
    stop = tl.load(stop_ptr + group * num_segments + segment, mask=is_row, other=0)
    begin = tl.load(begin_ptr + group)
    first, middle, end = chunk_of(begin, chunk, chunk_size, stop, is_row, BLOCK_N)
    place = (flat * num_segments + segment) * VOTERS + voter
    lse = tl.load(lse_ptr + place, mask=is_row, other=float("inf"))
    out_segment = row_block * segs + tl.arange(0, segs)
    has_segment = out_segment < num_segments
    out_stop = tl.load(stop_ptr + group * num_segments + out_segment, mask=has_segment, other=0)
    out_first = (flat * num_segments + out_segment) * out_slots
    factor = scale * LOG2_E
    lane = tl.arange(0, BLOCK_N)
    for start in range(first, middle, BLOCK_N):
        key = start + lane
        logits = block_scores(
            q, k_ptr, k_row, bias_ptr, key, num_keys, factor, D, BLOCK_D, HAS_BIAS, WIDE,
            PRECISION,
        )  # fmt: skip
        mass = tl.exp2(logits - lse[:, None])
        store_votes(
            over_voters(mass, VOTERS, BLOCK_N), out_ptr, out_first, start, key, out_stop,
            has_segment, begin, width, out_slots, segs, BLOCK_N, GROUP,
        )  # fmt: skip
    for start in range(middle, end, BLOCK_N):
        key = start + lane
        logits = block_scores(
            q, k_ptr, k_row, bias_ptr, key, num_keys, factor, D, BLOCK_D, HAS_BIAS, WIDE,
            PRECISION,
        )  # fmt: skip
        mass = tl.exp2(logits - lse[:, None])
        mass = tl.where(key[None, :] < stop[:, None], mass, 0.0)
        store_votes(
            over_voters(mass, VOTERS, BLOCK_N), out_ptr, out_first, start, key, out_stop,
            has_segment, begin, width, out_slots, segs, BLOCK_N, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def listed_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, bias_ptr, begin_ptr, stop_ptr, lse_ptr, list_ptr,
    list_head, out_ptr, num_heads, heads_per_key, num_keys, num_segments, num_voters, slots,
    out_slots, num_groups, chunk_size, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VOTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do as the kernels above for lists of groups of keys, `[heads or 1, segments, slots]`.

    Groups are counted from the begin of a segment; those from `num_groups` on are none. A program
    has one segment and `chunk_size` keys of its list. One of two is written:
    - `NORMALISE`: the log-sum-exp of the list, to the last of `out_slots` partial ones;
    - votes, in the order of the list, -1 for none: `[heads, segments, out_slots]`, from its start.
    """
    segment = tl.program_id(0)
    head = tl.program_id(2)
    flat = head.to(tl.int64) * num_segments + segment
    k_ptr += (head // num_heads).to(tl.int64) * k_batch
    k_ptr += (head % num_heads // heads_per_key).to(tl.int64) * k_head
    voter = tl.arange(0, BLOCK_M)
    q, is_row = load_voters(
        voter_ptr + flat * num_voters * D, voter * 0, voter, 1, num_voters, D, BLOCK_D
    )
    list_ptr += head.to(tl.int64) * list_head + segment.to(tl.int64) * slots
    begin = tl.load(begin_ptr + segment)
    stop = tl.load(stop_ptr + segment)
    factor = scale * LOG2_E
    row = flat * VOTERS + voter
    if NORMALISE:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        lse = tl.load(lse_ptr + row, mask=is_row, other=float("inf"))
    first = tl.program_id(1) * chunk_size
    for start in range(first, tl.minimum(first + chunk_size, slots * GROUP), BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        slot = place // GROUP
        number = tl.load(list_ptr + slot, mask=slot < slots, other=num_groups)
        key = tl.where(number < num_groups, begin + number * GROUP + place % GROUP, num_keys)
        is_there = (key < stop) & (number < num_groups)
        logits = block_scores(
            q, k_ptr, k_row, bias_ptr, key, num_keys, factor, D, BLOCK_D, HAS_BIAS, WIDE,
            PRECISION,
        )  # fmt: skip
        if NORMALISE:
            logits = tl.where(is_there[None, :], logits, float("-inf"))
            top, total = add_block(logits, top, total)
        else:
            mass = tl.exp2(logits - lse[:, None])
            votes = tl.sum(mass, 0)
            votes = tl.where(is_there, tl.where(votes == votes, votes, 0.0), -1.0)
            tl.store(out_ptr + flat * out_slots + place, votes, mask=slot < slots)
    if NORMALISE:
        tl.store(
            out_ptr + row * out_slots + out_slots - 1, log_sum(top, total), mask=voter < VOTERS
        )
