"""The best columns of long rows: the best groups of columns first, then the best columns of those.

The `k` best columns of a row lie in the `k` groups of the largest maxima, whatever the ties, if of
equal groups and of equal columns the first ones are taken. So a row of 131,072 columns is read
once, for the maxima of groups of 16; the rest is done on a few thousand values, in registers.
There the k-th largest value is bisected by its bits, which order like the value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import is_interpreted, power_of_two

__all__ = ["group_of", "launch_best", "maxima_kernel", "supports", "triton_select_top"]

_ROW = 4096  # longest row that is read at once, and columns of a program that finds maxima
_LARGEST = 16384  # values of a row that are held in registers
# registers of a thread, by values of a row: more than one program fits on a multiprocessor
_REGISTERS = {4096: 80, 8192: 64, 16384: 64}


@triton.jit(do_not_specialize=["length", "num_groups"])
def maxima_kernel(
    score_ptr, stop_ptr, max_ptr, length, num_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the largest score of every group of columns before the stop of a row."""
    row = tl.program_id(0).to(tl.int64)
    stop = tl.minimum(tl.load(stop_ptr + row), length)
    first = tl.program_id(1) * BLOCK
    if first < stop:
        column = first + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + row * length + column, mask=column < stop, other=-1.0)
        score = tl.where(score >= 0.0, score, -1.0)
        largest = tl.max(tl.reshape(score, [BLOCK // GROUP, GROUP]), 1)
        group = first // GROUP + tl.arange(0, BLOCK // GROUP)
        tl.store(max_ptr + row * num_groups + group, largest, mask=group < num_groups)


@triton.jit
def kth_largest(bits, total, count):
    """Return the largest bound that at least `count` of the bits reach, 0 if `total` are fewer."""
    low = total * 0
    high = tl.max(bits, 0) + 1
    reached = total  # how many reach the lower bound
    while (high - low > 1) & (reached > count):
        middle = low + (high - low) // 2
        here = tl.sum((bits >= middle).to(tl.int32), 0)
        if here >= count:
            low = middle
            reached = here
        else:
            high = middle
    return low


@triton.jit
def store_best(
    score, column, index_ptr, best_ptr, count_ptr, row, length, count, PADDED: tl.constexpr
):  # fmt: skip
    """Store the best columns of a row, in order, their scores and how many; return which these are.

    Scores below 0 and those that are not numbers are none.
    """
    # adding 0 makes a positive zero of a negative one
    bits = tl.where(score >= 0.0, (score + 0.0).to(tl.int32, bitcast=True), -1)
    total = tl.sum((bits >= 0).to(tl.int32), 0)
    bound = kth_largest(bits, total, count)
    above = tl.sum((bits > bound).to(tl.int32), 0)
    equal = (bits == bound).to(tl.int32)
    if tl.sum(equal, 0) > count - above:
        equal = tl.where(tl.cumsum(equal, 0) <= count - above, equal, 0)
    taken = (bits > bound) | (equal > 0)
    flags = taken.to(tl.int32)
    target = row * count + tl.cumsum(flags, 0) - 1
    tl.store(index_ptr + target, column, mask=taken)
    tl.store(best_ptr + target, bits.to(tl.float32, bitcast=True), mask=taken)
    total = tl.minimum(total, count)
    tl.store(count_ptr + row, total)
    rest = tl.arange(0, PADDED)
    is_rest = (rest >= total) & (rest < count)
    tl.store(index_ptr + row * count + rest, tl.zeros_like(rest) + length, mask=is_rest)
    tl.store(best_ptr + row * count + rest, (rest * 0 - 1).to(tl.float32), mask=is_rest)
    return flags


@triton.jit(do_not_specialize=["length", "slots", "count", "num_groups"])
def best_kernel(
    score_ptr, stop_ptr, list_ptr, index_ptr, best_ptr, count_ptr, bits_ptr, held_ptr, length,
    slots, count, num_groups, GROUP: tl.constexpr, COMPACT: tl.constexpr, WITH_BITS: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write the best columns of a row, in order, their scores and how many there are.

    Without groups (`GROUP` = 0) the columns are the first `BLOCK`. With groups they are those of
    the groups in a list of `slots`; `COMPACT` scores are in the order of that list, others in a
    whole row. `WITH_BITS`: also write the groups of which columns were taken, and which ones.
    """
    row = tl.program_id(0).to(tl.int64)
    stop = tl.minimum(tl.load(stop_ptr + row), length)
    place = tl.arange(0, BLOCK)
    column = place
    if GROUP > 0:
        slot = place // GROUP
        group = tl.load(list_ptr + row * slots + slot, mask=slot < slots, other=num_groups)
        column = tl.where(group < num_groups, group * GROUP + place % GROUP, length)
    is_there = column < stop
    source = score_ptr + row * length + column
    if COMPACT:
        source = score_ptr + row * slots * GROUP + place
    score = tl.load(source, mask=is_there, other=-1.0)
    flags = store_best(score, column, index_ptr, best_ptr, count_ptr, row, length, count, PADDED)
    if WITH_BITS:
        shifted = tl.reshape(flags << (place % GROUP), [BLOCK // GROUP, GROUP])
        listed = tl.arange(0, BLOCK // GROUP)
        packed = tl.sum(shifted, 1)
        number = tl.load(list_ptr + row * slots + listed, mask=listed < slots, other=0)
        is_held = packed != 0
        held = is_held.to(tl.int32)
        target = row * slots + tl.cumsum(held, 0) - 1
        tl.store(held_ptr + target, number, mask=is_held)
        tl.store(bits_ptr + target, packed, mask=is_held)
        is_rest = (listed >= tl.sum(held, 0)) & (listed < slots)
        tl.store(held_ptr + row * slots + listed, listed * 0 + num_groups, mask=is_rest)


def group_of(length: int, count: int) -> int:
    """Return how many columns a group has, 0 for rows that need none, -1 for too long ones."""
    if length <= _ROW:
        return 0
    for size in (16, 32, 64, 128):
        if power_of_two(max(1, count)) * size > _LARGEST:
            break
        if -(-length // size) <= _LARGEST:
            return size
    return -1


def supports(scores: torch.Tensor, count: int) -> bool:
    """Whether the kernel takes these scores."""
    return scores.dtype == torch.float32 and count > 0 and group_of(scores.shape[-1], count) >= 0


def launch_best(
    scores: torch.Tensor, stop: torch.Tensor, length: int, count: int, *,
    groups: torch.Tensor | None = None, size: int = 0, is_compact: bool = False,
    with_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the kernel on contiguous rows `[rows, ...]`; see `best_kernel` for what it takes.

    Returns:
        Columns, scores, counts, and, `with_bits`, int32 `[2, rows, slots]`: groups of which columns
        were taken, in the order of the list, then the number of groups; and their bits, bit `e`
        says that column `e` was taken.
    """
    rows, device, stop = stop.shape[0], scores.device, stop.contiguous()
    index = torch.empty((rows, count), dtype=torch.int32, device=device)
    best = torch.empty((rows, count), dtype=torch.float32, device=device)
    taken = torch.empty(rows, dtype=torch.int32, device=device)
    slots = 0 if groups is None else groups.shape[-1]
    held = torch.empty((2, rows if with_bits else 1, slots), dtype=torch.int32, device=device)
    block = max(16, power_of_two(max(1, slots * size if size else length)))
    few = {"maxnreg": _REGISTERS[block]} if block in _REGISTERS and not is_interpreted() else {}
    if rows:
        best_kernel[(rows,)](
            scores, stop, scores if groups is None else groups, index, best, taken, held[1],
            held[0], length, slots, count, -(-length // size) if size else 0,
            GROUP=size, COMPACT=is_compact, WITH_BITS=with_bits, BLOCK=block,
            PADDED=power_of_two(count), num_warps=min(16, max(1, block // 512)), **few,
        )  # fmt: skip
    return index, best, taken, held


def triton_select_top(
    scores: torch.Tensor, stop: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `hyperframe.kernels.select.select_top` says, where `supports` holds; no host sync."""
    *lead, length = scores.shape
    flat, stop = scores.contiguous().view(-1, length), stop.reshape(-1).int().contiguous()
    size = group_of(length, count)
    if size == 0:
        index, best, taken, _ = launch_best(flat, stop, length, count)
    else:
        num_groups = -(-length // size)
        largest = torch.empty((len(flat), num_groups), dtype=torch.float32, device=scores.device)
        if len(flat):
            maxima_kernel[(len(flat), -(-length // _ROW))](
                flat, stop, largest, length, num_groups, GROUP=size, BLOCK=_ROW, num_warps=8,
            )  # fmt: skip
        groups, _, _, _ = launch_best(
            largest, (stop.clamp(max=length) + (size - 1)) // size, num_groups, count
        )
        index, best, taken, _ = launch_best(flat, stop, length, count, groups=groups, size=size)
    return index.view(*lead, count), best.view(*lead, count), taken.view(lead)
