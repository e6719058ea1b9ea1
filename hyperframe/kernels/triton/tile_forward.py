"""The forward kernel of tiles with lists of their own, for plans that need nothing else.

What `forward_kernel` computes, a third sooner: one program owns `BLOCK_M` consecutive rows of a
tile and walks over whole blocks of the tile's list, gathers, multiplies and adds, and nothing else.
No masks, no keys that might not exist, no last block that is not whole, no second loop: what they
need would cost registers, and registers decide how many programs share a multiprocessor.

Two things make that safe. `survey_kernel` looks at all lists beforehand and says in which blocks
some row might not see some slot: only those get the elementwise test. And a tile that this kernel
cannot do, or finds that it did not (a key out of range, a list that does not end with a block, rows
whose sums left the range of the shift, which is the maximum of their first block), has the bit
`APART` set: `rest_kernel` (`tile_rest`) does such tiles afterwards. Lists that are laid out here
end with a block, by slots of weight 0 (`tile_lists`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    APART,
    CONSECUTIVE,
    LN_2,
    LOG2_E,
    is_within_range,
    load_places,
    load_rows,
    seen_positions,
    tile_rows,
)
from .forward import finite

__all__ = ["store_state", "survey_kernel", "tile_forward_kernel"]

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "left", "right"]


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=[*_SIZES, "position_offset"])
def survey_kernel(
    bits_ptr, index_ptr, index_batch, index_head, index_tile, counts_ptr, plan_heads, num_tiles,
    tile_slots, num_queries, num_keys, left, right, position_offset,
    BLOCK_N: tl.constexpr, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write which blocks of `BLOCK_N` slots of each list have to be tested, and whether it is good.

    Bit `b` of int64 `[batch, heads, tiles]` for block `b`, bit 61 for all later ones; bit `APART`
    if the fast kernel is not to do the tile.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    flat_tile = (batch * plan_heads + head) * num_tiles + tile
    key_count = tl.load(counts_ptr + flat_tile * 3)
    band_count = tl.load(counts_ptr + flat_tile * 3 + 2)
    index_ptr += batch * index_batch + head.to(tl.int64) * index_head
    index_ptr += tile.to(tl.int64) * index_tile
    first = tile * tile_slots + position_offset
    last = tl.minimum((tile + 1) * tile_slots, num_queries) - 1 + position_offset
    bits = tl.zeros([1], tl.int64)
    fits = tl.full([1], 1, tl.int32)
    # a list of 1,024 slots at once: what costs here is waiting
    BLOCKS: tl.constexpr = 1024 // BLOCK_N
    block = tl.arange(0, BLOCKS)
    for start in range(0, key_count, 1024):
        slot = start + block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        used = slot < key_count
        key = tl.load(index_ptr + slot, mask=used, other=0).to(tl.int32)
        fits &= tl.min(tl.min(((key >= 0) & (key < num_keys)).to(tl.int32), 1), 0)
        near = key > last  # nowhere
        if IS_CAUSAL:
            near = key > first
        if HAS_BAND:
            near = key >= first - left
            if not IS_CAUSAL:
                near = near & (key <= last + right)
            near = near | (slot < band_count)
        if IS_CAUSAL or HAS_BAND:
            found = tl.max((near & used).to(tl.int32), 1).to(tl.int64)
            number = tl.minimum(start // BLOCK_N + block, 61).to(tl.int64)
            bits |= tl.reduce(found << number, 0, _either)
    if tl.min(fits, 0) == 0 or key_count % BLOCK_N != 0:
        bits |= tl.full([1], 1, tl.int64) << APART
    tl.store(bits_ptr + flat_tile, tl.max(bits, 0))


@triton.jit
def store_state(
    out_ptr, lse_ptr, acc, row_sum, shift, batch, query_head, query_heads, row, is_row, num_queries,
    o_batch, o_head, o_row, dim_v, D_V: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of rows, from sums of exponentials with a shift."""
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    lse = tl.where(is_empty, float("-inf"), (shift + tl.log2(row_sum)) * LN_2)
    out = acc * (1.0 / row_sum)[:, None]
    flat_row = (batch * query_heads + query_head) * num_queries + row
    o_offset = batch * o_batch + query_head.to(tl.int64) * o_head + row.to(tl.int64) * o_row
    tl.store(lse_ptr + flat_row, lse, mask=is_row)
    tl.store(
        out_ptr + o_offset[:, None] + dim_v[None, :], out.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim_v < D_V)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "position_offset"])
def tile_forward_kernel(
    bits_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, counts_ptr,
    plan_heads, query_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    left, right, position_offset, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. `counts` is int32 `[batch, heads, tiles, 3]`: used, exact and banded slots.

    Lists have at least `BLOCK_N` slots, and weights a last stride of 1.
    """
    blocks = tl.cdiv(tile_slots * GROUP, BLOCK_M)
    tile = tl.program_id(0) // blocks
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key

    # ---- the list
    tile64, head64 = tile.to(tl.int64), head.to(tl.int64)
    flat_tile = (batch * plan_heads + head) * num_tiles + tile
    bits = tl.load(bits_ptr + flat_tile)
    counts_ptr += flat_tile * 3
    key_count = tl.where((bits >> APART) & 1 != 0, 0, tl.load(counts_ptr))
    heavy_count = tl.load(counts_ptr + 1)
    band_count = tl.load(counts_ptr + 2)
    index_ptr += batch * index_batch + head64 * index_head + tile64 * index_tile
    weight_ptr += batch * weight_batch + head64 * weight_head + tile64 * weight_tile
    k_ptr += batch * k_batch + key_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + key_head.to(tl.int64) * v_head

    # ---- the rows
    place = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row, is_row = tile_rows(
        place // GROUP, tile, tile_slots, index_ptr, index_ptr, num_queries, CONSECUTIVE
    )
    query_head = head * GROUP + place % GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    q = load_places(
        q_ptr + batch * q_batch, row, head, place, q_head, q_row, dim, D, BLOCK_D, GROUP, WIDE,
    )  # fmt: skip
    position = row + position_offset

    # ---- one softmax over the list
    lane = tl.arange(0, BLOCK_N)
    shift = tl.zeros([BLOCK_M], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    next_key = tl.load(index_ptr + lane).to(tl.int32)
    for start in range(0, key_count, BLOCK_N):
        key = next_key
        # the keys of the next block now, so that the gathers do not wait for them
        later = tl.minimum(start + BLOCK_N, key_count - BLOCK_N)
        next_key = tl.load((index_ptr + later) + lane).to(tl.int32)
        k = load_rows(k_ptr, key[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D, False, WIDE)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_WEIGHT:
            logits += tl.load((weight_ptr + start) + lane).to(tl.float32)[None, :]
        if (bits >> tl.minimum(start // BLOCK_N, 61).to(tl.int64)) & 1 != 0:
            slot = start + lane
            # loaded again, where it is rarely needed, rather than held in a second layout
            low = tl.load(index_ptr + slot).to(tl.int32)
            if IS_CAUSAL:
                span = tl.zeros_like(low) + 0x3FFFFFFF
                if HAS_BAND:
                    low += tl.where(slot >= heavy_count, left + 1, 0)
                    span = tl.where(slot < band_count, left, span)
                span = span.to(tl.uint32, bitcast=True)
            else:
                low, span = seen_positions(
                    low, slot, heavy_count, band_count, left, right, num_keys, False, HAS_BAND
                )
            seen = (position[:, None] - low[None, :]).to(tl.uint32, bitcast=True)
            logits = tl.where(seen <= span[None, :], logits, float("-inf"))
        if start == 0:
            shift = finite(tl.max(logits, 1)) * LOG2_E
        weights = tl.exp2(logits * LOG2_E - shift[:, None])
        row_sum += tl.sum(weights, 1)
        v = load_rows(
            v_ptr, key[:, None], v_row, dim_v[None, :], v_ptr, 0, D_V, BLOCK_DV, False, WIDE
        )
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    good = is_within_range(row_sum, acc, v_ptr.dtype.element_ty)
    if tl.min((good | (is_row == 0)).to(tl.int32), 0) == 0:
        # other programs of the tile may miss what they have to test: it is done again anyway
        tl.store(bits_ptr + flat_tile, tl.full([], 1, tl.int64) << APART)

    store_state(
        out_ptr, lse_ptr, acc, row_sum, shift, batch, query_head, query_heads, row, is_row,
        num_queries, o_batch, o_head, o_row, dim_v, D_V,
    )  # fmt: skip
