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
def bounds(stop_ptr, last_ptr, is_row, place, segment_place, LINES: tl.constexpr):
    """Return the stops of rows for columns and for lines, the smaller and the larger of the two."""
    stop = tl.load(stop_ptr + segment_place, mask=is_row, other=0)
    last = stop
    if LINES:
        last = tl.load(last_ptr + place, mask=is_row, other=0)
    return stop, last, tl.minimum(stop, last), tl.maximum(stop, last)


@triton.jit
def chunk_of(begin, chunk, chunk_size, low, high, is_row, BLOCK_N: tl.constexpr):
    """Return the first key of a chunk, the end of the blocks that no row has to test, and its end.

    `low` and `high` are bounds of the rows: all rows see keys before `low`, none from `high` on.
    """
    first = begin + chunk * chunk_size
    end = tl.minimum(first + chunk_size, tl.max(high, 0))
    free = tl.minimum(tl.min(tl.where(is_row, low, 0x7FFFFFFF), 0), end)
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
    "out_slots", "num_groups", "width", "num_lines", "first_offset",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def normalisers_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, bias_ptr, begin_ptr, stop_ptr, last_ptr, partial_ptr,
    num_heads, heads_per_key, num_keys, num_segments, num_voters, row_blocks, chunk_size, slots,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, BLOCK_N: tl.constexpr,
    LINES: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of a chunk for each row: float32 `[rows, slots, 1 or 2]`.

    Rows are `[batch, heads, groups, segments, VOTERS]`. With lines, the first one is over the keys
    before both stops of a row, the second one over those between the two.
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
    segment_place = group * num_segments + segment
    _, _, low, high = bounds(
        stop_ptr, last_ptr, is_row, segment_place * num_voters + voter, segment_place, LINES
    )
    begin = tl.load(begin_ptr + group)
    first, middle, end = chunk_of(begin, chunk, chunk_size, low, high, is_row, BLOCK_N)
    factor = scale * LOG2_E
    top = tl.full([NUM_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([NUM_ROWS], tl.float32)
    more_top = top
    more_total = total
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
        seen = key[None, :] < low[:, None]
        top, total = add_block(tl.where(seen, logits, float("-inf")), top, total)
        if LINES:
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            more_top, more_total = add_block(logits, more_top, more_total)
    place = (flat * num_segments + segment) * VOTERS + voter
    states: tl.constexpr = 2 if LINES else 1
    partial_ptr += (place * slots + chunk) * states
    has_slot = segment < num_segments
    tl.store(partial_ptr, log_sum(top, total), mask=has_slot)
    if LINES:
        tl.store(partial_ptr + 1, log_sum(more_top, more_total), mask=has_slot)


@triton.jit
def joined(x):
    """Return the log-sum-exp of each row of `[rows, n]` in units of log2."""
    top = tl.max(x, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return log_sum(shift, tl.sum(tl.exp2(x - shift[:, None]), 1))


@triton.jit(do_not_specialize=["num_rows", "num_segments", "num_voters", "slots"])
def combine_kernel(
    partial_ptr, stop_ptr, last_ptr, voted_ptr, lse_ptr, num_rows, num_segments, num_voters, slots,
    VOTERS: tl.constexpr, LINES: tl.constexpr, HAS_VOTED: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the log normalisers of rows, `+inf` for those that give no mass: `[1 or 2, rows]`.

    `num_segments` are those of all groups, `voted` says for each and its voters whether they count.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    used = row < num_rows
    voter = row % VOTERS
    segment = row // VOTERS % num_segments
    is_row = used & (voter < num_voters)
    place = segment * num_voters + voter
    states: tl.constexpr = 2 if LINES else 1
    source = partial_ptr + (row.to(tl.int64)[:, None] * slots + slot[None, :]) * states
    inside = used[:, None] & (slot < slots)[None, :]
    lse = joined(tl.load(source, mask=inside, other=float("-inf")))
    gives = is_row
    if HAS_VOTED:
        gives = gives & (tl.load(voted_ptr + place, mask=is_row, other=0) != 0)
    if LINES:
        more = joined(tl.load(source + 1, mask=inside, other=float("-inf")))
        top = tl.maximum(lse, more)
        shift = tl.where(top == float("-inf"), 0.0, top)
        both = log_sum(shift, tl.exp2(lse - shift) + tl.exp2(more - shift))
        stop, last, _, _ = bounds(stop_ptr, last_ptr, is_row, place, segment, True)
        line = tl.where(last > stop, both, lse)
        lse = tl.where(stop > last, both, lse)
        line = tl.where(gives & (line > float("-inf")), line, float("inf"))
        tl.store(lse_ptr + num_rows + row, line, mask=used)
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


@triton.jit
def store_lines(
    mass, line_ptr, row_place, has_line, phase, key, num_lines, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Store two sums of every run of keys: up to the phase of the row, and behind it."""
    runs: tl.constexpr = BLOCK_N // RUN
    is_low = (key % RUN)[None, :] <= phase[:, None]
    low = tl.sum(tl.reshape(tl.where(is_low, mass, 0.0), [ROWS, runs, RUN]), 2)
    high = tl.sum(tl.reshape(tl.where(is_low, 0.0, mass), [ROWS, runs, RUN]), 2)
    number = tl.max(tl.reshape(key // RUN, [runs, RUN]), 1)
    both = tl.join(low, high)
    half = tl.arange(0, 2)
    place = row_place[:, None] * num_lines + number[None, :]
    inside = has_line[:, None] & (number < num_lines)[None, :]
    target = line_ptr + place[:, :, None] * 2 + half[None, None, :]
    tl.store(target, both, mask=inside[:, :, None] & (half >= 0)[None, None, :])


@triton.jit(do_not_specialize=_SIZES)
def votes_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, bias_ptr, begin_ptr, stop_ptr, last_ptr, position_ptr,
    lse_ptr, out_ptr, line_ptr, num_heads, heads_per_key, num_keys, num_segments, num_voters,
    row_blocks, chunk_size, width, out_slots, num_lines, first_offset, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the votes of a chunk: float32 `[batch, heads, groups, segments, out_slots]`.

    `GROUP` keys give one value, the largest; 0 for all of them. With lines (`RUN` > 0) also, for
    every voter and every run of keys, the two sums of `store_lines`.
    """
    row_block = tl.program_id(0) % row_blocks
    chunk = tl.program_id(0) // row_blocks
    group = tl.program_id(1)
    head = tl.program_id(2)
    flat = head.to(tl.int64) * tl.num_programs(1) + group
    num_rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * num_segments * VOTERS
    k_ptr += (head // num_heads).to(tl.int64) * k_batch
    k_ptr += (head % num_heads // heads_per_key).to(tl.int64) * k_head
    segs: tl.constexpr = NUM_ROWS // VOTERS
    local, voter = place_of_row(tl.arange(0, NUM_ROWS), VOTERS)
    segment = row_block * segs + local
    q, is_row = load_voters(
        voter_ptr + flat * num_segments * num_voters * D, segment, voter, num_segments, num_voters,
        D, BLOCK_D,
    )  # fmt: skip
    segment_place = group * num_segments + segment
    row_place = segment_place * num_voters + voter
    stop, last, low, high = bounds(stop_ptr, last_ptr, is_row, row_place, segment_place, RUN > 0)
    begin = tl.load(begin_ptr + group)
    first, middle, end = chunk_of(begin, chunk, chunk_size, low, high, is_row, BLOCK_N)
    place = (flat * num_segments + segment) * VOTERS + voter
    lse = tl.load(lse_ptr + place, mask=is_row, other=float("inf"))
    base = lse
    if RUN > 0:
        # what comes before both stops of a row is below both of its normalisers
        line_lse = tl.load(lse_ptr + num_rows + place, mask=is_row, other=float("inf"))
        base = tl.minimum(lse, line_lse)
        some = base < float("inf")
        column_share = tl.where(some, tl.exp2(tl.where(some, base, 0.0) - lse), 0.0)
        line_share = tl.where(some, tl.exp2(tl.where(some, base, 0.0) - line_lse), 0.0)
        at = tl.load(position_ptr + row_place, mask=is_row, other=0) - first_offset
        phase = at & (RUN - 1)
        line_place = (flat * num_segments + segment) * num_voters + voter
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
        mass = tl.exp2(logits - base[:, None])
        if RUN > 0:
            store_lines(
                mass * line_share[:, None], line_ptr, line_place, is_row, phase, key, num_lines,
                NUM_ROWS, BLOCK_N, RUN,
            )  # fmt: skip
            mass = mass * column_share[:, None]
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
        if RUN > 0:
            mass = tl.exp2(logits - line_lse[:, None])
            mass = tl.where(key[None, :] < last[:, None], mass, 0.0)
            store_lines(
                mass, line_ptr, line_place, is_row, phase, key, num_lines, NUM_ROWS, BLOCK_N, RUN
            )
        mass = tl.exp2(logits - lse[:, None])
        mass = tl.where(key[None, :] < stop[:, None], mass, 0.0)
        store_votes(
            over_voters(mass, VOTERS, BLOCK_N), out_ptr, out_first, start, key, out_stop,
            has_segment, begin, width, out_slots, segs, BLOCK_N, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def listed_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, bias_ptr, begin_ptr, stop_ptr, last_ptr, position_ptr,
    lse_ptr, list_ptr, list_head, bits_ptr, out_ptr, line_ptr, num_heads, heads_per_key, num_keys,
    num_segments, num_voters, slots, out_slots, num_groups, num_lines, first_offset, chunk_size,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do as the kernels above for lists of groups of keys, `[heads or 1, segments, slots]`.

    Groups are counted from the begin of a segment; those from `num_groups` on are none. A program
    has one segment and `chunk_size` keys of its list. One of three is written:
    - `NORMALISE`: the log-sum-exp of the list, to the last of `out_slots` partial ones;
    - votes, in the order of the list, -1 for none: `[heads, segments, out_slots]`, from its start;
    - `RUN` > 0: the sums of `store_lines`, less the keys that `bits` name. The list and its bits
      are those of the segment before; the first one has its own.
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
    source = segment
    if RUN > 0:
        source = tl.maximum(segment - 1, 0)
    source_place = head.to(tl.int64) * num_segments + source
    list_ptr += head.to(tl.int64) * list_head + source.to(tl.int64) * slots
    begin = tl.load(begin_ptr + segment)
    stop = tl.load(stop_ptr + segment)
    factor = scale * LOG2_E
    row = flat * VOTERS + voter
    if NORMALISE:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        if RUN > 0:
            lse_ptr += tl.num_programs(2).to(tl.int64) * num_segments * VOTERS
        lse = tl.load(lse_ptr + row, mask=is_row, other=float("inf"))
    if RUN > 0:
        last = tl.load(last_ptr + segment * num_voters + voter, mask=is_row, other=0)
        at = tl.load(position_ptr + segment * num_voters + voter, mask=is_row, other=0)
        phase = (at - first_offset) & (RUN - 1)
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
            if RUN > 0:
                bits = tl.load(bits_ptr + source_place * slots + slot, mask=slot < slots, other=0)
                is_left = ((bits >> (place % GROUP)) & 1) == 0
                mass = tl.where(is_left[None, :] & (key[None, :] < last[:, None]), mass, 0.0)
                # groups that are none would be stored as others
                counted = tl.where(number < num_groups, key, num_lines * RUN)
                store_lines(
                    mass, line_ptr, flat * num_voters + voter, is_row, phase, counted, num_lines,
                    BLOCK_M, BLOCK_N, RUN,
                )  # fmt: skip
            else:
                votes = tl.sum(mass, 0)
                votes = tl.where(is_there, tl.where(votes == votes, votes, 0.0), -1.0)
                tl.store(out_ptr + flat * out_slots + place, votes, mask=slot < slots)
    if NORMALISE:
        tl.store(
            out_ptr + row * out_slots + out_slots - 1, log_sum(top, total), mask=voter < VOTERS
        )
