"""All gradients of tiles with lists of their own, for plans that need nothing else.

What `backward_rows` computes with `SCATTER`, sooner, for the plans and tiles that `tile_forward`
is for: one program owns `BLOCK_M` rows of a tile, walks over whole blocks of its list, recomputes
the shares, accumulates `dQ`, and adds what the rows contribute to `dK` and `dV`. `survey_kernel`
says which blocks need the elementwise test; tiles marked `APART` are left to `backward_rows`.

Sums are float16 times powers of two (`half_sums`). The powers ride on factors that are there
anyway: the shares carry that of `dV`, their gradients that of `dK`, and `dQ` gives it back at the
end. So `Q` and `dO` go to shared memory as they are, once, which leaves room for a second program
on a multiprocessor where `d = 128`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import APART, LOG2_E, existing_row, load_places, load_rows, seen_positions
from .half_sums import power_of_keys, power_of_values, sum_rows

__all__ = ["tile_backward_kernel"]

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "left", "right"]
_MORE = ["position_offset", "place_tile", "rows_of_sum", "list_slots"]


@triton.jit(do_not_specialize=[*_SIZES, *_MORE])
def tile_backward_kernel(
    bits_ptr, q_ptr, k_ptr, v_ptr, grad_out_ptr, dq_ptr, dk_ptr, dv_ptr, turn_ptr, spare_ptr,
    bound_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, place_row_ptr, place_lse_ptr, place_delta_ptr, place_tile,
    index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, counts_ptr,
    plan_heads, query_heads, key_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    left, right, position_offset, scale, rows_of_sum, list_slots,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. `dq` is contiguous; sums in `dk` and `dv` are over `rows_of_sum` rows.

    Lists have at least `BLOCK_N` slots, and weights a last stride of 1.
    """
    places = tile_slots * GROUP
    blocks = tl.cdiv(places, BLOCK_M)
    tile = tl.program_id(0) // blocks
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key

    # ---- the list
    tile64, head64 = tile.to(tl.int64), head.to(tl.int64)
    flat_tile = (batch * plan_heads + head) * num_tiles + tile
    bits = tl.load(bits_ptr + flat_tile)
    is_apart = (bits >> APART) & 1 != 0
    # places of a tile without any row name a row of another, and 0 times NaN is NaN
    is_done = is_apart | (tile * tile_slots >= num_queries)
    counts_ptr += flat_tile * 3
    key_count = tl.where(is_done, 0, tl.load(counts_ptr))
    heavy_count = tl.load(counts_ptr + 1)
    band_count = tl.load(counts_ptr + 2)
    index_ptr += batch * index_batch + head64 * index_head + tile64 * index_tile
    weight_ptr += batch * weight_batch + head64 * weight_head + tile64 * weight_tile
    turn_ptr += flat_tile * list_slots
    k_ptr += batch * k_batch + key_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + key_head.to(tl.int64) * v_head
    flat_key_head = batch * key_heads + key_head
    bound_ptr += flat_key_head * 4
    first_sum = (flat_key_head * num_keys).to(tl.int32)

    # ---- the rows
    place = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    of_tile = flat_tile * place_tile + tl.minimum(place, places - 1)
    # places without a row work on one of their tile, weigh nothing and store nothing
    row = tl.load(place_row_ptr + of_tile)
    is_row = (row >= 0) & (place < places)
    row = existing_row(row)
    shift = tl.where(is_row, tl.load(place_lse_ptr + of_tile), float("inf"))
    query_head = head * GROUP + place % GROUP
    flat_row = (batch * query_heads + query_head) * num_queries + row
    position = row + position_offset
    dim = tl.arange(0, D)
    q = load_places(
        q_ptr + batch * q_batch, row, head, place, q_head, q_row, dim, D, D, GROUP, WIDE
    )
    grad_out = load_places(
        grad_out_ptr + batch * g_batch, row, head, place, g_head, g_row, dim, D, D, GROUP, WIDE
    )
    of_keys = power_of_keys(bound_ptr, rows_of_sum, scale)
    of_values = power_of_values(bound_ptr, rows_of_sum)
    shift -= tl.log2(of_values)
    slope_scale = scale * (of_keys / of_values)
    delta = tl.load(place_delta_ptr + of_tile) * slope_scale
    factor = scale * LOG2_E

    lane = tl.arange(0, BLOCK_N)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    next_key = tl.load(index_ptr + lane).to(tl.int32)
    next_turn = tl.load(turn_ptr + lane)
    next_bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_WEIGHT and AHEAD:
        next_bias = tl.load(weight_ptr + lane).to(tl.float32) * LOG2_E
    for start in range(0, key_count, BLOCK_N):
        key = next_key
        bias = next_bias
        sum_row = sum_rows(next_turn, first_sum + key, spare_ptr)
        # what the next block needs now, so that it does not wait for it
        later = tl.minimum(start + BLOCK_N, key_count - BLOCK_N)
        next_key = tl.load((index_ptr + later) + lane).to(tl.int32)
        next_turn = tl.load((turn_ptr + later) + lane)
        if HAS_WEIGHT:
            if AHEAD:
                next_bias = tl.load((weight_ptr + later) + lane).to(tl.float32) * LOG2_E
            else:
                bias = tl.load((weight_ptr + start) + lane).to(tl.float32) * LOG2_E
        k = load_rows(k_ptr, key[:, None], k_row, dim[None, :], k_ptr, 0, D, D, False, WIDE)
        v = load_rows(v_ptr, key[:, None], v_row, dim[None, :], v_ptr, 0, D, D, False, WIDE)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        share = tl.exp2(logits * factor + (bias[None, :] - shift[:, None]))
        if (bits >> tl.minimum(start // BLOCK_N, 61).to(tl.int64)) & 1 != 0:
            slot = start + lane
            # loaded again, where it is rarely needed, rather than held in a second layout
            low, span = seen_positions(
                tl.load(index_ptr + slot).to(tl.int32), slot, heavy_count, band_count, left, right,
                num_keys, IS_CAUSAL, HAS_BAND,
            )  # fmt: skip
            seen = (position[:, None] - low[None, :]).to(tl.uint32, bitcast=True)
            share = tl.where(seen <= span[None, :], share, 0.0)
        by_key = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        grad_logits = (share * (by_key * slope_scale - delta[:, None])).to(k.dtype)
        dq = tl.dot(grad_logits, k, dq, input_precision=PRECISION)
        first = sum_row.to(tl.int64)[:, None] * D
        dv = tl.dot(tl.trans(share.to(v.dtype)), grad_out, input_precision=PRECISION)
        dv = dv.to(dv_ptr.dtype.element_ty)
        tl.atomic_add(dv_ptr + first + dim[None, :], dv, sem="relaxed")
        dk = tl.dot(tl.trans(grad_logits), q, input_precision=PRECISION)
        dk = dk.to(dk_ptr.dtype.element_ty)
        tl.atomic_add(dk_ptr + first + dim[None, :], dk, sem="relaxed")

    dq *= 1.0 / of_keys
    targets = dq_ptr + flat_row[:, None] * D + dim[None, :]
    stored = (is_row & (is_apart == 0))[:, None] & (dim >= 0)[None, :]
    tl.store(targets, dq.to(dq_ptr.dtype.element_ty), mask=stored)
