"""What the attention kernels share: rows of a tile, visibility, gathering, shares.

The three kernels (`forward`, `backward_rows`, `backward_keys`) differ in what they keep in
registers and what they loop over; which row a slot owns, who sees a key and what it weighs is said
once, here.
Functions that take rows and slots work on `[rows, 1]` with `[1, slots]` as well as transposed.

Weights are in units of log2, because `exp2` is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

UNUSED: tl.constexpr = tl.constexpr(-0x80000000)  # instead of the key of an unused slot

APART: tl.constexpr = tl.constexpr(62)  # the bit of tiles that `tile_forward_kernel` cannot do

# sums of weights below which a shift was too large: terms that matter may be lost. Weights that are
# multiplied in float16 end at 6e-8, and rows that see the keys of their shift sum up to 1 at least
LEAST_SUM: tl.constexpr = tl.constexpr(8.7e-19)
LEAST_FLOAT16_SUM: tl.constexpr = tl.constexpr(0.5)

CONSECUTIVE: tl.constexpr = tl.constexpr(0)
ORDERED: tl.constexpr = tl.constexpr(1)
BLOCKED: tl.constexpr = tl.constexpr(2)


@triton.jit
def is_within_range(row_sum, acc, DTYPE: tl.constexpr):
    """Whether a shift that stays was near enough to the largest logit of a row.

    Far from it a sum has lost terms that matter, or overflows; or the products with values do.

    Args:
        row_sum: float32 `[rows]`, of shifted exponentials.
        acc: float32 `[rows, d_v]`, of their products with values.
        DTYPE: in which they are multiplied.
    """
    least: tl.constexpr = LEAST_FLOAT16_SUM if tl.float16 == DTYPE else LEAST_SUM
    return (row_sum > least) & (row_sum < 1.2e18) & (tl.sum(acc * 0.0, 1) == 0.0)


@triton.jit
def tile_rows(
    slot, tile, num_slots, order_ptr, table_ptr, num_queries, ROWS: tl.constexpr
):  # fmt: skip
    """Return the query row of some slots of a tile, 0 for none, and whether there is one.

    `num_slots` slots belong to a tile, or as many as its block has; `order_ptr` points at the
    order of the head.
    """
    used = slot < num_slots
    if ROWS == CONSECUTIVE:
        row = tile * num_slots + slot
    elif ROWS == ORDERED:
        place = tile.to(tl.int64) * num_slots + slot
        row = tl.load(order_ptr + place, mask=used, other=-1).to(tl.int32)
    else:
        first = tl.load(table_ptr + tile * 5)
        used = slot < tl.load(table_ptr + tile * 5 + 1) - first
        row = tl.load(order_ptr + first + slot, mask=used, other=-1)
    used = used & (row >= 0) & (row < num_queries)
    return tl.where(used, row, 0), used


@triton.jit
def seen_positions(
    key, slot, heavy_count, band_count, left, right, num_keys, IS_CAUSAL: tl.constexpr,
    HAS_BAND: tl.constexpr,
):  # fmt: skip
    """Return, for every slot, which query positions see it: from `low`, for `span` more.

    Positions are counted around the circle of 32-bit integers, so that one unsigned comparison
    tests an interval, all positions, or all but an interval:

    - banded slots are seen from `key - right` to `key + left`;
    - exact slots from everywhere, sampled ones from everywhere but the band;
    - under a causal mask from the key's own position on, of all these;
    - summaries from everywhere; in a banded slot, from nowhere, since they have no position.
    """
    everywhere = -1  # the largest unsigned span
    low = tl.zeros_like(key)
    span = low + everywhere
    if IS_CAUSAL:
        low = key
        span = tl.zeros_like(key) + 0x3FFFFFFF
    if HAS_BAND:
        is_sampled = slot >= heavy_count
        is_banded = slot < band_count
        if IS_CAUSAL:
            low = tl.where(is_sampled, key + left + 1, key)
            span = tl.where(is_banded, left, span)
        else:
            low = tl.where(is_sampled, key + left + 1, key - right)
            span = tl.where(is_sampled, -(left + right + 2), everywhere)
            span = tl.where(is_banded, left + right, span)
    is_summary = key >= num_keys
    span = tl.where(is_summary, everywhere, span)
    if HAS_BAND:
        nowhere = is_summary & is_banded
        low = tl.where(nowhere, -0x7FFFFFFF, low)  # a position that no row has
        span = tl.where(nowhere, 0, span)
    return low, span.to(tl.uint32, bitcast=True)


@triton.jit
def visible(
    row, row_offset, key, low, span, rank_ptr, start_ptr, stop_ptr, num_keys, num_queries,
    position_offset, logits, nan, NUM_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Return whether rows see slots; broadcasts rows and slots.

    `low` and `span` are those of `seen_positions`; `row_offset` is the offset of the row's head in
    the `[batch, heads, R, n_q]` bounds of what other plans hold.

    `nan` is one, and nothing is larger: adding the comparison of the logits with it changes no
    position, but ties the test to the layout of the logits. Left to itself the compiler tests in
    the layout of the keys and sends the mask through shared memory, for half the time of a block.
    """
    position = row + (logits > nan).to(tl.int32) + position_offset
    seen = (position - low).to(tl.uint32, bitcast=True) <= span
    real = key < num_keys
    for r in tl.static_range(NUM_EXCLUDED):
        rank = tl.load(rank_ptr + r * num_keys + tl.where(real, key, 0))
        start = tl.load(start_ptr + row_offset + r * num_queries + row)
        stop = tl.load(stop_ptr + row_offset + r * num_queries + row)
        seen = seen & ((start > rank) | (rank >= stop) | (real == 0))
    return seen


@triton.jit
def list_of(
    index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile,
    value_weight_ptr, vw_batch, vw_head, vw_tile, counts_ptr, table_ptr,
    batch, head, key_head, tile, plan_heads, key_heads, num_tiles, exact_slots,
    ROWS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return a tile's list: pointers to keys, weights and value weights, and its counts.

    The counts: used, exact and banded slots; of a blocked tile also the length of its range, and,
    where all samples weigh the same (`UNIFORM`), that weight in units of log2.
    """
    if ROWS == BLOCKED:
        list_head = key_head.to(tl.int64)
        key_count = tl.load(counts_ptr + (batch * key_heads + key_head) * num_tiles + tile)
        range_length = tl.load(table_ptr + tile * 5 + 3) - tl.load(table_ptr + tile * 5 + 2)
        heavy_count = key_count * 0
        band_count = heavy_count
    else:
        list_head = head.to(tl.int64)
        counts_ptr += ((batch * plan_heads + head) * num_tiles + tile) * 3
        key_count = tl.load(counts_ptr)
        heavy_count = tl.load(counts_ptr + 1)
        band_count = tl.load(counts_ptr + 2)
        range_length = key_count
    tile64 = tile.to(tl.int64)
    index_ptr += batch * index_batch + list_head * index_head + tile64 * index_tile
    weight_ptr += batch * weight_batch + list_head * weight_head
    sample_weight = 0.0
    if UNIFORM:
        weight_ptr += tl.load(table_ptr + tile * 5 + 4) * weight_tile
        if key_count > exact_slots:
            sample_weight = tl.load(weight_ptr).to(tl.float32) * LOG2_E
    else:
        weight_ptr += tile64 * weight_tile
    value_weight_ptr += batch * vw_batch + list_head * vw_head + tile64 * vw_tile
    return (
        index_ptr, weight_ptr, value_weight_ptr, key_count, heavy_count, band_count, range_length,
        sample_weight,
    )  # fmt: skip


@triton.jit
def blocks_to_test(
    index_ptr, key_count, band_count, first_position, last_position, left, right, num_keys,
    num_rows, IS_CAUSAL: tl.constexpr, HAS_BAND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return in which blocks of a list some row might not see some slot: bit `b` for block `b`.

    From bounds of the rows' positions, for the first 63 blocks. Found for the whole list at once:
    a look at every block's keys inside the main loop would hold it up each time.
    """
    bits = tl.zeros([1], tl.int64)
    block = tl.arange(0, 8)
    for start in range(0, tl.minimum(key_count, 63 * BLOCK_N), 8 * BLOCK_N):
        slot = start + block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        key = tl.load(index_ptr + slot, mask=slot < key_count, other=-1).to(tl.int32)
        key = nearest(key, num_rows)
        near = (key > first_position) & (key < num_keys)
        if HAS_BAND:
            near = (key >= first_position - left) & (key < num_keys)
            if not IS_CAUSAL:
                near = near & (key <= last_position + right)
        near = (near & (slot < key_count)) | (slot < band_count)
        found = tl.max(near.to(tl.int32), 1).to(tl.int64)
        number = start // BLOCK_N + block
        bits += tl.sum(tl.where(number < 63, found << tl.minimum(number, 62).to(tl.int64), 0), 0)
    return tl.max(bits, 0)


@triton.jit
def is_tested(bits, block, NUM_EXCLUDED: tl.constexpr):
    """Return whether a block has to be tested, by the bits of `blocks_to_test`."""
    if NUM_EXCLUDED > 0:
        return True
    else:
        return (block >= 63) | (((bits >> tl.minimum(block, 62).to(tl.int64)) & 1) != 0)


@triton.jit
def load_rows(
    ptr, row, stride, dim, summary_ptr, num_keys, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    SUMMARIES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gather rows of a matrix: `[rows, BLOCK]`, 0 from column `SIZE` on; all rows have to exist.

    `row` is `[N, 1]`, `dim` `[1, BLOCK]`. Keys from `num_keys` on are summaries, which are stored
    contiguously. `WIDE` says that offsets within the matrix need 64 bits, which cost more.
    """
    if WIDE:
        row = row.to(tl.int64)
    if SUMMARIES:
        real = row < num_keys
        inside = dim < SIZE
        found = tl.load(ptr + (row * stride + dim), mask=inside & real, other=0.0)
        extra = tl.load(
            summary_ptr + ((row - num_keys) * SIZE + dim),
            mask=inside & (row >= num_keys), other=0.0,
        )  # fmt: skip
        # one of them is 0. a choice by `real` would need it in the layout of a product's factor,
        # which compilers do not make for tiles of 16 rows
        return found + extra
    elif SIZE == BLOCK:
        # no mask: its bookkeeping would cost as much as the loads
        return tl.load(ptr + (row * stride + dim))
    else:
        return tl.load(ptr + (row * stride + dim), mask=dim < SIZE, other=0.0)


@triton.jit
def existing_row(row):
    """Return the rows of places: those without one hold `-1 - f`, with a row `f` that exists."""
    return tl.where(row < 0, -1 - row, row)


@triton.jit
def load_places(
    ptr, row, head, place, stride_head, stride_row, dim, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gather what belongs to places of a tile, as `load_rows`: `GROUP` heads share each row.

    `ptr` is that of the batch item, `head` the plan head.
    """
    if GROUP == 1:
        ptr += head.to(tl.int64) * stride_head
        return load_rows(
            ptr, row[:, None], stride_row, dim[None, :], ptr, 0, SIZE, BLOCK, False, WIDE
        )
    else:
        query_head = (head * GROUP + place % GROUP).to(tl.int64)
        offset = query_head * stride_head + row.to(tl.int64) * stride_row
        return load_rows(ptr, offset[:, None], 1, dim[None, :], ptr, 0, SIZE, BLOCK, False, True)


@triton.jit
def load_once(ptr, used, other, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Load a short vector once, instead of once for every layout that the compiler wants it in.

    Cheap loads, of fewer elements than there are threads, are repeated by every thread for each
    use: twenty instructions where one will do. Volatile loads are not repeated, and a vector
    shorter than the program is loaded in as many copies as fill it.
    """
    if THREADS > COUNT:
        copy = tl.arange(0, THREADS // COUNT)
        place = ptr[:, None] + tl.zeros_like(copy)[None, :]
        copies = tl.load(
            place, mask=used[:, None] & (copy >= 0)[None, :], other=other, volatile=True
        )
        return tl.max(copies, 1)
    else:
        return tl.load(ptr, mask=used, other=other, volatile=True)


@triton.jit
def load_keys(index_ptr, slot, key_count, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Return what a list says of some slots, `UNUSED` where a slot is not used.

    `THREADS` is 0 where the keys are needed in one layout only; see `load_once`.
    """
    if THREADS > 0:
        return load_once(index_ptr + slot, slot < key_count, UNUSED, COUNT, THREADS).to(tl.int32)
    else:
        return tl.load(index_ptr + slot, mask=slot < key_count, other=UNUSED).to(tl.int32)


@triton.jit
def nearest(key, num_rows):
    """Return the nearest key that exists."""
    return tl.minimum(tl.maximum(key, 0), num_rows - 1)


@triton.jit
def existing(key, instead, num_rows):
    """Return the keys of some slots: the nearest that exist, and `instead` for unused slots."""
    return nearest(tl.where(key == UNUSED, instead, key), num_rows)


@triton.jit
def load_weights(weight_ptr, slot, key_count, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Return the weights of some slots in units of log2, `-inf` where a slot is not used."""
    weight = load_once(weight_ptr, slot < key_count, float("-inf"), COUNT, THREADS)
    return weight.to(tl.float32) * LOG2_E


@triton.jit
def shares(
    logits, bias, value_bias, is_heavy, cap, is_floored, lse, HAS_CAP: tl.constexpr,
    HAS_FLOOR: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return a block's shares of the numerator and of the row sum, from logits in log2 units.

    `lse` in log2 units, `+inf` in rows without keys. The share of the row sum is what its
    derivative passes on: 0 for capped terms, and for sampled ones where the floor was taken.
    """
    by_value = tl.exp2(logits + (value_bias - lse))
    by_sum = by_value
    if SPLIT:
        by_sum = tl.exp2(logits + (bias - lse))
        if HAS_CAP:
            by_sum = tl.where(is_heavy | (logits <= cap), by_sum, 0.0)
        if HAS_FLOOR:
            by_sum = tl.where(is_heavy | (is_floored == 0), by_sum, 0.0)
    return by_value, by_sum
