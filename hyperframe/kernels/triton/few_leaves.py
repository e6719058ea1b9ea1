"""The one or two best leaves of tiles, in one launch: normalisers, masses and choice.

A program has the voters of several tiles and walks over the means of leaves twice: first for the
normalisers of its rows, then for masses. Of those every column of a block keeps the two best of
each tile in registers, and at the end the best of all columns are taken: no score is written.
The masses of a single voter have the order of its logits: those tiles walk once.
Other numbers of leaves, or lists of near ones, are chosen by groups (`leaf_scores`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import is_wide
from .configs import is_interpreted, padded, power_of_two
from .votes import add_block, block_scores, load_voters, log_sum, place_of_row

__all__ = ["supports", "triton_few_leaves"]

_FEWEST = 132  # programs, for the walk not to be longer than all that is won
_SHORT = 2048  # leaves that one program walks over all the same


@triton.jit
def over_voters(x, VOTERS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """Return the sums over the voters of each tile, `[ROWS / VOTERS, N]`; see `votes`."""
    if VOTERS == 1:
        return x
    else:
        lanes: tl.constexpr = VOTERS // 2 if VOTERS < 16 else 8
        warps: tl.constexpr = VOTERS // 2 // lanes
        x = tl.reshape(x, [ROWS // 16 // warps, warps, 2, 8 // lanes, lanes, N])
        x = tl.sum(tl.sum(tl.sum(x, 2), 3), 1)
        return tl.reshape(x, [ROWS // VOTERS, N])


@triton.jit
def keep_two(value, leaf, first, first_leaf, second, second_leaf):
    """Return the two best values of every place, and their leaves, with one more value."""
    is_first = value > first
    rest = tl.where(is_first, first, value)
    rest_leaf = tl.where(is_first, first_leaf, leaf)
    first = tl.where(is_first, value, first)
    first_leaf = tl.where(is_first, leaf, first_leaf)
    is_second = rest > second
    second = tl.where(is_second, rest, second)
    return first, first_leaf, second, tl.where(is_second, rest_leaf, second_leaf)


@triton.jit
def best_of_row(value, leaf):
    """Return the leaf of the largest value of each row, of equal ones the first."""
    top = tl.max(value, 1)
    return tl.min(tl.where(value == top[:, None], leaf, 0x7FFFFFFF), 1)


@triton.jit(do_not_specialize=["num_heads", "num_leaves", "num_tiles", "num_voters", "num_far"])
def few_leaves_kernel(
    voter_ptr, voted_ptr, mean_ptr, mean_batch, mean_head, mean_row, bias_ptr, far_ptr, chosen_ptr,
    num_heads, heads_per_key, num_leaves, num_tiles, num_voters, num_far, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VOTERS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the leaves of some tiles: int64 `[batch, heads, tiles, COUNT]`."""
    tiles: tl.constexpr = ROWS // VOTERS
    # the longest walks first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    mean_ptr += (head // num_heads).to(tl.int64) * mean_batch
    mean_ptr += (head % num_heads // heads_per_key).to(tl.int64) * mean_head
    local, voter = place_of_row(tl.arange(0, ROWS), VOTERS)
    tile = block * tiles + local
    q, is_row = load_voters(
        voter_ptr + head.to(tl.int64) * num_tiles * num_voters * D, tile, voter, num_tiles,
        num_voters, D, BLOCK_D,
    )  # fmt: skip
    far = tl.minimum(tl.load(far_ptr + tile, mask=is_row, other=0), num_far).to(tl.int32)
    gives = is_row & (tl.load(voted_ptr + tile * num_voters + voter, mask=is_row, other=0) != 0)
    shortest = tl.min(tl.where(is_row, far, 0x7FFFFFFF), 0)
    longest = tl.max(far, 0)
    factor = scale * 1.4426950408889634
    lane = tl.arange(0, BLOCK_N)
    lse = tl.zeros([ROWS], tl.float32)
    if VOTERS > 1:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, longest, BLOCK_N):
            leaf = start + lane
            logits = block_scores(
                q, mean_ptr, mean_row, bias_ptr, leaf, num_leaves, factor, D, BLOCK_D, HAS_BIAS,
                WIDE, PRECISION,
            )  # fmt: skip
            if start + BLOCK_N > shortest:
                logits = tl.where(leaf[None, :] < far[:, None], logits, float("-inf"))
            top, total = add_block(logits, top, total)
        lse = log_sum(top, total)
        lse = tl.where(gives & (lse > float("-inf")), lse, float("inf"))
    out_tile = block * tiles + tl.arange(0, tiles)
    out_far = tl.load(far_ptr + out_tile, mask=out_tile < num_tiles, other=0)
    out_far = tl.minimum(out_far, num_far).to(tl.int32)
    none = tl.zeros([tiles, BLOCK_N], tl.float32)
    lowest: tl.constexpr = -3.4e38
    unseen = lowest if VOTERS == 1 else -1.0
    first, second = none + 2.0 * unseen, none + 2.0 * unseen
    first_leaf, second_leaf = none.to(tl.int32), none.to(tl.int32)
    for start in range(0, longest, BLOCK_N):
        leaf = start + lane
        logits = block_scores(
            q, mean_ptr, mean_row, bias_ptr, leaf, num_leaves, factor, D, BLOCK_D, HAS_BIAS, WIDE,
            PRECISION,
        )  # fmt: skip
        if VOTERS == 1:
            mass = tl.maximum(logits, 0.5 * lowest)
        else:
            mass = over_voters(tl.exp2(logits - lse[:, None]), VOTERS, ROWS, BLOCK_N)
        # what is not a number is still seen
        mass = tl.where(mass == mass, mass, 0.5 * lowest if VOTERS == 1 else 0.0)
        mass = tl.where(leaf[None, :] < out_far[:, None], mass, unseen)
        leaf = tl.broadcast_to(leaf[None, :], [tiles, BLOCK_N])
        first, first_leaf, second, second_leaf = keep_two(
            mass, leaf, first, first_leaf, second, second_leaf
        )
    chosen = best_of_row(first, first_leaf)
    chosen_ptr += (head.to(tl.int64) * num_tiles + out_tile) * COUNT
    is_tile = out_tile < num_tiles
    tl.store(chosen_ptr, tl.minimum(chosen, num_leaves - 1).to(tl.int64), mask=is_tile)
    if COUNT == 2:
        is_taken = first_leaf == chosen[:, None]
        first = tl.where(is_taken, second, first)
        first_leaf = tl.where(is_taken, second_leaf, first_leaf)
        chosen = tl.minimum(best_of_row(first, first_leaf), num_leaves - 1)
        tl.store(chosen_ptr + 1, chosen.to(tl.int64), mask=is_tile)


def _rows(num_voters: int) -> int:
    """Return the rows of a program: where a key is read for more of them, it is read less often."""
    return max(128, power_of_two(num_voters))


def supports(voters: torch.Tensor, num_far: int, num_near: int, num_leaves: int) -> bool:
    """Whether the kernel takes these, of what `leaf_scores.supports`, and is the quicker one."""
    batch, heads, num_tiles, num_voters, _ = voters.shape
    count = min(num_leaves, num_far + num_near)
    programs = -(-num_tiles * power_of_two(num_voters) // _rows(num_voters)) * batch * heads
    return (
        num_near == 0
        and 0 < count <= 2
        and (num_far <= _SHORT or programs >= _FEWEST)
        and voters.shape[-1] <= 128
    )


def triton_few_leaves(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, bias: torch.Tensor | None,
    far: torch.Tensor, *, scale: float, num_far: int, num_leaves: int, precision: str,
) -> torch.Tensor:  # fmt: skip
    """Do what `kernels.leaves.best_leaves` says, where `supports` holds; no host sync.

    `bias` is float32 `[leaves]`, added to the logits in units of log2, or None.
    """
    batch, heads, num_tiles, num_voters, dim = voters.shape
    count = min(num_leaves, num_far)
    chosen = torch.empty((batch, heads, num_tiles, count), dtype=torch.int64, device=mean.device)
    rows, places = _rows(num_voters), power_of_two(num_voters)
    # two programs on a multiprocessor
    options = {} if is_interpreted() else {"num_warps": rows // 16, "num_stages": 2, "maxnreg": 128}
    few_leaves_kernel[(-(-num_tiles * places // rows), batch * heads)](
        voters.contiguous(), votes.contiguous().view(torch.int8), mean, *mean.stride()[:3],
        mean if bias is None else bias, far.contiguous(), chosen, heads, heads // mean.shape[1],
        mean.shape[2], num_tiles, num_voters, num_far, scale, D=dim, BLOCK_D=padded(dim),
        VOTERS=places, ROWS=rows, BLOCK_N=64 if dim <= 64 else 32, COUNT=count,
        HAS_BIAS=bias is not None, WIDE=is_wide(mean), PRECISION=precision, **options,
    )  # fmt: skip
    return chosen
