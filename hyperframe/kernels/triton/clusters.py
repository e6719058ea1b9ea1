"""A kernel that decodes the named vertices of a column: edges, clusters, cuts, words, rows.

A program has one column and goes through the buckets that can hold a cluster. A bucket's graph is
64 lanes, two a thread: a set of vertices is a word, which neighbours hand on by shuffles; the word
of a cluster is decoded by nine look-ups. Components with two vertices in a layer are parted by the
same whole numbers as in `hyperframe.sketching.clusters`, where all steps are explained.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import power_of_two
from .names import VERTICES, triton_names

__all__ = ["triton_rows"]

ONES: tl.constexpr = tl.constexpr(0x0101010101010101)
LOW: tl.constexpr = tl.constexpr(0x7F7F7F7F7F7F7F7F)
# of bytes 0 and 1 in every byte: bit k of the highest byte of the product is byte k
GATHER: tl.constexpr = tl.constexpr(0x0102040810204080)
STEPS: tl.constexpr = tl.constexpr(7)
CUTS: tl.constexpr = tl.constexpr(2)
ITERATIONS: tl.constexpr = tl.constexpr(20)
LARGEST: tl.constexpr = tl.constexpr(1 << 20)
MOST: tl.constexpr = tl.constexpr(int(0.35 * (1 << 16)))


@triton.jit
def sum_of_words(word):
    """Return the union of words that have no bit in common.

    A sum of 32 bits is one instruction, and its result is known to be the same in all lanes.
    """
    low = tl.sum(word.to(tl.int32), 0).to(tl.uint32, bitcast=True).to(tl.int64)
    return low | (tl.sum((word >> 32).to(tl.int32), 0).to(tl.int64) << 32)


@triton.jit
def twice_and_once(members):
    """Return a 1 for every byte of words that has two bits or more, and for those with any."""
    seen = members & 0
    twice = members & 0
    for cell in tl.static_range(8):
        bit = (members >> cell) & ONES
        twice |= seen & bit
        seen |= bit
    return twice, seen


@triton.jit
def joined(members, t0, t1, t2, t3, e0, e1, e2, e3):
    """Return the sets of vertices that the vertices are joined to."""
    for _ in range(STEPS):
        a = tl.where(e0, tl.gather(members, t0, 0), 0) | tl.where(e1, tl.gather(members, t1, 0), 0)
        b = tl.where(e2, tl.gather(members, t2, 0), 0) | tl.where(e3, tl.gather(members, t3, 0), 0)
        members |= a | b
    return members


@triton.jit
def side_of_cut(component, inside, t0, t1, t2, t3, e0, e1, e2, e3):
    """Return one side of the best cut of a component, as 0 and 1; zeros if it is a bad one.

    `component` is the word of the vertices inside.
    """
    vertex = tl.arange(0, 64)
    value = tl.where(inside, (((vertex * 40503) & 4095) - 2048) * (LARGEST >> 11), 0)
    degree = e0.to(tl.int32) + e1.to(tl.int32) + e2.to(tl.int32) + e3.to(tl.int32)
    count = tl.maximum(tl.sum(inside.to(tl.int32), 0), 1)
    for _ in range(ITERATIONS):
        there = tl.where(e0, tl.gather(value, t0, 0), 0) + tl.where(e1, tl.gather(value, t1, 0), 0)
        there += tl.where(e2, tl.gather(value, t2, 0), 0) + tl.where(e3, tl.gather(value, t3, 0), 0)
        value = tl.where(inside, ((8 - degree) * value + there) >> 3, 0)
        mean = (tl.sum(value, 0) + 64 * LARGEST) // count - 64 * LARGEST // count
        value = tl.where(inside, value - mean, 0)
    v0, v1 = tl.gather(value, t0, 0), tl.gather(value, t1, 0)
    v2, v3 = tl.gather(value, t2, 0), tl.gather(value, t3, 0)
    total = tl.sum(degree, 0)
    least = count * 0 + MOST + 1
    chosen = count * 0
    for place in range(64):
        if ((component >> place) & 1) != 0:
            bound = tl.sum(tl.where(vertex == place, value, 0), 0)
            is_below = value <= bound
            cut = (e0 & (v0 > bound)).to(tl.int32) + (e1 & (v1 > bound)).to(tl.int32)
            cut += (e2 & (v2 > bound)).to(tl.int32) + (e3 & (v3 > bound)).to(tl.int32)
            both = tl.sum(tl.where(is_below, (cut << 16) + degree, 0), 0)
            volume = both & 0xFFFF
            smaller = tl.minimum(volume, total - volume)
            if smaller > 0:
                score = ((both >> 16) << 16) // smaller
                if score < least:
                    least = score
                    chosen = bound
    is_good = least <= MOST
    return (inside & (value <= chosen) & is_good).to(tl.int32)


@triton.jit(do_not_specialize=["columns", "buckets", "places", "least", "capacity", "num_rows"])
def clusters_kernel(
    word_ptr, count_ptr, order_ptr, row_ptr, first_ptr, shift_ptr, contribution_ptr,
    correction_ptr, columns, buckets, places, least, capacity, num_rows, PARITY_BITS: tl.constexpr,
    SPECTRAL: tl.constexpr, BUCKETS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Write the rows that one column's clusters spell, bucket by bucket, then -1."""
    head = tl.program_id(1).to(tl.int64)
    program = head * columns + tl.program_id(0)
    word_ptr += program * buckets * 64
    count_ptr += program * buckets
    row_ptr += program * capacity
    order_ptr += head * buckets * places
    vertex = tl.arange(0, 64)
    cell = vertex % 8
    bit = (vertex * 0 + 1).to(tl.int64) << vertex.to(tl.int64)
    lane = tl.arange(0, BUCKETS)
    held = least * 0
    for block in range(0, buckets, BUCKETS):
        count = tl.load(count_ptr + block + lane, mask=block + lane < buckets, other=0)
        waiting = tl.where(count.to(tl.int32) >= least, lane, BUCKETS)
        here = tl.min(waiting, 0)
        while here < BUCKETS:
            bucket = block + here
            word = tl.load(word_ptr + bucket * 64 + vertex).to(tl.int32)
            is_used = word > 0
            t0 = tl.load(first_ptr + vertex).to(tl.int32) + (word & 7)
            t1 = tl.load(first_ptr + 64 + vertex).to(tl.int32) + ((word >> 3) & 7)
            t2 = tl.load(first_ptr + 128 + vertex).to(tl.int32) + ((word >> 6) & 7)
            t3 = tl.load(first_ptr + 192 + vertex).to(tl.int32) + ((word >> 9) & 7)
            w0, w1 = tl.gather(word, t0, 0), tl.gather(word, t1, 0)
            w2, w3 = tl.gather(word, t2, 0), tl.gather(word, t3, 0)
            b0 = (w0 >> tl.load(shift_ptr + vertex).to(tl.int32)) & 7
            b1 = (w1 >> tl.load(shift_ptr + 64 + vertex).to(tl.int32)) & 7
            b2 = (w2 >> tl.load(shift_ptr + 128 + vertex).to(tl.int32)) & 7
            b3 = (w3 >> tl.load(shift_ptr + 192 + vertex).to(tl.int32)) & 7
            e0 = is_used & (w0 > 0) & (b0 == cell)
            e1 = is_used & (w1 > 0) & (b1 == cell)
            e2 = is_used & (w2 > 0) & (b2 == cell)
            e3 = is_used & (w3 > 0) & (b3 == cell)
            single = tl.where(is_used, bit, 0)
            members = joined(single, t0, t1, t2, t3, e0, e1, e2, e3)
            twice, seen = twice_and_once(members)
            layers = ((seen * ONES) >> 56).to(tl.int32)
            if SPECTRAL:
                cuts = least * 0
                first = tl.min(tl.where((twice != 0) & (layers >= least), vertex, 64), 0)
                while (first < 64) & (cuts < CUTS):
                    chosen = sum_of_words(tl.where(vertex == first, members, 0))
                    inside = ((chosen >> vertex.to(tl.int64)) & 1) != 0
                    side = side_of_cut(chosen, inside, t0, t1, t2, t3, e0 & inside, e1 & inside,
                                       e2 & inside, e3 & inside)  # fmt: skip
                    e0 = e0 & (tl.gather(side, t0, 0) == side)
                    e1 = e1 & (tl.gather(side, t1, 0) == side)
                    e2 = e2 & (tl.gather(side, t2, 0) == side)
                    e3 = e3 & (tl.gather(side, t3, 0) == side)
                    members = joined(single, t0, t1, t2, t3, e0, e1, e2, e3)
                    twice, seen = twice_and_once(members)
                    layers = ((seen * ONES) >> 56).to(tl.int32)
                    first = tl.min(tl.where((twice != 0) & (layers >= least), vertex, 64), 0)
                    cuts += 1
            is_root = is_used & ((members & -members) == bit) & (layers >= least)
            if tl.sum(is_root.to(tl.int32), 0) > 0:
                total = members & 0
                for layer in tl.static_range(8):
                    cells = ((members >> (8 * layer)) & 255).to(tl.int32)
                    total ^= tl.load(contribution_ptr + layer * 256 + cells, mask=is_root, other=0)
                present = seen & (twice ^ ONES)
                missing = 255 - (((present * GATHER) >> 56) & 255)
                entry = tl.load(
                    correction_ptr + ((missing << PARITY_BITS) | (total >> 32)), mask=is_root,
                    other=-1,
                )  # fmt: skip
                is_word = is_root & (entry >= 0)
                place = (total & 0xFFFFFFFF).to(tl.int32) ^ entry
                place = tl.where(is_word, place, -1 - vertex)
                words = sum_of_words(tl.where(is_word, bit, 0))
                if (words & (words - 1)) != 0:
                    # a row that was split in two halves is spelled twice
                    for other in range(64):
                        if ((words >> other) & 1) != 0:
                            there = tl.sum(tl.where(vertex == other, place, 0), 0)
                            is_word = is_word & ((place != there) | (vertex <= other))
                is_word = is_word & (place < places)
                row = tl.load(order_ptr + bucket * places + place, mask=is_word, other=num_rows)
                is_row = is_word & (row < num_rows)
                rank = held + tl.cumsum(is_row.to(tl.int32), 0) - 1
                tl.store(row_ptr + rank, row, mask=is_row & (rank < capacity))
                held += tl.sum(is_row.to(tl.int32), 0)
            here = tl.min(tl.where(waiting > here, waiting, BUCKETS), 0)
    rest = tl.arange(0, SLOTS)
    is_rest = (rest >= held) & (rest < capacity)
    tl.store(row_ptr + rest, tl.zeros([SLOTS], tl.int64) - 1, mask=is_rest)


def triton_rows(
    key: torch.Tensor, sketch: torch.Tensor, bucket_order: torch.Tensor, message: int,
    factor: float, capacity: int, num_rows: int, spectral: bool, code: Any, names: Any,
    thresholds: tuple[float, float, float],
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.sketching.expander_decoding.torch_rows` says; no sync.

    Args:
        key: float32, and so on as there.
        sketch: of the dtype of the products.
        bucket_order: int64.
        message: symbols of a message.
        factor: of the keys.
        capacity: slots of a column.
        num_rows: how many rows.
        spectral: part joined clusters.
        code: the tables `contribution` and `correction` of the code.
        names: int64 `[4, 64]` twice, see `sketching.clusters.name_tables`.
        thresholds: `plain`, `share` and `even` of `triton_names`.
    """
    heads, columns, _ = key.shape
    buckets = sketch.shape[1]
    row = torch.empty((heads, columns, capacity), dtype=torch.int64, device=key.device)
    if row.numel() == 0:
        return row
    plain, share, even = thresholds
    word, count = triton_names(
        (key * factor).to(sketch.dtype).contiguous(), sketch.contiguous(), least=message,
        plain=plain, share=share, even=even,
    )  # fmt: skip
    block = min(1024, max(32, power_of_two(buckets)))
    clusters_kernel[(columns, heads)](
        word, count, bucket_order.contiguous(), row, *names, *code, columns, buckets,
        bucket_order.shape[1] // buckets, message, capacity, num_rows,
        PARITY_BITS=3 * (VERTICES // 8 - message), SPECTRAL=spectral, BUCKETS=block,
        SLOTS=power_of_two(capacity), num_warps=1,
    )  # fmt: skip
    return row
