"""The best distinct keys of lists: one program a list, which stays in registers throughout.

Keys are sorted with their slots, packed into one integer; a segmented scan adds the weights of
equal keys up. The threshold is the k-th largest sum: sums are not negative, so their bits ascend
with them, and a bisection over the bits finds it in 31 counts. Ranks among what is kept, from one
more scan, are the places where keys are stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import power_of_two

__all__ = ["supports", "triton_best_distinct"]

_LONGEST = 4096


@triton.jit
def add_equal(key, total, later_key, later_total):
    """Join neighbouring pieces of a sorted list: the last key and its sum, -1 where unused."""
    joined = tl.maximum(total, 0.0) + later_total
    joined = tl.where(later_total < 0.0, total, joined)
    return later_key, tl.where(key == later_key, joined, later_total)


@triton.jit
def kth_largest(bits, k):
    """Return the k-th largest of some integers, of those that are not negative; 0 if they lack."""
    threshold = tl.sum(bits * 0, 0)
    for place in tl.static_range(31):
        raised = threshold | (1 << (30 - place))
        is_reached = tl.sum((bits >= raised).to(tl.int32), 0) >= k
        threshold = tl.where(is_reached, raised, threshold)
    return threshold


@triton.jit(do_not_specialize=["slots", "heads", "tiles", "start_key", "limit", "k"])
def best_distinct_kernel(
    index_ptr, index_batch, index_head, index_tile, weight_ptr, weight_batch, weight_head,
    weight_tile, count_ptr, count_batch, count_head, count_tile, stop_ptr, stop_batch, stop_head,
    stop_tile, kept_ptr, held_ptr, slots, heads, tiles, start_key, limit, k,
    HAS_WEIGHT: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_STOP: tl.constexpr,
    IS_SORTED: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """See the module. `WIDE`: `limit * SLOTS` exceeds 31 bits."""
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    index_ptr += batch * index_batch + head * index_head + tile * index_tile
    weight_ptr += batch * weight_batch + head * weight_head + tile * weight_tile
    kept_ptr += program.to(tl.int64) * k
    slot = tl.arange(0, SLOTS)
    length = slots
    if HAS_COUNT:
        counted = tl.load(count_ptr + batch * count_batch + head * count_head + tile * count_tile)
        length = tl.minimum(counted.to(tl.int32), slots)
    stop_key = limit
    if HAS_STOP:
        stopped = tl.load(stop_ptr + batch * stop_batch + head * stop_head + tile * stop_tile)
        stop_key = tl.minimum(stopped, limit).to(tl.int32)
    given = tl.load(index_ptr + slot, mask=slot < length, other=limit)
    used = (given >= start_key) & (given < stop_key)
    key = tl.where(used, given, limit).to(tl.int32)
    if IS_SORTED == 0:
        # with its slot a key sorts stably, and finds its weight again
        packed = key * SLOTS + slot
        if WIDE:
            packed = key.to(tl.int64) * SLOTS + slot
        packed = tl.sort(packed)
        key = (packed // SLOTS).to(tl.int32)
        slot = (packed % SLOTS).to(tl.int32)
    place = tl.arange(0, SLOTS)
    next_key = tl.gather(key, tl.minimum(place + 1, SLOTS - 1), axis=0)
    is_last = ((key != next_key) | (place == SLOTS - 1)) & (key < limit)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + slot, mask=key < limit, other=-1.0).to(tl.float32)
        # adding 0 leaves no negative zero, whose bits are negative
        weight = tl.where(weight >= 0.0, weight + 0.0, -1.0)
        _, total = tl.associative_scan((key, weight), 0, add_equal)
        bits = tl.where(is_last & (total >= 0.0), total.to(tl.int32, bitcast=True), -1)
        threshold = kth_largest(bits, k)
        is_above = bits > threshold
        is_tie = bits == threshold
        # both counts in one scan
        ranks = tl.cumsum(is_above.to(tl.int32) + is_tie.to(tl.int32) * 65536, 0)
        above, ties = ranks % 65536, ranks // 65536
        lacking = k - tl.sum(is_above.to(tl.int32), 0)
        rank = above + tl.minimum(ties, lacking) - 1
        is_kept = is_above | (is_tie & (ties <= lacking))
    else:
        rank = tl.cumsum(is_last.to(tl.int32), 0) - 1
        is_kept = is_last & (rank < k)
    tl.store(kept_ptr + rank, key, mask=is_kept)
    held = tl.sum(is_kept.to(tl.int32), 0)
    tl.store(held_ptr + program, held)
    for first in range(0, k, SLOTS):
        rest = first + place
        tl.store(kept_ptr + rest, tl.zeros_like(rest) + limit, mask=(rest >= held) & (rest < k))


def supports(index: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether the kernel takes these: lists of up to 4096 slots, weights of up to 32 bits."""
    return (
        index.dtype in (torch.int32, torch.int64)
        and 0 < index.shape[-1] <= _LONGEST
        and (weight is None or weight.dtype in (torch.float32, torch.float16, torch.bfloat16))
    )


def triton_best_distinct(
    index: torch.Tensor, weight: torch.Tensor | None, count: torch.Tensor | None,
    stop: torch.Tensor | None, start: int, limit: int, k: int, *, is_sorted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.lists.best_distinct` says, where `supports` holds; no sync."""
    shape, length = index.shape[:-1], index.shape[-1]
    kept = torch.empty((*shape, k), dtype=torch.int32, device=index.device)
    held = torch.empty(shape, dtype=torch.int32, device=index.device)
    if held.numel() == 0:
        return kept, held
    lists = _four(index if index.stride(-1) == 1 else index.contiguous())
    weights = lists
    if weight is not None:
        weight = weight.expand(index.shape)
        weights = _four(weight if weight.stride(-1) == 1 else weight.contiguous())
    counts, stops = (
        lists if x is None else _four(x.expand(shape).unsqueeze(-1)) for x in (count, stop)
    )
    slots = max(32, power_of_two(length))
    best_distinct_kernel[(held.numel(),)](
        lists, *lists.stride()[:3], weights, *weights.stride()[:3], counts, *counts.stride()[:3],
        stops, *stops.stride()[:3], kept, held, length, lists.shape[1], lists.shape[2], start,
        limit, k, HAS_WEIGHT=weight is not None, HAS_COUNT=count is not None,
        HAS_STOP=stop is not None, IS_SORTED=is_sorted, WIDE=(limit + 1) * slots > 2**31,
        SLOTS=slots, num_warps=max(1, slots // 1024),
    )  # fmt: skip
    return kept, held


def _four(lists: torch.Tensor) -> torch.Tensor:
    """Return lists as `[batch, heads, tiles, L]`."""
    while lists.ndim < 4:
        lists = lists.unsqueeze(0)
    return lists.flatten(0, -4)
