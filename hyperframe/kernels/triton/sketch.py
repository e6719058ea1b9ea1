"""Kernels of the descent of a sketch's tree: all bytes of a column, then its path through them.

The first kernel is a matrix product that ends in a byte for every bucket, written once. The second
has a warp for each column (or a few). Scores of eight siblings are the bytes of a word: sums over
the repetitions are sums of words, and bytes are compared with a threshold eight at a time, in two
words of four 16-bit lanes whose ninth bit is the answer. The threshold that leaves room for
`capacity` nodes is bisected, in eight counts at most; ranks are one scan over words, and inside of
them the bytes of a product with 0x0101010101010101. What is kept stays in the order of the nodes,
and of an equal score the first nodes are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import is_interpreted, padded, power_of_two

__all__ = ["supports", "triton_candidates"]

EVEN: tl.constexpr = tl.constexpr(0x00FF00FF00FF00FF)
ONE_IN_TWO: tl.constexpr = tl.constexpr(0x0001000100010001)
NINTH_BITS: tl.constexpr = tl.constexpr(0x0100010001000100)
ONES: tl.constexpr = tl.constexpr(0x0101010101010101)

_BLOCK_COLUMNS, _BLOCK_BUCKETS = 128, 128
_STEPS = 8  # blocks of buckets of a program
_WORDS_OF_A_WARP = 128
_MOST_WORDS = 2048  # counts of their bytes fit 16-bit lanes
_ALIGNMENT = 128  # of the bytes of the top level


@triton.jit
def scores_of(key, source, is_there, unit):
    """Return the bytes of products, as integers."""
    part = tl.load(source, mask=is_there, other=0.0)
    value = tl.dot(key, tl.trans(part), input_precision="ieee")
    return tl.minimum(value * value, unit).to(tl.int32)


@triton.jit(do_not_specialize=["columns", "rows"])
def scores_kernel(
    key_ptr, key_head, key_column, sketch_ptr, score_ptr, columns, rows, padded_rows, stride,
    offset, factor, unit, REPEATS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr, BUCKETS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write `min((factor * sketch . key)^2, unit)` as bytes, summed over `REPEATS` sketches."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    is_column = column < columns
    key = tl.load(
        key_ptr + head * key_head + column.to(tl.int64)[:, None] * key_column + dim[None, :],
        mask=is_column[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip
    key = (key * factor).to(sketch_ptr.dtype.element_ty)
    sketch_ptr += head * (REPEATS * rows * D)
    # 32-bit offsets within a program
    target = score_ptr + (head * columns + tl.program_id(0) * COLUMNS) * stride + offset
    target += tl.arange(0, COLUMNS)[:, None] * stride
    for step in range(STEPS):
        bucket = (tl.program_id(1) * STEPS + step) * BUCKETS + tl.arange(0, BUCKETS)
        source = bucket[:, None] * D + dim[None, :]
        is_there = (bucket < rows)[:, None] & (dim < D)[None, :]
        if REPEATS == 1:
            total = scores_of(key, sketch_ptr + source, is_there, unit)
        else:
            total = tl.zeros([COLUMNS, BUCKETS], tl.int32)
            for repeat in range(REPEATS):
                total += scores_of(key, sketch_ptr + repeat * rows * D + source, is_there, unit)
        is_stored = is_column[:, None] & (bucket < padded_rows)[None, :]
        tl.store(target + bucket[None, :], total.to(tl.uint8), mask=is_stored)


@triton.jit
def raised_by(bound):
    """Return what lifts bytes, in 16-bit lanes, over 255 if they are at least a bound up to 256."""
    return (256 - bound).to(tl.int64) * ONE_IN_TWO


@triton.jit
def reaching(even, odd, bound):
    """Return a 1 for every byte of words that is at least a bound, in its place."""
    raised = raised_by(bound)
    by_even = ((even + raised) >> 8) & ONE_IN_TWO
    by_odd = (odd + raised) & NINTH_BITS
    return by_even | by_odd


@triton.jit
def count_reaching(even, odd, bound):
    """Return how many bytes are at least a bound; sums of 4096 in each of four lanes fit."""
    raised = raised_by(bound)
    lanes = (((even + raised) & NINTH_BITS) + ((odd + raised) & NINTH_BITS)) >> 8
    return ((tl.sum(lanes, 0) * ONE_IN_TWO) >> 48).to(tl.int32)


@triton.jit
def keep_best(word, node, out_ptr, least, capacity):
    """Store the best children of nodes, by the bytes of their words; return how many there are."""
    even, odd = word & EVEN, (word >> 8) & EVEN
    total = count_reaching(even, odd, least)
    low = least + total * 0
    high = total * 0 + 256
    reached = total
    while (high - low > 1) & (reached > capacity):
        middle = (low + high) // 2
        here = count_reaching(even, odd, middle)
        if here >= capacity:
            low = middle
            reached = here
        else:
            high = middle
    above = reaching(even, odd, low + 1)
    ties = reaching(even, odd, low) - above
    # byte c of such a product is how many of the bytes 0 to c are set
    ties_here = ties * ONES
    both = (((above * ONES) >> 56) + ((ties_here >> 56) << 16)).to(tl.int32)
    before = tl.cumsum(both, 0) - both
    room = capacity - (tl.sum(both, 0) & 0xFFFF)
    ties_before = before >> 16
    spare = tl.minimum(tl.maximum(room - ties_before, 0), 8).to(tl.int64)
    is_late = ((ties_here + (127 - spare) * ONES) >> 7) & ONES
    kept = above | (ties & ~is_late)
    kept_here = kept * ONES
    rank = (before & 0xFFFF) + tl.minimum(ties_before, room) - 1
    child_of = node * 8
    for child in tl.static_range(8):
        # halves of words: shifts of 64 bits cost twice
        flags = (kept >> (32 * (child // 4))).to(tl.int32) >> (8 * (child % 4))
        here = (kept_here >> (32 * (child // 4))).to(tl.int32) >> (8 * (child % 4))
        tl.store(out_ptr + rank + (here & 255), child_of + child, mask=(flags & 1) != 0)
    return tl.minimum(total, capacity)


@triton.jit(do_not_specialize=["columns", "num_rows", "top", "least", "capacity", "slots"])
def descend_kernel(
    score_ptr, place_ptr, row_ptr, columns, score_words, place_head, num_rows, top, top_words,
    block_words, least, capacity, slots, LEVELS: tl.constexpr, REPETITIONS: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the rows of one column that the descent ends at, ascending, then -1.

    A column has `top_words` words of scores of the `top` first nodes, then for each level
    `REPETITIONS` times `block_words`, which the places name, `64 / BITS` in a word.
    """
    head = tl.program_id(1).to(tl.int64)
    program = head * columns + tl.program_id(0)
    score_ptr += program * score_words
    row_ptr += program * slots
    place_ptr += head * place_head
    slot = tl.arange(0, BLOCK)
    word = tl.load(score_ptr + slot, mask=slot < top_words, other=0)
    held = keep_best(word, slot.to(tl.int64), row_ptr, least, capacity)
    score_ptr += top_words
    nodes = top.to(tl.int64)
    PER_WORD: tl.constexpr = 64 // BITS
    WORDS: tl.constexpr = (REPETITIONS + PER_WORD - 1) // PER_WORD
    MASK: tl.constexpr = (1 << BITS) - 1
    for _ in tl.static_range(LEVELS):
        tl.debug_barrier()  # what other threads stored is read
        is_held = slot < held
        node = tl.load(row_ptr + slot, mask=is_held, other=0)
        word = tl.zeros([BLOCK], tl.int64)
        for group in range(WORDS):
            packed = tl.load(place_ptr + node * WORDS + group, mask=is_held, other=0)
            for member in tl.static_range(PER_WORD):
                repetition = group * PER_WORD + member
                place = (packed >> (BITS * member)) & MASK
                source = score_ptr + repetition * block_words + place
                word += tl.load(source, mask=is_held & (repetition < REPETITIONS), other=0)
        held = keep_best(word, node, row_ptr, least, capacity)
        score_ptr += REPETITIONS * block_words
        place_ptr += nodes * WORDS
        nodes *= 8
    tl.debug_barrier()
    row = tl.load(row_ptr + slot, mask=slot < held, other=-1)
    tl.store(row_ptr + slot, tl.where(row < num_rows, row, -1), mask=slot < slots)


def supports(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, capacity: int
) -> bool:  # fmt: skip
    """Whether the kernels take these: products of 32 bits at most, up to 2048 words of nodes."""
    sizes = (top.shape[2] // 8 + 1, capacity)
    return (
        key.dtype == torch.float32
        and top.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and hashed.dtype == top.dtype
        and key.shape[-1] <= 256
        and max(sizes) <= _MOST_WORDS
        and hashed[0].numel() < 2**31
        and key.shape[0] < 65536
    )


def triton_candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.kernels.sketch.sketch_candidates` says, where `supports` holds; no sync.

    Cost: three launches; the bytes of all columns are held at once.
    """
    heads, columns, _ = key.shape
    _, repetitions, nodes, _ = top.shape
    levels, width = hashed.shape[1], hashed.shape[3]
    top_bytes = -(-nodes // _ALIGNMENT) * _ALIGNMENT
    hashed_rows = levels * repetitions * width
    hashed_bytes = -(-hashed_rows // 16) * 16
    stride = top_bytes + hashed_bytes
    slots = min(capacity, nodes)
    for _ in range(levels):
        slots = min(capacity, 8 * slots)
    row = torch.empty((heads, columns, slots), dtype=torch.int64, device=key.device)
    if row.numel() == 0:
        return row
    score = torch.empty((heads, columns, stride), dtype=torch.uint8, device=key.device)
    key = key if key.stride(-1) == 1 else key.contiguous()
    _launch_scores(key, top.contiguous(), score, nodes, top_bytes, 0, factor, unit, repetitions)
    if levels:
        _launch_scores(
            key, hashed.contiguous(), score, hashed_rows, hashed_bytes, top_bytes, factor, unit, 1
        )
    block = max(32, power_of_two(max(capacity, top_bytes // 8)))
    place_words = places.contiguous().view(torch.int64)
    descend_kernel[(columns, heads)](
        score.view(torch.int64), place_words, row, columns, stride // 8,
        place_words.shape[1] * place_words.shape[2], num_rows, nodes, top_bytes // 8, width // 8,
        least, capacity, slots, LEVELS=levels, REPETITIONS=repetitions,
        BITS=8 * places.element_size(), BLOCK=block,
        num_warps=min(8, max(1, block // _WORDS_OF_A_WARP)),
    )  # fmt: skip
    return row


def _launch_scores(
    key: torch.Tensor, sketch: torch.Tensor, score: torch.Tensor, rows: int, padded_rows: int,
    offset: int, factor: float, unit: int, repeats: int,
) -> None:  # fmt: skip
    heads, columns, dim = key.shape
    # the interpreter computes blocks of any size alike, padding included
    buckets = 32 if is_interpreted() else _BLOCK_BUCKETS
    block = 32 if is_interpreted() else _BLOCK_COLUMNS
    if padded(dim) > 128:
        block = min(64, block)
    grid = (-(-columns // block), -(-padded_rows // (buckets * _STEPS)), heads)
    scores_kernel[grid](
        key, key.stride(0), key.stride(1), sketch, score, columns, rows, padded_rows,
        score.shape[-1], offset, factor, float(unit), REPEATS=repeats, D=dim, BLOCK_D=padded(dim),
        COLUMNS=block, BUCKETS=buckets, STEPS=_STEPS, num_warps=8,
        num_stages=3 if padded(dim) <= 128 else 1,
    )  # fmt: skip
