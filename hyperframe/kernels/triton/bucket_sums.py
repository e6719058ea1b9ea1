"""A kernel of sums of signed rows: a program for every block of nodes of a repetition.

It goes through the nodes of its block, a few at a time: their children, side by side in memory, are
added child by child to the block's sums, and summed to the nodes' own, which are the rows of the
level above. So all rows of a level are read once a repetition, and nothing is stored but sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import padded

__all__ = ["supports", "triton_bucket_sums"]

_ELEMENTS = 2048  # of rows that a program holds at once


@triton.jit(do_not_specialize=["num_rows", "nodes", "blocks", "members", "first"])
def bucket_sums_kernel(
    x_ptr, x_head, x_repetition, sign_ptr, sign_head, order_ptr, sum_ptr, parent_ptr, num_rows,
    nodes, blocks, members, first, HAS_SIGNS: tl.constexpr, WORD_BITS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Write the sums of one block, and of the children of each of its nodes."""
    block = tl.program_id(0)
    repetition = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    program = head * tl.num_programs(1) + repetition
    x_ptr += head * x_head + repetition.to(tl.int64) * x_repetition
    order_ptr += (program * blocks + block) * members
    parent_ptr += program * nodes * D
    number = first + repetition
    if HAS_SIGNS:
        sign_ptr += head * sign_head + (number // WORD_BITS).to(tl.int64) * num_rows
    dim = tl.arange(0, BLOCK_D)
    child = tl.arange(0, NODES * 8)
    member = tl.arange(0, NODES)
    total = tl.zeros([NODES * 8, BLOCK_D], tl.float32)
    for start in range(0, members, NODES):
        place = start + child // 8
        node = tl.load(order_ptr + place, mask=place < members, other=nodes)
        row = node * 8 + child % 8
        is_row = (node < nodes) & (row < num_rows)
        x = tl.load(
            x_ptr + row[:, None] * D + dim[None, :],
            mask=is_row[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        if HAS_SIGNS:
            word = tl.load(sign_ptr + row, mask=is_row, other=0)
            is_minus = ((word >> (number % WORD_BITS).to(tl.int64)) & 1) != 0
            x = tl.where(is_minus[:, None], -x, x)
        total += x
        parents = tl.sum(tl.reshape(x, [NODES, 8, BLOCK_D]), 1)
        place = start + member
        node = tl.load(order_ptr + place, mask=place < members, other=nodes)
        tl.store(
            parent_ptr + node[:, None] * D + dim[None, :], parents,
            mask=(node < nodes)[:, None] & (dim < D)[None, :],
        )  # fmt: skip
    sums = tl.sum(tl.reshape(total, [NODES, 8, BLOCK_D]), 0)
    target = (program * blocks + block) * 8 + tl.arange(0, 8)
    tl.store(sum_ptr + target[:, None] * D + dim[None, :], sums, mask=(dim < D)[None, :])


def supports(x: torch.Tensor, order: torch.Tensor) -> bool:
    """Whether the kernel takes these: float32 with up to 256 columns."""
    return x.dtype == torch.float32 and x.shape[-1] <= 256 and max(order.shape[:2]) < 65536


def triton_bucket_sums(
    x: torch.Tensor, sign_words: torch.Tensor | None, order: torch.Tensor, nodes: int,
    blocks: int, first: int, word_bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.bucket_sums` says, where `supports` holds; no sync."""
    heads, repetitions, places = order.shape
    dim = x.shape[-1]
    sums = torch.empty((heads, repetitions, 8 * blocks, dim), dtype=x.dtype, device=x.device)
    parents = torch.empty((heads, repetitions, nodes, dim), dtype=x.dtype, device=x.device)
    if sums.numel() == 0:
        return sums, parents
    if x.stride(-1) != 1 or x.stride(-2) != dim:
        x = x.contiguous()
    words = order if sign_words is None else sign_words.contiguous()
    bucket_sums_kernel[(blocks, repetitions, heads)](
        x, x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), words, words.stride(0),
        order.contiguous(), sums, parents, x.shape[2], nodes, blocks, places // blocks, first,
        HAS_SIGNS=sign_words is not None, WORD_BITS=word_bits, D=dim, BLOCK_D=padded(dim),
        NODES=max(1, _ELEMENTS // (8 * padded(dim))), num_warps=4,
    )  # fmt: skip
    return sums, parents
