"""The forward kernel of tiles with whole lists for Hopper, scheduled by hand.

What `tile_forward_kernel` computes, for heads of 64 or 128 in 16 bits. There the compiler decides
when rows are gathered; here the kernel says so, in Gluon. The values of the next block are gathered
as soon as the products with those of the last one are done, into the other of two buffers, and its
keys as soon as the scores of this one are: so something is on its way at any time, and three
programs with blocks of 64 keys fit on a multiprocessor. Per key that is a third fewer instructions
than with blocks of 32, and brings the gathers near what the L2 cache can give. Weights come the
same way, because a fence waits for loads that are under way.

Fences: rows that `cp.async` wrote are read by the matrix unit, which sees memory through another
proxy. Barriers: a buffer may be written again when all warps have waited for their products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

__all__ = ["hopper_tiles_kernel"]

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
APART: gl.constexpr = gl.constexpr(62)

# renamed in Triton 3.7
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

_SIZES = ["num_tiles", "tile_slots", "num_queries", "num_keys", "left", "right"]


@gluon.jit
def rows_of(tile, place, tile_slots, num_queries, GROUP: gl.constexpr):
    """Return the rows of places of a tile, 0 where there is none, and whether there is one."""
    slot = place // GROUP
    row = tile * tile_slots + slot
    used = (slot < tile_slots) & (row < num_queries)
    return gl.where(used, row, 0), used


@gluon.jit
def gather(buffer, ptr, key, stride, dim, skip, WIDE: gl.constexpr):
    """Start to copy rows into a buffer, unless they are skipped; a group of its own in any case."""
    if skip == 0:
        if WIDE:
            key = key.to(gl.int64)
        async_copy.async_copy_global_to_shared(buffer, ptr + (key[:, None] * stride + dim[None, :]))
    async_copy.commit_group()


@gluon.jit
def of_threads(weights):
    """Return sums over what a thread holds of each row; adding up threads can wait for the end."""
    parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def hide_unseen(
    logits, position, index_ptr, slot, heavy_count, band_count, left, right,
    HAS_BAND: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Return logits, `-inf` where a row does not see a slot; see `common.seen_positions`."""
    low = gl.load(index_ptr + slot).to(gl.int32)
    if IS_CAUSAL:
        span = gl.zeros_like(low) + 0x3FFFFFFF
        if HAS_BAND:
            low += gl.where(slot >= heavy_count, left + 1, 0)
            span = gl.where(slot < band_count, left, span)
    else:
        span = gl.zeros_like(low) - 1
        if HAS_BAND:
            is_sampled = slot >= heavy_count
            low = gl.where(is_sampled, low + left + 1, low - right)
            span = gl.where(is_sampled, -(left + right + 2), span)
            span = gl.where(slot < band_count, left + right, span)
    seen = (position[:, None] - low[None, :]).to(gl.uint32, bitcast=True)
    return gl.where(seen <= span.to(gl.uint32, bitcast=True)[None, :], logits, float("-inf"))


@gluon.jit(do_not_specialize=[*_SIZES, "position_offset"])
def hopper_tiles_kernel(
    bits_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, index_ptr, index_batch, index_head, index_tile,
    weight_ptr, weight_batch, weight_head, weight_tile, counts_ptr,
    plan_heads, query_heads, heads_per_key, num_tiles, tile_slots, num_queries, num_keys,
    left, right, position_offset, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    WIDE: gl.constexpr, HAS_WEIGHT: gl.constexpr, HAS_BAND: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """See the module, and `tile_forward_kernel`, of which arguments and results are the same.

    Queries, keys and values have `D` columns, 64 or 128. Lists have at least `BLOCK_N` slots.
    """
    WARPS: gl.constexpr = gl.num_warps()
    GATHERED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    HELD: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = k_ptr.dtype.element_ty

    blocks = (tile_slots * GROUP + BLOCK_M - 1) // BLOCK_M
    tile = gl.program_id(0) // blocks
    head = gl.program_id(1)
    batch = gl.program_id(2).to(gl.int64)
    key_head = (head // heads_per_key).to(gl.int64)

    # ---- the list: all that the first gathers wait for at once
    tile64, head64 = tile.to(gl.int64), head.to(gl.int64)
    index_ptr += batch * index_batch + head64 * index_head + tile64 * index_tile
    weight_ptr += batch * weight_batch + head64 * weight_head + tile64 * weight_tile
    flat_tile = (batch * plan_heads + head) * num_tiles + tile
    counts_ptr += flat_tile * 3
    lane = gl.arange(0, BLOCK_N, gl.SliceLayout(1, GATHERED))
    key = gl.load(index_ptr + lane).to(gl.int32)
    bits = gl.load(bits_ptr + flat_tile)
    key_count = gl.load(counts_ptr)
    heavy_count = gl.load(counts_ptr + 1)
    band_count = gl.load(counts_ptr + 2)
    key_count = gl.where((bits >> APART) & 1 != 0, 0, key_count)

    # ---- the rows
    k_ptr += batch * k_batch + key_head * k_head
    v_ptr += batch * v_batch + key_head * v_head
    first_place = gl.program_id(0) % blocks * BLOCK_M
    dim = gl.arange(0, D, gl.SliceLayout(0, GATHERED))
    q = gl.allocate_shared_memory(dtype, [BLOCK_M, D], HELD)
    k = gl.allocate_shared_memory(dtype, [BLOCK_N, D], HELD)
    v = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], HELD)
    w = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], FLAT)
    weight_ptr += gl.arange(0, BLOCK_N, LINE)
    place = first_place + gl.arange(0, BLOCK_M, gl.SliceLayout(1, GATHERED))
    row, _ = rows_of(tile, place, tile_slots, num_queries, GROUP)
    query_head = (head * GROUP + place % GROUP).to(gl.int64)
    q_offset = query_head * q_head + row.to(gl.int64) * q_row
    gather(q, q_ptr + batch * q_batch, q_offset, 1, dim, False, True)
    key = gl.where(key_count > 0, key, 0)  # a tile that is left may list keys that do not exist
    if HAS_WEIGHT:
        async_copy.async_copy_global_to_shared(w.index(0), weight_ptr)
    gather(k, k_ptr, key, k_row, dim, False, WIDE)
    gather(v.index(0), v_ptr, key, v_row, dim, False, WIDE)
    last = gl.maximum(key_count - BLOCK_N, 0)
    next_key = gl.load(index_ptr + gl.minimum(BLOCK_N, last) + lane).to(gl.int32)
    next_key = gl.where(key_count > 0, next_key, 0)

    # ---- one softmax over the list
    place_s = first_place + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES))
    position = tile * tile_slots + place_s // GROUP + position_offset
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    shift = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    row_sum = of_threads(nothing)
    acc = warpgroup_mma_init(gl.zeros([BLOCK_M, D], gl.float32, OUT))
    turn = 0
    for start in range(0, key_count, BLOCK_N):
        is_last = start + BLOCK_N >= key_count
        acc = warpgroup_mma_wait(0, deps=[acc])  # those of the last block
        acc = warpgroup_mma_init(acc)
        barrier()
        if HAS_WEIGHT:
            following = weight_ptr + gl.minimum(start + BLOCK_N, last)
            async_copy.async_copy_global_to_shared(w.index(turn ^ 1), following)
        gather(v.index(turn ^ 1), v_ptr, next_key, v_row, dim, is_last, WIDE)
        async_copy.wait_group(1)  # for the keys, values and weights of this block
        bias = gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(0, SCORES))
        if HAS_WEIGHT:
            bias = w.index(turn).load(gl.SliceLayout(0, SCORES))
        fence_async_shared()
        scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        barrier()
        gather(k, k_ptr, next_key, k_row, dim, is_last, WIDE)
        later = gl.minimum(start + 2 * BLOCK_N, last)
        next_key = gl.load((index_ptr + later) + lane).to(gl.int32)

        logits = scores * scale + bias[None, :]
        if (bits >> gl.minimum(start // BLOCK_N, 61).to(gl.int64)) & 1 != 0:
            logits = hide_unseen(
                logits, position, index_ptr, start + column, heavy_count, band_count, left, right,
                HAS_BAND, IS_CAUSAL,
            )  # fmt: skip
        if start == 0:
            top = gl.max(logits, 1)
            shift = gl.where(top == float("-inf"), 0.0, top) * LOG2_E
        weights = gl.exp2(logits * LOG2_E - shift[:, None])
        row_sum += of_threads(weights)
        factor = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUT, 2))
        acc = warpgroup_mma(factor, v.index(turn), acc, is_async=True)
        turn ^= 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    # ---- the state of these rows; see `tile_forward_kernel`
    place_o = first_place + gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
    row_o, is_row = rows_of(tile, place_o, tile_slots, num_queries, GROUP)
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, OUT))
    shift = gl.convert_layout(shift, gl.SliceLayout(1, OUT))
    # as `common.is_within_range`
    least: gl.constexpr = 0.5 if dtype == gl.float16 else 8.7e-19
    good = (row_sum > least) & (row_sum < 1.2e18) & (gl.sum(acc * 0.0, 1) == 0.0)
    if gl.min((good | (is_row == 0)).to(gl.int32), 0) == 0:
        gl.store(bits_ptr + flat_tile, gl.to_tensor(1).to(gl.int64) << APART)
    is_empty = row_sum == 0.0
    row_sum = gl.where(is_empty, 1.0, row_sum)
    lse = gl.where(is_empty, float("-inf"), (shift + gl.log2(row_sum)) * LN_2)
    head_o = (head * GROUP + place_o % GROUP).to(gl.int64)
    gl.store(lse_ptr + (batch * query_heads + head_o) * num_queries + row_o, lse, mask=is_row)
    # whole rows go out, by way of shared memory
    q.store((acc * (1.0 / row_sum)[:, None]).to(dtype))
    place = first_place + gl.arange(0, BLOCK_M, gl.SliceLayout(1, GATHERED))
    row, used = rows_of(tile, place, tile_slots, num_queries, GROUP)
    query_head = (head * GROUP + place % GROUP).to(gl.int64)
    o_offset = batch * o_batch + query_head * o_head + row.to(gl.int64) * o_row
    gl.store(out_ptr + (o_offset[:, None] + dim[None, :]), q.load(GATHERED), mask=used[:, None])
