"""What the attention kernels share: rows of a tile, slots of its list, visibility, weights.

The three kernels (`forward`, `backward_rows`, `backward_keys`) differ in what they keep in registers
and what they loop over; which key a slot names, who sees it and what it weighs is said once, here.
Functions that take rows and slots work on `[rows, 1]` with `[1, slots]` as well as transposed.

Weights are in units of log2, because `exp2` is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

CONSECUTIVE: tl.constexpr = tl.constexpr(0)
ORDERED: tl.constexpr = tl.constexpr(1)
BLOCKED: tl.constexpr = tl.constexpr(2)


@triton.jit
def tile_rows(slot, tile, num_slots, order_ptr, num_queries, ROWS: tl.constexpr):  # fmt: skip
    """Return the query row of some slots of a tile, and whether there is one.

    `num_slots` slots belong to a tile. `order_ptr` points at the head's order, or, for a block, at
    the block's first place in it.
    """
    used = slot < num_slots
    if ROWS == CONSECUTIVE:
        row = tile * num_slots + slot
    elif ROWS == ORDERED:
        row = tl.load(order_ptr + tile.to(tl.int64) * num_slots + slot, mask=used, other=-1)
        row = row.to(tl.int32)
    else:
        row = tl.load(order_ptr + slot, mask=used, other=-1)
    used = used & (row >= 0) & (row < num_queries)
    return tl.where(used, row, 0), used


@triton.jit
def slot_keys(
    slot, range_slots, range_ptr, range_length, index_ptr, key_count, num_rows, HAS_RANGE: tl.constexpr,
    HAS_LIST: tl.constexpr,
):  # fmt: skip
    """Return the key of each slot, the slot's place in the list, and whether it is in use.

    The first `range_slots` slots (a multiple of the block of slots) are the range of the key
    order, `range_length` of them in use; the list follows. Keys outside `[0, num_rows)` are never
    read: their slots count as unused.
    """
    if HAS_RANGE and HAS_LIST:
        in_range = slot < range_slots
        place = slot - range_slots
        key = tl.load(range_ptr + slot, mask=slot < range_length, other=0)
        listed = (place >= 0) & (place < key_count)
        key += tl.load(index_ptr + place, mask=listed, other=0)
        used = tl.where(in_range, slot < range_length, listed)
    elif HAS_RANGE:
        place = slot
        used = slot < range_length
        key = tl.load(range_ptr + slot, mask=used, other=0)
    else:
        place = slot
        used = slot < key_count
        key = tl.load(index_ptr + slot, mask=used, other=0).to(tl.int32)
    used = used & (key >= 0) & (key < num_rows)
    return tl.where(used, key, 0), place, used


@triton.jit
def visible(
    row, row_offset, key, slot, heavy_count, band_count, left, right, num_keys, rank_ptr,
    start_ptr, stop_ptr, num_queries, position_offset, IS_CAUSAL: tl.constexpr,
    HAS_BAND: tl.constexpr, NUM_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Return whether rows see slots, as far as it depends on both; broadcasts rows and slots.

    `row_offset` is the offset of the row's head in the `[batch, heads, R, n_q]` bounds.
    """
    offset = key - (row + position_offset)
    real = key < num_keys
    seen = (offset == offset)  # fmt: skip  # all True, in the shape of both
    if IS_CAUSAL:
        seen = seen & ((offset <= 0) | (key >= num_keys))
    if HAS_BAND:
        in_band = (offset >= -left) & (offset <= right) & real
        seen = seen & (in_band | (slot >= band_count)) & ((slot < heavy_count) | (in_band == 0))
    for r in tl.static_range(NUM_EXCLUDED):
        rank = tl.load(rank_ptr + r * num_keys + tl.where(real, key, 0))
        start = tl.load(start_ptr + row_offset + r * num_queries + row)
        stop = tl.load(stop_ptr + row_offset + r * num_queries + row)
        seen = seen & ((start > rank) | (rank >= stop) | (key >= num_keys))
    return seen


@triton.jit
def load_rows(ptr, row, used, stride, dim, size, summary_ptr, num_keys, SUMMARIES: tl.constexpr):
    """Gather rows of a matrix: `[rows, dim]`, 0 where unused; keys from `num_keys` on are summaries.

    `dim` is `[1, D]`, `row` and `used` are `[N, 1]`; summaries are stored contiguously.
    """
    inside = used & (dim < size)
    if SUMMARIES:
        real = row < num_keys
        found = tl.load(ptr + row.to(tl.int64) * stride + dim, mask=inside & real, other=0.0)
        extra = tl.load(
            summary_ptr + (row - num_keys).to(tl.int64) * size + dim, mask=inside & (row >= num_keys),
            other=0.0,
        )  # fmt: skip
        return tl.where(real, found, extra)
    return tl.load(ptr + row.to(tl.int64) * stride + dim, mask=inside, other=0.0)


@triton.jit
def shares(
    logits, bias, value_bias, is_heavy, cap, is_floored, lse, HAS_CAP: tl.constexpr,
    HAS_FLOOR: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return a block's shares of the numerator and of the row sum, from logits in log2 units.

    `lse` in log2 units, `+inf` in rows without keys. The share of the row sum is what its
    derivative passes on: 0 for capped terms, and for sampled ones where the floor was taken.
    """
    by_value = tl.exp2(logits + value_bias - lse)
    by_sum = by_value
    if SPLIT:
        by_sum = tl.exp2(logits + bias - lse)
        if HAS_CAP:
            by_sum = tl.where(is_heavy | (logits <= cap), by_sum, 0.0)
        if HAS_FLOOR:
            by_sum = tl.where(is_heavy | (is_floored == 0), by_sum, 0.0)
    return by_value, by_sum
