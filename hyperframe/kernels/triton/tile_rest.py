"""The tiles that the fast kernels of tiles left: few, or none.

Those kernels (`tile_forward`, `hopper_tiles`) do whole lists of keys that exist, by a shift that
stays. Here is the rest of what a plan may hold, slowly: one program looks at several tiles, since
most have nothing to do and launching a program for each would cost more than they do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    APART,
    CONSECUTIVE,
    LOG2_E,
    UNUSED,
    existing,
    load_places,
    load_rows,
    seen_positions,
    tile_rows,
)
from .forward import finite
from .tile_forward import store_state

__all__ = ["rest_kernel"]

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "left", "right"]


@triton.jit(do_not_specialize=[*_SIZES, "position_offset"])
def rest_kernel(
    bits_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, counts_ptr,
    plan_heads, query_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    left, right, position_offset, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Do the tiles whose bit `APART` is set; a program looks at `TILES` tiles.

    With the maximum of all blocks so far, keys that are made to exist, and a test of every block.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * TILES
    flat_tile = (batch * plan_heads + head) * num_tiles
    bits_ptr += flat_tile
    number = first + tl.arange(0, TILES)
    bits = tl.load(bits_ptr + number, mask=number < num_tiles, other=0)
    if tl.max((bits >> APART) & 1, 0) != 0:
        key_head = (head // heads_per_key).to(tl.int64)
        k_ptr += batch * k_batch + key_head * k_head
        v_ptr += batch * v_batch + key_head * v_head
        index_ptr += batch * index_batch + head.to(tl.int64) * index_head
        weight_ptr += batch * weight_batch + head.to(tl.int64) * weight_head
        dim = tl.arange(0, BLOCK_D)
        dim_v = tl.arange(0, BLOCK_DV)
        lane = tl.arange(0, BLOCK_N)
        blocks = tl.cdiv(tile_slots * GROUP, BLOCK_M)
        for part in range(first * blocks, tl.minimum(first + TILES, num_tiles) * blocks):
            tile = part // blocks
            if (tl.load(bits_ptr + tile) >> APART) & 1 != 0:
                # ---- the list and the rows
                slots_ptr = index_ptr + tile.to(tl.int64) * index_tile
                bias_ptr = weight_ptr + tile.to(tl.int64) * weight_tile
                key_count = tl.load(counts_ptr + (flat_tile + tile) * 3)
                heavy_count = tl.load(counts_ptr + (flat_tile + tile) * 3 + 1)
                band_count = tl.load(counts_ptr + (flat_tile + tile) * 3 + 2)
                first_key = tl.load(slots_ptr, mask=key_count > 0, other=0).to(tl.int32)
                place = part % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
                row, is_row = tile_rows(
                    place // GROUP, tile, tile_slots, slots_ptr, slots_ptr, num_queries, CONSECUTIVE
                )
                q = load_places(
                    q_ptr + batch * q_batch, row, head, place, q_head, q_row, dim, D, BLOCK_D,
                    GROUP, WIDE,
                )  # fmt: skip
                # ---- one softmax over the list
                top = tl.full([BLOCK_M], float("-inf"), tl.float32)
                row_sum = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                for start in tl.range(0, key_count, BLOCK_N, num_stages=3):
                    slot = start + lane
                    used = slot < key_count
                    key = tl.load(slots_ptr + slot, mask=used, other=UNUSED).to(tl.int32)
                    key = existing(key, first_key, num_keys)
                    bias = tl.where(used, 0.0, float("-inf"))
                    if HAS_WEIGHT:
                        bias = tl.load(bias_ptr + slot, mask=used, other=float("-inf"))
                        bias = bias.to(tl.float32) * LOG2_E
                    k = load_rows(
                        k_ptr, key[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D, False, WIDE
                    )
                    v = load_rows(
                        v_ptr, key[:, None], v_row, dim_v[None, :], v_ptr, 0, D_V, BLOCK_DV, False,
                        WIDE,
                    )  # fmt: skip
                    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
                    logits += bias[None, :]
                    if IS_CAUSAL or HAS_BAND:
                        low, span = seen_positions(
                            key, slot, heavy_count, band_count, left, right, num_keys, IS_CAUSAL,
                            HAS_BAND,
                        )  # fmt: skip
                        seen = (row + position_offset)[:, None] - low[None, :]
                        seen = seen.to(tl.uint32, bitcast=True) <= span[None, :]
                        logits = tl.where(seen, logits, float("-inf"))
                    former, top = top, tl.maximum(top, tl.max(logits, 1))
                    rescale = tl.exp2(former - finite(top))
                    weights = tl.exp2(logits - finite(top)[:, None])
                    row_sum = row_sum * rescale + tl.sum(weights, 1)
                    acc = acc * rescale[:, None]
                    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
                query_head = head * GROUP + place % GROUP
                store_state(
                    out_ptr, lse_ptr, acc, row_sum, finite(top), batch, query_head, query_heads,
                    row, is_row, num_queries, o_batch, o_head, o_row, dim_v, D_V,
                )  # fmt: skip
