"""Leaves of keys: their means, and those to which the voters of a tile of rows attend most."""

from __future__ import annotations

import torch

from ..precision import without_autocast
from .ops import has_triton
from .ops import leaves as _schema  # noqa: F401  (defines the operators implemented here)

__all__ = ["best_leaves", "leaf_masses", "leaf_means"]

_CHUNK_BYTES = 64 << 20  # of the scores of tiles, or of gathered rows, held at once
_NEVER = float("-inf")


def leaf_means(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return the mean rows of leaves.

    Args:
        x: `[batch, key_heads, n, d]`.
        index: integer `[batch, key_heads, leaves, longest]`, the rows of each leaf.
        sizes: int64 `[leaves]`, how many of them there are, the first ones.

    Returns:
        `[batch, key_heads, leaves, d]`, in float32 at least. No gradient.
        Cost O(leaves longest d). On CUDA with Triton one launch that keeps no gathered row.
    """
    mean: torch.Tensor = torch.ops.hyperframe.leaf_means(x.detach(), index, sizes)
    return mean


def best_leaves(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor,
    far: torch.Tensor, near: torch.Tensor, is_near: torch.Tensor, *, scale: float, num_far: int,
    num_leaves: int, is_even: bool,
) -> torch.Tensor:  # fmt: skip
    """Return the leaves of every tile with the largest `leaf_masses`.

    Args:
        voters: `[batch, query_heads, tiles, voters, d]`.
        votes: bool `[tiles, voters]`, which of them there are.
        mean: `[batch, key_heads, leaves, d]`, the mean keys of leaves, of the same dtype.
        sizes: int64 `[leaves]`, the keys of each leaf.
        far: int64 `[tiles]`: a tile sees that many leaves, the first ones.
        near: int64 `[tiles, near]`, further leaves that a tile may see.
        is_near: bool `[tiles, near]`, whether it sees them.
        scale: factor of the logits.
        num_far: the largest of `far`, or a bound of it.
        num_leaves: how many leaves a tile holds, at most.
        is_even: whether all leaves have the same size.

    Returns:
        int64 `[batch, query_heads, tiles, num_leaves]` (fewer where there are fewer leaves): those
        that are seen first; the last ones, where a tile sees fewer, are any. No gradient.
        Cost O(tiles voters leaves d) time. On CUDA with Triton a few launches, for up to 64 voters
        and d <= 256, and the memory of the scores of groups of 16 leaves, of which 256 MiB are
        held at once; elsewhere in chunks of bounded memory, and the best leaves come first.
    """
    chosen: torch.Tensor = torch.ops.hyperframe.best_leaves(
        voters.detach(), votes, mean.detach(), sizes, far, near, is_near, scale, num_far,
        num_leaves, is_even,
    )  # fmt: skip
    return chosen


@torch.library.impl("hyperframe::leaf_means", "default")
def _run_means(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    if x.is_cuda and torch.version.hip is None and has_triton():
        from .triton import leaf_scores as kernels

        if kernels.supports_means(x):
            with torch.cuda.device(x.device):
                return kernels.triton_leaf_means(x, index, sizes)
    return torch_leaf_means(x, index, sizes)


@torch.library.impl("hyperframe::best_leaves", "default")
def _run_leaves(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor,
    far: torch.Tensor, near: torch.Tensor, is_near: torch.Tensor, scale: float, num_far: int,
    num_leaves: int, is_even: bool,
) -> torch.Tensor:  # fmt: skip
    if voters.is_cuda and torch.version.hip is None and has_triton():
        from .triton import leaf_scores as kernels

        if kernels.supports(voters, mean, num_far, near.shape[1], num_leaves):
            with torch.cuda.device(voters.device):
                return kernels.triton_best_leaves(
                    voters, votes, mean, sizes, far, near, is_near, scale=scale, num_far=num_far,
                    num_leaves=num_leaves, is_even=is_even,
                )  # fmt: skip
    return torch_best_leaves(
        voters, votes, mean, sizes, far, near, is_near, scale=scale, num_far=num_far,
        num_leaves=num_leaves, is_even=is_even,
    )  # fmt: skip


def torch_leaf_means(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Do what `leaf_means` says, for some leaves at a time, on any device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    is_there = torch.arange(index.shape[-1], device=x.device) < sizes.unsqueeze(-1)
    mean = torch.empty((*index.shape[:3], x.shape[-1]), dtype=dtype, device=x.device)
    step = max(1, _CHUNK_BYTES // max(1, 12 * mean[:, :, :1].numel() * index.shape[-1]))
    for start in range(0, index.shape[2], step):
        part = slice(start, start + step)
        some = index[:, :, part]
        flat = some.flatten(2).long().unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        rows = x.gather(2, flat).to(dtype).view(*some.shape, -1)
        sums = torch.where(is_there[part].unsqueeze(-1), rows, 0).sum(dim=-2)
        mean[:, :, part] = sums / sizes[part].clamp(min=1).unsqueeze(-1)
    return mean


def leaf_masses(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor,
    far: torch.Tensor, near: torch.Tensor, is_near: torch.Tensor, *, scale: float, num_far: int,
) -> torch.Tensor:  # fmt: skip
    """Return the log of the softmax mass that voters give to each leaf, by its mean key.

    A leaf of `c` keys has the logit `scale q . mean + log c`. The softmax of a voter is over the
    leaves that its tile sees; the masses of a tile's voters add up. Arguments as in `best_leaves`.

    Returns:
        `[batch, query_heads, tiles, num_far + near]`, natural log; `-inf` for a leaf that is not
        seen. Far leaves come first, then the near ones of each tile.
    """
    batch, heads, num_tiles, num_voters, dim = voters.shape
    key_heads = mean.shape[1]
    dtype = torch.promote_types(voters.dtype, torch.float32)
    lowest = torch.finfo(dtype).min  # finite: where nothing is seen, no NaN is born
    mean, log_count = mean.to(dtype), sizes.to(dtype).log()
    voters = (voters.to(dtype) * scale).view(batch, key_heads, -1, num_tiles, num_voters, dim)
    parts, normaliser = [], torch.full((1,), lowest, dtype=dtype, device=voters.device)
    with without_autocast(voters):
        if num_far:
            logits = voters.flatten(2, 4) @ mean[:, :, :num_far].transpose(-1, -2)
            logits = logits.view(batch, heads, num_tiles, num_voters, -1) + log_count[:num_far]
            is_far = torch.arange(num_far, device=far.device) < far.unsqueeze(-1)
            parts.append((logits, is_far))
        if near.shape[1]:
            near_mean = mean[:, :, near].unsqueeze(2)  # [B, Hkv, 1, T, near, d]
            logits = (voters @ near_mean.transpose(-1, -2)).flatten(1, 2)
            parts.append((logits + log_count[near].unsqueeze(1), is_near))
    hidden = [logits.masked_fill(~seen.unsqueeze(1), lowest) for logits, seen in parts]
    for logits in hidden:
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(dim=-1, keepdim=True))
    masses = []
    for logits, (_, is_seen) in zip(hidden, parts, strict=True):
        mass = (logits - normaliser).masked_fill(~votes.unsqueeze(-1), _NEVER).logsumexp(dim=-2)
        masses.append(mass.masked_fill(~is_seen, _NEVER))
    return torch.cat(masses, dim=-1)


def torch_best_leaves(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor,
    far: torch.Tensor, near: torch.Tensor, is_near: torch.Tensor, *, scale: float, num_far: int,
    num_leaves: int, is_even: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `best_leaves` says, for some tiles at a time, on any device."""
    del is_even
    batch, heads, num_tiles, num_voters, dim = voters.shape
    num_near = near.shape[1]
    count = min(num_leaves, num_far + num_near)
    best = torch.empty((batch, heads, num_tiles, count), dtype=torch.int64, device=far.device)
    if count == 0:
        return best
    # the logits and three things made of them; the mean keys of near leaves
    needed = 4 * batch * heads * (4 * num_voters * (num_far + num_near) + num_near * dim)
    step = max(1, _CHUNK_BYTES // max(1, needed))
    for start in range(0, num_tiles, step):
        part = slice(start, start + step)
        scores = leaf_masses(
            voters[:, :, part], votes[part], mean, sizes, far[part], near[part], is_near[part],
            scale=scale, num_far=num_far,
        )  # fmt: skip
        chosen = scores.topk(count, dim=-1).indices
        if num_near:
            place = (chosen - num_far).clamp(min=0)
            named = near[part].expand(batch, heads, -1, -1).gather(-1, place)
            chosen = torch.where(chosen < num_far, chosen, named)
        best[:, :, part] = chosen
    return best
