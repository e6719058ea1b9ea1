"""The best leaves of tiles, by the kernels that count votes; and the mean keys of leaves.

A tile is a segment whose voters see the first leaves and a list of near ones. The largest mass of
every 16 far leaves chooses groups of them; the leaves of those and the near ones are then counted
one by one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import few_leaves, vote_calls
from .arguments import is_wide
from .common import load_rows
from .configs import is_interpreted, padded
from .select_long import launch_best
from .vote_calls import Voting

__all__ = ["supports", "supports_means", "triton_best_leaves", "triton_leaf_means"]

_HELD_BYTES = 256 << 20  # of the scores of groups of leaves
_GROUP = 16
_LARGEST = 16384  # values of a row that are selected from at once
_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_leaves", "longest", "key_heads"])
def leaf_means_kernel(
    x_ptr, x_batch, x_head, x_row, index_ptr, size_ptr, mean_ptr, num_leaves, longest, key_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the mean rows of some leaves: float32 `[batch, key_heads, leaves, D]`."""
    head = tl.program_id(1)
    leaf = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    is_leaf = leaf < num_leaves
    place = head.to(tl.int64) * num_leaves + tl.minimum(leaf, num_leaves - 1)
    x_ptr += (head // key_heads).to(tl.int64) * x_batch + (head % key_heads).to(tl.int64) * x_head
    size = tl.load(size_ptr + leaf, mask=is_leaf, other=0).to(tl.int32)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    # rows are loaded a step ahead: the gathers do not wait for them
    next_row = tl.load(index_ptr + place * longest).to(tl.int32)
    for slot in range(longest):
        row = next_row
        later = tl.minimum(slot + 1, longest - 1)
        next_row = tl.load(index_ptr + place * longest + later).to(tl.int32)
        x = load_rows(x_ptr, row[:, None], x_row, dim[None, :], x_ptr, 0, D, BLOCK_D, False, WIDE)
        total += tl.where((slot < size)[:, None], x.to(tl.float32), 0.0)
    mean = total / tl.maximum(size, 1).to(tl.float32)[:, None]
    target = mean_ptr + place[:, None] * D + dim[None, :]
    tl.store(target, mean, mask=is_leaf[:, None] & (dim < D)[None, :])


def supports_means(x: torch.Tensor) -> bool:
    """Whether the kernel of means takes these rows."""
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and 0 < x.shape[-1] <= 256
        and x.shape[0] * x.shape[1] <= 65535
    )


def triton_leaf_means(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Do what `hyperframe.kernels.leaves.leaf_means` says, where `supports_means` holds."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    index, (batch, key_heads, _, dim) = index.contiguous(), x.shape
    num_leaves, longest = index.shape[2:]
    mean = torch.empty((batch, key_heads, num_leaves, dim), dtype=torch.float32, device=x.device)
    if mean.numel() and longest and x.shape[2]:
        width = padded(dim)
        block = max(4, 2048 // width)
        leaf_means_kernel[(-(-num_leaves // block), batch * key_heads)](
            x, *x.stride()[:3], index, sizes.contiguous(), mean, num_leaves, longest, key_heads,
            D=dim, BLOCK_D=width, BLOCK=block, WIDE=is_wide(x), num_warps=4,
        )  # fmt: skip
        return mean
    return mean.zero_()


def supports(
    voters: torch.Tensor, mean: torch.Tensor, num_far: int, num_near: int, num_leaves: int
) -> bool:
    """Whether the kernels take these: see `vote_calls.supports`; not too many leaves."""
    slots = min(num_leaves, -(-num_far // _GROUP)) * _GROUP + num_near
    return (
        vote_calls.supports(voters.unsqueeze(2), mean)
        and num_leaves > 0
        and 0 < slots <= _LARGEST
        and num_far <= _LARGEST * _GROUP
    )


@functools.cache
def _precision(dtype: torch.dtype) -> str:
    """Return how products are made, of float32 three of bfloat16 where Triton knows them."""
    if dtype != torch.float32:
        return "ieee"
    if not is_interpreted():
        from triton.backends.nvidia.compiler import CUDAOptions

        if "bf16x3" in CUDAOptions.allowed_dot_input_precisions:
            return "bf16x3"
    return "tf32x3"


def triton_best_leaves(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor,
    far: torch.Tensor, near: torch.Tensor, is_near: torch.Tensor, *, scale: float, num_far: int,
    num_leaves: int, is_even: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `kernels.leaves.best_leaves` says, where `supports` holds; no host sync."""
    batch, heads, num_tiles, _, _ = voters.shape
    mean = mean if mean.stride(-1) == 1 else mean.contiguous()
    count = min(num_leaves, num_far + near.shape[1])
    bias = None if is_even else sizes.float().log2()
    if few_leaves.supports(voters, num_far, near.shape[1], num_leaves):
        return few_leaves.triton_few_leaves(
            voters, votes, mean, bias, far, scale=scale, num_far=num_far, num_leaves=num_leaves,
            precision=_precision(mean.dtype),
        )  # fmt: skip
    chosen = torch.empty((batch, heads, num_tiles, count), dtype=torch.int64, device=mean.device)
    listed = torch.where(is_near, near, mean.shape[2]).int().contiguous()
    per_tile = 4 * batch * heads * (-(-num_far // _GROUP) + _GROUP * count + near.shape[1])
    step = max(1, _HELD_BYTES // per_tile)
    for start in range(0, num_tiles, step):
        part = slice(start, start + step)
        voting = Voting(
            voters=voters[:, :, part].unsqueeze(2).contiguous(), key=mean,
            begin=torch.zeros(1, dtype=torch.int32, device=mean.device),
            stop=far[part].clamp(0, num_far).int().unsqueeze(0), width=num_far, scale=scale,
            bias=bias, precision=_precision(mean.dtype),
        )  # fmt: skip
        chosen[:, :, part] = _of_some_tiles(voting, votes[part], listed[part], num_far, count)
    return chosen


def _of_some_tiles(
    voting: Voting, votes: torch.Tensor, near: torch.Tensor, num_far: int, count: int
) -> torch.Tensor:
    batch, heads, _, num_tiles, _, _ = voting.voters.shape
    rows, device, num_near = batch * heads * num_tiles, near.device, near.shape[1]
    num_groups = -(-num_far // _GROUP)
    slots = min(count, num_groups)
    num_listed = slots * _GROUP
    voted = votes.contiguous().view(torch.int8)
    lse = voting.normalisers(listed=near if num_near else None, voted=voted)
    masses = torch.empty((rows, num_listed + num_near), device=device)
    named = near.view(num_tiles, num_near).expand(batch, heads, -1, -1)
    if num_far:
        largest = voting.votes(lse, group=_GROUP).view(rows, num_groups)
        stop = voting.stop.expand(batch * heads, -1).reshape(rows)
        groups, _, _, _ = launch_best(largest, (stop + (_GROUP - 1)) // _GROUP, num_groups, slots)
        voting.listed(
            lse, masses, groups.view(batch * heads, num_tiles, slots), group=_GROUP,
            out_slots=masses.shape[1],
        )  # fmt: skip
        within = torch.arange(_GROUP, dtype=torch.int32, device=device)
        far = (groups.unsqueeze(-1) * _GROUP + within).view(batch, heads, num_tiles, num_listed)
        named = torch.cat([far, named], dim=-1)
    if num_near:
        voting.listed(lse, masses[:, num_listed:], near, group=1, out_slots=masses.shape[1])
    every = torch.full((rows,), masses.shape[1], dtype=torch.int32, device=device)
    place, _, _, _ = launch_best(masses, every, masses.shape[1], count)
    place = place.clamp(max=masses.shape[1] - 1).long().view(batch, heads, num_tiles, count)
    return named.gather(-1, place).clamp(max=voting.key.shape[2] - 1).long()
