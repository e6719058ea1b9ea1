"""Kernels of single entries: their exact test by columns, and their lists by tiles of rows.

The test has a warp for each column, which reads the rows of the candidates once and keeps nothing
of them in memory. The lists are a counting sort of pairs of a tile and a key: pairs of a tile are
counted, then written where its own begin, in any order (atomic counters), then every tile finds
the pairs that it keeps, which depends on no order, and sorts them by key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import padded, power_of_two

__all__ = ["supports_lists", "supports_products", "triton_lists", "triton_products"]

_CANDIDATES = 32  # rows that a warp holds at once
_COLUMNS_AT_ONCE = 1024  # slots of a program that counts or places
_MOST_SLOTS = 4096
LOWEST: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit(do_not_specialize=["columns", "width", "limit"])
def products_kernel(
    query_ptr, query_head, query_row, key_ptr, key_head, key_column, row_ptr, kept_ptr,
    product_ptr, columns, width, limit, least, sign, HAS_SIGN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Keep the candidates of one column whose squares are large, in their order."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64)
    program = head * columns + column
    dim = tl.arange(0, BLOCK_D)
    key = tl.load(key_ptr + head * key_head + column * key_column + dim, mask=dim < D, other=0.0)
    query_ptr += head * query_head
    row_ptr += program * width
    kept_ptr += program * limit
    product_ptr += program * limit
    held = width * 0
    for first in range(0, width, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + slot, mask=slot < width, other=-1)
        is_row = row >= 0
        if tl.sum(is_row.to(tl.int32), 0) > 0:
            place = tl.where(is_row, row, 0) * query_row
            query = tl.load(
                query_ptr + place[:, None] + dim[None, :],
                mask=is_row[:, None] & (dim < D)[None, :], other=0.0,
            )  # fmt: skip
            product = tl.sum(query.to(tl.float32) * key[None, :], 1)
            square = product * product
            is_heavy = is_row & (square > 0.0) & (square >= least)
            if HAS_SIGN:
                is_heavy = is_heavy & (product * sign > 0.0)
            rank = held + tl.cumsum(is_heavy.to(tl.int32), 0) - 1
            is_stored = is_heavy & (rank < limit)
            tl.store(kept_ptr + rank, row, mask=is_stored)
            tl.store(product_ptr + rank, product, mask=is_stored)
            held += tl.sum(is_heavy.to(tl.int32), 0)
    rest = tl.arange(0, SLOTS)
    is_rest = (rest >= held) & (rest < limit)
    tl.store(kept_ptr + rest, tl.zeros([SLOTS], tl.int64) - 1, mask=is_rest)
    tl.store(product_ptr + rest, tl.zeros([SLOTS], tl.float32), mask=is_rest)


@triton.jit
def used_rows(row_ptr, place, is_there, key, offset, IS_CAUSAL: tl.constexpr):
    """Return the rows of slots, -1 where there is none or it does not see the key."""
    row = tl.load(row_ptr + place, mask=is_there, other=-1).to(tl.int32)
    if IS_CAUSAL:
        row = tl.where(row >= key + offset, row, -1)
    return row


@triton.jit(do_not_specialize=["num_keys", "width", "num_tiles", "tile_size", "offset"])
def pairs_kernel(
    row_ptr, strength_ptr, cursor_ptr, pair_key_ptr, pair_order_ptr, pair_bits_ptr, num_keys,
    width, num_tiles, tile_size, offset, IS_CAUSAL: tl.constexpr, IS_PLACED: tl.constexpr,
    COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Count the pairs of every tile, or place them, for some columns.

    The first slot of a column with a row of a tile stands for the pair; it looks at the others.
    `cursor_ptr`: counts of the tiles, zeros at first; or the places that they come to.
    """
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, COLUMNS * SLOTS)
    key = tl.program_id(0) * COLUMNS + lane // SLOTS
    slot = lane % SLOTS
    first = (head * num_keys + key) * width
    is_there = (slot < width) & (key < num_keys)
    row = used_rows(row_ptr, first + slot, is_there, key, offset, IS_CAUSAL)
    is_used = row >= 0
    tile = tl.where(is_used, row // tile_size, -1)
    last = tl.max(tl.where(is_used, slot + 1, 0), 0)
    is_first = is_used
    bits = tl.zeros([COLUMNS * SLOTS], tl.int64)
    strength = tl.full([COLUMNS * SLOTS], float("-inf"), tl.float32)
    for other in range(last):
        there = used_rows(row_ptr, first + other, is_used, key, offset, IS_CAUSAL)
        is_same = (there >= 0) & (there // tile_size == tile)
        is_first = is_first & ((is_same & (other < slot)) == 0)
        if IS_PLACED:
            place_of_bit = tl.where(is_same, there % tile_size, 0).to(tl.int64)
            bits = bits | (is_same.to(tl.int64) << place_of_bit)
            size = tl.load(strength_ptr + first + other, mask=is_same, other=float("-inf"))
            strength = tl.where(size > strength, size, strength)
    target = cursor_ptr + head * num_tiles + tile
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
def count_pairs(order_ptr, key_ptr, count, bound, key_bound, IS_TIE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Return how many pairs reach a bound; of those at it, how many have a key below another."""
    found = count * 0
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_there = place < count
        order = tl.load(order_ptr + place, mask=is_there, other=0).to(tl.int64)
        if IS_TIE:
            key = tl.load(key_ptr + place, mask=is_there, other=0)
            is_counted = is_there & (order == bound) & (key < key_bound)
        else:
            is_counted = is_there & (order >= bound)
        found += tl.sum(is_counted.to(tl.int32), 0)
    return found


@triton.jit(do_not_specialize=["pairs", "num_keys", "num_tiles", "longest"])
def tile_lists_kernel(
    start_ptr, stop_ptr, pair_key_ptr, pair_order_ptr, pair_bits_ptr, index_ptr, bits_ptr,
    count_ptr, pairs, num_keys, num_tiles, longest, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the list of one tile: its strongest pairs, by key."""
    head = tl.program_id(1).to(tl.int64)
    program = head * num_tiles + tl.program_id(0)
    start = tl.load(start_ptr + program)
    count = tl.load(stop_ptr + program) - start
    skipped = head * pairs + start
    pair_key_ptr += skipped
    pair_order_ptr += skipped
    pair_bits_ptr += skipped
    index_ptr += program * longest
    bits_ptr += program * longest
    lane = tl.arange(0, BLOCK)
    if count > longest:
        # the order of the weakest that is kept, then below which key those as weak as it are kept
        low = (count * 0).to(tl.int64) + LOWEST
        high = -low
        reached = count
        while (high - low > 1) & (reached > longest):
            middle = low + ((high - low) >> 1)
            here = count_pairs(pair_order_ptr, pair_key_ptr, count, middle, 0, False, BLOCK)
            if here >= longest:
                low = middle
                reached = here
            else:
                high = middle
        below = num_keys
        if reached > longest:
            above = count_pairs(pair_order_ptr, pair_key_ptr, count, low + 1, 0, False, BLOCK)
            fewer = count * 0
            while below - fewer > 1:
                half = fewer + (below - fewer) // 2
                here = count_pairs(pair_order_ptr, pair_key_ptr, count, low, half, True, BLOCK)
                if here >= longest - above:
                    below = half
                else:
                    fewer = half
        held = count * 0
        for first in range(0, count, BLOCK):
            place = first + lane
            is_there = place < count
            order = tl.load(pair_order_ptr + place, mask=is_there, other=0).to(tl.int64)
            key = tl.load(pair_key_ptr + place, mask=is_there, other=0)
            is_kept = is_there & ((order > low) | ((order == low) & (key < below)))
            rank = held + tl.cumsum(is_kept.to(tl.int32), 0) - 1
            tl.store(index_ptr + rank, place, mask=is_kept & (rank < longest))
            held += tl.sum(is_kept.to(tl.int32), 0)
        tl.debug_barrier()  # what other threads stored is read
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
    tl.store(count_ptr + program, kept)


def supports_products(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, least: float, limit: int,
    sign: float | None,
) -> bool:  # fmt: skip
    """Whether the kernel takes these: squares that add up to 1 leave no more than `limit`."""
    at_most = min(row.shape[2], query.shape[1])
    if least > 0:
        at_most = min(at_most, int(1.0005 / least))
    return (
        key.dtype == torch.float32
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and row.dtype == torch.int64
        and key.shape[-1] <= 256
        and 0 < limit <= _MOST_SLOTS
        and min(limit, row.shape[2]) >= at_most
        and key.shape[0] < 65536
    )


def triton_products(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, least: float, limit: int,
    sign: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.sketch.heavy_products` says, where `supports_products` holds."""
    heads, columns, width = row.shape
    dim = key.shape[-1]
    limit = min(limit, width)
    kept = torch.empty((heads, columns, limit), dtype=torch.int64, device=row.device)
    product = torch.empty(kept.shape, dtype=torch.float32, device=row.device)
    if kept.numel() == 0:
        return kept, product
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    products_kernel[(columns, heads)](
        query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1),
        row.contiguous(), kept, product, columns, width, limit, least,
        0.0 if sign is None else float(sign), HAS_SIGN=sign is not None, D=dim,
        BLOCK_D=padded(dim), BLOCK=_CANDIDATES * 64 // max(64, padded(dim)),
        SLOTS=power_of_two(limit), num_warps=1,
    )  # fmt: skip
    return kept, product


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

    Cost: three launches and a sum over tiles; 16 bytes for each slot of a column.
    """
    heads, num_keys, width = row.shape
    num_tiles, device = -(-num_queries // tile_size), row.device
    index = torch.empty((heads, num_tiles, longest), dtype=torch.int32, device=device)
    bits = torch.empty(index.shape, dtype=torch.int64, device=device)
    kept = torch.empty(index.shape[:2], dtype=torch.int32, device=device)
    if index.numel() == 0:
        return index, bits, kept
    pairs = num_keys * width
    pair_key, pair_order = (
        torch.empty(heads * pairs, dtype=torch.int32, device=device) for _ in range(2)
    )
    pair_bits = torch.empty(heads * pairs, dtype=torch.int64, device=device)
    row, strength = row.contiguous(), strength.contiguous()
    slots = power_of_two(width)
    columns = max(1, _COLUMNS_AT_ONCE // slots)

    def look(cursor: torch.Tensor, *, is_placed: bool) -> None:
        pairs_kernel[(-(-num_keys // columns), heads)](
            row, strength, cursor, pair_key, pair_order, pair_bits, num_keys, width, num_tiles,
            tile_size, num_queries - num_keys, IS_CAUSAL=is_causal, IS_PLACED=is_placed,
            COLUMNS=columns, SLOTS=slots, num_warps=4,
        )  # fmt: skip

    count = torch.zeros((heads, num_tiles), dtype=torch.int32, device=device)
    look(count, is_placed=False)
    stop = count.cumsum(dim=-1, dtype=torch.int32)
    cursor = stop - count
    start = cursor.clone()
    look(cursor, is_placed=True)
    block = max(32, power_of_two(longest))
    tile_lists_kernel[(num_tiles, heads)](
        start, stop, pair_key, pair_order, pair_bits, index, bits, kept, pairs, num_keys,
        num_tiles, longest, BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return index, bits, kept
