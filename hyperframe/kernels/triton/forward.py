"""The forward kernel: one online softmax over everything that a tile of rows attends to.

One program owns `BLOCK_M` rows of one tile. It gathers their queries once, walks over the tile's
list `BLOCK_N` slots at a time, and keeps the sum and output of every row in registers: the softmax
of FlashAttention over gathered keys. With `MERGE` the result is merged into the state that is there
already, so that several plans leave one state behind and no partial states: the softmax begins with
it, as with one more key.

Exponentials are shifted by the maximum of the row's first block, or by the log-sum-exp that is
there: a shift is free to choose as long as nothing overflows and the terms that matter do not
vanish, and one that stays spares the maximum of every block and the rescaling of the output. At the
end the sums say whether that held. Where not (a later block lies 40 nats above the first, or the
first holds nothing that the row sees and the others lie as far below 0), the rows are done once
more, with the running maximum.

The keys of a block are loaded two iterations ahead, so that the gathers of K and V, which the
compiler pipelines, never wait for them. The elementwise test of visibility runs only in blocks
where it can matter.

`SPLIT` is the variant in which the row sum and the numerator differ (caps, floor, value weights):
it keeps a running maximum for each, and the exact and the sampled part of the row sum apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BLOCKED,
    LN_2,
    LOG2_E,
    blocks_to_test,
    existing,
    is_tested,
    is_within_range,
    list_of,
    load_keys,
    load_places,
    load_rows,
    load_weights,
    seen_positions,
    tile_rows,
    visible,
)

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "num_summaries", "left", "right"]


@triton.jit
def finite(shift):
    """Return a shift of rows; those without a key so far, at -inf, are shifted by 0."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def logits_of(
    q, k, key, slot, end, bias, row, row_offset, is_in_tested, factor, last_slot, heavy_count,
    band_count, left, right, ex_rank_ptr, ex_start_ptr, ex_stop_ptr, num_keys, num_queries,
    position_offset, nan, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    NUM_EXCLUDED: tl.constexpr, UNIFORM: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the logits of a block, `-inf` where a row does not see a slot.

    In units of log2 and with the weights of the slots; with `SPLIT` without weights; `UNIFORM`:
    products of queries and keys, neither scaled nor weighted.
    """
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if UNIFORM:
        if end > last_slot:
            logits = tl.where((slot < last_slot)[None, :], logits, float("-inf"))
    else:
        logits *= factor
    if not (UNIFORM or SPLIT):
        logits += bias[None, :]
    if IS_CAUSAL or HAS_BAND or NUM_EXCLUDED > 0:
        if is_in_tested:
            low, span = seen_positions(
                key, slot, heavy_count, band_count, left, right, num_keys, IS_CAUSAL, HAS_BAND
            )
            seen = visible(
                row[:, None], row_offset[:, None], key[None, :], low[None, :], span[None, :],
                ex_rank_ptr, ex_start_ptr, ex_stop_ptr, num_keys, num_queries, position_offset,
                logits, nan, NUM_EXCLUDED,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
    return logits


@triton.jit
def weight_of(start, exact_slots, sample_weight):
    """Return the one weight of a block of a `UNIFORM` list."""
    return tl.where(start < exact_slots, 0.0, sample_weight)


@triton.jit
def top_of(logits, factor, weight, UNIFORM: tl.constexpr):
    """Return the largest logit of every row, in units of log2 and weighted."""
    top = tl.max(logits, 1)
    if UNIFORM:
        top = top * factor + weight
    return top


@triton.jit
def exponentials(logits, shift, factor, weight, UNIFORM: tl.constexpr):
    """Return `exp2` of shifted logits."""
    if UNIFORM:
        # the factor and the one weight of the block join the shift
        return tl.exp2(logits * factor + (weight - shift)[:, None])
    else:
        return tl.exp2(logits - shift[:, None])


@triton.jit(do_not_specialize=[*_SIZES, "position_offset", "first_head"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, floored_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, table_ptr, order_ptr, order_batch, order_head,
    index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, weight_slot,
    value_weight_ptr, vw_batch, vw_head, vw_tile, vw_slot,
    counts_ptr, cap_ptr, floor_ptr, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
    summary_key_ptr, summary_value_ptr,
    plan_heads, query_heads, key_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    num_summaries, exact_slots, left, right, position_offset, scale, nan, first_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_VALUE_WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_FLOOR: tl.constexpr, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    NUM_EXCLUDED: tl.constexpr, SUMMARIES: tl.constexpr, MERGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. `counts` is int32 `[batch, heads, tiles, 3]`: used, exact and banded slots.

    The lists of blocks (`ROWS == BLOCKED`) belong to key heads, those of other plans to plan heads.
    The plan heads are those from `first_head` on.
    """
    SPLIT: tl.constexpr = HAS_VALUE_WEIGHT or HAS_CAP or HAS_FLOOR
    # lists of blocks without weights: exact slots, then samples that all weigh the same
    UNIFORM: tl.constexpr = ROWS == BLOCKED and not HAS_WEIGHT
    TESTED: tl.constexpr = IS_CAUSAL or HAS_BAND or NUM_EXCLUDED > 0
    ONCE: tl.constexpr = THREADS if TESTED else 0  # the test needs keys in a layout of its own
    blocks = tl.cdiv(tile_slots * GROUP, BLOCK_M)
    tile = tl.program_id(0) // blocks
    head = tl.program_id(1) + first_head
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key

    # ---- the rows
    place = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    order_ptr += batch * order_batch + head.to(tl.int64) * order_head
    row, is_row = tile_rows(
        place // GROUP, tile, tile_slots, order_ptr, table_ptr, num_queries, ROWS
    )
    query_head = head * GROUP + place % GROUP
    flat_row = (batch * query_heads + query_head) * num_queries + row
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    # places without a row work on row 0, and store nothing
    q = load_places(
        q_ptr + batch * q_batch, row, head, place, q_head, q_row, dim, D, BLOCK_D, GROUP, WIDE,
    )  # fmt: skip
    if GROUP == 1:
        out_ptr += batch * o_batch + head.to(tl.int64) * o_head
        o_offset = row.to(tl.int64) * o_row
    else:
        o_offset = batch * o_batch + query_head.to(tl.int64) * o_head + row.to(tl.int64) * o_row
    out_ptrs = out_ptr + o_offset[:, None] + dim_v[None, :]
    store = is_row[:, None] & (dim_v < D_V)[None, :]
    if HAS_CAP:
        cap = tl.load(cap_ptr + flat_row, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
    if TESTED:
        first_position = tl.min(tl.where(is_row, row, num_queries), 0) + position_offset
        last_position = tl.max(tl.where(is_row, row, 0), 0) + position_offset

    # ---- the list
    (
        index_ptr, weight_ptr, value_weight_ptr, key_count, heavy_count, band_count, range_length,
        sample_weight,
    ) = list_of(
        index_ptr, index_batch, index_head, index_tile, weight_ptr, weight_batch, weight_head,
        weight_tile, value_weight_ptr, vw_batch, vw_head, vw_tile, counts_ptr, table_ptr,
        batch, head, key_head, tile, plan_heads, key_heads, num_tiles, exact_slots, ROWS, UNIFORM,
    )  # fmt: skip
    k_ptr += batch * k_batch + key_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + key_head.to(tl.int64) * v_head
    flat_key_head = batch * key_heads + key_head
    summary_key_ptr += flat_key_head * num_summaries * D
    summary_value_ptr += flat_key_head * num_summaries * D_V
    ex_rank_ptr += flat_key_head * NUM_EXCLUDED * num_keys
    row_offset = (batch * query_heads + query_head) * NUM_EXCLUDED * num_queries

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the row sum
    heavy_sum = tl.zeros([BLOCK_M], tl.float32)
    sampled_sum = tl.zeros([BLOCK_M], tl.float32)
    value_top = top
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if MERGE:
        tl.static_assert(not SPLIT, "plans of this kind stand alone")
        # go on from the state that is there: one more key, of weight exp(lse) and value out
        old_lse = tl.load(lse_ptr + flat_row, mask=is_row, other=float("-inf"))
        acc = tl.load(out_ptrs, mask=store, other=0.0).to(tl.float32)
        value_top = finite(old_lse * LOG2_E)
        heavy_sum = tl.where(old_lse == float("-inf"), 0.0, 1.0)
    factor = tl.maximum(scale * LOG2_E, 1.2e-38)  # not 0: times -inf stays -inf
    num_rows = num_keys + num_summaries
    tested = 0
    if TESTED:
        tested = blocks_to_test(
            index_ptr, key_count, band_count, first_position, last_position, left, right, num_keys,
            num_rows, IS_CAUSAL, HAS_BAND, BLOCK_N,
        )  # fmt: skip
    lane = tl.arange(0, BLOCK_N)
    first_key = tl.load(index_ptr, mask=key_count > 0, other=0).to(tl.int32)
    key = existing(load_keys(index_ptr, lane, key_count, BLOCK_N, ONCE), first_key, num_rows)
    next_key = load_keys(index_ptr, lane + BLOCK_N, key_count, BLOCK_N, ONCE)
    next_bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_WEIGHT:
        next_bias = load_weights(weight_ptr + lane * weight_slot, lane, key_count, BLOCK_N, THREADS)
    for start in range(0, key_count, BLOCK_N):
        slot = start + lane
        bias = next_bias
        k = load_rows(
            k_ptr, key[:, None], k_row, dim[None, :], summary_key_ptr, num_keys, D, BLOCK_D,
            SUMMARIES, WIDE,
        )  # fmt: skip
        if HAS_WEIGHT:
            later = slot + BLOCK_N
            next_bias = load_weights(
                weight_ptr + later * weight_slot, later, key_count, BLOCK_N, THREADS
            )
        elif not UNIFORM:
            bias = tl.where(slot < key_count, 0.0, float("-inf"))
        last_slot = tl.where(start < exact_slots, range_length, key_count)
        logits = logits_of(
            q, k, key, slot, start + BLOCK_N, bias, row, row_offset,
            is_tested(tested, start // BLOCK_N, NUM_EXCLUDED), factor, last_slot, heavy_count,
            band_count, left, right, ex_rank_ptr, ex_start_ptr, ex_stop_ptr, num_keys, num_queries,
            position_offset, nan, HAS_BAND, IS_CAUSAL, NUM_EXCLUDED, UNIFORM, SPLIT, PRECISION,
        )  # fmt: skip
        weight = weight_of(start, exact_slots, sample_weight)
        if SPLIT:
            is_heavy = (slot < heavy_count)[None, :]
            value_bias = bias
            if HAS_VALUE_WEIGHT:
                value_bias = load_weights(
                    value_weight_ptr + slot * vw_slot, slot, key_count, BLOCK_N, THREADS
                )
            row_logits = logits
            if HAS_CAP:
                row_logits = tl.where(is_heavy, logits, tl.minimum(logits, cap[:, None]))
            row_logits += bias[None, :]
            logits += value_bias[None, :]
            new_top = tl.maximum(top, tl.max(row_logits, 1))
            shift = finite(new_top)
            rescale = tl.exp2(top - shift)
            weights = tl.exp2(row_logits - shift[:, None])
            heavy_sum = heavy_sum * rescale + tl.sum(tl.where(is_heavy, weights, 0.0), 1)
            sampled_sum = sampled_sum * rescale + tl.sum(tl.where(is_heavy, 0.0, weights), 1)
            top = new_top
            new_value_top = tl.maximum(value_top, tl.max(logits, 1))
            acc = acc * tl.exp2(value_top - finite(new_value_top))[:, None]
            value_top = new_value_top
        elif not MERGE:
            if start == 0:
                value_top = finite(top_of(logits, factor, weight, UNIFORM))
        if SPLIT:
            weights = exponentials(logits, finite(value_top), factor, weight, UNIFORM)
        else:
            weights = exponentials(logits, value_top, factor, weight, UNIFORM)
            heavy_sum += tl.sum(weights, 1)
        v = load_rows(
            v_ptr, key[:, None], v_row, dim_v[None, :], summary_value_ptr, num_keys, D_V,
            BLOCK_DV, SUMMARIES, WIDE,
        )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        key = existing(next_key, first_key, num_rows)
        next_key = load_keys(index_ptr, slot + 2 * BLOCK_N, key_count, BLOCK_N, ONCE)

    if not SPLIT:
        good = is_within_range(heavy_sum, acc, v_ptr.dtype.element_ty)
        if tl.min((good | (is_row == 0)).to(tl.int32), 0) == 0:
            # once more, with a shift that follows the maximum; few slots at a time, so that this
            # takes no more registers than the loop above
            FEW: tl.constexpr = BLOCK_N if BLOCK_N <= 32 else 32
            few = tl.arange(0, FEW)
            heavy_sum = tl.zeros([BLOCK_M], tl.float32)
            value_top = heavy_sum + float("-inf")
            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            if MERGE:
                old_lse = tl.load(lse_ptr + flat_row, mask=is_row, other=float("-inf"))
                acc = tl.load(out_ptrs, mask=store, other=0.0).to(tl.float32)
                value_top = old_lse * LOG2_E
                heavy_sum = tl.where(old_lse == float("-inf"), 0.0, 1.0)
            for start in tl.range(0, key_count, FEW, num_stages=1):
                few_slot = start + few
                few_key = load_keys(index_ptr, few_slot, key_count, FEW, ONCE)
                few_key = existing(few_key, first_key, num_rows)
                few_bias = tl.where(few_slot < key_count, 0.0, float("-inf"))
                if HAS_WEIGHT:
                    few_bias = load_weights(
                        weight_ptr + few_slot * weight_slot, few_slot, key_count, FEW, THREADS
                    )
                few_k = load_rows(
                    k_ptr, few_key[:, None], k_row, dim[None, :], summary_key_ptr, num_keys, D,
                    BLOCK_D, SUMMARIES, WIDE,
                )  # fmt: skip
                few_v = load_rows(
                    v_ptr, few_key[:, None], v_row, dim_v[None, :], summary_value_ptr, num_keys,
                    D_V, BLOCK_DV, SUMMARIES, WIDE,
                )  # fmt: skip
                last_slot = tl.where(start < exact_slots, range_length, key_count)
                few_logits = logits_of(
                    q, few_k, few_key, few_slot, start + FEW, few_bias, row, row_offset,
                    is_tested(tested, start // BLOCK_N, NUM_EXCLUDED), factor, last_slot,
                    heavy_count, band_count, left, right, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
                    num_keys, num_queries, position_offset, nan, HAS_BAND, IS_CAUSAL,
                    NUM_EXCLUDED, UNIFORM, SPLIT, PRECISION,
                )  # fmt: skip
                weight = weight_of(start, exact_slots, sample_weight)
                new_value_top = tl.maximum(value_top, top_of(few_logits, factor, weight, UNIFORM))
                rescale = tl.exp2(value_top - finite(new_value_top))
                value_top = new_value_top
                few_weights = exponentials(few_logits, finite(value_top), factor, weight, UNIFORM)
                heavy_sum = heavy_sum * rescale + tl.sum(few_weights, 1)
                acc = acc * rescale[:, None]
                acc = tl.dot(few_weights.to(few_v.dtype), few_v, acc, input_precision=PRECISION)

    # ---- the state of these rows
    if SPLIT:
        is_empty = top == float("-inf")
        if HAS_FLOOR:
            floor = tl.load(floor_ptr + flat_row, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
            final_top = tl.where(is_empty, 0.0, tl.maximum(top, floor))
            rescale = tl.exp2(top - final_top)
            floor_sum = tl.exp2(floor - final_top)
            sampled_sum *= rescale
            is_floored = (sampled_sum < floor_sum) & (is_empty == 0)
            tl.store(floored_ptr + flat_row, is_floored.to(tl.int8), mask=is_row)
            row_sum = heavy_sum * rescale + tl.maximum(sampled_sum, floor_sum)
        else:
            final_top = tl.where(is_empty, 0.0, top)
            row_sum = heavy_sum + sampled_sum
        row_sum = tl.where(is_empty, 1.0, row_sum)
        value_shift = tl.where(value_top == float("-inf"), 0.0, value_top)
        # the numerator may lie far above a capped sum; stays finite
        gain = tl.exp2(tl.minimum(value_shift - final_top, 115.0)) / row_sum
        out = acc * tl.where(is_empty, 0.0, gain)[:, None]
        lse = tl.where(is_empty, float("-inf"), (final_top + tl.log2(row_sum)) * LN_2)
    else:
        is_empty = heavy_sum == 0.0
        row_sum = tl.where(is_empty, 1.0, heavy_sum)
        out = acc * (1.0 / row_sum)[:, None]
        lse = tl.where(is_empty, float("-inf"), (value_top + tl.log2(row_sum)) * LN_2)
    tl.store(lse_ptr + flat_row, lse, mask=is_row)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=store)
