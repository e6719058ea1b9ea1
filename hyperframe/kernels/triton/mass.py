"""How much the rows of a tile attend to each key of its list: one launch, two passes.

One program owns a tile. The first pass walks over the candidates, and over what a window holds,
with an online softmax that keeps no output: it leaves the log normaliser of every row in registers.
The second pass makes the scores of the candidates anew and adds up their exponentials over rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import is_wide
from .common import LOG2_E, load_rows
from .configs import padded
from .forward import finite

__all__ = ["supports", "triton_tile_mass"]


@triton.jit
def held_by_window(key, position, left, right, num_sinks):
    """Return whether rows hold keys by a window; broadcasts positions of both."""
    return ((key >= position - left) & (key <= position + right)) | (key < num_sinks)


@triton.jit
def add_block(logits, top, total):
    """Return the running maximum and sum of the rows with the logits of one more block."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = finite(new_top)
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
    return new_top, total


@triton.jit
def block_logits(
    q, k_ptr, k_row, index_ptr, key, start, slots, dim, position, first_position, num_keys, left,
    right, num_sinks, factor, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the logits of a block of candidates, `-inf` where a row gives a key no mass.

    Candidates ascend, so the first and the last key of the block tell whether to look at all.
    """
    k = load_rows(
        k_ptr, tl.minimum(key, num_keys - 1)[:, None], k_row, dim[None, :], k_ptr, num_keys, D,
        BLOCK_D, False, WIDE,
    )  # fmt: skip
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    first = tl.load(index_ptr + start).to(tl.int32)
    last = tl.load(index_ptr + tl.minimum(start + BLOCK_N, slots) - 1).to(tl.int32)
    is_tested = (last >= num_keys) | (start + BLOCK_N > slots)
    if HAS_WINDOW:
        is_tested = is_tested | (first < num_sinks) | (last >= first_position - left)
    if IS_CAUSAL:
        is_tested = is_tested | (last > first_position)
    if is_tested:
        hidden = (key >= num_keys)[None, :] & (position > -0x7FFFFFFF)[:, None]
        if HAS_WINDOW:
            hidden |= held_by_window(key[None, :], position[:, None], left, right, num_sinks)
        if IS_CAUSAL:
            hidden |= key[None, :] > position[:, None]
        logits = tl.where(hidden, float("-inf"), logits)
    return logits


@triton.jit(
    do_not_specialize=["num_keys", "num_tiles", "slots", "left", "right", "num_sinks", "span"]
)
def tile_mass_kernel(
    voter_ptr, voter_batch, voter_head, voter_tile, voter_row, k_ptr, k_batch, k_head, k_row,
    index_ptr, mass_ptr, rows_ptr, position_ptr, begin_ptr, heads_per_key, num_heads, num_tiles,
    slots, num_keys, left, right, num_sinks, span, scale,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; `index` and `mass` are contiguous `[batch, heads, tiles, slots]`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    counts = row < tl.load(rows_ptr + tile)
    position = tl.load(position_ptr + tile) + row
    begin = tl.load(begin_ptr + tile)
    voter_ptr += batch * voter_batch + head.to(tl.int64) * voter_head
    voter_ptr += tile.to(tl.int64) * voter_tile
    q = tl.load(
        voter_ptr + row[:, None] * voter_row + dim[None, :],
        mask=(row < SIZE)[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip
    k_ptr += batch * k_batch + (head // heads_per_key).to(tl.int64) * k_head
    first = ((batch * num_heads + head) * num_tiles + tile) * slots
    index_ptr += first
    mass_ptr += first
    factor = scale * LOG2_E
    lane = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first_position = tl.load(position_ptr + tile)
    # keys are loaded a block ahead: the gathers do not wait for them
    next_key = tl.load(index_ptr + lane, mask=lane < slots, other=num_keys).to(tl.int32)
    for start in range(0, slots, BLOCK_N):
        key = next_key
        later = start + BLOCK_N + lane
        next_key = tl.load(index_ptr + later, mask=later < slots, other=num_keys).to(tl.int32)
        logits = block_logits(
            q, k_ptr, k_row, index_ptr, key, start, slots, dim, position, first_position, num_keys,
            left, right, num_sinks, factor, D, BLOCK_N, BLOCK_D, HAS_WINDOW, IS_CAUSAL, WIDE,
            PRECISION,
        )  # fmt: skip
        top, total = add_block(logits, top, total)
    if HAS_WINDOW:
        # sinks, then the keys around the tile
        for start in range(0, num_sinks + span, BLOCK_N):
            slot = start + lane
            is_sink = slot < num_sinks
            near = first_position - left + (slot - num_sinks)
            key = tl.where(is_sink, slot, near)
            real = (key < num_keys) & (is_sink | ((key >= num_sinks) & (slot < num_sinks + span)))
            if IS_CAUSAL:
                real = real & (key < begin)
            k = load_rows(
                k_ptr, tl.minimum(tl.maximum(key, 0), num_keys - 1)[:, None], k_row, dim[None, :],
                k_ptr, num_keys, D, BLOCK_D, False, WIDE,
            )  # fmt: skip
            held = real[None, :] & held_by_window(
                key[None, :], position[:, None], left, right, num_sinks
            )
            if IS_CAUSAL:
                held = held & (key[None, :] <= position[:, None])
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            top, total = add_block(tl.where(held, logits, float("-inf")), top, total)
    # rows that see nothing, and rows that do not count, give no mass
    gives = (total > 0.0) & counts
    lse = tl.where(gives, top + tl.log2(tl.where(gives, total, 1.0)), float("inf"))
    next_key = tl.load(index_ptr + lane, mask=lane < slots, other=num_keys).to(tl.int32)
    for start in range(0, slots, BLOCK_N):
        key = next_key
        later = start + BLOCK_N + lane
        next_key = tl.load(index_ptr + later, mask=later < slots, other=num_keys).to(tl.int32)
        logits = block_logits(
            q, k_ptr, k_row, index_ptr, key, start, slots, dim, position, first_position, num_keys,
            left, right, num_sinks, factor, D, BLOCK_N, BLOCK_D, HAS_WINDOW, IS_CAUSAL, WIDE,
            PRECISION,
        )  # fmt: skip
        mass = tl.sum(tl.exp2(logits - lse[:, None]), 0)
        slot = start + lane
        tl.store(mass_ptr + slot, tl.where(key < num_keys, mass, -1.0), mask=slot < slots)


def supports(voters: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors: heads of up to 256, tiles of up to 128 rows."""
    return (
        key.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and voters.dtype == key.dtype
        and key.shape[-1] <= 256
        and voters.shape[3] <= 128
        and max(voters.shape[0], voters.shape[1]) <= 65535
    )


def triton_tile_mass(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: tuple[int, int, int], *, scale: float,
    is_causal: bool, is_delayed: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.kernels.mass.tile_mass` says, where `supports` holds; no host sync."""
    voters, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (voters, key))
    index = index.contiguous()
    batch, heads, tiles, slots = index.shape
    mass = torch.empty(index.shape, dtype=torch.float32, device=index.device)
    if mass.numel() == 0:
        return mass
    left, right, num_sinks = window
    size, width = voters.shape[3], padded(key.shape[-1])
    span = left + (size - 1 if is_delayed else 0) + (0 if is_causal else size + right)
    narrow = key.element_size() == 4 or width > 128
    tile_mass_kernel[(tiles, heads, batch)](
        voters, *voters.stride()[:4], key, *key.stride()[:3], index, mass,
        rows.int(), position.int(), begin.int(), heads // key.shape[1], heads, tiles, slots,
        key.shape[2], left, right, min(num_sinks, key.shape[2]), max(0, span), scale,
        SIZE=size, D=key.shape[-1], BLOCK_M=padded(size), BLOCK_N=32 if narrow else 64,
        BLOCK_D=width, HAS_WINDOW=left >= 0, IS_CAUSAL=is_causal, WIDE=is_wide(key),
        PRECISION="ieee", num_warps=4, num_stages=2 if narrow else 3,
    )  # fmt: skip
    return mass
