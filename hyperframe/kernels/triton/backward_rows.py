"""The gradient of the queries, one tile of rows at a time, and of keys that only small tiles hold.

One program owns the rows that a program of the forward owns, recomputes the shares `P` from the
saved log normaliser, and accumulates `dQ`:

    dS_ij = Pv_ij (dO_i . v_j) - Ps_ij (dO_i . O_i - dlse_i),      dQ_i = scale sum_j dS_ij k_j

(`Pv`, `Ps`: shares of the numerator and of the row sum; one and the same without caps, floor or
value weights). With the log normaliser and the output of several merged plans these are the
gradients through the merge. `SCATTER` also adds what the tile contributes to `dK` and `dV`, by
atomic additions in float32, or as `half_sums` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    APART,
    BLOCKED,
    LOG2_E,
    blocks_to_test,
    existing,
    existing_row,
    is_tested,
    list_of,
    load_keys,
    load_places,
    load_rows,
    load_weights,
    seen_positions,
    shares,
    visible,
)
from .half_sums import power_of_keys, power_of_values, sum_rows

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "num_summaries", "left", "right"]
_MORE = ["position_offset", "place_tile", "num_sums", "rows_of_sum", "list_slots"]


@triton.jit(do_not_specialize=[*_SIZES, *_MORE])
def backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, floored_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, place_row_ptr, place_lse_ptr, place_delta_ptr, place_tile, table_ptr,
    index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, weight_slot,
    value_weight_ptr, vw_batch, vw_head, vw_tile, vw_slot,
    counts_ptr, cap_ptr, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
    summary_key_ptr, summary_value_ptr, bits_ptr, turn_ptr, spare_ptr, bound_ptr,
    plan_heads, query_heads, key_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    num_summaries, exact_slots, left, right, position_offset, scale, nan, num_sums, rows_of_sum,
    list_slots,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_VALUE_WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_FLOOR: tl.constexpr, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    NUM_EXCLUDED: tl.constexpr, SUMMARIES: tl.constexpr, SCATTER: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """See the module. `dq`, `dk`, `dv` are contiguous; the latter two float32, summaries last.

    Those have `num_sums` rows a head. `REST`: only the tiles that `tile_backward_kernel` left;
    `bits` says which. `HALF`: sums are those of `half_sums`.
    """
    SPLIT: tl.constexpr = HAS_VALUE_WEIGHT or HAS_CAP or HAS_FLOOR
    # lists of blocks without weights: exact slots, then samples that all weigh the same
    UNIFORM: tl.constexpr = ROWS == BLOCKED and not HAS_WEIGHT
    TESTED: tl.constexpr = IS_CAUSAL or HAS_BAND or NUM_EXCLUDED > 0
    ONCE: tl.constexpr = THREADS if TESTED else 0  # the test needs keys in a layout of its own
    places = tile_slots * GROUP
    blocks = tl.cdiv(places, BLOCK_M)
    tile = tl.program_id(0) // blocks
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key
    if REST:
        bits = tl.load(bits_ptr + (batch * plan_heads + head) * num_tiles + tile)
        if (bits >> APART) & 1 == 0:
            return

    # ---- the rows
    place = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    of_tile = ((batch * plan_heads + head) * num_tiles + tile) * place_tile
    of_tile += tl.minimum(place, places - 1)
    # places without a row work on one that exists, weigh nothing and store nothing
    row = tl.load(place_row_ptr + of_tile)
    is_row = (row >= 0) & (place < places)
    row = existing_row(row)
    lse = tl.where(is_row, tl.load(place_lse_ptr + of_tile), float("inf"))
    query_head = head * GROUP + place % GROUP
    flat_row = (batch * query_heads + query_head) * num_queries + row
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    in_q = is_row[:, None] & (dim < D)[None, :]
    q = load_places(
        q_ptr + batch * q_batch, row, head, place, q_head, q_row, dim, D, BLOCK_D, GROUP, WIDE,
    )  # fmt: skip
    grad_out = load_places(
        grad_out_ptr + batch * g_batch, row, head, place, g_head, g_row, dim_v, D_V, BLOCK_DV,
        GROUP, WIDE,
    )  # fmt: skip
    if SCATTER:
        # 0 times what a foreign row holds may be NaN
        q = tl.where(is_row[:, None], q, 0.0).to(q.dtype)
        grad_out = tl.where(is_row[:, None], grad_out, 0.0).to(grad_out.dtype)
    delta = tl.load(place_delta_ptr + of_tile)
    cap = lse
    if HAS_CAP:
        cap = tl.load(cap_ptr + flat_row, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
    is_floored = row
    if HAS_FLOOR:
        is_floored = tl.load(floored_ptr + flat_row, mask=is_row, other=0).to(tl.int32)
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
    first_sum = flat_key_head * num_sums
    times_k, times_v = scale, 1.0
    if HALF:
        turn_ptr += ((batch * plan_heads + head) * num_tiles + tile) * list_slots
        bound_ptr += flat_key_head * 4
        times_k *= power_of_keys(bound_ptr, rows_of_sum, scale)
        times_v = power_of_values(bound_ptr, rows_of_sum)

    targets = dq_ptr + flat_row[:, None] * D + dim[None, :]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if ACCUMULATE:
        # what is there is added at the start, where its loads wait together with others
        # (with a scale of 0, or as small as that, there is nothing)
        unscale = 1.0 / tl.where(tl.abs(scale) < 1.2e-38, 1.0, scale)
        dq = tl.load(targets, mask=in_q, other=0.0).to(tl.float32) * unscale
    factor = scale * LOG2_E
    num_rows = num_keys + num_summaries
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
        v = load_rows(
            v_ptr, key[:, None], v_row, dim_v[None, :], summary_value_ptr, num_keys, D_V,
            BLOCK_DV, SUMMARIES, WIDE,
        )  # fmt: skip
        if HAS_WEIGHT:
            later = slot + BLOCK_N
            next_bias = load_weights(
                weight_ptr + later * weight_slot, later, key_count, BLOCK_N, THREADS
            )
        elif not UNIFORM:
            bias = tl.where(slot < key_count, 0.0, float("-inf"))
        value_bias = bias
        if HAS_VALUE_WEIGHT:
            value_bias = load_weights(
                value_weight_ptr + slot * vw_slot, slot, key_count, BLOCK_N, THREADS
            )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if UNIFORM:
            shift = lse - tl.where(start < exact_slots, 0.0, sample_weight)
            by_value = tl.exp2(logits - shift[:, None])
            by_sum = by_value
            last_slot = tl.where(start < exact_slots, range_length, key_count)
            if start + BLOCK_N > last_slot:
                by_value = tl.where((slot < last_slot)[None, :], by_value, 0.0)
        else:
            by_value, by_sum = shares(
                logits, bias[None, :], value_bias[None, :], (slot < heavy_count)[None, :],
                cap[:, None], is_floored[:, None], lse[:, None], HAS_CAP, HAS_FLOOR, SPLIT,
            )  # fmt: skip
        if TESTED:
            if is_tested(tested, start // BLOCK_N, NUM_EXCLUDED):
                low, span = seen_positions(
                    key, slot, heavy_count, band_count, left, right, num_keys, IS_CAUSAL, HAS_BAND
                )
                seen = visible(
                    row[:, None], row_offset[:, None], key[None, :], low[None, :], span[None, :],
                    ex_rank_ptr, ex_start_ptr, ex_stop_ptr, num_keys, num_queries, position_offset,
                    logits, nan, NUM_EXCLUDED,
                )  # fmt: skip
                by_value = tl.where(seen, by_value, 0.0)
                if SPLIT:
                    by_sum = tl.where(seen, by_sum, 0.0)
        by_key = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if SPLIT:
            grad_logits = by_value * by_key - by_sum * delta[:, None]
        else:
            grad_logits = by_value * (by_key - delta[:, None])
        grad_logits = grad_logits.to(k.dtype)
        dq = tl.dot(grad_logits, k, dq, input_precision=PRECISION)
        if SCATTER:
            dv = tl.dot(tl.trans(by_value.to(v.dtype)), grad_out, input_precision=PRECISION)
            dk = tl.dot(tl.trans(grad_logits), q, input_precision=PRECISION) * times_k
            target = first_sum + key
            if HALF:
                dv *= times_v
                turn = tl.load(turn_ptr + slot, mask=slot < key_count, other=0)
                target = sum_rows(turn, target, spare_ptr)
            target = target.to(tl.int64)[:, None]
            dk = dk.to(dk_ptr.dtype.element_ty)
            dv = dv.to(dv_ptr.dtype.element_ty)
            in_k = (slot < key_count)[:, None] & (dim < D)[None, :]
            in_v = (slot < key_count)[:, None] & (dim_v < D_V)[None, :]
            tl.atomic_add(dk_ptr + target * D + dim[None, :], dk, mask=in_k, sem="relaxed")
            tl.atomic_add(dv_ptr + target * D_V + dim_v[None, :], dv, mask=in_v, sem="relaxed")
        key = existing(next_key, first_key, num_rows)
        next_key = load_keys(index_ptr, slot + 2 * BLOCK_N, key_count, BLOCK_N, ONCE)

    dq *= scale
    tl.store(targets, dq.to(dq_ptr.dtype.element_ty), mask=in_q)
