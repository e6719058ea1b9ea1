"""The gradient of keys and values, a block of keys at a time: no atomics where keys have one owner.

One program owns `BLOCK_N` slots and walks over the rows that hold them, `BLOCK_M` at a time, with
scores transposed so that `dV = P^T dO` and `dK = dS^T Q` accumulate in registers. Two forms:

- `RANGE`: slots are a tile's range of the key order of a `BlockPlan`. No other tile holds them, so
  the sums are written to their keys directly.
- `LISTED`: slots of a `TilePlan`'s list, for tiles of many rows. Added atomically, or stored by
  slot for a sum in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LOG2_E,
    ORDERED,
    existing,
    existing_row,
    list_of,
    load_keys,
    load_once,
    load_places,
    load_rows,
    load_weights,
    seen_positions,
    shares,
    visible,
)

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "num_summaries", "left", "right"]

LISTED: tl.constexpr = tl.constexpr(0)
RANGE: tl.constexpr = tl.constexpr(1)


@triton.jit
def block_places(
    block, blocks, head, tile, num_tiles, place_tile, lane, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return where a block of rows stands among the places of its batch item."""
    if FORM == RANGE:
        head += block // blocks
    first = (head * num_tiles + tile).to(tl.int64) * place_tile
    return first + block % blocks * BLOCK_M + lane


@triton.jit(
    do_not_specialize=[*_SIZES, "position_offset", "first_program", "part_blocks", "place_tile"]
)
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, floored_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, place_row_ptr, place_lse_ptr, place_delta_ptr, place_tile,
    table_ptr, range_ptr, range_batch, range_head, index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, weight_slot,
    value_weight_ptr, vw_batch, vw_head, vw_tile, vw_slot,
    counts_ptr, cap_ptr, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
    summary_key_ptr, summary_value_ptr,
    plan_heads, query_heads, key_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    num_summaries, num_slots, left, right, position_offset, scale, nan, first_program,
    num_parts, part_blocks,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
    WIDE: tl.constexpr, FORM: tl.constexpr, HAS_GAPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_VALUE_WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_FLOOR: tl.constexpr, HAS_BAND: tl.constexpr,
    IS_CAUSAL: tl.constexpr, NUM_EXCLUDED: tl.constexpr, SUMMARIES: tl.constexpr,
    ATOMIC: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module.

    A part is `part_blocks` blocks of rows of one tile (`LISTED`); `RANGE` has one. `num_slots` is
    the longest list or range of a tile. `HAS_GAPS` says that a place without a row may name a row
    of another tile; elsewhere it names the first row of its own.
    """
    SPLIT: tl.constexpr = HAS_VALUE_WEIGHT or HAS_CAP or HAS_FLOOR
    places = tile_slots * GROUP
    blocks = tl.cdiv(places, BLOCK_M)
    slot_blocks = tl.cdiv(num_slots, BLOCK_N)
    program = tl.program_id(0) + first_program
    lane = tl.arange(0, BLOCK_M)
    slot = program % slot_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // slot_blocks % num_parts
    rest = program // (slot_blocks * num_parts)
    # the heads of the rows: RANGE walks over all that share the key head
    if FORM == RANGE:
        tile = rest % num_tiles
        key_head = rest // num_tiles % key_heads
        batch = (rest // num_tiles // key_heads).to(tl.int64)
        head = key_head * heads_per_key
    else:
        tile = rest % num_tiles
        head = rest // num_tiles % plan_heads
        batch = (rest // num_tiles // plan_heads).to(tl.int64)
        key_head = head // heads_per_key
    flat_key_head = batch * key_heads + key_head
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)

    # ---- the slots
    heavy_count, band_count = 0, 0
    bias = tl.zeros([BLOCK_N], tl.float32)
    if FORM == RANGE:
        first_key = tl.load(table_ptr + tile * 5 + 2)
        key_count = tl.load(table_ptr + tile * 5 + 3) - first_key
        index_ptr = range_ptr + batch * range_batch + key_head.to(tl.int64) * range_head + first_key
    else:
        index_ptr, weight_ptr, value_weight_ptr, key_count, heavy_count, band_count, _, _ = list_of(
            index_ptr, index_batch, index_head, index_tile, weight_ptr, weight_batch, weight_head,
            weight_tile, value_weight_ptr, vw_batch, vw_head, vw_tile, counts_ptr, table_ptr,
            batch, head, key_head, tile, plan_heads, key_heads, num_tiles, 0, ORDERED, False,
        )  # fmt: skip
    used = slot < key_count
    # slots that are not used hold the first key of the list, and weigh nothing
    first = tl.load(index_ptr, mask=key_count > 0, other=0).to(tl.int32)
    key = load_keys(index_ptr, slot, key_count, BLOCK_N, 0)
    key = existing(key, first, num_keys + num_summaries)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + slot * weight_slot, mask=used, other=0.0)
        bias += weight.to(tl.float32) * LOG2_E
    bias = tl.where(used, bias, float("-inf"))
    value_bias = bias
    if HAS_VALUE_WEIGHT:
        value_bias = load_weights(
            value_weight_ptr + slot * vw_slot, slot, key_count, BLOCK_N, BLOCK_N
        )
    k_ptr += batch * k_batch + key_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + key_head.to(tl.int64) * v_head
    summary_key_ptr += flat_key_head * num_summaries * D
    summary_value_ptr += flat_key_head * num_summaries * D_V
    k = load_rows(
        k_ptr, key[:, None], k_row, dim[None, :], summary_key_ptr, num_keys, D, BLOCK_D, SUMMARIES,
        WIDE,
    )  # fmt: skip
    v = load_rows(
        v_ptr, key[:, None], v_row, dim_v[None, :], summary_value_ptr, num_keys, D_V, BLOCK_DV,
        SUMMARIES, WIDE,
    )  # fmt: skip
    ex_rank_ptr += flat_key_head * NUM_EXCLUDED * num_keys

    # ---- the rows
    q_ptr += batch * q_batch
    grad_out_ptr += batch * g_batch
    first_block = part * part_blocks
    last_block = first_block + part_blocks
    if FORM == LISTED:
        last_block = tl.minimum(last_block, blocks)
    low, span = seen_positions(
        key, slot, heavy_count, band_count, left, right, num_keys, IS_CAUSAL, HAS_BAND
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    factor = scale * LOG2_E
    first_place = batch * plan_heads * num_tiles * place_tile
    place_row_ptr += first_place
    place_lse_ptr += first_place
    place_delta_ptr += first_place
    all_of_it = lane >= 0
    of_batch = block_places(
        first_block, blocks, head, tile, num_tiles, place_tile, lane, FORM, BLOCK_M
    )
    next_row = tl.load(place_row_ptr + of_batch)
    next_lse = load_once(place_lse_ptr + of_batch, all_of_it, 0.0, BLOCK_M, THREADS)
    next_delta = load_once(place_delta_ptr + of_batch, all_of_it, 0.0, BLOCK_M, THREADS)
    for block in range(first_block, last_block):
        row = next_row
        lse = next_lse
        delta = next_delta
        of_batch = block_places(
            tl.minimum(block + 1, last_block - 1), blocks, head, tile, num_tiles, place_tile, lane,
            FORM, BLOCK_M,
        )  # fmt: skip
        next_row = tl.load(place_row_ptr + of_batch)
        next_lse = load_once(place_lse_ptr + of_batch, all_of_it, 0.0, BLOCK_M, THREADS)
        next_delta = load_once(place_delta_ptr + of_batch, all_of_it, 0.0, BLOCK_M, THREADS)
        is_row = row >= 0
        row = existing_row(row)  # places without a row weigh nothing
        place = block % blocks * BLOCK_M + lane
        row_head = head
        if FORM == RANGE:
            row_head = head + block // blocks
        query_head = row_head * GROUP + place % GROUP
        q = load_places(q_ptr, row, row_head, place, q_head, q_row, dim, D, BLOCK_D, GROUP, WIDE)
        grad_out = load_places(
            grad_out_ptr, row, row_head, place, g_head, g_row, dim_v, D_V, BLOCK_DV, GROUP, WIDE,
        )  # fmt: skip
        if HAS_GAPS:
            # 0 times what a foreign row holds may be NaN
            q = tl.where(is_row[:, None], q, 0.0).to(q.dtype)
            grad_out = tl.where(is_row[:, None], grad_out, 0.0).to(grad_out.dtype)
        flat_row = (batch * query_heads + query_head) * num_queries + row
        cap = lse
        if HAS_CAP:
            cap = tl.load(cap_ptr + flat_row, volatile=True).to(tl.float32) * LOG2_E
        is_floored = row
        if HAS_FLOOR:
            is_floored = tl.load(floored_ptr + flat_row, volatile=True).to(tl.int32)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
        by_value, by_sum = shares(
            logits, bias[:, None], value_bias[:, None], (slot < heavy_count)[:, None],
            cap[None, :], is_floored[None, :], lse[None, :], HAS_CAP, HAS_FLOOR, SPLIT,
        )  # fmt: skip
        if IS_CAUSAL or HAS_BAND or NUM_EXCLUDED > 0:
            row_offset = (batch * query_heads + query_head) * NUM_EXCLUDED * num_queries
            seen = visible(
                row[None, :], row_offset[None, :], key[:, None], low[:, None], span[:, None],
                ex_rank_ptr, ex_start_ptr, ex_stop_ptr, num_keys, num_queries, position_offset,
                logits, nan, NUM_EXCLUDED,
            )  # fmt: skip
            by_value = tl.where(seen, by_value, 0.0)
            if SPLIT:
                by_sum = tl.where(seen, by_sum, 0.0)
        dv = tl.dot(by_value.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
        by_key = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        if SPLIT:
            grad_logits = by_value * by_key - by_sum * delta[None, :]
        else:
            grad_logits = by_value * (by_key - delta[None, :])
        dk = tl.dot(grad_logits.to(q.dtype), q, dk, input_precision=PRECISION)

    dk *= scale
    if FORM == RANGE or ATOMIC:
        target = flat_key_head * (num_keys + num_summaries) + tl.where(used, key, 0)
        stored = used
    else:
        # by head (and tile), part, slot; slots that are not used may hold NaN times 0
        dk = tl.where(used[:, None], dk, 0.0)
        dv = tl.where(used[:, None], dv, 0.0)
        target = (tl.program_id(0) // slot_blocks).to(tl.int64) * num_slots + slot
        stored = slot < num_slots
    k_targets = dk_ptr + target.to(tl.int64)[:, None] * D + dim[None, :]
    v_targets = dv_ptr + target.to(tl.int64)[:, None] * D_V + dim_v[None, :]
    in_k = stored[:, None] & (dim < D)[None, :]
    in_v = stored[:, None] & (dim_v < D_V)[None, :]
    if ATOMIC:
        tl.atomic_add(k_targets, dk, mask=in_k, sem="relaxed")
        tl.atomic_add(v_targets, dv, mask=in_v, sem="relaxed")
    else:
        if ACCUMULATE:
            dk += tl.load(k_targets, mask=in_k, other=0.0).to(tl.float32)
            dv += tl.load(v_targets, mask=in_v, other=0.0).to(tl.float32)
        tl.store(k_targets, dk.to(dk_ptr.dtype.element_ty), mask=in_k)
        tl.store(v_targets, dv.to(dv_ptr.dtype.element_ty), mask=in_v)
