"""How much the rows of a tile attend to each key of its list: one launch, two passes.

One program owns a tile. The first pass walks over what a window holds and over the candidates, and
leaves the log normaliser of every row in registers. The second pass makes the scores of the
candidates anew and adds up their exponentials over the rows.

Blocks are `[keys, rows]`: a thread has many rows of few keys, so that the sums over rows, wanted of
every block, stay in the thread. The sums over keys are made once, after the first pass. To that end
exponentials are shifted by the maximum of the row's first block, as in `forward`; where the sums
say that this did not do, the first pass is done once more with the running maximum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import is_wide
from .common import LOG2_E, load_rows, nearest
from .configs import is_interpreted, mass_config, padded, power_of_two
from .forward import finite

__all__ = ["supports", "triton_tile_mass"]

NOWHERE: tl.constexpr = tl.constexpr(-0x7FFFFFFF)  # a position that no row has


@triton.jit
def is_between(position, low, span):
    """Return whether rows lie from `low` of a key to `span` after it, unsigned: `[keys, rows]`."""
    return (position[None, :] - low[:, None]).to(tl.uint32, bitcast=True) <= span[:, None]


@triton.jit
def gathered(
    k_ptr, k_row, key, dim, num_keys, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return the rows of some keys, or of the nearest ones that exist."""
    return load_rows(
        k_ptr, nearest(key, num_keys)[:, None], k_row, dim[None, :], k_ptr, num_keys, D, BLOCK_D,
        False, WIDE,
    )  # fmt: skip


@triton.jit
def products(
    q_t, k_ptr, k_row, key, dim, num_keys, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products of some keys with all rows, `[keys, rows]`."""
    k = gathered(k_ptr, k_row, key, dim, num_keys, D, BLOCK_D, WIDE)
    return tl.dot(k, q_t, input_precision=PRECISION)


@triton.jit
def hidden(found, key, position, num_keys, left, right, num_sinks, IS_CAUSAL: tl.constexpr):
    """Return products with `-inf` where a row gives a key no mass."""
    # rows behind the window, and if not causal also those before it
    low = key + left + 1
    span = tl.zeros_like(key) + (0x3FFFFFFF if IS_CAUSAL else -(left + right + 2))
    nobody = (key >= num_keys) | (key < num_sinks)
    low = tl.where(nobody, NOWHERE, low)
    span = tl.where(nobody, 0, span)
    seen = is_between(position, low, span.to(tl.uint32, bitcast=True))
    return tl.where(seen, found, float("-inf"))


@triton.jit
def candidate_products(
    q_t, k_ptr, k_row, key, dim, position, is_clear, num_keys, left, right, num_sinks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `products`, `-inf` where a row gives a key no mass; nowhere if `is_clear`."""
    found = products(q_t, k_ptr, k_row, key, dim, num_keys, D, BLOCK_D, WIDE, PRECISION)
    if is_clear == 0:
        found = hidden(found, key, position, num_keys, left, right, num_sinks, IS_CAUSAL)
    return found


@triton.jit
def is_held_by_all(
    start, begin, first_key, num_keys, left, right, num_sinks, span, first_position, reach,
    BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return whether every row holds all keys of a block of slots of the window."""
    stop = tl.minimum(num_keys, begin) if IS_CAUSAL else num_keys
    last_position = first_position + reach
    end = start + BLOCK_N
    first = first_key + start - num_sinks
    are_sinks = (end <= num_sinks) & (end <= stop)
    are_near = (start >= num_sinks) & (end <= num_sinks + span) & (first >= num_sinks)
    are_near = are_near & (first + BLOCK_N <= stop) & (first >= last_position - left)
    if IS_CAUSAL:
        are_sinks = are_sinks & (end <= first_position + 1)
        are_near = are_near & (first + BLOCK_N <= first_position + 1)
    else:
        are_near = are_near & (first + BLOCK_N - 1 <= first_position + right)
    return are_sinks | are_near


@triton.jit
def window_products(
    q_t, k_ptr, k_row, start, dim, position, begin, first_key, num_keys, left, right, num_sinks,
    span, first_position, reach, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `products` for slots of the window, `-inf` where a row does not hold the key.

    The slots are the sinks, then `span` keys from `first_key` on. Positions are `first_position`
    and up to `reach` more.
    """
    slot = start + tl.arange(0, BLOCK_N)
    is_sink = slot < num_sinks
    key = tl.where(is_sink, slot, first_key + (slot - num_sinks))
    real = (key < num_keys) & (is_sink | ((key >= num_sinks) & (slot < num_sinks + span)))
    if IS_CAUSAL:
        real = real & (key < begin)
        low, held = key, tl.where(is_sink, 0x3FFFFFFF, left)
    else:
        low, held = key - right, tl.where(is_sink, -1, left + right)
    low = tl.where(real, low, NOWHERE)
    held = tl.where(real, held, 0)
    found = products(q_t, k_ptr, k_row, key, dim, num_keys, D, BLOCK_D, WIDE, PRECISION)
    if not is_held_by_all(
        start, begin, first_key, num_keys, left, right, num_sinks, span, first_position, reach,
        BLOCK_N, IS_CAUSAL,
    ):  # fmt: skip
        seen = is_between(position, low, held.to(tl.uint32, bitcast=True))
        found = tl.where(seen, found, float("-inf"))
    return found


@triton.jit
def over_pairs(mass, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return sums over the pairs of keys that a thread has: `[keys / 2, rows]`."""
    pairs = tl.sum(tl.reshape(mass, [BLOCK_N // 16, 2, 8, BLOCK_M]), 1)
    return tl.reshape(pairs, [BLOCK_N // 2, BLOCK_M])


@triton.jit
def add_block(found, factor, weight, shift, total, is_first, IS_RUNNING: tl.constexpr):
    """Add the exponentials of a block; return what a row is shifted by, and the sums.

    The shift is the maximum of the row's first block, and there is a sum for every two places of
    a block. If `IS_RUNNING` it is the maximum so far, and there is a sum for every row.
    """
    if IS_RUNNING:
        top = tl.maximum(shift, tl.max(found, 0) * factor + weight)
        total *= tl.exp2(shift - finite(top))
        shift = top
        total += tl.sum(tl.exp2(found * factor + (weight - finite(shift))[None, :]), 0)
    else:
        if is_first:
            shift = finite(tl.max(found, 0) * factor + weight)
        mass = tl.exp2(found * factor + (weight - shift)[None, :])
        total += over_pairs(mass, mass.shape[0], mass.shape[1])
    return shift, total


@triton.jit
def window_sums(
    q_t, k_ptr, k_row, dim, position, first_position, begin, num_keys, left, right, num_sinks,
    span, reach, factor, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, IS_RUNNING: tl.constexpr,
):  # fmt: skip
    """Return shifts and sums, as `add_block` has them, of what the window holds."""
    if IS_RUNNING:
        shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        shift = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    if HAS_WINDOW:
        first_key = first_position - left
        if IS_CAUSAL:
            # whole blocks that end where the tile begins: all rows hold most of them
            first_key += span
            span = tl.cdiv(span, BLOCK_N) * BLOCK_N
            first_key -= span
        for start in range(0, num_sinks + span, BLOCK_N):
            found = window_products(
                q_t, k_ptr, k_row, start, dim, position, begin, first_key, num_keys, left, right,
                num_sinks, span, first_position, reach, D, BLOCK_N, BLOCK_D, IS_CAUSAL, WIDE,
                PRECISION,
            )  # fmt: skip
            shift, total = add_block(found, factor, 0.0, shift, total, start == 0, IS_RUNNING)
    return shift, total


@triton.jit
def row_sums(
    q_t, k_ptr, k_row, index_ptr, used_slots, clear_start, clear_stop, dim, position,
    first_position, begin, num_keys, left, right, num_sinks, span, reach, factor, weight,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, IS_RUNNING: tl.constexpr,
):  # fmt: skip
    """Return shifts and sums of all rows: of the window, and of every `STRIDE`-th candidate.

    `weight` is the log2 of how many candidates each of these stands for.
    """
    lane = tl.arange(0, BLOCK_N)
    shift, total = window_sums(
        q_t, k_ptr, k_row, dim, position, first_position, begin, num_keys, left, right, num_sinks,
        span, reach, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, HAS_WINDOW, IS_CAUSAL, WIDE, PRECISION,
        IS_RUNNING,
    )  # fmt: skip
    # keys are loaded a block ahead: the gathers do not wait for them
    slot = lane * STRIDE
    next_key = tl.load(index_ptr + slot, mask=slot < used_slots, other=num_keys).to(tl.int32)
    for start in range(0, used_slots, BLOCK_N * STRIDE):
        key = next_key
        slot += BLOCK_N * STRIDE
        next_key = tl.load(index_ptr + slot, mask=slot < used_slots, other=num_keys).to(tl.int32)
        found = candidate_products(
            q_t, k_ptr, k_row, key, dim, position,
            (start >= clear_start) & (start + BLOCK_N * STRIDE <= clear_stop), num_keys, left,
            right, num_sinks, D, BLOCK_D, IS_CAUSAL, WIDE, PRECISION,
        )  # fmt: skip
        is_first = (start == 0) & (HAS_WINDOW == 0)
        shift, total = add_block(found, factor, weight, shift, total, is_first, IS_RUNNING)
    if not IS_RUNNING:
        total = tl.sum(total, 0)
    return shift, total


@triton.jit
def clear_slots(
    index_ptr, slots, num_keys, first_position, left, num_sinks, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return of a list: used slots, in whole blocks, and the slots of blocks that all rows see.

    Candidates ascend, so the first and the last key of a block tell.
    """
    block = tl.arange(0, BLOCKS) * BLOCK_N
    exists = block < slots
    first = tl.load(index_ptr + block, mask=exists, other=num_keys).to(tl.int32)
    last_slot = tl.minimum(block + BLOCK_N, slots) - 1
    last = tl.load(index_ptr + last_slot, mask=exists, other=num_keys).to(tl.int32)
    near = num_keys
    if HAS_WINDOW or IS_CAUSAL:
        near = tl.minimum(near, first_position - left)
    start = BLOCK_N * tl.sum((first < num_sinks).to(tl.int32), 0)
    used = BLOCK_N * tl.sum((first < num_keys).to(tl.int32), 0)
    is_far = (last < near) & (block + BLOCK_N <= slots)
    return used, start, BLOCK_N * tl.sum(is_far.to(tl.int32), 0)


@triton.jit(
    do_not_specialize=["num_keys", "num_tiles", "slots", "left", "right", "num_sinks", "span"]
)
def tile_mass_kernel(
    voter_ptr, voter_batch, voter_head, voter_tile, voter_row, k_ptr, k_batch, k_head, k_row,
    index_ptr, mass_ptr, rows_ptr, position_ptr, begin_ptr, heads_per_key, num_heads, num_tiles,
    slots, num_keys, left, right, num_sinks, span, scale, weight,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; `index` and `mass` are contiguous `[batch, heads, tiles, slots]`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    counts = row < tl.load(rows_ptr + tile)
    first_position = tl.load(position_ptr + tile)
    position = first_position + row * STEP
    begin = tl.load(begin_ptr + tile)
    voter_ptr += batch * voter_batch + head.to(tl.int64) * voter_head
    voter_ptr += tile.to(tl.int64) * voter_tile
    q = tl.load(
        voter_ptr + row[:, None] * voter_row + dim[None, :],
        mask=(row < SIZE)[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip
    q_t = tl.trans(q)
    k_ptr += batch * k_batch + (head // heads_per_key).to(tl.int64) * k_head
    flat_tile = (batch * num_heads + head) * num_tiles + tile
    index_ptr += flat_tile * slots
    mass_ptr += flat_tile * slots
    factor = scale * LOG2_E
    reach = (SIZE - 1) * STEP
    used_slots, clear_start, clear_stop = clear_slots(
        index_ptr, slots, num_keys, first_position, left, num_sinks, BLOCKS, BLOCK_N, HAS_WINDOW,
        IS_CAUSAL,
    )  # fmt: skip
    used_slots = tl.minimum(used_slots, slots)
    shift, total = row_sums(
        q_t, k_ptr, k_row, index_ptr, used_slots, clear_start, clear_stop, dim, position,
        first_position, begin, num_keys, left, right, num_sinks, span, reach, factor, weight,
        STRIDE, D, BLOCK_M, BLOCK_N, BLOCK_D, HAS_WINDOW, IS_CAUSAL, WIDE, PRECISION, False,
    )  # fmt: skip
    good = (total > 8.7e-19) & (total < 1.2e18)
    if tl.min((good | (counts == 0)).to(tl.int32), 0) == 0:
        # far from the shift a sum has lost terms that matter, or overflows; few keys at a time,
        # so that this takes no more registers
        shift, total = row_sums(
            q_t, k_ptr, k_row, index_ptr, used_slots, clear_start, clear_stop, dim, position,
            first_position, begin, num_keys, left, right, num_sinks, span, reach, factor, weight,
            STRIDE, D, BLOCK_M, 16, BLOCK_D, HAS_WINDOW, IS_CAUSAL, WIDE, PRECISION, True,
        )  # fmt: skip
    # rows that see nothing, and rows that do not count, give no mass
    gives = (total > 0.0) & counts
    lse = tl.where(gives, shift + tl.log2(tl.where(gives, total, 1.0)), float("inf"))
    slot = lane
    next_key = tl.load(index_ptr + slot, mask=slot < used_slots, other=num_keys).to(tl.int32)
    for start in range(0, used_slots, BLOCK_N):
        key = next_key
        later = slot + BLOCK_N
        next_key = tl.load(index_ptr + later, mask=later < used_slots, other=num_keys).to(tl.int32)
        found = candidate_products(
            q_t, k_ptr, k_row, key, dim, position,
            (start >= clear_start) & (start + BLOCK_N <= clear_stop), num_keys, left, right,
            num_sinks, D, BLOCK_D, IS_CAUSAL, WIDE, PRECISION,
        )  # fmt: skip
        share = found * factor - lse[None, :]
        if STRIDE > 1:
            share = tl.minimum(share, 0.0)  # of a sum that lacks it
        mass = tl.sum(tl.exp2(share), 1)
        tl.store(mass_ptr + slot, tl.where(key < num_keys, mass, -1.0), mask=slot < slots)
        slot = later
    nothing = tl.full([BLOCK_N], -1.0, tl.float32)
    for start in range(used_slots, slots, BLOCK_N):
        tl.store(mass_ptr + start + lane, nothing, mask=start + lane < slots)


def supports(voters: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors: heads of up to 256, tiles of up to 128 rows."""
    return (
        key.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and voters.dtype == key.dtype
        and key.shape[-1] <= 256
        and key.shape[2] > 0
        and voters.shape[3] <= 128
        and max(voters.shape[0], voters.shape[1]) <= 65535
    )


def triton_tile_mass(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: tuple[int, int, int], *, scale: float,
    is_causal: bool, is_delayed: bool, stride: int = 1, step: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.kernels.mass.tile_mass` says, where `supports` holds; no host sync."""
    voters, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (voters, key))
    index = index.contiguous()
    batch, heads, tiles, slots = index.shape
    mass = torch.empty(index.shape, dtype=torch.float32, device=index.device)
    if mass.numel() == 0:
        return mass
    if scale <= 0:
        # kernels hide a product before they scale it
        voters, scale = voters * (-1 if scale < 0 else 0), -scale or 1.0
    left, right, num_sinks = window if window[0] >= 0 else (-1, 0, 0)
    size, width = voters.shape[3], padded(key.shape[-1])
    reach = (size - 1) * step  # from the first row to the last
    span = left + (reach if is_delayed else 0) + (0 if is_causal else reach + 1 + right)
    config = mass_config(key, size, slots, stride)
    block = config.block_n
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers is not None and not is_interpreted():
        options["maxnreg"] = config.max_registers
    kernel: Any = tile_mass_kernel
    rows_at_once = {"BLOCK_M": padded(size), "STRIDE": stride}
    if config.long:
        # (that module needs this one)
        from .short_mass import short_mass_kernel as kernel

        rows_at_once = {"BLOCK_M": min(32, padded(size)), "LONG": config.long}
        rows_at_once["SHORT"] = config.short
    kernel[(tiles, heads, batch)](
        voters, *voters.stride()[:4], key, *key.stride()[:3], index, mass,
        rows.int(), position.int(), begin.int(), heads // key.shape[1], heads, tiles, slots,
        key.shape[2], left, right, min(num_sinks, key.shape[2]), max(0, span), scale,
        math.log2(stride), SIZE=size, D=key.shape[-1], BLOCK_N=block, BLOCK_D=width,
        BLOCKS=power_of_two(triton.cdiv(slots, block)), STEP=step, HAS_WINDOW=left >= 0,
        IS_CAUSAL=is_causal, WIDE=is_wide(key), PRECISION="ieee", **rows_at_once, **options,
    )  # fmt: skip
    return mass
