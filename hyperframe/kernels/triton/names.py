"""Kernels of an ExpanderSketch: sums of rows by cell and name bit, and the names of all columns.

The sums of a layer of a bucket are one product: a matrix of signs, one row for each cell and bit of
a name and zero where a row is in another cell, times the rows of the bucket. The names are 13
products of a block of columns with the 64 vertices of a bucket, one for the plain sums and one for
each bit. Their accumulators lie alike, so that a thread sees all 13 numbers of its vertices: a sign
is shifted into a word, sizes and squares are added, and no number is ever stored. What is stored is
a byte for every column and bucket, and the words of those that can hold a cluster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import is_interpreted, padded

__all__ = ["LAYERS", "NUM_OUTPUTS", "VERTICES", "triton_name_sums", "triton_names"]

LAYERS, VERTICES, NUM_OUTPUTS = 8, 64, 13  # see `hyperframe.kernels.ops.names`
_MEMBERS = 64  # rows of a product
_BLOCK_COLUMNS, _WARPS = 64, 4


@triton.jit(do_not_specialize=["num_rows", "buckets", "places"])
def name_sums_kernel(
    x_ptr, x_head, x_row, sign_ptr, sign_head, order_ptr, word_ptr, name_ptr, out_ptr, num_rows,
    buckets, places, OUTPUTS: tl.constexpr, OUTPUT_ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Write all sums of one layer of one bucket."""
    bucket = tl.program_id(0)
    layer = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    x_ptr += head * x_head
    sign_ptr += head * sign_head
    order_ptr += (head * buckets + bucket) * places
    output = tl.arange(0, OUTPUT_ROWS)
    # cell by cell: its plain sum, then the bits of a name, the highest one first
    cell_of = output // OUTPUTS
    bit_of = OUTPUTS - 1 - output % OUTPUTS
    dim = tl.arange(0, BLOCK_D)
    member = tl.arange(0, MEMBERS)
    total = tl.zeros([OUTPUT_ROWS, BLOCK_D], tl.float32)
    for start in range(0, places, MEMBERS):
        place = start + member
        is_place = place < places
        row = tl.load(order_ptr + place, mask=is_place, other=num_rows)
        is_row = row < num_rows
        x = tl.load(
            x_ptr + row[:, None] * x_row + dim[None, :],
            mask=is_row[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        word = tl.load(word_ptr + place, mask=is_place, other=0)
        cell = (word >> (3 * layer)) & 7
        # the plain sum has no bit of a name
        name = tl.load(name_ptr + layer * places + place, mask=is_place, other=0)
        sign = tl.load(sign_ptr + row, mask=is_row, other=0)
        flip = ((sign >> layer) & 1).to(tl.int32)
        is_minus = ((name[None, :] >> bit_of[:, None]) & 1) != flip[None, :]
        pattern = tl.where(is_minus, -1.0, 1.0)
        pattern = tl.where(cell[None, :] == cell_of[:, None], pattern, 0.0)
        total = tl.dot(pattern.to(x.dtype), x, total)
    target = ((head * buckets + bucket) * OUTPUTS + output % OUTPUTS) * 64 + layer * 8 + cell_of
    tl.store(
        out_ptr + target[:, None] * D + dim[None, :], total,
        mask=(cell_of < 8)[:, None] & (dim < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns", "buckets", "least"])
def names_kernel(
    key_ptr, sketch_ptr, word_ptr, count_ptr, columns, buckets, least, plain, share, even,
    OUTPUTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write what the vertices of one bucket say, for some columns."""
    bucket = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    dim = tl.arange(0, BLOCK_D)
    vertex = tl.arange(0, 64)
    key = tl.load(
        key_ptr + (head * columns + column)[:, None] * D + dim[None, :],
        mask=is_column[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip
    sketch_ptr += (head * buckets + bucket) * (OUTPUTS * 64 * D)
    source = sketch_ptr + vertex[None, :] * D + dim[:, None]
    is_there = (dim < D)[:, None] & (vertex >= 0)[None, :]
    value = tl.dot(key, tl.load(source, mask=is_there, other=0.0), input_precision="ieee")
    word = (value < 0.0).to(tl.int32)
    size = tl.abs(value)
    energy = value * value
    # what fails the first test has no energy, whatever comes
    energy = tl.where(energy >= plain, energy, -1e30)
    for number in tl.range(1, OUTPUTS, num_stages=STAGES):
        part = tl.load(source + number * (64 * D), mask=is_there, other=0.0)
        value = tl.dot(key, part, input_precision="ieee")
        bits = value.to(tl.uint32, bitcast=True)
        # one shift of two registers
        word = (word << 1) | (bits >> 31).to(tl.int32)
        size += tl.abs(value)
        energy += value * value
    is_named = (energy >= share) & (size * size >= even * energy)
    named: tl.constexpr = 1 << (OUTPUTS - 1)
    # where the plain sum is negative, all bits are the other way round
    turned = tl.where((word & named) != 0, ~word, word)
    word = tl.where(is_named, (turned & (named - 1)) | named, 0)
    # layers that hold a name
    layers = tl.max(tl.reshape(is_named.to(tl.int32), [COLUMNS, 8, 8]), 2)
    held = tl.sum(layers, 1)
    program = (head * columns + column) * buckets + bucket
    tl.store(count_ptr + program, held.to(tl.uint8), mask=is_column)
    is_kept = is_column & (held >= least)
    tl.store(
        word_ptr + program[:, None] * 64 + vertex[None, :], word.to(tl.int16), mask=is_kept[:, None]
    )


def triton_name_sums(
    x: torch.Tensor, sign_words: torch.Tensor, bucket_order: torch.Tensor, num_buckets: int,
    words: torch.Tensor, names: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.sketching.expander_sketch.torch_name_sums` says; no sync.

    Args:
        x: float32, up to 256 columns, and so are the others as there.
        sign_words: int64 `[heads, n]`.
        bucket_order: int64 `[heads, buckets * places]`.
        num_buckets: how many.
        words: int32 `[places]`, words of the code.
        names: int32 `[8, places]`, their names in each layer.
    """
    heads, num_rows, dim = x.shape
    shape = (heads, num_buckets, NUM_OUTPUTS, VERTICES, dim)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    sign_words = sign_words if sign_words.stride(-1) == 1 else sign_words.contiguous()
    places = bucket_order.shape[1] // num_buckets
    name_sums_kernel[(num_buckets, LAYERS, heads)](
        x, x.stride(0), x.stride(1), sign_words, sign_words.stride(0), bucket_order.contiguous(),
        words, names.contiguous(), out, num_rows, num_buckets, places, OUTPUTS=NUM_OUTPUTS,
        OUTPUT_ROWS=128, D=dim, BLOCK_D=padded(dim), MEMBERS=_MEMBERS, num_warps=8,
        num_stages=2 if padded(dim) <= 128 else 1,
    )  # fmt: skip
    return out


def triton_names(
    key: torch.Tensor, sketch: torch.Tensor, *, least: int, plain: float, share: float, even: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return what the vertices of all buckets say, for every column; no sync.

    Args:
        key: `[heads, columns, d]`, contiguous, scaled so that a row at the bound has size 1.
        sketch: `[heads, buckets, 13, 64, d]`, contiguous, of the same dtype.
        least: layers with names of a bucket that can hold a cluster.
        plain: least square of a plain sum.
        share: least mean square of all sums.
        even: least part of it that the square of the mean size is.

    Returns:
        int16 `[heads, columns, buckets, 64]`, see `sketching.expander_decoding.heavy_names`; and
        uint8 `[heads, columns, buckets]`, layers with names. Words of buckets with fewer than
        `least` are not written.
    """
    heads, columns, dim = key.shape
    buckets = sketch.shape[1]
    word = torch.empty((heads, columns, buckets, VERTICES), dtype=torch.int16, device=key.device)
    count = torch.empty(word.shape[:-1], dtype=torch.uint8, device=key.device)
    block = 16 if is_interpreted() else _BLOCK_COLUMNS
    names_kernel[(-(-columns // block), buckets, heads)](
        key, sketch, word, count, columns, buckets, least, plain, NUM_OUTPUTS * share,
        NUM_OUTPUTS * even, OUTPUTS=NUM_OUTPUTS, D=dim, BLOCK_D=padded(dim), COLUMNS=block,
        STAGES=3 if padded(dim) <= 128 else 2, num_warps=_WARPS,
    )  # fmt: skip
    return word, count
