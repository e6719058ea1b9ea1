"""Sums over programs in 16 bits that are as good as those in 32: half the traffic of adding.

Adding the gradients of keys is bound by how many bytes the memory can add up, not by the products.
So they are added in float16, times a power of two by which no sum can overflow: 11 bits lose less
over some tens of terms than the rounding to bfloat16 at the end does. Where more than `TERMS` slots
name a key, it has a row of sums for each `TERMS` of them, added up in float32 in the end.

`turns_kernel` counts the slots that name a key, and notes the turn of each; `spare_kernel` gives
the keys that need them rows behind those that every key has; `bounds_kernel` bounds what a row can
contribute; `finish_kernel` writes the sums in the dtype of the keys. With shares of at most 1, `R`
rows in `TERMS` tiles, and the largest over the rows of a head:

    |dv| <= R max|dO|,      |dk| <= scale R max(|q| (|dO|_2 max|v|_2 + |delta|))

A row of queries whose gradient is far above those of others raises the bound of its head: from some
ten thousand times on, the sums of keys that it does not see lose bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import nearest

__all__ = [
    "TERMS",
    "bounds_kernel",
    "finish_kernel",
    "power_of_keys",
    "power_of_values",
    "spare_kernel",
    "sum_rows",
    "turns_kernel",
]

TERMS: tl.constexpr = tl.constexpr(64)
"""Slots that add to one row of sums."""


@triton.jit(do_not_specialize=["num_tiles", "num_keys", "list_slots"])
def turns_kernel(
    count_ptr, turn_ptr, index_ptr, index_batch, index_head, index_tile, counts_ptr, plan_heads,
    key_heads, heads_per_key, num_tiles, num_keys, list_slots, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count in how many slots a key stands, and write of each how many were counted before it.

    `count` is int32 `[batch, key_heads, n_k]`, 0 at first; `turn` int32 `[batch, heads, tiles, L]`.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    flat_tile = (batch * plan_heads + head) * num_tiles + tile
    key_count = tl.load(counts_ptr + flat_tile * 3)
    index_ptr += batch * index_batch + head.to(tl.int64) * index_head
    index_ptr += tile.to(tl.int64) * index_tile
    turn_ptr += flat_tile * list_slots
    count_ptr += (batch * key_heads + head // heads_per_key) * num_keys
    for start in range(0, key_count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        used = slot < key_count
        key = nearest(tl.load(index_ptr + slot, mask=used, other=0).to(tl.int32), num_keys)
        turn = tl.atomic_add(
            count_ptr + key, tl.full([BLOCK], 1, tl.int32), mask=used, sem="relaxed"
        )
        tl.store(turn_ptr + slot, turn, mask=used)


@triton.jit(do_not_specialize=["total"])
def spare_kernel(count_ptr, spare_ptr, total, BLOCK: tl.constexpr):
    """Write where the spare rows of each key begin. `spare[total]` is the first that is free."""
    key = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = key < total
    count = tl.load(count_ptr + key, mask=inside, other=0)
    wanted = tl.maximum(count - 1, 0) // TERMS
    some = tl.sum(wanted, 0)
    first = 0
    if some > 0:
        first = tl.atomic_add(spare_ptr + total, some, sem="relaxed")
    before = tl.cumsum(wanted, 0) - wanted
    tl.store(spare_ptr + key, total.to(tl.int32) + first + before, mask=inside)


@triton.jit
def sum_rows(turn, key, spare_ptr):
    """Return the row of sums of some slots; keys are counted through all heads."""
    part = turn // TERMS
    spare = tl.load(spare_ptr + key, mask=part > 0, other=0)
    return tl.where(part > 0, spare + part - 1, key)


@triton.jit(do_not_specialize=["num_rows"])
def bounds_kernel(
    bound_ptr, x_ptr, grad_ptr, delta_ptr, x_batch, x_head, x_row, g_batch, g_head, g_row, heads,
    heads_per_key, num_rows, D: tl.constexpr, BLOCK: tl.constexpr, OF_ROWS: tl.constexpr,
):  # fmt: skip
    """Raise the bounds of the heads, float32 `[batch, key_heads, 4]`, 0 at first, by some rows.

    The largest `|dO|`, `|q| |dO|_2` and `|q| |delta|` of rows (`x` is `q`), or `|v|_2` of values.
    """
    blocks = tl.cdiv(num_rows, BLOCK)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    flat_head = tl.program_id(0) // blocks
    head = flat_head % heads
    batch = (flat_head // heads).to(tl.int64)
    bound_ptr += (batch * (heads // heads_per_key) + head // heads_per_key) * 4
    dim = tl.arange(0, D)
    row = tl.minimum(row, num_rows - 1)
    row64 = row.to(tl.int64)[:, None]
    x_ptr += batch * x_batch + head.to(tl.int64) * x_head
    x = tl.load(x_ptr + row64 * x_row + dim[None, :]).to(tl.float32)
    if OF_ROWS:
        grad_ptr += batch * g_batch + head.to(tl.int64) * g_head
        grad = tl.load(grad_ptr + row64 * g_row + dim[None, :]).to(tl.float32)
        delta = tl.load(delta_ptr + flat_head.to(tl.int64) * num_rows + row)
        largest = tl.max(tl.abs(x), 1)
        norm = tl.sqrt(tl.sum(grad * grad, 1))
        tl.atomic_max(bound_ptr, tl.max(tl.max(tl.abs(grad), 1), 0), sem="relaxed")
        tl.atomic_max(bound_ptr + 1, tl.max(largest * norm, 0), sem="relaxed")
        tl.atomic_max(bound_ptr + 2, tl.max(largest * tl.abs(delta), 0), sem="relaxed")
    else:
        tl.atomic_max(bound_ptr + 3, tl.max(tl.sqrt(tl.sum(x * x, 1)), 0), sem="relaxed")


@triton.jit
def power_of_keys(bound_ptr, rows, scale):
    """Return the power of two by which sums of `dk` over `rows` rows fit."""
    each = tl.load(bound_ptr + 1) * tl.load(bound_ptr + 3) + tl.load(bound_ptr + 2)
    return _power(each * tl.abs(scale) * rows)


@triton.jit
def power_of_values(bound_ptr, rows):
    """Return the power of two by which sums of `dv` over `rows` rows fit."""
    return _power(tl.load(bound_ptr) * rows)


@triton.jit
def _power(bound):
    # half of what float16 holds, because shares and sums are rounded
    good = (bound > 0.0) & (bound < float("inf"))
    exponent = tl.floor(tl.log2(32768.0 / tl.where(good, bound, 32768.0)))
    exponent = tl.minimum(tl.maximum(exponent, -60.0), 60.0)
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_keys", "rows"])
def finish_kernel(
    dk_ptr, dv_ptr, sum_k_ptr, sum_v_ptr, count_ptr, spare_ptr, bound_ptr, rows, scale, num_keys,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums of all keys in their dtype: contiguous `[batch, key_heads, n_k, d]`."""
    head = tl.program_id(1)
    bound_ptr += head * 4
    of_keys = 1.0 / power_of_keys(bound_ptr, rows, scale)
    of_values = 1.0 / power_of_values(bound_ptr, rows)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # places behind the last key repeat it
    key = head.to(tl.int64) * num_keys + tl.minimum(key, num_keys - 1)
    more = tl.maximum(tl.load(count_ptr + key) - 1, 0) // TERMS
    dim = tl.arange(0, D)[None, :]
    at = key[:, None] * D + dim
    dk = tl.load(sum_k_ptr + at).to(tl.float32)
    dv = tl.load(sum_v_ptr + at).to(tl.float32)
    most = tl.max(more, 0)
    if most > 0:
        spare = tl.load(spare_ptr + key).to(tl.int64)
        for part in range(most):
            has = (part < more)[:, None] & (dim >= 0)
            row = (spare + part)[:, None] * D + dim
            dk += tl.load(sum_k_ptr + row, mask=has, other=0.0).to(tl.float32)
            dv += tl.load(sum_v_ptr + row, mask=has, other=0.0).to(tl.float32)
    tl.store(dk_ptr + at, (dk * of_keys).to(dk_ptr.dtype.element_ty))
    tl.store(dv_ptr + at, (dv * of_values).to(dv_ptr.dtype.element_ty))
