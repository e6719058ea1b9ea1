"""Lay out the lists of a plan: one program writes the list of one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["triton_tile_lists"]

_BLOCK = 256


@triton.jit
def is_listed(list_ptr, count, key, STEPS: tl.constexpr):
    """Return whether an ascending list holds some keys: a binary search for each of them."""
    low = key * 0
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        found = tl.load(list_ptr + middle, mask=low < high, other=0).to(tl.int32)
        is_less = (low < high) & (found < key)
        high = tl.where(is_less, high, middle)
        low = tl.where(is_less, middle + 1, low)
    return tl.load(list_ptr + low, mask=low < count, other=-1).to(tl.int32) == key


@triton.jit(
    do_not_specialize=[
        "num_tiles", "tile_size", "num_queries", "num_keys", "offset", "left", "right", "num_sinks",
        "list_slots", "num_samples", "slots",
    ]
)  # fmt: skip
def tile_lists_kernel(
    list_ptr, list_batch, list_head, list_tile, count_ptr, count_batch, count_head, count_tile,
    sample_ptr, sample_batch, sample_head, sample_tile, sample_slot,
    weight_ptr, weight_batch, weight_head, weight_tile, weight_slot,
    index_ptr, log_weight_ptr, counts_ptr, heads_per_list, heads_per_sample, num_heads, num_batch,
    num_tiles, tile_size, num_queries, num_keys, offset, left, right, num_sinks, list_slots,
    num_samples, slots, HAS_BAND: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """See `hyperframe.kernels.layout.tile_lists`; `counts` is `[3, batch, heads, tiles]`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    program = (batch * num_heads + head) * num_tiles + tile
    tile64 = tile.to(tl.int64)
    list_ptr += batch * list_batch + (head // heads_per_list).to(tl.int64) * list_head
    list_ptr += tile64 * list_tile
    count_ptr += batch * count_batch + (head // heads_per_list).to(tl.int64) * count_head
    sample_head_of = (head // heads_per_sample).to(tl.int64)
    sample_ptr += batch * sample_batch + sample_head_of * sample_head + tile64 * sample_tile
    weight_ptr += batch * weight_batch + sample_head_of * weight_head + tile64 * weight_tile
    index_ptr += program * slots
    log_weight_ptr += program * slots
    count = tl.load(count_ptr + tile64 * count_tile).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    banded = 0
    if HAS_BAND:
        first = tile * tile_size
        stop = tl.minimum(first + tile_size, num_queries)
        begin = tl.maximum(first + offset - left, num_sinks)
        banded = tl.maximum(tl.minimum(stop + offset + right, num_keys) - begin, 0)
        for start in range(0, banded, BLOCK):
            slot = start + lane
            key = begin + slot
            twice = is_listed(list_ptr, count, key, STEPS)
            tl.store(index_ptr + slot, key, mask=slot < banded)
            weight = tl.where(twice, float("-inf"), 0.0)
            tl.store(log_weight_ptr + slot, weight, mask=slot < banded)
        for start in range(0, num_sinks, BLOCK):
            slot = start + lane
            tl.store(index_ptr + banded + slot, slot, mask=slot < num_sinks)
            tl.store(log_weight_ptr + banded + slot, slot * 0.0, mask=slot < num_sinks)
    exact = banded + num_sinks
    for start in range(0, count, BLOCK):
        slot = start + lane
        key = tl.load(list_ptr + slot, mask=slot < count, other=0).to(tl.int32)
        tl.store(index_ptr + exact + slot, key, mask=slot < count)
        weight = tl.where(key < num_sinks, float("-inf"), 0.0)
        tl.store(log_weight_ptr + exact + slot, weight, mask=slot < count)
    exact += count
    for start in range(0, num_samples, BLOCK):
        slot = start + lane
        used = slot < num_samples
        key = tl.load(sample_ptr + slot * sample_slot, mask=used, other=0).to(tl.int32)
        weight = tl.load(weight_ptr + slot * weight_slot, mask=used, other=0.0)
        held = (key < num_sinks) | is_listed(list_ptr, count, key, STEPS)
        tl.store(index_ptr + exact + slot, key, mask=used)
        weight = tl.where(held, float("-inf"), weight)
        tl.store(log_weight_ptr + exact + slot, weight, mask=used)
    used = exact + num_samples
    # up to a whole block: slots of weight 0 that repeat a key of the list, so that nothing leaks
    spare = tl.load(sample_ptr, mask=num_samples > 0, other=0).to(tl.int32)
    spare = tl.load(list_ptr, mask=count > 0, other=spare).to(tl.int32)
    if HAS_BAND:
        spare = tl.where(banded > 0, begin, tl.where(num_sinks > 0, 0, spare))
    for start in range(used, slots, BLOCK):
        slot = start + lane
        tl.store(index_ptr + slot, slot * 0 + spare, mask=slot < slots)
        tl.store(log_weight_ptr + slot, slot * 0.0 + float("-inf"), mask=slot < slots)
    lists = num_batch * num_heads * num_tiles
    tl.store(counts_ptr + program, tl.cdiv(used, WHOLE) * WHOLE)
    tl.store(counts_ptr + lists + program, exact)
    tl.store(counts_ptr + 2 * lists + program, banded)


def triton_tile_lists(
    index: torch.Tensor, count: torch.Tensor, sample_index: torch.Tensor | None,
    sample_weight: torch.Tensor | None, band: list[int], *, tile_size: int, num_queries: int,
    num_keys: int, offset: int, is_causal: bool, heads: int, slots: int, whole: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Do what `hyperframe.kernels.layout.tile_lists` says, with `slots` a list; no host sync.

    Used slots of a list are rounded up to a multiple of `whole`. The three counts are one tensor:
    what an operator returns may not share memory.
    """
    index = index if index.stride(3) == 1 else index.contiguous()
    batch, list_heads, tiles, list_slots = index.shape
    count = count.expand(index.shape[:3])
    device = index.device
    keys = torch.empty((batch, heads, tiles, slots), dtype=torch.int32, device=device)
    weights = torch.empty(keys.shape, dtype=torch.float32, device=device)
    counts = torch.empty((3, batch, heads, tiles), dtype=torch.int32, device=device)
    left, right, num_sinks = band
    if sample_index is None or sample_weight is None:
        sample_index, sample_weight = index[..., :0], weights[:, :list_heads, :, :0]
    if counts.numel():
        tile_lists_kernel[(tiles, heads, batch)](
            index, *index.stride()[:3], count, *count.stride(), sample_index,
            *sample_index.stride(), sample_weight, *sample_weight.stride(), keys, weights, counts,
            heads // list_heads, heads // sample_index.shape[1], heads, batch, tiles, tile_size,
            num_queries, num_keys, offset, left, 0 if is_causal else right,
            min(num_sinks, num_keys) if left >= 0 else 0, list_slots, sample_index.shape[3], slots,
            HAS_BAND=left >= 0, STEPS=list_slots.bit_length(), BLOCK=_BLOCK, WHOLE=whole,
            num_warps=4,
        )  # fmt: skip
    return keys, weights, counts
