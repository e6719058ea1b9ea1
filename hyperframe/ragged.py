"""Ragged lists in padded tensors: index `[batch, heads, tiles, L]`, count one dimension less.

Slots from the count on are unused and may hold anything. A dimension of stride 0 says that its
lists are one and the same; joining keeps it so where it can.
"""

from __future__ import annotations

import torch

__all__ = [
    "append_lists",
    "concatenate_lists",
    "join_padded",
    "keep_in_lists",
    "spread_heads",
    "take_ranges",
]

_CHUNK_BYTES = 64 << 20  # of temporaries held at once


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
        index, _, count = _append(index, count, more_index, None, more_count)
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

    Returns the lists (int32 if either was), their log weights (0 for what was there) and their
    counts. Done on one tile where nothing varies between tiles.
    """
    joined, weights, total = _append(index, count, more, weight, more_count)
    assert weights is not None
    return joined, weights, total


def _append(
    index: torch.Tensor, count: torch.Tensor, more: torch.Tensor, weight: torch.Tensor | None,
    more_count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    shape = index.shape[:3]
    given = [x for x in (index, count, more, weight, more_count) if x is not None]
    if shape[2] > 1 and all(x.stride(2) == 0 for x in given):
        index, count, more = index[:, :, :1], count[:, :, :1], more[:, :, :1]
        weight = None if weight is None else weight[:, :, :1]
        more_count = None if more_count is None else more_count[:, :, :1]
        joined, weights, total = _append(index, count, more, weight, more_count)
        if weights is not None:
            weights = weights.expand(-1, -1, shape[2], -1)
        return joined.expand(-1, -1, shape[2], -1), weights, total.expand(-1, -1, shape[2])
    length, extra = index.shape[-1], more.shape[-1]
    # both name the same keys: what fits one of them fits the other
    dtype = torch.int32 if torch.int32 in (index.dtype, more.dtype) else torch.int64
    joined = torch.zeros((*shape, length + extra), dtype=dtype, device=index.device)
    joined[..., :length] = index
    weights = None if weight is None else weight.new_zeros((*shape, length + extra))
    slot = torch.arange(extra, device=index.device)
    more, count_before = more.expand(*shape, extra), count.expand(shape).unsqueeze(-1)
    # the int64 targets are written for some tiles at a time
    step = max(1, _CHUNK_BYTES // max(1, 16 * shape[0] * shape[1] * extra))
    for start in range(0, shape[2], step):
        tiles = slice(start, start + step)
        target = count_before[:, :, tiles] + slot
        joined[:, :, tiles].scatter_(-1, target, more[:, :, tiles].to(dtype))
        if weights is not None and weight is not None:
            source = weight.expand(*shape, extra)[:, :, tiles]
            weights[:, :, tiles].scatter_(-1, target, source)
    return joined, weights, count + (extra if more_count is None else more_count)


def join_padded(
    pieces: list[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, int, int], fill: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return lists side by side: cheaper than `concatenate_lists`, but unused slots lie between.

    Args:
        pieces: lists and counts, at least one; each for all heads or for key heads.
        shape: `(batch, heads, tiles)`.
        fill: what unused slots hold.

    Returns:
        int32 `[batch, heads, tiles, L]`, and None; of a single piece itself and its counts.
    """
    indices = [spread_heads(index, shape[1]).expand(*shape, -1) for index, _ in pieces]
    counts = [spread_heads(count, shape[1]).expand(shape) for _, count in pieces]
    if len(pieces) == 1:
        return indices[0], counts[0]
    lengths = [index.shape[-1] for index in indices]
    joined = torch.empty((*shape, sum(lengths)), dtype=torch.int32, device=indices[0].device)
    for part, index, count in zip(joined.split(lengths, dim=-1), indices, counts, strict=True):
        used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
        part.copy_(torch.where(used, index, fill))
    return joined, None


def keep_in_lists(
    index: torch.Tensor, count: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the entries where `keep` is False; the others move up in their order."""
    slot = torch.arange(index.shape[-1], device=index.device)
    keep = keep & (slot < count.unsqueeze(-1))
    order = (~keep).to(torch.uint8).sort(dim=-1, stable=True).indices
    return index.expand(keep.shape).gather(-1, order), keep.sum(dim=-1)


def take_ranges(
    order: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ranges of an order as lists: `[batch, heads, tiles, longest]`, and which are used.

    Args:
        order: `[batch, heads, n]`.
        start: integer `[tiles]`.
        stop: integer `[tiles]`.
        longest: length of the longest range.

    Returns:
        The lists, with any entry of the order in unused slots, and bool `[tiles, longest]`.
    """
    place = start.unsqueeze(-1) + torch.arange(longest, device=order.device)
    taken = order[..., place.clamp(max=order.shape[-1] - 1)]
    return taken, place < stop.unsqueeze(-1)
