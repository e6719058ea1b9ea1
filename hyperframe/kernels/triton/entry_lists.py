"""Kernels of lists of entries by tiles of rows: a counting sort, and a selection by digits.

Pairs of a tile and a key are counted, then written where those of the tile begin, in any order
(atomic counters, several for a tile: in some inputs every key has an entry in the same few tiles).
A tile with more pairs than it keeps has *jobs*, a few thousand pairs each, whose programs share out
the device however uneven the tiles are. The last pair that is kept is found digit by digit: every
digit is a launch in which each job adds its histogram to that of its tile; the next launch reads
which digit it is. Pairs are ordered by strength and then by key, so no two are equal, and what is
found depends on no order. A last launch collects the pairs that are kept, and then every tile sorts
its own by key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import power_of_two

__all__ = ["supports_lists", "triton_lists"]

_LANES, _SLOTS_AT_ONCE = 1024, 16  # slots of a program that counts or places; those of a column
_MOST_SLOTS = 4096
_JOB, _JOB_BLOCK = 4096, 1024  # pairs of a job, and of them at once
_SHARDS = 16  # counters of a tile
_TILES_AT_ONCE = 128  # of a program that makes jobs
_KEY_BITS = 31
_PAIR_BYTES = 16


@triton.jit
def used_rows(row_ptr, place, is_there, key, offset, IS_CAUSAL: tl.constexpr):
    """Return the rows of slots, -1 where there is none or it does not see the key."""
    row = tl.load(row_ptr + place, mask=is_there, other=-1).to(tl.int32)
    if IS_CAUSAL:
        row = tl.where(row >= key + offset, row, -1)
    return row


@triton.jit(do_not_specialize=["num_keys", "width", "num_tiles", "offset"])
def pairs_kernel(
    row_ptr, strength_ptr, cursor_ptr, pair_key_ptr, pair_order_ptr, pair_bits_ptr, num_keys,
    width, num_tiles, offset, TILE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_PLACED: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """Count the pairs of every tile, or place them, for some columns, some slots at a time.

    The first slot of a column with a row of a tile stands for the pair; it looks at the others.
    `cursor_ptr`: counts of the shards of tiles, zeros at first; or the places that they come to.
    """
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, COLUMNS * SLOTS)
    key = tl.program_id(0) * COLUMNS + lane // SLOTS
    first = (head * num_keys + key) * width
    last = width * 0
    for begin in range(0, width, SLOTS):
        slot = begin + lane % SLOTS
        is_there = (slot < width) & (key < num_keys)
        row = used_rows(row_ptr, first + slot, is_there, key, offset, IS_CAUSAL)
        last = tl.maximum(last, tl.max(tl.where(row >= 0, slot + 1, 0), 0))
    # mostly a few slots of many are used, and they come first
    for begin in range(0, last, SLOTS):
        slot = begin + lane % SLOTS
        is_there = (slot < width) & (key < num_keys)
        row = used_rows(row_ptr, first + slot, is_there, key, offset, IS_CAUSAL)
        is_used = row >= 0
        tile = tl.where(is_used, row // TILE, -1)
        is_first = is_used
        bits = tl.zeros([COLUMNS * SLOTS], tl.int64)
        strength = tl.full([COLUMNS * SLOTS], float("-inf"), tl.float32)
        for other in range(last):
            there = used_rows(row_ptr, first + other, is_used, key, offset, IS_CAUSAL)
            is_same = (there >= 0) & (there // TILE == tile)
            is_first = is_first & ((is_same & (other < slot)) == 0)
            if IS_PLACED:
                place_of_bit = tl.where(is_same, there % TILE, 0).to(tl.int64)
                bits = bits | (is_same.to(tl.int64) << place_of_bit)
                size = tl.load(strength_ptr + first + other, mask=is_same, other=float("-inf"))
                strength = tl.where(size > strength, size, strength)
        target = cursor_ptr + (head * num_tiles + tile) * SHARDS + tl.program_id(0) % SHARDS
        if IS_PLACED:
            place = tl.atomic_add(target, 1, mask=is_first, sem="relaxed").to(tl.int64)
            place += head * num_keys * width
            tl.store(pair_key_ptr + place, key, mask=is_first)
            tl.store(pair_bits_ptr + place, bits, mask=is_first)
            # integers that ascend with the strength
            order = strength.to(tl.int32, bitcast=True)
            order = order ^ ((order >> 31) & 0x7FFFFFFF)
            tl.store(pair_order_ptr + place, order, mask=is_first)
        else:
            tl.atomic_add(target, 1, mask=is_first, sem="relaxed")


@triton.jit
def pairs_of(stop_ptr, head, tile, num_tiles, is_tile, SHARDS: tl.constexpr):
    """Return where the pairs of tiles begin and how many there are."""
    stop_ptr += head * num_tiles * SHARDS
    stop = tl.load(stop_ptr + (tile + 1) * SHARDS - 1, mask=is_tile, other=0)
    start = tl.load(stop_ptr + tile * SHARDS - 1, mask=is_tile & (tile > 0), other=0)
    return start, stop - start


@triton.jit(do_not_specialize=["num_tiles", "longest", "most_jobs"])
def jobs_kernel(
    stop_ptr, job_ptr, made_ptr, num_tiles, longest, most_jobs, JOB: tl.constexpr,
    SHARDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write a tile and the number of a part for every job, in any order; add up how many."""
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    _, count = pairs_of(stop_ptr, head, tile, num_tiles, tile < num_tiles, SHARDS)
    parts = tl.where(count > longest, (count + JOB - 1) // JOB, 0)
    total = tl.sum(parts, 0)
    if total > 0:
        first = tl.atomic_add(made_ptr + head, total, sem="relaxed")
        place = first + tl.cumsum(parts, 0) - parts
        target = job_ptr + (head * most_jobs + place) * 2
        for part in range(tl.max(parts, 0)):
            tl.store(target + 2 * part, tile, mask=part < parts)
            tl.store(target + 2 * part + 1, tl.zeros([TILES], tl.int32) + part, mask=part < parts)


@triton.jit(do_not_specialize=["pairs", "num_tiles", "longest", "most_jobs", "number", "shift",
                               "last_shift"])  # fmt: skip
def selection_kernel(
    stop_ptr, job_ptr, made_ptr, pair_key_ptr, pair_order_ptr, digits_ptr, bound_ptr, left_ptr,
    index_ptr, kept_ptr, pairs, num_tiles, longest, most_jobs, number, shift, last_shift,
    DIGITS: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, JOB: tl.constexpr,
    BLOCK: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """Add a job's pairs to the histogram of a digit; or, the last time, collect those that stay.

    Before that, find the digit of the time before, at `last_shift` (63 at first: ranks have no
    sign). A launch reads what those before it wrote: `bound_ptr` has the rank of the last pair that
    stays, whose higher digits are known, and `left_ptr` how many of the pairs with these digits
    stay, 0 for all of them.
    """
    head = tl.program_id(1).to(tl.int64)
    job = tl.program_id(0)
    if job < tl.load(made_ptr + head):
        job_ptr += (head * most_jobs + job) * 2
        tile = tl.load(job_ptr)
        part = tl.load(job_ptr + 1)
        start, count = pairs_of(stop_ptr, head, tile, num_tiles, True, SHARDS)
        program = head * num_tiles + tile
        tiles = tl.num_programs(1).to(tl.int64) * num_tiles
        here = number * tiles + program
        digit_of = tl.arange(0, DIGITS)
        bound = program * 0
        left = count * 0 + longest
        if not IS_FIRST:
            bound = tl.load(bound_ptr + here - tiles)
            left = tl.load(left_ptr + here - tiles)
            if left > 0:
                found = tl.load(digits_ptr + (here - tiles) * DIGITS + digit_of)
                is_below = tl.cumsum(found, 0) < left
                left -= tl.sum(tl.where(is_below, found, 0), 0)
                digit = tl.sum(is_below.to(tl.int32), 0)
                bound |= digit.to(tl.int64) << last_shift
                if tl.sum(tl.where(digit_of == digit, found, 0), 0) == left:
                    bound |= ((program * 0 + 1) << last_shift) - 1
                    left = left * 0
        if not IS_LAST:
            if part == 0:
                tl.store(bound_ptr + here, bound)
                tl.store(left_ptr + here, left)
        pair_key_ptr += head * pairs + start
        pair_order_ptr += head * pairs + start
        stop = tl.minimum(count, (part + 1) * JOB)
        if IS_LAST:
            index_ptr += program * longest
            for first in range(part * JOB, stop, BLOCK):
                place = first + tl.arange(0, BLOCK)
                value = ranks_of(pair_key_ptr, pair_order_ptr, place, place < stop)
                is_kept = (place < stop) & (value <= bound)
                rank = tl.cumsum(is_kept.to(tl.int32), 0)
                held = tl.sum(is_kept.to(tl.int32), 0)
                if held > 0:
                    begin = tl.atomic_add(kept_ptr + program, held, sem="relaxed")
                    tl.store(index_ptr + begin + rank - 1, place, mask=is_kept)
        else:
            if left > 0:
                total = tl.zeros([DIGITS], tl.int32)
                for first in range(part * JOB, stop, BLOCK):
                    place = first + tl.arange(0, BLOCK)
                    value = ranks_of(pair_key_ptr, pair_order_ptr, place, place < stop)
                    is_counted = (place < stop) & ((value ^ bound) >> last_shift == 0)
                    digit = ((value >> shift) & (DIGITS - 1)).to(tl.int32)
                    total += tl.histogram(digit, DIGITS, mask=is_counted)
                target = digits_ptr + here * DIGITS + digit_of
                tl.atomic_add(target, total, mask=total > 0, sem="relaxed")


@triton.jit
def ranks_of(key_ptr, order_ptr, place, is_there):
    """Return numbers of pairs, from 0, that ascend as strengths descend, then with the keys."""
    order = tl.load(order_ptr + place, mask=is_there, other=0).to(tl.int64)
    key = tl.load(key_ptr + place, mask=is_there, other=0).to(tl.int64)
    return ((0x7FFFFFFF - order) << 31) | key


@triton.jit(do_not_specialize=["pairs", "num_keys", "num_tiles", "longest"])
def tile_lists_kernel(
    stop_ptr, pair_key_ptr, pair_bits_ptr, index_ptr, bits_ptr, kept_ptr, pairs, num_keys,
    num_tiles, longest, BLOCK: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """Write the list of one tile, by key: all its pairs, or those that its index names."""
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    program = head * num_tiles + tile
    start, count = pairs_of(stop_ptr, head, tile, num_tiles, True, SHARDS)
    skipped = head * pairs + start
    pair_key_ptr += skipped
    pair_bits_ptr += skipped
    index_ptr += program * longest
    bits_ptr += program * longest
    lane = tl.arange(0, BLOCK)
    kept = tl.minimum(count, longest)
    place = lane
    if count > longest:
        place = tl.load(index_ptr + lane, mask=lane < kept, other=0)
    key = tl.load(pair_key_ptr + place, mask=lane < kept, other=num_keys)
    packed = tl.where(lane < kept, (key.to(tl.int64) << 32) | place, num_keys.to(tl.int64) << 32)
    if kept > 1:
        packed = tl.sort(packed)
    tl.debug_barrier()  # all places were read before they are overwritten
    is_slot = lane < longest
    key = tl.minimum((packed >> 32).to(tl.int32), num_keys - 1)
    bits = tl.load(pair_bits_ptr + (packed & 0xFFFFFFFF), mask=lane < kept, other=0)
    tl.store(index_ptr + lane, key, mask=is_slot)
    tl.store(bits_ptr + lane, bits, mask=is_slot)
    tl.store(kept_ptr + program, kept)


def supports_lists(row: torch.Tensor, strength: torch.Tensor, longest: int) -> bool:
    """Whether the kernels take these: lists that fit registers, pairs that 31 bits count."""
    heads, num_keys, width = row.shape
    return (
        row.dtype in (torch.int32, torch.int64)
        and strength.dtype == torch.float32
        and 0 < width <= _MOST_SLOTS
        and 0 < longest <= _MOST_SLOTS
        and num_keys * width < 2**31
        and heads < 65536
    )


def triton_lists(
    row: torch.Tensor, strength: torch.Tensor, num_queries: int, tile_size: int, longest: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.entry_lists.entry_lists` says, where `supports_lists` holds.

    Cost: three launches and a sum over tiles, and where a tile can have more than it keeps a launch
    for every four or eight bits of a strength and a key, and two; 16 bytes for each slot of a
    column and at most as many for the histograms (or 1 KiB for each tile). No sync.
    """
    heads, num_keys, width = row.shape
    num_tiles, device = -(-num_queries // tile_size), row.device
    index = torch.empty((heads, num_tiles, longest), dtype=torch.int32, device=device)
    bits = torch.empty(index.shape, dtype=torch.int64, device=device)
    kept = torch.zeros(index.shape[:2], dtype=torch.int32, device=device)
    if index.numel() == 0:
        return index, bits, kept
    pairs = num_keys * width
    pair_key, pair_order = (
        torch.empty(heads * pairs, dtype=torch.int32, device=device) for _ in range(2)
    )
    pair_bits = torch.empty(heads * pairs, dtype=torch.int64, device=device)
    row, strength = row.contiguous(), strength.contiguous()
    slots = min(_SLOTS_AT_ONCE, power_of_two(width))
    columns = _LANES // slots

    def look(cursor: torch.Tensor, *, is_placed: bool) -> None:
        pairs_kernel[(-(-num_keys // columns), heads)](
            row, strength, cursor, pair_key, pair_order, pair_bits, num_keys, width, num_tiles,
            num_queries - num_keys, TILE=tile_size, IS_CAUSAL=is_causal, IS_PLACED=is_placed,
            COLUMNS=columns, SLOTS=slots, SHARDS=_SHARDS, num_warps=4,
        )  # fmt: skip

    count = torch.zeros((heads, num_tiles * _SHARDS), dtype=torch.int32, device=device)
    look(count, is_placed=False)
    stop = count.cumsum(dim=-1, dtype=torch.int32)
    look(stop - count, is_placed=True)
    if longest < num_keys:
        _select(stop, pair_key, pair_order, index, kept, num_keys=num_keys, pairs=pairs)
    block = max(32, power_of_two(longest))
    tile_lists_kernel[(num_tiles, heads)](
        stop, pair_key, pair_bits, index, bits, kept, pairs, num_keys, num_tiles, longest,
        BLOCK=block, SHARDS=_SHARDS, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return index, bits, kept


def _select(
    stop: torch.Tensor, pair_key: torch.Tensor, pair_order: torch.Tensor, index: torch.Tensor,
    kept: torch.Tensor, *, num_keys: int, pairs: int,
) -> None:  # fmt: skip
    """Write the places of what is kept to the index of tiles that cannot keep all, in any order."""
    heads, num_tiles, longest = index.shape
    # every part of a tile but its last is whole
    most_jobs = pairs // _JOB + min(num_tiles, pairs // (longest + 1))
    if most_jobs == 0:
        return
    # as many bytes as pairs have are enough for eight bits at a time, unless tiles are tiny
    shifts = _shifts(8, num_keys)
    width = 8 if 1024 * num_tiles * len(shifts) <= _PAIR_BYTES * pairs else 4
    shifts = _shifts(width, num_keys)
    job = torch.empty((heads, most_jobs, 2), dtype=torch.int32, device=index.device)
    made = torch.zeros(heads, dtype=torch.int32, device=index.device)
    jobs_kernel[(-(-num_tiles // _TILES_AT_ONCE), heads)](
        stop, job, made, num_tiles, longest, most_jobs, JOB=_JOB, SHARDS=_SHARDS,
        TILES=_TILES_AT_ONCE, num_warps=4,
    )  # fmt: skip
    shape = (len(shifts), heads, num_tiles)
    digits = torch.zeros((*shape, 1 << width), dtype=torch.int32, device=index.device)
    bound = torch.empty(shape, dtype=torch.int64, device=index.device)
    left = torch.empty(shape, dtype=torch.int32, device=index.device)
    for number in range(len(shifts) + 1):
        is_last = number == len(shifts)
        selection_kernel[(most_jobs, heads)](
            stop, job, made, pair_key, pair_order, digits, bound, left, index, kept, pairs,
            num_tiles, longest, most_jobs, number, 0 if is_last else shifts[number],
            shifts[number - 1] if number else 63, DIGITS=1 << width, IS_FIRST=number == 0,
            IS_LAST=is_last, JOB=_JOB, BLOCK=_JOB_BLOCK, SHARDS=_SHARDS, num_warps=4,
        )  # fmt: skip


def _shifts(width: int, num_keys: int) -> list[int]:
    """Return where the digits of ranks begin that can differ, the highest first."""
    of_key = range(((num_keys - 1).bit_length() - 1) // width * width, -1, -width)
    return [*range(_KEY_BITS + 32 - width, _KEY_BITS - 1, -width), *of_key]
