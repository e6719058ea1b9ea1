"""A kernel of the exact test of single entries, by columns.

It has a warp for each column, which reads the rows of the candidates once and keeps nothing of them
in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import padded, power_of_two

__all__ = ["supports_products", "triton_products"]

_CANDIDATES = 32  # rows that a warp holds at once
_MOST_SLOTS = 4096


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
