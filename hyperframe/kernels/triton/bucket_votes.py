"""Shares of the softmax that keys found by rows have: one program a tile, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import is_wide
from .common import LOG2_E, load_rows
from .configs import padded, power_of_two
from .forward import finite

__all__ = ["supports", "triton_bucket_votes"]

NUM_SPREAD: tl.constexpr = tl.constexpr(64)
NUM_FIRST: tl.constexpr = tl.constexpr(4)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def bucket_votes_kernel(
    q_ptr, q_batch, q_head, q_row, k_ptr, k_batch, k_head, k_row, index_ptr, score_ptr, voted_ptr,
    weight_ptr, before_ptr, heads_per_key, num_heads, num_rows, num_keys, scale, SIZE: tl.constexpr,
    FOUND: tl.constexpr, VOTES: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `kernels.bucket_votes`; all that was found is contiguous. Grid: tiles, heads, batch."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first_row = tile.to(tl.int64) * SIZE
    place = tl.arange(0, BLOCK_M)
    used = (place < SIZE) & (place < num_rows - first_row)
    dim = tl.arange(0, BLOCK_D)
    q_ptr += batch * q_batch + head.to(tl.int64) * q_head + first_row * q_row
    k_ptr += batch * k_batch + (head // heads_per_key).to(tl.int64) * k_head
    q = tl.load(
        q_ptr + place[:, None] * q_row + dim[None, :], mask=used[:, None] & (dim < D)[None, :],
        other=0.0,
    )  # fmt: skip
    before = tl.maximum(tl.load(before_ptr + tile), 0)
    factor = scale * LOG2_E
    # keys that stand for all of them, and the first ones
    slot = tl.arange(0, NUM_SPREAD)
    is_all = before <= NUM_SPREAD
    spread = ((2 * slot + 1).to(tl.int64) * before // (2 * NUM_SPREAD)).to(tl.int32)
    key = tl.where(is_all, slot, spread)
    share = tl.where(is_all, 0.0, tl.log2(tl.maximum(before, 1).to(tl.float32) / NUM_SPREAD))
    k = load_rows(
        k_ptr, tl.minimum(key, num_keys - 1)[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D,
        False, WIDE,
    )  # fmt: skip
    spread_logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + share
    spread_logits = tl.where((key < before)[None, :], spread_logits, float("-inf"))
    key = tl.arange(0, 16)
    k = load_rows(
        k_ptr, tl.minimum(key, num_keys - 1)[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D,
        False, WIDE,
    )  # fmt: skip
    first_logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    is_first = (key < NUM_FIRST) & (key < before)
    first_logits = tl.where(is_first[None, :], first_logits, float("-inf"))
    column = tl.arange(0, BLOCK_F)
    flat_row = (batch * num_heads + head) * num_rows + first_row
    at = flat_row * FOUND + place[:, None] * FOUND + column[None, :]
    is_slot = used[:, None] & (column < FOUND)[None, :]
    index = tl.load(index_ptr + at, mask=is_slot, other=-1)
    is_one = index >= 0
    for other in range(FOUND):
        its = tl.sum(tl.where(column[None, :] == other, index, 0), 1)
        is_one = is_one & ((index != its[:, None]) | (column <= other)[None, :])
    score = tl.load(score_ptr + at, mask=is_one, other=float("-inf")) * LOG2_E
    top = tl.maximum(tl.max(spread_logits, 1), tl.max(first_logits, 1))
    shift = finite(tl.maximum(top, tl.max(score, 1)))[:, None]
    total = tl.sum(tl.exp2(spread_logits - shift), 1) + tl.sum(tl.exp2(first_logits - shift), 1)
    part = tl.exp2(score - shift)
    total += tl.sum(part, 1)
    weight = tl.where(is_one, part / total[:, None], 0.0)
    if VOTES == FOUND:
        tl.store(voted_ptr + at, index, mask=is_slot)
        tl.store(weight_ptr + at, weight, mask=is_slot)
    else:
        # the largest ones, of ties the first
        weight = tl.where(is_slot, weight, -1.0)
        at = flat_row * VOTES + place * VOTES
        for vote in tl.static_range(VOTES):
            top, best = tl.max(weight, 1, return_indices=True)
            is_it = column[None, :] == best[:, None]
            tl.store(voted_ptr + at + vote, tl.sum(tl.where(is_it, index, 0), 1), mask=used)
            tl.store(weight_ptr + at + vote, top, mask=used)
            weight = tl.where(is_it, -1.0, weight)


def supports(voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, size: int) -> bool:
    """Whether the kernel takes these: tiles of 128 rows, heads of 256, 64 keys found at most."""
    return (
        key.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and voters.dtype == key.dtype
        and key.shape[-1] <= 256
        and size <= 128
        and index.shape[-1] <= 64
        and max(voters.shape[0], voters.shape[1]) <= 65535
        and index.numel() > 0
        and key.numel() > 0
    )


def triton_bucket_votes(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, score: torch.Tensor,
    before: torch.Tensor, size: int, votes: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.bucket_votes` says, where `supports` holds."""
    voters, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (voters, key))
    index, score = index.contiguous(), score.contiguous()
    batch, heads, num_rows, found = index.shape
    voted, weight = (x.new_empty((batch, heads, num_rows, votes)) for x in (index, score))
    dim = key.shape[-1]
    bucket_votes_kernel[(len(before), heads, batch)](
        voters, *voters.stride()[:3], key, *key.stride()[:3], index, score, voted, weight,
        before.int(), heads // key.shape[1], heads, num_rows, key.shape[2], scale, SIZE=size,
        FOUND=found, VOTES=votes, D=dim, BLOCK_M=padded(size), BLOCK_F=power_of_two(found),
        BLOCK_D=padded(dim), WIDE=is_wide(key), PRECISION="ieee",
        num_warps=4 if padded(size) <= 64 and key.element_size() == 2 else 8,
    )  # fmt: skip
    return voted, weight
