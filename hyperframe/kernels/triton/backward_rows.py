"""The gradient of the queries, one tile of rows at a time, and of keys that only small tiles hold.

One program owns the rows that a program of the forward owns, recomputes the shares `P` from the
saved log normaliser, and accumulates `dQ`:

    dS_ij = Pv_ij (dO_i . v_j) - Ps_ij (dO_i . O_i - dlse_i),      dQ_i = scale sum_j dS_ij k_j

(`Pv`, `Ps`: shares of the numerator and of the row sum; one and the same without caps, floor or
value weights). With the log normaliser and the output of several merged plans these are the
gradients through the merge. `SCATTER` also adds what the tile contributes to `dK` and `dV`, by
atomic additions in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import BLOCKED, CONSECUTIVE, LOG2_E, load_rows, shares, slot_keys, tile_rows, visible

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "num_summaries", "left", "right"]


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    out_ptr, grad_out_ptr, grad_lse_ptr, delta_ptr, o_batch, o_head, o_row, g_batch, g_head, g_row,
    heads, num_queries, rows, D_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Write `dO_i . O_i - dlse_i` for every row: float32 `[batch, heads, n_q]`."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = flat < rows
    row = flat % num_queries
    head = flat // num_queries % heads
    batch = flat // num_queries // heads
    dim = tl.arange(0, BLOCK_DV)
    inside = used[:, None] & (dim < D_V)[None, :]
    out = tl.load(
        out_ptr + (batch * o_batch + head * o_head + row * o_row)[:, None] + dim[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    grad = tl.load(
        grad_out_ptr + (batch * g_batch + head * g_head + row * g_row)[:, None] + dim[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + flat, mask=used, other=0.0).to(tl.float32)
    tl.store(delta_ptr + flat, delta, mask=used)


@triton.jit(do_not_specialize=[*_SIZES, "position_offset"])
def backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, floored_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row,
    table_ptr, order_ptr, order_batch, order_head, range_ptr, range_batch, range_head,
    index_ptr, index_batch, index_head, index_tile,
    rank_ptr, weight_ptr, weight_batch, weight_head, weight_tile, weight_slot,
    value_weight_ptr, vw_batch, vw_head, vw_tile, vw_slot,
    counts_ptr, cap_ptr, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
    summary_key_ptr, summary_value_ptr,
    plan_heads, query_heads, key_heads, num_tiles, tile_slots, num_queries, num_keys,
    num_summaries, num_slots, left, right, position_offset, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    HAS_RANGE: tl.constexpr, HAS_LIST: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_VALUE_WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_FLOOR: tl.constexpr,
    HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr, NUM_EXCLUDED: tl.constexpr,
    SUMMARIES: tl.constexpr, SCATTER: tl.constexpr, ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. `dq`, `dk`, `dv` are contiguous; the latter two float32, summaries last."""
    SPLIT: tl.constexpr = HAS_VALUE_WEIGHT or HAS_CAP or HAS_FLOOR
    blocks = tl.cdiv(tile_slots * GROUP, BLOCK_M)
    program = tl.program_id(0)
    tile = program // blocks % num_tiles
    head = program // (blocks * num_tiles) % plan_heads
    batch = (program // (blocks * num_tiles) // plan_heads).to(tl.int64)
    key_head = head * key_heads // plan_heads

    # ---- the rows
    place = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    slots_here = tile_slots
    first_key, last_key, list_tile = 0, 0, tile
    order_ptr += batch * order_batch + head.to(tl.int64) * order_head
    if ROWS == BLOCKED:
        first = tl.load(table_ptr + tile * 5)
        slots_here = tl.load(table_ptr + tile * 5 + 1) - first
        first_key = tl.load(table_ptr + tile * 5 + 2)
        last_key = tl.load(table_ptr + tile * 5 + 3)
        list_tile = tl.load(table_ptr + tile * 5 + 4)
        order_ptr += first
    row, is_row = tile_rows(place // GROUP, tile, slots_here, order_ptr, num_queries, ROWS)
    query_head = head * GROUP + place % GROUP
    flat_row = (batch * query_heads + query_head) * num_queries + row
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    in_q = is_row[:, None] & (dim < D)[None, :]
    head64 = query_head.to(tl.int64)
    q_offset = batch * q_batch + head64 * q_head + row.to(tl.int64) * q_row
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=in_q, other=0.0)
    g_offset = batch * g_batch + head64 * g_head + row.to(tl.int64) * g_row
    grad_out = tl.load(
        grad_out_ptr + g_offset[:, None] + dim_v[None, :],
        mask=is_row[:, None] & (dim_v < D_V)[None, :], other=0.0,
    )  # fmt: skip
    lse = tl.load(lse_ptr + flat_row, mask=is_row, other=float("-inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + flat_row, mask=is_row, other=0.0)
    cap = lse
    if HAS_CAP:
        cap = tl.load(cap_ptr + flat_row, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
    is_floored = row
    if HAS_FLOOR:
        is_floored = tl.load(floored_ptr + flat_row, mask=is_row, other=0).to(tl.int32)

    # ---- the slots
    key_count, heavy_count, band_count = 0, 0, 0
    if HAS_LIST and ROWS == BLOCKED:
        key_count = num_slots
    elif HAS_LIST:
        counts = counts_ptr + ((batch * plan_heads + head) * num_tiles + tile) * 3
        key_count = tl.load(counts)
        heavy_count = tl.load(counts + 1)
        band_count = tl.load(counts + 2)
    range_slots = 0
    if HAS_RANGE:
        range_ptr += batch * range_batch + key_head.to(tl.int64) * range_head + first_key
        range_slots = tl.cdiv(last_key - first_key, BLOCK_N) * BLOCK_N
    tile64 = list_tile.to(tl.int64)
    list_head = head
    if ROWS == BLOCKED:
        list_head = key_head
    list_offset = batch * index_batch + list_head.to(tl.int64) * index_head + tile64 * index_tile
    index_ptr += list_offset
    rank_ptr += list_offset
    weight_ptr += batch * weight_batch + list_head.to(tl.int64) * weight_head + tile64 * weight_tile
    value_weight_ptr += batch * vw_batch + list_head.to(tl.int64) * vw_head + tile64 * vw_tile
    k_ptr += batch * k_batch + key_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + key_head.to(tl.int64) * v_head
    flat_key_head = batch * key_heads + key_head
    summary_key_ptr += flat_key_head * num_summaries * D
    summary_value_ptr += flat_key_head * num_summaries * D_V
    ex_rank_ptr += flat_key_head * NUM_EXCLUDED * num_keys
    row_offset = (batch * query_heads + query_head) * NUM_EXCLUDED * num_queries
    if SCATTER:
        dk_ptr += flat_key_head * (num_keys + num_summaries) * D
        dv_ptr += flat_key_head * (num_keys + num_summaries) * D_V

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    for start in range(0, range_slots + key_count, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        key, list_slot, used = slot_keys(
            slot, range_slots, range_ptr, last_key - first_key, index_ptr, key_count,
            num_keys + num_summaries, HAS_RANGE, HAS_LIST,
        )  # fmt: skip
        bias = tl.where(used, 0.0, float("-inf"))
        if HAS_LIST:
            listed = used & (list_slot >= 0)
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + list_slot * weight_slot, mask=listed, other=0.0)
                bias = bias + weight.to(tl.float32) * LOG2_E
            if HAS_RANGE:
                rank = tl.load(rank_ptr + list_slot, mask=listed, other=-1)
                bias = tl.where((rank >= first_key) & (rank < last_key), float("-inf"), bias)
        k = load_rows(
            k_ptr, key[:, None], used[:, None], k_row, dim[None, :], D, summary_key_ptr, num_keys,
            SUMMARIES,
        )  # fmt: skip
        v = load_rows(
            v_ptr, key[:, None], used[:, None], v_row, dim_v[None, :], D_V, summary_value_ptr,
            num_keys, SUMMARIES,
        )  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        value_bias = bias
        if HAS_VALUE_WEIGHT:
            weight = tl.load(value_weight_ptr + list_slot * vw_slot, mask=used, other=0.0)
            value_bias = tl.where(used, weight.to(tl.float32) * LOG2_E, float("-inf"))
        by_value, by_sum = shares(
            logits, bias[None, :], value_bias[None, :], (list_slot < heavy_count)[None, :],
            cap[:, None], is_floored[:, None], lse[:, None], HAS_CAP, HAS_FLOOR, SPLIT,
        )  # fmt: skip
        if IS_CAUSAL or HAS_BAND or NUM_EXCLUDED > 0:
            seen = visible(
                row[:, None], row_offset[:, None], key[None, :], list_slot[None, :], heavy_count,
                band_count, left, right, num_keys, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
                num_queries, position_offset, IS_CAUSAL, HAS_BAND, NUM_EXCLUDED,
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
            dk = tl.dot(tl.trans(grad_logits), q, input_precision=PRECISION) * scale
            target = key.to(tl.int64)[:, None]
            in_k = used[:, None] & (dim < D)[None, :]
            in_v = used[:, None] & (dim_v < D_V)[None, :]
            tl.atomic_add(dk_ptr + target * D + dim[None, :], dk, mask=in_k, sem="relaxed")
            tl.atomic_add(dv_ptr + target * D_V + dim_v[None, :], dv, mask=in_v, sem="relaxed")

    dq *= scale
    # dq is contiguous: [batch, heads, n_q, d]
    targets = dq_ptr + flat_row[:, None] * D + dim[None, :]
    if ACCUMULATE:
        dq += tl.load(targets, mask=in_q, other=0.0).to(tl.float32)
    tl.store(targets, dq.to(dq_ptr.dtype.element_ty), mask=in_q)
