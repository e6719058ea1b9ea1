"""Kernels of the descent of a sketch's tree: all shares of a column, then its path through them.

The first kernels are matrix products that end in shares of energy, at most 15 each. Of the hashed
levels the shares of eight siblings are a word of 32 bits, written once. There is a product for each
of the eight children, so that a thread has all of a word in its own registers: a square is rounded
down by an addition to `2^23`, bounded as an integer and shifted into place, three instructions in
all. Of the top level shares are added up over the repetitions and written as bytes.

The last kernel has a warp for each column (or a few). Sums over the repetitions are sums of words,
of every second child; they are bytes up to 127, compared with a threshold four at a time: the
eighth bits of a sum are the answer. The threshold that leaves room for `capacity` nodes is
bisected, in seven counts at most; ranks are one scan over words, and inside of them the bytes of a
product with 0x01010101. What is kept stays in the order of the nodes, and of an equal score the
first nodes are kept. Instructions are what it costs: so everything has 32 bits, and where a column
keeps few of the nodes that it may, a level has no more lanes than that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from .configs import is_interpreted, padded, power_of_two

__all__ = ["supports", "triton_candidates"]

ONES: tl.constexpr = tl.constexpr(0x01010101)
HALVES: tl.constexpr = tl.constexpr(0x0F0F0F0F)
# from 2^23 on floats are whole numbers, and their bits count them
WHOLE: tl.constexpr = tl.constexpr(0x4B000000)
# what children 0 and 4 leave of it in a word, with a minus
UNDONE: tl.constexpr = tl.constexpr((1 << 32) - ((0x4B000000 + 0xB0000000) & 0xFFFFFFFF))

# columns and words of a product, its warps and stages, and blocks of words of a program
_COLUMNS, _WORDS, _WARPS, _STAGES, _STEPS = 64, 64, 4, 3, 1
_WORDS_REGISTERS: int | None = None  # of a thread, at most
# the same of the top level: columns, nodes, warps, stages
_TOP = (64, 64, 4, 3)
_LARGEST, _MOST_SCORE = 15, 127  # share, sum of shares
_WORDS_OF_A_WARP = 128
_LANES = 32  # of a warp
_REGISTERS: int | None = 64  # of a thread of the descent: 32 warps of a multiprocessor
_MOST_WORDS = 2048
_ALIGNMENT = 128  # of the bytes of the top level


@triton.jit
def whole_squares(value, unit, IS_INTERPRETED: tl.constexpr):
    """Return squares, rounded down and bounded, plus `WHOLE`."""
    if IS_INTERPRETED:
        return tl.minimum(value * value, unit * 1.0).to(tl.int32) + WHOLE
    bits = libdevice.fma_rd(value, value, 8388608.0).to(tl.int32, bitcast=True)
    return tl.minimum(bits, unit + WHOLE)


@triton.jit
def load_keys(key_ptr, column, is_column, key_column, factor, D: tl.constexpr,
              BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Return scaled keys in the dtype of products."""
    dim = tl.arange(0, BLOCK_D)
    key = tl.load(
        key_ptr + column.to(tl.int64)[:, None] * key_column + dim[None, :],
        mask=is_column[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip
    return (key * factor).to(DTYPE)


@triton.jit(do_not_specialize=["columns", "nodes", "unit"])
def top_kernel(
    key_ptr, key_head, key_column, sketch_ptr, score_ptr, columns, nodes, stride, factor, unit,
    repetitions, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    NODES: tl.constexpr, STAGES: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the shares of nodes, summed over the repetitions, as bytes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(2).to(tl.int64)
    is_column = column < columns
    key = load_keys(
        key_ptr + head * key_head, column, is_column, key_column, factor, D, BLOCK_D,
        sketch_ptr.dtype.element_ty,
    )  # fmt: skip
    node = tl.program_id(1) * NODES + tl.arange(0, NODES)
    dim = tl.arange(0, BLOCK_D)
    source = sketch_ptr + head * (repetitions * nodes * D) + node[None, :] * D + dim[:, None]
    is_there = (dim < D)[:, None] & (node < nodes)[None, :]
    total = tl.zeros([COLUMNS, NODES], tl.int32)
    for repetition in tl.range(0, repetitions, num_stages=STAGES):
        part = tl.load(source + repetition * nodes * D, mask=is_there, other=0.0)
        value = tl.dot(key, part, input_precision="ieee")
        total += whole_squares(value, unit, IS_INTERPRETED) - WHOLE
    target = score_ptr + (head * columns + column)[:, None] * stride + node[None, :]
    tl.store(target, total.to(tl.uint8), mask=is_column[:, None] & (node < stride)[None, :])


@triton.jit(do_not_specialize=["columns", "words", "unit"])
def words_kernel(
    key_ptr, key_head, key_column, sketch_ptr, word_ptr, columns, words, stride, factor, unit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the shares of hashed buckets, those of eight siblings in a word.

    Child `c` has the bits from `8 c` on, children from 4 on the bits from `8 (c - 4) + 4` on: so
    that the lower halves of all bytes are children 0 to 3.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(2).to(tl.int64)
    is_column = column < columns
    key = load_keys(
        key_ptr + head * key_head, column, is_column, key_column, factor, D, BLOCK_D,
        sketch_ptr.dtype.element_ty,
    )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    sketch_ptr += head * words * (8 * D)
    # 32-bit offsets within a program
    target = word_ptr + (head * columns + tl.program_id(0) * COLUMNS) * stride
    target += tl.arange(0, COLUMNS)[:, None] * stride
    for step in range(STEPS):
        word = (tl.program_id(1) * STEPS + step) * WORDS + tl.arange(0, WORDS)
        source = sketch_ptr + word[None, :] * (8 * D) + dim[:, None]
        is_there = (dim < D)[:, None] & (word < words)[None, :]
        total = tl.zeros([COLUMNS, WORDS], tl.uint32)
        for number in tl.range(0, 8, num_stages=STAGES):
            # children 7, 3, 6, 2, 5, 1, 4, 0
            child = (7 - number) // 2 + 4 * ((7 - number) % 2)
            part = tl.load(source + child * D, mask=is_there, other=0.0)
            value = tl.dot(key, part, input_precision="ieee")
            share = whole_squares(value, unit, IS_INTERPRETED).to(tl.uint32)
            total = (total << 4) + share
        total += UNDONE
        is_stored = is_column[:, None] & (word < stride)[None, :]
        tl.store(target + word[None, :], total.to(tl.int32, bitcast=True), mask=is_stored)


@triton.jit
def reaching(word, bound):
    """Return a 1 for every byte of words, up to 127, that is at least a bound, in its place."""
    return ((word + (128 - bound).to(tl.uint32) * ONES) >> 7) & ONES


@triton.jit
def count_of(low, high):
    """Return how many of the bytes of two words are 1."""
    return (((low + high) * ONES) >> 24).to(tl.int32)


@triton.jit
def up_to_each(low, high):
    """Return for every byte of two words how many up to it are 1."""
    first = low * ONES
    return first, high * ONES + (first >> 24) * ONES


@triton.jit
def keep_best(low, high, node, out_ptr, least, capacity):
    """Store the best children of nodes, by the bytes of their words; return how many there are.

    `low` has children 0 to 3.
    """
    kept_low, kept_high = reaching(low, least), reaching(high, least)
    count = count_of(kept_low, kept_high)
    total = tl.sum(count, 0)
    if total > capacity:
        bound = least + total * 0
        beyond = total * 0 + 128
        reached = total
        while (beyond - bound > 1) & (reached > capacity):
            middle = (bound + beyond) // 2
            here = tl.sum(count_of(reaching(low, middle), reaching(high, middle)), 0)
            if here >= capacity:
                bound = middle
                reached = here
            else:
                beyond = middle
        above_low, above_high = reaching(low, bound + 1), reaching(high, bound + 1)
        ties_low, ties_high = reaching(low, bound) - above_low, reaching(high, bound) - above_high
        ties = count_of(ties_low, ties_high)
        room = capacity - tl.sum(count_of(above_low, above_high), 0)
        room = tl.minimum(tl.maximum(room - tl.cumsum(ties, 0) + ties, 0), 8)
        until_low, until_high = up_to_each(ties_low, ties_high)
        kept_low = above_low | (ties_low & (reaching(until_low, room + 1) ^ ONES))
        kept_high = above_high | (ties_high & (reaching(until_high, room + 1) ^ ONES))
        count = count_of(kept_low, kept_high)
        total = total * 0 + capacity
    rank = tl.cumsum(count, 0) - count - 1
    until_low, until_high = up_to_each(kept_low, kept_high)
    child_of = node * 8
    for child in tl.static_range(8):
        kept, until = kept_low, until_low
        if child >= 4:
            kept, until = kept_high, until_high
        place = rank + ((until >> (8 * (child % 4))) & 255).to(tl.int32)
        is_kept = ((kept >> (8 * (child % 4))) & 1) != 0
        tl.store(out_ptr + place, child_of + child, mask=is_kept)
    return total


@triton.jit
def next_level(
    word_ptr, place_ptr, node_ptr, held, least, capacity, BLOCK_WORDS: tl.constexpr,
    REPETITIONS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace the nodes of a column, up to `BLOCK`, by the best of their children."""
    slot = tl.arange(0, BLOCK)
    is_held = slot < held
    node = tl.load(node_ptr + slot, mask=is_held, other=0)
    low = tl.zeros([BLOCK], tl.uint32)
    high = tl.zeros([BLOCK], tl.uint32)
    PER_WORD: tl.constexpr = 64 // BITS
    WORDS: tl.constexpr = (REPETITIONS + PER_WORD - 1) // PER_WORD
    MASK: tl.constexpr = (1 << BITS) - 1
    for group in range(WORDS):
        packed = tl.load(place_ptr + node * WORDS + group, mask=is_held, other=0)
        for member in tl.static_range(PER_WORD):
            repetition = group * PER_WORD + member
            place = ((packed >> (BITS * member)) & MASK).to(tl.int32)
            source = word_ptr + repetition * BLOCK_WORDS + place
            is_there = is_held & (repetition < REPETITIONS)
            word = tl.load(source, mask=is_there, other=0).to(tl.uint32, bitcast=True)
            low += word & HALVES
            high += (word >> 4) & HALVES
    tl.debug_barrier()  # all nodes were read before they are overwritten
    return keep_best(low, high, node, node_ptr, least, capacity)


@triton.jit(do_not_specialize=["columns", "num_rows", "top", "least", "capacity", "slots"])
def descend_kernel(
    score_ptr, word_ptr, place_ptr, node_ptr, row_ptr, columns, words, place_head, num_rows, top,
    least, capacity, slots, TOP_WORDS: tl.constexpr, TOP_BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, REPETITIONS: tl.constexpr, BITS: tl.constexpr, FEW: tl.constexpr,
    BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Write the rows of one column that the descent ends at, ascending, then -1.

    A column has scores of the `top` first nodes, a byte each, eight in each of `TOP_WORDS` words;
    and for each level `REPETITIONS` times `BLOCK_WORDS` words of shares, which the places name,
    `64 / BITS` of them in a word. `node_ptr`: the memory of the rows, for the nodes of levels.
    """
    head = tl.program_id(1).to(tl.int64)
    program = head * columns + tl.program_id(0)
    word_ptr += program * words
    row_ptr += program * slots
    node_ptr += program * slots * 2
    place_ptr += head * place_head
    slot = tl.arange(0, TOP_BLOCK)
    score_ptr += program * (2 * TOP_WORDS)
    low = tl.load(score_ptr + 2 * slot, mask=slot < TOP_WORDS, other=0)
    high = tl.load(score_ptr + 2 * slot + 1, mask=slot < TOP_WORDS, other=0)
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    held = keep_best(low, high, slot, node_ptr, least, capacity)
    PLACE_WORDS: tl.constexpr = (REPETITIONS + 64 // BITS - 1) // (64 // BITS)
    for _ in range(LEVELS):
        tl.debug_barrier()  # what other threads stored is read
        given = (word_ptr, place_ptr, node_ptr, held, least, capacity)
        if (held > 0) & (held <= FEW):
            held = next_level(*given, BLOCK_WORDS, REPETITIONS, BITS, FEW)
        elif FEW < BLOCK:
            if (held > FEW) & (held <= 2 * FEW):
                held = next_level(*given, BLOCK_WORDS, REPETITIONS, BITS, 2 * FEW)
            elif 2 * FEW < BLOCK:
                if held > 2 * FEW:
                    held = next_level(*given, BLOCK_WORDS, REPETITIONS, BITS, BLOCK)
        word_ptr += REPETITIONS * BLOCK_WORDS
        place_ptr += top * PLACE_WORDS
        top *= 8
    tl.debug_barrier()
    slot = tl.arange(0, OUT)
    node = tl.load(node_ptr + slot, mask=slot < held, other=-1)
    row = tl.where(node < num_rows, node, -1).to(tl.int64)
    tl.debug_barrier()  # all nodes were read before rows take their memory
    tl.store(row_ptr + slot, row, mask=slot < slots)


def supports(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, unit: int, capacity: int
) -> bool:  # fmt: skip
    """Whether the kernels take these: shares of half a byte, up to 2048 words of nodes."""
    repetitions, nodes = top.shape[1:3]
    sizes = (nodes // 8 + 1, capacity)
    return (
        key.dtype == torch.float32
        and top.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and hashed.dtype == top.dtype
        and key.shape[-1] <= 256
        and unit <= _LARGEST
        and repetitions * unit <= _MOST_SCORE
        and max(sizes) <= _MOST_WORDS
        and hashed[0].numel() < 2**31
        and nodes * 8 ** hashed.shape[1] * max(1, repetitions // 64) < 2**31
        and key.shape[0] < 65536
    )


def triton_candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.kernels.sketch.sketch_candidates` says, where `supports` holds; no sync.

    Cost: three launches; the shares of all columns are held at once.
    """
    heads, columns, _ = key.shape
    repetitions, nodes = top.shape[1:3]
    levels, width = hashed.shape[1], hashed.shape[3]
    slots = min(capacity, nodes)
    for _ in range(levels):
        slots = min(capacity, 8 * slots)
    row = torch.empty((heads, columns, slots), dtype=torch.int64, device=key.device)
    if row.numel() == 0:
        return row
    key = key if key.stride(-1) == 1 else key.contiguous()
    score = _top_scores(key, top.contiguous(), factor, unit)
    word = _words(key, hashed.contiguous(), factor, unit)
    top_words = score.shape[-1] // 8
    block, top_block = (max(32, power_of_two(size)) for size in (capacity, top_words))
    warps = min(8, max(1, max(block, top_block) // _WORDS_OF_A_WARP))
    place_words = places.contiguous().view(torch.int64)
    descend_kernel[(columns, heads)](
        score.view(torch.int32), word, place_words, row.view(torch.int32), row, columns,
        word.shape[-1], place_words.shape[1] * place_words.shape[2], num_rows, nodes,
        min(least, _MOST_SCORE + 1), capacity, slots, TOP_WORDS=top_words, TOP_BLOCK=top_block,
        LEVELS=levels, BLOCK_WORDS=width // 8, REPETITIONS=repetitions,
        BITS=8 * places.element_size(), FEW=min(block, _LANES * warps), BLOCK=block,
        OUT=max(32, power_of_two(slots)), num_warps=warps,
        **_capped(_REGISTERS),
    )  # fmt: skip
    return row


def _top_scores(key: torch.Tensor, top: torch.Tensor, factor: float, unit: int) -> torch.Tensor:
    """Return the bytes of all nodes of the top level, uint8 `[heads, columns, bytes]`."""
    heads, columns, dim = key.shape
    repetitions, nodes = top.shape[1:3]
    stride = -(-nodes // _ALIGNMENT) * _ALIGNMENT
    score = torch.empty((heads, columns, stride), dtype=torch.uint8, device=key.device)
    # the interpreter computes blocks of any size alike, padding included
    block, of_nodes, warps, stages = (32, 32, 4, 1) if is_interpreted() else _TOP
    grid = (-(-columns // block), -(-stride // of_nodes), heads)
    top_kernel[grid](
        key, key.stride(0), key.stride(1), top, score, columns, nodes, stride, factor, unit,
        repetitions, D=dim, BLOCK_D=padded(dim), COLUMNS=block, NODES=of_nodes,
        STAGES=_stages(stages, dim), IS_INTERPRETED=is_interpreted(), num_warps=warps,
    )  # fmt: skip
    return score


def _words(key: torch.Tensor, hashed: torch.Tensor, factor: float, unit: int) -> torch.Tensor:
    """Return the words of all blocks of the hashed levels, int32 `[heads, columns, words]`."""
    heads, columns, dim = key.shape
    words = hashed[0].numel() // (8 * dim)
    stride = -(-words // 8) * 8
    word = torch.empty((heads, columns, stride), dtype=torch.int32, device=key.device)
    if word.numel() == 0:
        return word
    block, of_words, steps = (
        (32, 32, 1) if is_interpreted() else (_COLUMNS, min(_WORDS, power_of_two(words)), _STEPS)
    )
    grid = (-(-columns // block), -(-stride // (of_words * steps)), heads)
    words_kernel[grid](
        key, key.stride(0), key.stride(1), hashed, word, columns, words, stride, factor, unit,
        D=dim, BLOCK_D=padded(dim), COLUMNS=block, WORDS=max(16, of_words), STEPS=steps,
        STAGES=_stages(_STAGES, dim), IS_INTERPRETED=is_interpreted(), num_warps=_WARPS,
        **_capped(_WORDS_REGISTERS),
    )  # fmt: skip
    return word


def _capped(registers: int | None) -> dict[str, int]:
    """Return what tells the compiler how many registers a thread may have."""
    return {} if is_interpreted() or registers is None else {"maxnreg": registers}


def _stages(stages: int, dim: int) -> int:
    """Return how many blocks of a sketch fit, for the dimension of keys."""
    return stages if padded(dim) <= 128 else 1
