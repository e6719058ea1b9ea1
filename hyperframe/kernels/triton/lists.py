"""Small kernels that lay out what the attention kernels read: lists of blocks, rows by place.

A block plan names no keys: `block_lists_kernel` writes the list of each tile (its range of the key
order, then the samples of its rectangle, those it holds already with weight 0) in one launch, a
hundredth of the time of attending. `places_kernel` puts what the backward needs of every row in the
order in which tiles own the rows, so that its inner loops read it in sequence. Both do it for
several plans at once, those of the levels of the recursion: by themselves they are too short to
fill a GPU. What differs from plan to plan comes as a tuple.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E, nearest, tile_rows

_SIZES = ["num_tiles", "num_queries", "tile_slots", "place_tile"]


@triton.jit
def of_plan(pointers, plan, PLANS: tl.constexpr):
    """Return the pointer that belongs to a plan."""
    chosen = pointers[0]
    for other in tl.static_range(1, PLANS):
        chosen = tl.where(plan == other, pointers[other], chosen)
    return chosen


@triton.jit(
    do_not_specialize=[
        "heads", "num_tiles", "num_keys", "num_samples", "exact_slots", "list_slots"
    ]
)  # fmt: skip
def block_lists_kernel(
    tables, orders, order_batch, order_head, samples, sample_batch, sample_head,
    sample_rectangle, ranks, rank_batch, rank_head,
    weights, weight_batch, weight_head, weight_rectangle, weight_slot,
    indices, log_weights, counts, tiles_ptr, heads, key_heads, num_tiles, num_keys, num_samples,
    exact_slots, list_slots, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
    PLANS: tl.constexpr,
):  # fmt: skip
    """Write the list of one tile: keys int32 `[batch, key_heads, T, L]`, and its length int32.

    Grid: (tiles of all heads of the largest plan, plans); of several plans `tiles` says how many
    tiles each of them has.

    The range of the key order stands in front, padded to `exact_slots`; then the samples that the
    tile does not hold and that weigh something, moved up. Slots that are not used repeat the first
    key. With `WEIGHTS`, also the log weight float32 of every slot, `-inf` where it is not used.
    `SAMPLES` is the number of samples rounded up to a power of two, 0 without any.
    """
    program, plan = tl.program_id(0), tl.program_id(1)
    if PLANS > 1:
        num_tiles = tl.load(tiles_ptr + plan)
        if program >= heads * num_tiles:
            return
    tile = program % num_tiles
    head = (program // num_tiles % key_heads).to(tl.int64)
    batch = (program // num_tiles // key_heads).to(tl.int64)
    table_ptr, order_ptr = of_plan(tables, plan, PLANS), of_plan(orders, plan, PLANS)
    index_ptr, count_ptr = of_plan(indices, plan, PLANS), of_plan(counts, plan, PLANS)
    first = tl.load(table_ptr + tile * 5 + 2)
    last = tl.load(table_ptr + tile * 5 + 3)
    rectangle = tl.load(table_ptr + tile * 5 + 4).to(tl.int64)
    order_ptr += batch * order_batch + head * order_head + first
    index_ptr += program.to(tl.int64) * list_slots
    if WEIGHTS:
        log_weight_ptr = of_plan(log_weights, plan, PLANS) + program.to(tl.int64) * list_slots
    for start in range(0, exact_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        used = slot < last - first
        # a tile without keys has no first one either
        key = tl.load(order_ptr + tl.where(used, slot, 0), mask=last > first, other=0)
        tl.store(index_ptr + slot, key, mask=slot < exact_slots)
        if WEIGHTS:
            weight = tl.where(used, 0.0, float("-inf"))
            tl.store(log_weight_ptr + slot, weight, mask=slot < exact_slots)
    count = exact_slots
    if SAMPLES > 0:
        sample_ptr, rank_ptr = of_plan(samples, plan, PLANS), of_plan(ranks, plan, PLANS)
        weight_ptr = of_plan(weights, plan, PLANS)
        sample_ptr += batch * sample_batch + head * sample_head + rectangle * sample_rectangle
        rank_ptr += batch * rank_batch + head * rank_head
        weight_ptr += batch * weight_batch + head * weight_head + rectangle * weight_rectangle
        place = tl.arange(0, SAMPLES)
        is_sample = place < num_samples
        key = tl.load(sample_ptr + place, mask=is_sample, other=0)
        rank = tl.load(rank_ptr + nearest(key, num_keys), mask=is_sample, other=0)
        weight = tl.load(weight_ptr + place * weight_slot, mask=is_sample, other=float("-inf"))
        kept = ((rank < first) | (rank >= last)) & (weight > float("-inf"))
        before = tl.cumsum(kept.to(tl.int32), 0)
        total = tl.sum(kept.to(tl.int32), 0)
        # kept samples move up, the others go behind them in their own order
        target = exact_slots + tl.where(kept, before - 1, total + place - before)
        key = tl.where(kept, key, tl.load(order_ptr, mask=last > first, other=0))
        stored = target < list_slots
        tl.store(index_ptr + target, key, mask=stored)
        if WEIGHTS:
            tl.store(log_weight_ptr + target, tl.where(kept, weight, float("-inf")), mask=stored)
        count += total
    tl.store(count_ptr + program, count)


@triton.jit(do_not_specialize=[*_SIZES, "heads"])
def places_kernel(
    tables, orders, order_batch, order_head, lse_ptr, delta_ptr, place_rows, place_lses,
    place_deltas, tiles_ptr, heads, plan_heads, query_heads, num_tiles, tile_slots, num_queries,
    place_tile, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PLANS: tl.constexpr,
):  # fmt: skip
    """Write row, log normaliser (log2; `+inf` for none or without keys) and delta of every place.

    Grid: (blocks of places of all tiles of the largest plan, plans), as above. A tile has
    `tile_slots * GROUP` places, padded to `place_tile`; outputs are `[batch, plan_heads,
    tiles, place_tile]`. Places without a row name the first row `f` of their
    tile, as `-1 - f`.
    """
    blocks = place_tile // BLOCK
    program, plan = tl.program_id(0), tl.program_id(1)
    if PLANS > 1:
        num_tiles = tl.load(tiles_ptr + plan)
        if program >= heads * num_tiles * blocks:
            return
    table_ptr, order_ptr = of_plan(tables, plan, PLANS), of_plan(orders, plan, PLANS)
    row_ptr, place_lse_ptr = of_plan(place_rows, plan, PLANS), of_plan(place_lses, plan, PLANS)
    place_delta_ptr = of_plan(place_deltas, plan, PLANS)
    tile = program // blocks % num_tiles
    head = program // (blocks * num_tiles) % plan_heads
    batch = (program // (blocks * num_tiles) // plan_heads).to(tl.int64)
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    order_ptr += batch * order_batch + head.to(tl.int64) * order_head
    row, is_row = tile_rows(
        place // GROUP, tile, tile_slots, order_ptr, table_ptr, num_queries, ROWS
    )
    first, _ = tile_rows(0, tile, tile_slots, order_ptr, table_ptr, num_queries, ROWS)
    flat_row = (batch * query_heads + head * GROUP + place % GROUP) * num_queries + row
    lse = tl.load(lse_ptr + flat_row, mask=is_row, other=float("-inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + flat_row, mask=is_row, other=0.0)
    target = ((batch * plan_heads + head) * num_tiles + tile) * place_tile + place
    tl.store(row_ptr + target, tl.where(is_row, row, -1 - first))
    tl.store(place_lse_ptr + target, lse)
    tl.store(place_delta_ptr + target, delta)


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
