"""How much the rows of a tile attend to each key of a short list: one launch, one pass.

What `mass` computes, for lists whose first slots fit: rows of those keys are gathered once, all at
the same time, and stay in shared memory; a group of 32 rows of the tile after the other keeps the
exponentials of all of them in registers until its normalisers are known. So nothing waits for
memory inside a loop but the window, no exponential is made twice, and no score is.

What a list holds beyond is counted in a second pass, as `mass` does it; so is the whole list where
the sums of some row left the range of its shift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E
from .forward import finite
from .mass import (
    add_block,
    candidate_products,
    clear_slots,
    gathered,
    hidden,
    row_sums,
    window_sums,
)

__all__ = ["short_mass_kernel"]


@triton.jit
def over_places(mass, PIECE: tl.constexpr, ROWS: tl.constexpr):
    """Return sums over the keys that a thread has of a piece: `[32, rows]`."""
    sums = tl.sum(tl.reshape(mass, [PIECE // 64, 4, 2, 8, ROWS]), 2)
    return tl.reshape(tl.sum(sums, 0), [32, ROWS])


@triton.jit
def piece_of_list(
    index_ptr, k_ptr, k_row, dim, first, used_slots, num_keys, PIECE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return keys of some slots of a list, and their rows."""
    slot = first + tl.arange(0, PIECE)
    key = tl.load(index_ptr + slot, mask=slot < used_slots, other=num_keys).to(tl.int32)
    return key, gathered(k_ptr, k_row, key, dim, num_keys, D, BLOCK_D, WIDE)


@triton.jit
def piece_masses(
    q_t, k, key, is_clear, is_first, position, counts, shift, total, factor, num_keys, left, right,
    num_sinks, PIECE: tl.constexpr, ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return exponentials of a piece, `[keys, rows]`, the shift and the sums with them."""
    found = tl.dot(k, q_t, input_precision=PRECISION)
    if is_clear == 0:
        found = hidden(found, key, position, num_keys, left, right, num_sinks, IS_CAUSAL)
    if is_first:
        shift = tl.where(counts, finite(tl.max(found, 0) * factor), float("inf"))
    mass = tl.exp2(found * factor - shift[None, :])
    return mass, shift, total + over_places(mass, PIECE, ROWS)


@triton.jit
def store_piece(mass_ptr, mass, key, first, slots, num_keys, is_good, PIECE: tl.constexpr):
    """Store masses of a piece, -1 for slots without a key."""
    slot = first + tl.arange(0, PIECE)
    mass = tl.where(key < num_keys, mass, -1.0)
    tl.store(mass_ptr + slot, mass, mask=(slot < slots) & (is_good != 0))


@triton.jit(
    do_not_specialize=["num_keys", "num_tiles", "slots", "left", "right", "num_sinks", "span"]
)
def short_mass_kernel(
    voter_ptr, voter_batch, voter_head, voter_tile, voter_row, k_ptr, k_batch, k_head, k_row,
    index_ptr, mass_ptr, rows_ptr, position_ptr, begin_ptr, heads_per_key, num_heads, num_tiles,
    slots, num_keys, left, right, num_sinks, span, scale, weight,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr,
    STEP: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; arguments as in `tile_mass_kernel`.

    The pieces are the first `LONG` slots and `SHORT` more; groups have `BLOCK_M` rows.
    """
    groups: tl.constexpr = (SIZE + BLOCK_M - 1) // BLOCK_M
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    num_rows = tl.load(rows_ptr + tile)
    tile_position = tl.load(position_ptr + tile)
    begin = tl.load(begin_ptr + tile)
    voter_ptr += batch * voter_batch + head.to(tl.int64) * voter_head
    voter_ptr += tile.to(tl.int64) * voter_tile
    k_ptr += batch * k_batch + (head // heads_per_key).to(tl.int64) * k_head
    flat_tile = (batch * num_heads + head) * num_tiles + tile
    index_ptr += flat_tile * slots
    mass_ptr += flat_tile * slots
    factor = scale * LOG2_E
    # the gathers of both pieces before anything waits
    long_key, long_k = piece_of_list(
        index_ptr, k_ptr, k_row, dim, 0, slots, num_keys, LONG, D, BLOCK_D, WIDE
    )
    short_key, short_k = piece_of_list(
        index_ptr, k_ptr, k_row, dim, LONG, slots, num_keys, SHORT, D, BLOCK_D, WIDE
    )
    used_slots, clear_start, clear_stop = clear_slots(
        index_ptr, slots, num_keys, tile_position, left, num_sinks, BLOCKS, BLOCK_N, HAS_WINDOW,
        IS_CAUSAL,
    )  # fmt: skip
    used_slots = tl.minimum(used_slots, slots)
    is_clear = (clear_start == 0) & (clear_stop >= LONG)
    is_short_clear = (clear_start <= LONG) & (clear_stop >= LONG + SHORT)
    long_sum = tl.zeros([LONG], tl.float32)
    short_sum = tl.zeros([SHORT], tl.float32)
    is_good = 1
    q_of, lse_of, position_of = (), (), ()
    for group in tl.static_range(groups):
        place = group * BLOCK_M + row
        q = tl.load(
            voter_ptr + place[:, None] * voter_row + dim[None, :],
            mask=(place < SIZE)[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        q_t = tl.trans(q)
        counts = place < num_rows
        position = tile_position + place * STEP
        shift, total = window_sums(
            q_t, k_ptr, k_row, dim, position, tile_position, begin, num_keys, left, right,
            num_sinks, span, (SIZE - 1) * STEP, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, HAS_WINDOW,
            IS_CAUSAL, WIDE, PRECISION, False,
        )  # fmt: skip
        if HAS_WINDOW:
            shift = tl.where(counts, shift, float("inf"))
        mass, shift, total = piece_masses(
            q_t, long_k, long_key, is_clear, HAS_WINDOW == 0, position, counts, shift, total,
            factor, num_keys, left, right, num_sinks, LONG, BLOCK_M, IS_CAUSAL, PRECISION,
        )  # fmt: skip
        more, shift, total = piece_masses(
            q_t, short_k, short_key, is_short_clear, False, position, counts, shift, total,
            factor, num_keys, left, right, num_sinks, SHORT, BLOCK_M, IS_CAUSAL, PRECISION,
        )  # fmt: skip
        for start in range(LONG + SHORT, used_slots, BLOCK_N):
            slot = start + lane
            key = tl.load(index_ptr + slot, mask=slot < slots, other=num_keys).to(tl.int32)
            found = candidate_products(
                q_t, k_ptr, k_row, key, dim, position, 0, num_keys, left, right, num_sinks, D,
                BLOCK_D, IS_CAUSAL, WIDE, PRECISION,
            )  # fmt: skip
            shift, total = add_block(found, factor, 0.0, shift, total, False, False)
        # gathered in their own order: else the compiler moves the pieces, not these, to one layout
        sums = tl.gather(tl.sum(total, 0), row, 0)
        good = (sums > 8.7e-19) & (sums < 1.2e18)
        is_done = tl.min((good | (counts == 0)).to(tl.int32), 0)
        is_good = is_good & is_done
        gives = (sums > 0.0) & counts
        share = tl.where(gives, 1.0 / tl.where(gives, sums, 1.0), 0.0)
        long_sum += tl.sum(mass * share[None, :], 1)
        short_sum += tl.sum(more * share[None, :], 1)
        if is_done == 0:
            shift, sums = row_sums(
                q_t, k_ptr, k_row, index_ptr, used_slots, clear_start, clear_stop, dim, position,
                tile_position, begin, num_keys, left, right, num_sinks, span, (SIZE - 1) * STEP,
                factor, weight, 1, D, BLOCK_M, 16, BLOCK_D, HAS_WINDOW, IS_CAUSAL, WIDE, PRECISION,
                True,
            )  # fmt: skip
        # rows that see nothing, and rows that do not count, give no mass
        gives = (sums > 0.0) & counts
        lse = tl.where(gives, shift + tl.log2(tl.where(gives, sums, 1.0)), float("inf"))
        # the compiler knows no unpacking
        q_of = q_of + (q_t,)  # type: ignore[assignment]  # noqa: RUF005
        lse_of = lse_of + (lse,)  # type: ignore[assignment]  # noqa: RUF005
        position_of = position_of + (position,)  # type: ignore[assignment]  # noqa: RUF005
    store_piece(mass_ptr, long_sum, long_key, 0, slots, num_keys, is_good, LONG)
    store_piece(mass_ptr, short_sum, short_key, LONG, slots, num_keys, is_good, SHORT)
    first_slot = (LONG + SHORT) * is_good
    for start in range(first_slot, used_slots, BLOCK_N):
        slot = start + lane
        key = tl.load(index_ptr + slot, mask=slot < slots, other=num_keys).to(tl.int32)
        k = gathered(k_ptr, k_row, key, dim, num_keys, D, BLOCK_D, WIDE)
        sum_of_rows = tl.zeros([BLOCK_N], tl.float32)
        for group in tl.static_range(groups):
            found = tl.dot(k, q_of[group], input_precision=PRECISION)
            found = hidden(
                found, key, position_of[group], num_keys, left, right, num_sinks, IS_CAUSAL
            )
            sum_of_rows += tl.sum(tl.exp2(found * factor - lse_of[group][None, :]), 1)
        tl.store(mass_ptr + slot, tl.where(key < num_keys, sum_of_rows, -1.0), mask=slot < slots)
    nothing = tl.full([BLOCK_N], -1.0, tl.float32)
    for start in range(tl.maximum(first_slot, used_slots), slots, BLOCK_N):
        tl.store(mass_ptr + start + lane, nothing, mask=start + lane < slots)
