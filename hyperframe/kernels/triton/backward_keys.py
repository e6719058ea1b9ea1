"""The gradient of keys and values, one block of keys at a time: no atomics where a key has one owner.

One program owns `BLOCK_N` slots and walks over the rows that hold them, `BLOCK_M` at a time, with
scores transposed so that `dV = P^T dO` and `dK = dS^T Q` accumulate in registers. Three forms:

- `RANGE`: slots are a tile's range of the key order of a `BlockPlan`. No other tile holds them, so
  the sums are written to their keys directly.
- `SAMPLED`: slots are samples shared by the tiles of a rectangle. Every program sums over some of
  the tiles into a partial result of its own; the partial results are added afterwards, in order.
- `LISTED`: slots of a `TilePlan`'s list, for tiles of many rows. Added atomically, or stored by
  slot for a sum in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import BLOCKED, CONSECUTIVE, LOG2_E, load_rows, shares, slot_keys, tile_rows, visible

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "num_summaries", "left", "right"]

LISTED: tl.constexpr = tl.constexpr(0)
RANGE: tl.constexpr = tl.constexpr(1)
SAMPLED: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=[*_SIZES, "position_offset", "first_program"])
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, floored_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row,
    table_ptr, order_ptr, order_batch, order_head, range_ptr, range_batch, range_head,
    index_ptr, index_batch, index_head, index_tile,
    rank_ptr, weight_ptr, weight_batch, weight_head, weight_tile, weight_slot,
    value_weight_ptr, vw_batch, vw_head, vw_tile, vw_slot,
    counts_ptr, cap_ptr, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
    summary_key_ptr, summary_value_ptr,
    plan_heads, query_heads, key_heads, num_tiles, tile_slots, num_queries, num_keys,
    num_summaries, num_slots, left, right, position_offset, scale, first_program,
    num_parts, part_blocks,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    FORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_VALUE_WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_BAND: tl.constexpr,
    IS_CAUSAL: tl.constexpr, NUM_EXCLUDED: tl.constexpr, SUMMARIES: tl.constexpr,
    ATOMIC: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module.

    A part is `part_blocks` blocks of rows: of one tile (`LISTED`), of consecutive tiles
    (`SAMPLED`); `RANGE` has one part. `num_slots` is the longest list or range of a tile.
    """
    SPLIT: tl.constexpr = HAS_VALUE_WEIGHT or HAS_CAP or HAS_FLOOR
    blocks = tl.cdiv(tile_slots * GROUP, BLOCK_M)
    slot_blocks = tl.cdiv(num_slots, BLOCK_N)
    program = tl.program_id(0) + first_program
    slot = program % slot_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // slot_blocks % num_parts
    rest = program // (slot_blocks * num_parts)
    # the heads of the rows: RANGE walks over all that share the key head
    if FORM == SAMPLED:
        tile = part * part_blocks // blocks
        head = rest % plan_heads
        batch = (rest // plan_heads).to(tl.int64)
        key_head = head * key_heads // plan_heads
    elif FORM == RANGE:
        tile = rest % num_tiles
        key_head = rest // num_tiles % key_heads
        batch = (rest // num_tiles // key_heads).to(tl.int64)
        head = key_head * (plan_heads // key_heads)
    else:
        tile = rest % num_tiles
        head = rest // num_tiles % plan_heads
        batch = (rest // num_tiles // plan_heads).to(tl.int64)
        key_head = head * key_heads // plan_heads
    flat_key_head = batch * key_heads + key_head
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)

    # ---- the slots
    first_key, last_key, heavy_count, band_count = 0, 0, 0, 0
    bias = tl.zeros([BLOCK_N], tl.float32)
    rank = slot
    if FORM == RANGE:
        first_key = tl.load(table_ptr + tile * 5 + 2)
        last_key = tl.load(table_ptr + tile * 5 + 3)
        range_ptr += batch * range_batch + key_head.to(tl.int64) * range_head + first_key
        used = slot < last_key - first_key
        key = tl.load(range_ptr + slot, mask=used, other=0)
    else:
        list_tile = tile
        list_head = head
        key_count = num_slots
        if FORM == SAMPLED:
            list_tile = tl.load(table_ptr + tile * 5 + 4)
            list_head = key_head
        else:
            counts = counts_ptr + ((batch * plan_heads + head) * num_tiles + tile) * 3
            key_count = tl.load(counts)
            heavy_count = tl.load(counts + 1)
            band_count = tl.load(counts + 2)
        tile64 = list_tile.to(tl.int64)
        head64 = list_head.to(tl.int64)
        index_ptr += batch * index_batch + head64 * index_head + tile64 * index_tile
        rank_ptr += batch * index_batch + head64 * index_head + tile64 * index_tile
        weight_ptr += batch * weight_batch + head64 * weight_head + tile64 * weight_tile
        value_weight_ptr += batch * vw_batch + head64 * vw_head + tile64 * vw_tile
        key, unused_place, used = slot_keys(
            slot, 0, range_ptr, 0, index_ptr, key_count, num_keys + num_summaries, False, True
        )
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + slot * weight_slot, mask=used, other=0.0)
            bias += weight.to(tl.float32) * LOG2_E
        if FORM == SAMPLED:
            rank = tl.load(rank_ptr + slot, mask=used, other=-1)
    bias = tl.where(used, bias, float("-inf"))
    value_bias = bias
    if HAS_VALUE_WEIGHT:
        weight = tl.load(value_weight_ptr + slot * vw_slot, mask=used, other=0.0)
        value_bias = tl.where(used, weight.to(tl.float32) * LOG2_E, float("-inf"))
    k_ptr += batch * k_batch + key_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + key_head.to(tl.int64) * v_head
    summary_key_ptr += flat_key_head * num_summaries * D
    summary_value_ptr += flat_key_head * num_summaries * D_V
    k = load_rows(
        k_ptr, key[:, None], used[:, None], k_row, dim[None, :], D, summary_key_ptr, num_keys,
        SUMMARIES,
    )  # fmt: skip
    v = load_rows(
        v_ptr, key[:, None], used[:, None], v_row, dim_v[None, :], D_V, summary_value_ptr, num_keys,
        SUMMARIES,
    )  # fmt: skip
    ex_rank_ptr += flat_key_head * NUM_EXCLUDED * num_keys

    # ---- the rows
    order_ptr += batch * order_batch
    q_ptr += batch * q_batch
    grad_out_ptr += batch * g_batch
    first_block = part * part_blocks
    last_block = first_block + part_blocks
    if FORM == LISTED:
        last_block = tl.minimum(last_block, blocks)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    factor = scale * LOG2_E
    for block in range(first_block, last_block):
        place = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        row_tile = tile
        row_head = head
        slots_here = tile_slots
        row_order = order_ptr
        if FORM == RANGE:
            row_head = head + block // blocks
        if FORM == SAMPLED:
            row_tile = block // blocks
        row_order += row_head.to(tl.int64) * order_head
        if ROWS == BLOCKED:
            first = tl.load(table_ptr + row_tile * 5)
            slots_here = tl.load(table_ptr + row_tile * 5 + 1) - first
            row_order += first
        row, is_row = tile_rows(place // GROUP, row_tile, slots_here, row_order, num_queries, ROWS)
        query_head = row_head * GROUP + place % GROUP
        flat_row = (batch * query_heads + query_head) * num_queries + row
        q_offset = query_head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
        q = tl.load(
            q_ptr + q_offset[:, None] + dim[None, :],
            mask=is_row[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        g_offset = query_head.to(tl.int64) * g_head + row.to(tl.int64) * g_row
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
        block_bias = bias
        block_value_bias = value_bias
        if FORM == SAMPLED:
            # the tile of these rows holds some of the samples exactly
            begin = tl.load(table_ptr + row_tile * 5 + 2)
            end = tl.load(table_ptr + row_tile * 5 + 3)
            block_bias = tl.where((rank >= begin) & (rank < end), float("-inf"), bias)
            block_value_bias = block_bias
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
        by_value, by_sum = shares(
            logits, block_bias[:, None], block_value_bias[:, None], (slot < heavy_count)[:, None],
            cap[None, :], is_floored[None, :], lse[None, :], HAS_CAP, HAS_FLOOR, SPLIT,
        )  # fmt: skip
        if IS_CAUSAL or HAS_BAND or NUM_EXCLUDED > 0:
            row_offset = (batch * query_heads + query_head) * NUM_EXCLUDED * num_queries
            seen = visible(
                row[None, :], row_offset[None, :], key[:, None], slot[:, None], heavy_count,
                band_count, left, right, num_keys, ex_rank_ptr, ex_start_ptr, ex_stop_ptr,
                num_queries, position_offset, IS_CAUSAL, HAS_BAND, NUM_EXCLUDED,
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
        target = flat_key_head * (num_keys + num_summaries) + key
        stored = used
    else:
        # by head (and tile), part, slot
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


@triton.jit
def add_samples_kernel(
    index_ptr, index_batch, index_head, index_tile, part_ptr, out_ptr, key_heads, rectangles,
    num_keys, num_slots, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the gradients of sampled slots to their keys; several slots may name one key.

    `part` is float32 `[batch, key_heads, rectangles, slots, d]`, `out` contiguous
    `[batch, key_heads, n_k, d]`. The first slot of a key adds for all of them, in their order.
    """
    slot_blocks = tl.cdiv(num_slots, BLOCK_N)
    program = tl.program_id(0)
    slot = program % slot_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rectangle = program // slot_blocks % rectangles
    flat_head = (program // slot_blocks // rectangles).to(tl.int64)
    batch = flat_head // key_heads
    index_ptr += batch * index_batch + flat_head % key_heads * index_head
    index_ptr += rectangle.to(tl.int64) * index_tile
    part_ptr += (flat_head * rectangles + rectangle) * num_slots * D
    dim = tl.arange(0, BLOCK_D)
    used = slot < num_slots
    key = tl.load(index_ptr + slot, mask=used, other=-1)
    used = used & (key >= 0) & (key < num_keys)
    repeats = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, num_slots, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        other_key = tl.load(index_ptr + other, mask=other < num_slots, other=-2)
        same = key[:, None] == other_key[None, :]
        repeats += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        values = tl.load(
            part_ptr + other[:, None] * D + dim[None, :],
            mask=(other < num_slots)[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(same.to(tl.float32), values, total, input_precision="ieee")
    stored = (used & (repeats == 0))[:, None] & (dim < D)[None, :]
    targets = out_ptr + (flat_head * num_keys + key)[:, None] * D + dim[None, :]
    total += tl.load(targets, mask=stored, other=0.0).to(tl.float32)
    tl.store(targets, total.to(out_ptr.dtype.element_ty), mask=stored)
