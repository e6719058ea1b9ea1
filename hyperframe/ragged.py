"""Ragged lists in padded tensors: index `[batch, heads, tiles, L]`, count one dimension less.

Slots from the count on are unused and may hold anything. A dimension of stride 0 says that its
lists are one and the same; joining keeps it so where it can.
"""

from __future__ import annotations

import torch

__all__ = ["append_lists", "concatenate_lists", "keep_in_lists", "spread_heads"]


def spread_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat `[batch, key_heads, ...]` so that there are `heads` heads."""
    if tensor.shape[1] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def concatenate_lists(
    pieces: list[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join lists of ragged counts; lists shared by all tiles stay shared if all of them are."""
    if not pieces:
        empty = torch.zeros((*shape, 0), dtype=torch.int64, device=device)
        return empty, torch.zeros(shape, dtype=torch.int64, device=device)
    index, count = pieces[0]
    index, count = _expand_lists(index, count, shape)
    for more_index, more_count in pieces[1:]:
        more_index, more_count = _expand_lists(more_index, more_count, shape)
        zeros = torch.zeros((), device=device).expand_as(more_index)
        index, _, count = append_lists(index, count, more_index, zeros, more_count)
    return index, count


def _expand_lists(
    index: torch.Tensor, count: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    index, count = _keep_or_spread(index, shape[1]), _keep_or_spread(count, shape[1])
    return index.expand(*shape, index.shape[-1]), count.expand(shape)


def _keep_or_spread(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor if tensor.shape[1] == 1 else spread_heads(tensor, heads)


def append_lists(
    index: torch.Tensor, count: torch.Tensor, more: torch.Tensor, weight: torch.Tensor,
    more_count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Write `more` behind the first `count` slots of each list; all tensors `[B, H, T, L]`.

    Returns the lists, their log weights (0 for what was there) and their counts. Done on one tile
    where nothing varies between tiles.
    """
    shape = index.shape[:3]
    tensors = (index, count, more, weight) + (() if more_count is None else (more_count,))
    if shape[2] > 1 and all(x.stride(2) == 0 for x in tensors):
        first = [x[:, :, :1] for x in tensors]
        joined = append_lists(first[0], first[1], first[2], first[3], *first[4:])
        a, b, c = (x.expand(-1, -1, shape[2], *x.shape[3:]) for x in joined)
        return a, b, c
    length, extra = index.shape[-1], more.shape[-1]
    slot = torch.arange(extra, device=index.device)
    target = (count.unsqueeze(-1) + slot).expand(*shape, extra)
    joined_index = torch.cat([index.long(), more.new_zeros((*shape, extra)).long()], dim=-1)
    joined_index.scatter_(-1, target, more.long().expand(*shape, extra))
    joined_weight = weight.new_zeros((*shape, length + extra))
    joined_weight.scatter_(-1, target, weight.expand(*shape, extra))
    added = extra if more_count is None else more_count
    return joined_index, joined_weight, count + added


def keep_in_lists(
    index: torch.Tensor, count: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the entries where `keep` is False; the others move up in their order."""
    slot = torch.arange(index.shape[-1], device=index.device)
    keep = keep & (slot < count.unsqueeze(-1))
    order = (~keep).to(torch.uint8).sort(dim=-1, stable=True).indices
    return index.expand(keep.shape).gather(-1, order), keep.sum(dim=-1)
