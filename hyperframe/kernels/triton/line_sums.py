"""What single voters give to runs of keys: one pass over the keys, before a normaliser is known.

A program has a tile of voters, of all heads that share a key head, and a chunk of keys. It writes,
for every voter and run of keys, the two sums that runs of diagonals are made of (up to the phase of
the voter, and behind it) and the largest term, all relative to a shift of that voter and chunk; and
the sums of the chunk. `line_shares_kernel` joins those: normalisers, and the factors that make
softmax masses of what was written.

Keys of a block are loaded in an order that gives whole runs to one thread: sums over them cost no
exchange. The voters of a unit (a segment of a head) lie side by side in memory, so that whole
sectors are written; pairs of numbers share a word, as bfloat16 (`HALVES`). Logs are in units of
log2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E, load_rows
from .forward import finite
from .votes import FARTHEST, joined, load_voters, log_sum

__all__ = [
    "bounds_kernel",
    "left_sums_kernel",
    "line_shares_kernel",
    "line_sums_kernel",
    "rank_kernel",
    "sum_runs_kernel",
]

_SIZES = [
    "num_heads", "num_keys", "num_segments", "num_voters", "row_blocks", "chunk_size", "slots",
    "num_lines", "first_offset", "list_slots", "num_groups", "num_runs", "num_rows",
    "log_chunk", "plane",
]  # fmt: skip


@triton.jit
def stop_of_lines(position, num_keys, IS_CAUSAL: tl.constexpr):
    """Return one past the last key of voters at some positions that counts for lines."""
    if IS_CAUSAL:
        return tl.minimum(tl.maximum(position + 1, 0), num_keys)
    else:
        return position * 0 + num_keys


@triton.jit
def bounds(
    stop_ptr, position_ptr, is_row, segment, voter, num_voters, num_keys, IS_CAUSAL: tl.constexpr
):  # fmt: skip
    """Return positions of rows, their stops for columns and lines, the smaller and the larger."""
    position = tl.load(position_ptr + segment * num_voters + voter, mask=is_row, other=0)
    stop = tl.load(stop_ptr + segment, mask=is_row, other=0)
    last = tl.where(is_row, stop_of_lines(position, num_keys, IS_CAUSAL), 0)
    return position, stop, last, tl.minimum(stop, last), tl.maximum(stop, last)


@triton.jit
def either(a, b):
    """Return the bits of both."""
    return a | b


@triton.jit
def key_order(BLOCK_N: tl.constexpr):
    """Return the keys of a block in the order of its columns: a thread's columns are a run."""
    lane = tl.arange(0, BLOCK_N)
    return lane // 2 % 4 * (BLOCK_N // 4) + lane // 8 * 2 + lane % 2


@triton.jit
def by_run(x, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr):
    """Return `[ROWS, BLOCK_N]`, ordered by `key_order`, as `[ROWS, runs, RUN]`, keys in order."""
    x = tl.permute(tl.reshape(x, [ROWS, BLOCK_N // 8, 4, 2]), [0, 2, 1, 3])
    return tl.reshape(x, [ROWS, BLOCK_N // RUN, RUN])


@triton.jit
def edges(bound, first, end, BLOCK_N: tl.constexpr):
    """Return bit `b` where a bound lies within block `b` of a chunk, of up to 64 blocks."""
    inside = (bound > first) & (bound <= end) & ((bound - first) % BLOCK_N != 0)
    block = tl.where(inside, (bound - first) // BLOCK_N, 0).to(tl.int64)
    bit = tl.where(inside, tl.full(bound.shape, 1, tl.int64) << block, 0)
    return tl.reduce(bit, 0, either)


@triton.jit
def in_halves(low, high):
    """Return two numbers, not negative, rounded to bfloat16, in one word of 32 bits."""
    low = (low.to(tl.int32, bitcast=True) + 0x8000) >> 16
    return low | ((high.to(tl.int32, bitcast=True) + 0x8000) & -0x10000)


@triton.jit
def low_half(word):
    """Return the first number of words of `in_halves`."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word):
    """Return the second number of words of `in_halves`."""
    return (word & -0x10000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_SIZES)
def line_sums_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, stop_ptr, position_ptr, partial_ptr, sum_ptr,
    max_ptr, plane, num_heads, heads_per_key, num_keys, num_segments, num_voters,
    row_blocks, chunk_size, slots, num_lines, first_offset, scale, D: tl.constexpr,
    BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RUN: tl.constexpr, IS_CAUSAL: tl.constexpr, HALVES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write sums and largest terms of runs of a chunk of keys, and what a normaliser needs of it.

    Units are `[batch, heads, segments]`, rows `[units, VOTERS]`, a power of two. Written are: the
    two sums, over the keys before the last of a row: `[units, lines, VOTERS]`, in one word, or the
    second ones a `plane` behind the first ones; largest terms, of the keys before the stop:
    likewise, two lines in a word; and `[rows, slots, 3]`: the shift, the sums before both and
    between the two. Of a chunk that a tile does not see nothing is written, and behind the last
    key of any of its rows neither.
    """
    row_block = tl.program_id(0) % row_blocks
    chunk = tl.program_id(0) // row_blocks
    key_heads = num_heads // heads_per_key
    batch = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    voter = row % VOTERS
    segment = row // VOTERS // heads_per_key
    head = batch * num_heads + key_head * heads_per_key + row // VOTERS % heads_per_key
    has_unit = segment < num_segments
    is_row = has_unit & (voter < num_voters)
    position, stop, last, low, high = bounds(
        stop_ptr, position_ptr, is_row, segment, voter, num_voters, num_keys, IS_CAUSAL
    )
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, tl.max(high, 0))
    if first >= end:
        return
    unit = (head * num_segments + segment).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(
        voter_ptr + ((unit * num_voters + voter) * D)[:, None] + dim[None, :],
        mask=is_row[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip
    phase = (position - first_offset) & (RUN - 1)
    within = tl.arange(0, RUN)
    weight = (within[None, None, :] <= phase[:, None, None]).to(tl.float32)
    tested = edges(tl.where(is_row, stop, 0), first, end, BLOCK_N)
    tested = tested | edges(tl.where(is_row, last, 0), first, end, BLOCK_N)
    runs: tl.constexpr = BLOCK_N // RUN
    order = key_order(BLOCK_N)
    number = tl.arange(0, runs)
    pair = tl.arange(0, runs // 2)
    k_ptr += batch.to(tl.int64) * k_batch + key_head.to(tl.int64) * k_head
    factor = scale * LOG2_E
    sign = tl.where(factor < 0.0, -1.0, 1.0)
    top = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, runs], tl.float32)
    more = tl.zeros([BLOCK_M, runs], tl.float32)
    num_pairs = (num_lines + 1) // 2
    line_place = (unit * num_lines * VOTERS + voter)[:, None] + number[None, :] * VOTERS
    pair_place = (unit * num_pairs * VOTERS + voter)[:, None] + pair[None, :] * VOTERS
    for start in range(first, end, BLOCK_N):
        key = start + order
        k = load_rows(
            k_ptr, tl.minimum(key, num_keys - 1)[:, None], k_row, tl.arange(0, BLOCK_D)[None, :],
            k_ptr, num_keys, D, BLOCK_D, False, WIDE,
        )  # fmt: skip
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # the first block's maximum serves them all, up to where the sum would overflow
        if start == first:
            # not from the product below, which would then be no part of a multiply-add
            signed = tl.where(key[None, :] < high[:, None], score * sign, float("-inf"))
            top = finite(tl.max(signed, 1) * tl.abs(factor))
        mass = tl.exp2(tl.minimum(score * factor - top[:, None], FARTHEST))
        if ((tested >> ((start - first) // BLOCK_N)) & 1) == 0:
            # a row sees all of the block or nothing
            term = by_run(mass, BLOCK_M, BLOCK_N, RUN)
            largest = tl.max(term, 2)
            every = tl.sum(term, 2)
            early = tl.sum(term * weight, 2)
            total += tl.where((start < low)[:, None], every, 0.0)
            more += tl.where(((start >= low) & (start < high))[:, None], every, 0.0)
        else:
            counted = tl.where(key[None, :] < stop[:, None], mass, 0.0)
            on_line = tl.where(key[None, :] < last[:, None], mass, 0.0)
            shared = tl.sum(by_run(tl.minimum(on_line, counted), BLOCK_M, BLOCK_N, RUN), 2)
            longer = tl.sum(by_run(tl.maximum(on_line, counted), BLOCK_M, BLOCK_N, RUN), 2)
            largest = tl.max(by_run(counted, BLOCK_M, BLOCK_N, RUN), 2)
            term = by_run(on_line, BLOCK_M, BLOCK_N, RUN)
            every = tl.sum(term, 2)
            early = tl.sum(term * weight, 2)
            total += shared
            more += longer - shared
        is_line = (start < last)[:, None]
        every = tl.where(is_line, every, 0.0)
        early = tl.where(is_line, early, 0.0)
        largest = tl.where((start < stop)[:, None], largest, 0.0)
        late = tl.maximum(every - early, 0.0)
        # room of voters that are none is written, too: in whole vectors
        is_there = has_unit[:, None] & (start // RUN + number < num_lines)[None, :]
        target = line_place + start // RUN * VOTERS
        if HALVES:
            tl.store(sum_ptr + target, in_halves(early, late), mask=is_there)
            one, other = tl.split(tl.reshape(largest, [BLOCK_M, runs // 2, 2]))
            is_there = has_unit[:, None] & (start // RUN // 2 + pair < num_pairs)[None, :]
            target = pair_place + start // RUN // 2 * VOTERS
            tl.store(max_ptr + target, in_halves(one, other), mask=is_there)
        else:
            tl.store(sum_ptr + target, early, mask=is_there)
            tl.store(sum_ptr + plane + target, late, mask=is_there)
            tl.store(max_ptr + target, largest, mask=is_there)
    partial_ptr += ((unit * VOTERS + voter) * slots + chunk) * 3
    tl.store(partial_ptr, top, mask=is_row)
    tl.store(partial_ptr + 1, tl.sum(total, 1), mask=is_row)
    tl.store(partial_ptr + 2, tl.sum(more, 1), mask=is_row)


@triton.jit(do_not_specialize=_SIZES)
def line_shares_kernel(
    partial_ptr, stop_ptr, position_ptr, lse_ptr, share_ptr, num_rows, num_keys, num_segments,
    num_voters, chunk_size, slots, VOTERS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write log normalisers of columns and what makes softmax masses of the sums of a chunk.

    Normalisers are `[rows]`, `+inf` for rows that give no mass; the factors `[2, rows, slots]`, for
    columns and for lines.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    voter = row % VOTERS
    segment = row // VOTERS % num_segments
    is_row = (row < num_rows) & (voter < num_voters)
    _, stop, last, _, high = bounds(
        stop_ptr, position_ptr, is_row, segment, voter, num_voters, num_keys, IS_CAUSAL
    )
    place = row.to(tl.int64)[:, None] * slots + slot[None, :]
    inside = (row < num_rows)[:, None] & (slot < slots)[None, :]
    seen = is_row[:, None] & inside & ((slot * chunk_size)[None, :] < high[:, None])
    top = tl.load(partial_ptr + place * 3, mask=seen, other=float("-inf"))
    lse = joined(log_sum(top, tl.load(partial_ptr + place * 3 + 1, mask=seen, other=0.0)))
    more = joined(log_sum(top, tl.load(partial_ptr + place * 3 + 2, mask=seen, other=0.0)))
    shift = finite(tl.maximum(lse, more))
    both = log_sum(shift, tl.exp2(lse - shift) + tl.exp2(more - shift))
    column = tl.where(stop > last, both, lse)
    line = tl.where(last > stop, both, lse)
    column = tl.where(column > float("-inf"), column, float("inf"))
    line = tl.where(line > float("-inf"), line, float("inf"))
    tl.store(share_ptr + place, tl.exp2(top - column[:, None]), mask=inside)
    share_ptr += num_rows.to(tl.int64) * slots
    tl.store(share_ptr + place, tl.exp2(top - line[:, None]), mask=inside)
    tl.store(lse_ptr + row, column, mask=row < num_rows)


@triton.jit(do_not_specialize=_SIZES)
def bounds_kernel(
    max_ptr, share_ptr, stop_ptr, bound_ptr, coarse_ptr, num_segments, num_voters, num_lines, slots,
    num_groups, VOTERS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, LINES: tl.constexpr,
    COARSE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Write bounds of the votes of groups of keys: float32 `[units, groups]`.

    And the largest of every `COARSE` of them, where that is not 1.

    The bound is the sum, over the voters, of the largest share that each gives to a key: no key of
    the group has more votes. `max` are the largest terms of runs, `share` the factors of columns; a
    chunk has `LINES` runs of keys.
    """
    unit = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    stop = tl.load(stop_ptr + tl.program_id(0) % num_segments)
    if chunk * LINES * RUN >= stop:
        return
    voter = tl.arange(0, VOTERS)
    is_voter = (voter < num_voters)[None, :]
    row = unit * VOTERS + voter
    share = tl.load(share_ptr + row * slots + chunk, mask=voter < num_voters, other=0.0)[None, :]
    each: tl.constexpr = GROUP // RUN
    groups: tl.constexpr = LINES // each
    if HALVES:
        num_pairs = (num_lines + 1) // 2
        pair = chunk * (LINES // 2) + tl.arange(0, LINES // 2)
        word = tl.load(
            max_ptr + (unit * num_pairs + pair)[:, None] * VOTERS + voter[None, :],
            mask=is_voter & (pair * 2 * RUN < stop)[:, None], other=0,
        )  # fmt: skip
        if each == 1:
            both = tl.join(tl.sum(low_half(word) * share, 1), tl.sum(high_half(word) * share, 1))
            bound = tl.reshape(both, [LINES])
        else:
            largest = tl.maximum(low_half(word), high_half(word))
            largest = tl.max(tl.reshape(largest, [groups, each // 2, VOTERS]), 1)
            bound = tl.sum(largest * share, 1)
    else:
        line = chunk * LINES + tl.arange(0, LINES)
        largest = tl.load(
            max_ptr + (unit * num_lines + line)[:, None] * VOTERS + voter[None, :],
            mask=is_voter & (line * RUN < stop)[:, None], other=0.0,
        )  # fmt: skip
        largest = tl.max(tl.reshape(largest, [groups, each, VOTERS]), 1)
        bound = tl.sum(largest * share, 1)
    group = chunk * groups + tl.arange(0, groups)
    # what is not a number is still seen
    bound = tl.where(bound == bound, bound, 0.0)
    tl.store(bound_ptr + unit * num_groups + group, bound, mask=group < num_groups)
    if COARSE > 1:
        number = chunk * (groups // COARSE) + tl.arange(0, groups // COARSE)
        num_coarse = (num_groups + COARSE - 1) // COARSE
        largest = tl.max(tl.reshape(bound, [groups // COARSE, COARSE]), 1)
        tl.store(coarse_ptr + unit * num_coarse + number, largest, mask=number < num_coarse)


@triton.jit(do_not_specialize=_SIZES)
def left_sums_kernel(
    voter_ptr, k_ptr, k_batch, k_head, k_row, position_ptr, partial_ptr, list_ptr, bits_ptr,
    sum_ptr, plane, num_heads, heads_per_key, num_keys, num_segments, num_voters,
    list_slots, num_groups, log_chunk, slots, num_lines, first_offset, scale, D: tl.constexpr,
    BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, IS_CAUSAL: tl.constexpr, HALVES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sums of the runs of some groups of keys anew, less the keys that bits name.

    Lists of groups, `[units, list_slots]`, those from `num_groups` on are none, and their bits are
    those of the segment before; the first one has its own. A program has one segment and `BLOCK_N`
    keys of its list.
    """
    segment = tl.program_id(0)
    head = tl.program_id(2)
    list_place = (head * num_segments + tl.maximum(segment - 1, 0)).to(tl.int64) * list_slots
    start = tl.program_id(1) * BLOCK_N
    if tl.load(list_ptr + list_place + start // GROUP) >= num_groups:
        return
    order = key_order(BLOCK_N)
    slot = (start + order) // GROUP
    number = tl.load(list_ptr + list_place + slot, mask=slot < list_slots, other=num_groups)
    key = number * GROUP + order % GROUP
    k_ptr += (head // num_heads).to(tl.int64) * k_batch
    k_ptr += (head % num_heads // heads_per_key).to(tl.int64) * k_head
    k = load_rows(
        k_ptr, tl.minimum(key, num_keys - 1)[:, None], k_row, tl.arange(0, BLOCK_D)[None, :], k_ptr,
        num_keys, D, BLOCK_D, False, WIDE,
    )  # fmt: skip
    voter = tl.arange(0, BLOCK_M)
    unit = head.to(tl.int64) * num_segments + segment
    q, is_row = load_voters(
        voter_ptr + unit * num_voters * D, voter * 0, voter, 1, num_voters, D, BLOCK_D
    )
    position = tl.load(position_ptr + segment * num_voters + voter, mask=is_row, other=0)
    last = stop_of_lines(position, num_keys, IS_CAUSAL)
    phase = (position - first_offset) & (RUN - 1)
    each: tl.constexpr = GROUP // RUN
    run = tl.arange(0, BLOCK_N // RUN) + start // RUN
    slot = run // each
    number = tl.load(list_ptr + list_place + slot, mask=slot < list_slots, other=num_groups)
    bits = tl.load(bits_ptr + list_place + slot, mask=slot < list_slots, other=0)
    line = number * each + run % each
    is_there = is_row[:, None] & ((number < num_groups) & (line < num_lines))[None, :]
    chunk = (line * RUN) >> log_chunk
    seen = is_there & ((line * RUN)[None, :] < last[:, None])
    row = (unit * VOTERS + voter)[:, None]
    top = tl.load(partial_ptr + (row * slots + chunk[None, :]) * 3, mask=seen, other=0.0)
    within = tl.arange(0, RUN)
    is_left = ((bits[:, None] >> ((run % each * RUN)[:, None] + within[None, :])) & 1) == 0
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    logits = by_run(logits, BLOCK_M, BLOCK_N, RUN)
    mass = tl.exp2(tl.minimum(logits - top[:, :, None], FARTHEST))
    key = (line * RUN)[:, None] + within[None, :]
    mass = tl.where(is_left[None, :, :] & (key[None, :, :] < last[:, None, None]), mass, 0.0)
    is_early = within[None, None, :] <= phase[:, None, None]
    early = tl.sum(tl.where(is_early, mass, 0.0), 2)
    late = tl.sum(tl.where(is_early, 0.0, mass), 2)
    target = (unit * num_lines + line)[None, :] * VOTERS + voter[:, None]
    if HALVES:
        tl.store(sum_ptr + target, in_halves(early, late), mask=seen)
    else:
        tl.store(sum_ptr + target, early, mask=seen)
        tl.store(sum_ptr + plane + target, late, mask=seen)


@triton.jit(do_not_specialize=_SIZES)
def sum_runs_kernel(
    sum_ptr, plane, share_ptr, position_ptr, votes_ptr, num_keys, num_segments, num_voters,
    num_lines, num_runs, first_offset, slots, RUN: tl.constexpr, LOG_RUN: tl.constexpr,
    VOTERS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Write the mass of runs of diagonals of a segment: `[batch, heads, segments, runs]`.

    `share` are the factors of lines, `[rows, slots]`, of chunks of `LINES` runs of keys; that is
    `BLOCK` at least, so that a program meets two chunks of a voter. The second sum of a run of keys
    belongs to the run of diagonals before that of the first: a program reads `BLOCK` runs, and
    writes one less.
    """
    unit = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(0) % num_segments
    first = tl.program_id(1) * (BLOCK - 1)
    lane = tl.arange(0, BLOCK)
    early = tl.zeros([BLOCK], tl.float32)
    late = tl.zeros([BLOCK], tl.float32)
    sum_ptr += unit * num_lines * VOTERS
    share_ptr += unit * VOTERS * slots
    for voter in tl.static_range(VOTERS):
        place = segment * num_voters + tl.minimum(voter, num_voters - 1)
        position = tl.load(position_ptr + place)
        last = tl.where(voter < num_voters, stop_of_lines(position, num_keys, IS_CAUSAL), 0)
        nearest = ((position - first_offset) >> LOG_RUN) - first
        chunk = tl.maximum(nearest, 0) // LINES
        share = share_ptr + voter * slots + chunk
        near_share = tl.load(share, mask=chunk < slots, other=0.0)
        far_share = tl.load(share - 1, mask=(chunk > 0) & (chunk <= slots), other=0.0)
        near = nearest - lane
        seen = (near >= 0) & (near * RUN < last)
        factor = tl.where(near >= chunk * LINES, near_share, far_share)
        target = sum_ptr + near * VOTERS + voter
        if HALVES:
            word = tl.load(target, mask=seen, other=0)
            early += low_half(word) * factor
            late += high_half(word) * factor
        else:
            early += tl.load(target, mask=seen, other=0.0) * factor
            late += tl.load(target + plane, mask=seen, other=0.0) * factor
    votes = early + tl.gather(late, tl.minimum(lane + 1, BLOCK - 1), 0)
    is_there = (lane < BLOCK - 1) & (first + lane < num_runs)
    tl.store(votes_ptr + unit * num_runs + first + lane, votes, mask=is_there)


@triton.jit(do_not_specialize=["longest", "num_columns", "other"])
def rank_kernel(
    index_ptr, best_ptr, out_ptr, longest, num_columns, other, PADDED: tl.constexpr
):  # fmt: skip
    """Write the columns of a row with the best first, of equal ones the first, then `other`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    used = place < longest
    index = tl.load(index_ptr + row * longest + place, mask=used, other=0)
    mine = tl.load(best_ptr + row * longest + place, mask=used, other=-2.0)
    is_before = tl.zeros([16, PADDED], tl.int32)
    for start in range(0, longest, 16):
        there = start + tl.arange(0, 16)
        best = tl.load(best_ptr + row * longest + there, mask=there < longest, other=-2.0)
        is_better = best[:, None] > mine[None, :]
        is_equal = (best[:, None] == mine[None, :]) & (there[:, None] < place[None, :])
        is_before += (is_better | is_equal).to(tl.int32)
    rank = tl.sum(is_before, 0)
    tl.store(out_ptr + row * num_columns + rank, index, mask=used)
    is_rest = (place >= longest) & (place < num_columns)
    tl.store(out_ptr + row * num_columns + place, place * 0 + other, mask=is_rest)
