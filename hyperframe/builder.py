"""From a heavy mask and a residual sample to tile plans.

`build_plans` turns any `HeavyMask` into plans whose exact entries are the mask's, entry for entry,
and whose sampled entries stand for the rest. Parts that live in an order of their own (hash
blocks) become a plan each; everything laid out by position (bands, lists) becomes one more plan,
which leaves out what the ordered ones hold. The plans have disjoint support: their states merge.

A `BlockMask` by itself needs no lists at all: it becomes a `BlockPlan` as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd

import torch

from .blockplan import BlockPlan
from .errors import UnsupportedError
from .kernels.layout import can_lay_out, tile_lists
from .kernels.lists import best_distinct
from .masks import BandMask, BlockMask, EntryMask, HeavyMask, ListMask, RangeMask
from .plan import RankRanges, TilePlan
from .ragged import append_lists, concatenate_lists, join_padded, spread_heads
from .rectangles import Places
from .rowsums import RowSumRule
from .samples import KeySample, SampleDraw, Summaries

__all__ = ["POSITION_TILE", "build_level_plans", "build_plans", "tile_ends"]

POSITION_TILE = 64
"""Rows of a tile of a plan laid out by position, where the mask does not say."""


def build_plans(
    mask: HeavyMask, *, key_heads: int, draw: SampleDraw | None = None,
    rule: RowSumRule | None = None,
) -> list[TilePlan | BlockPlan]:  # fmt: skip
    """Return plans with disjoint support for a mask and a residual.

    Args:
        mask: the heavy entries.
        key_heads: number of key heads.
        draw: draws the residual; None leaves the rest of the matrix out.
        rule: caps and floor for the sampled part.

    Returns:
        One plan for every `RangeMask` and `BlockMask` in the mask, then one for the rest, in which
        all rows of a tile hold what any row of it has in an `EntryMask`. The
        residual is in the last. Under a causal mask it is drawn from the prefix of each tile of
        consecutive rows. A `BlockMask` that is the whole mask becomes a `BlockPlan`, if it is not
        causal, has no caps or floors, and a residual can reach all of its rows.
        Cost O(total list length log(list length)); no list is built where one is shared.
    """
    parts = list(mask.parts())
    if len(parts) == 1 and isinstance(parts[0], BlockMask):
        block = parts[0]
        is_bounded = rule is not None and (rule.log_cap is not None or rule.log_floor is not None)
        if not block.is_causal and not is_bounded and (draw is None or block.covers_all_rows):
            return [_whole_block_plan(block, _drawn(draw))]
    parts = [part.to_ranges() if isinstance(part, BlockMask) else part for part in parts]
    parts = [part.to_lists() if isinstance(part, EntryMask) else part for part in parts]
    ordered = [part for part in parts if isinstance(part, RangeMask)]
    positional = [part for part in parts if not isinstance(part, RangeMask)]
    # (torch.compile cannot trace `bool` of a list in every version)
    has_positional = len(positional) > 0
    needs_position = has_positional or not ordered or (mask.is_causal and draw is not None)
    plans: list[TilePlan | BlockPlan] = []
    for number, part in enumerate(ordered):
        is_last = number == len(ordered) - 1 and not needs_position
        sample = _drawn(draw) if is_last else None
        plans.append(
            _range_plan(
                part, ordered[:number], sample, rule if is_last else None, mask.query_offset
            )
        )
    if needs_position:
        plans.append(_position_plan(mask, positional, ordered, key_heads, draw, rule))
    return plans


def _drawn(draw: SampleDraw | None) -> KeySample | None:
    """Draw for a plan in an order of its own."""
    sample = None if draw is None else draw(None)
    if sample is not None and sample.summaries is not None:
        raise UnsupportedError(_NO_SUMMARIES)
    return sample


def build_level_plans(
    masks: Sequence[BlockMask],
    draw: Callable[[tuple[Places, ...]], KeySample | None] | None = None,
) -> list[BlockPlan] | None:
    """Return a plan for every mask, each rectangle with a sample of its own keys.

    Args:
        masks: masks of disjoint support whose orders move rows and keys only inside rectangles,
            as those of the levels of the causal recursion.
        draw: draws a sample for each of some rectangles, `[batch, key_heads, rectangles, m]`; or
            returns None, where it cannot. None leaves the rest of the rectangles out. Asked once.

    Returns:
        The plans, in the order of the masks, or None if `draw` returned that. Masks whose
        rectangles are held entirely have no sample.
    """
    sampled = [mask for mask in masks if not mask.is_full]
    sample, index = None, None
    if draw is not None and sampled:
        sample = draw(tuple(places for mask in sampled for places in mask.rectangles))
        if sample is None:
            return None
        index = sample.index.int()
    plans = []
    first = 0
    for mask in masks:
        if sample is None or index is None or mask.is_full:
            plans.append(_block_plan(mask))
            continue
        own = slice(first, first + len(mask.rectangles))
        first = own.stop
        plan = _block_plan(mask, index[:, :, own], sample.log_weight[:, :, own])
        plans.append(replace(plan, samples_are_own=True))
    return plans


def _whole_block_plan(mask: BlockMask, sample: KeySample | None) -> BlockPlan:
    """Plan of one mask whose rectangles share a sample of all keys."""
    if sample is None:
        return _block_plan(mask)
    shape = (-1, -1, len(mask.rectangles), -1)
    return _block_plan(
        mask, *(x.unsqueeze(2).expand(shape) for x in (sample.index.int(), sample.log_weight))
    )


def _block_plan(
    mask: BlockMask, index: torch.Tensor | None = None, log_weight: torch.Tensor | None = None
) -> BlockPlan:
    tiles = mask.tiles()
    return BlockPlan(
        query_order=mask.query_order.int(), key_order=mask.key_order.int(), tiles=tiles.table,
        max_rows=tiles.max_rows, max_keys=tiles.max_keys, tile_counts=tiles.counts,
        rectangles=mask.rectangles, num_query_heads=mask.num_query_heads,
        num_queries=mask.num_queries, num_keys=mask.num_keys,
        covers_all_keys=tiles.held_keys == mask.num_keys,
        sample_index=None if index is None else index.int(),
        sample_log_weight=None if log_weight is None else log_weight.float(),
        key_rank=None if index is None else mask.rank_of_keys().int(),
    )  # fmt: skip


def _excluded(masks: list[RangeMask]) -> RankRanges | None:
    if not masks:
        return None
    ranges = [mask.row_ranges() for mask in masks]
    return RankRanges(
        key_rank=torch.stack([mask.key_rank() for mask in masks], dim=2),
        start=torch.stack([start for start, _ in ranges], dim=2),
        stop=torch.stack([stop for _, stop in ranges], dim=2),
    )


def _range_plan(
    mask: RangeMask, earlier: list[RangeMask], sample: KeySample | None, rule: RowSumRule | None,
    query_offset: int | None,
) -> TilePlan:  # fmt: skip
    """Plan of one ordered mask: every tile gathers its range of the key order."""
    heads = mask.num_query_heads
    key_order = spread_heads(mask.key_order, heads)
    length = (mask.stop - mask.start).clamp(min=0)  # [B, H, T]
    slot = torch.arange(mask.max_keys, device=mask.device)
    rank = (mask.start.unsqueeze(-1) + slot).clamp(max=mask.num_keys - 1)  # [B, H, T, L]
    index = key_order.int().gather(-1, rank.flatten(2)).view(rank.shape)
    log_weight = None
    key_count = length
    if sample is not None:
        drawn = spread_heads(sample.index, heads).unsqueeze(2)  # [B, H, 1, m]
        drawn_rank = spread_heads(mask.key_rank(), heads).gather(-1, drawn.squeeze(2)).unsqueeze(2)
        held = (mask.start.unsqueeze(-1) <= drawn_rank) & (drawn_rank < mask.stop.unsqueeze(-1))
        weight = (
            spread_heads(sample.log_weight, heads).unsqueeze(2).masked_fill(held, float("-inf"))
        )
        index, log_weight, key_count = append_lists(index, length, drawn.expand_as(weight), weight)
    return TilePlan(
        key_index=index.int(), key_count=key_count.int(), heavy_count=length.int(),
        tile_size=mask.tile_size, num_query_heads=heads, num_queries=mask.num_queries,
        num_keys=mask.num_keys, query_order=mask.query_order, log_weight=log_weight,
        log_cap=rule.log_cap if rule else None, log_floor=rule.log_floor if rule else None,
        is_causal=mask.is_causal, query_offset=query_offset, excluded=_excluded(earlier),
        disjoint=True,
    )  # fmt: skip


def _position_plan(
    mask: HeavyMask, parts: list[HeavyMask], ordered: list[RangeMask], key_heads: int,
    draw: SampleDraw | None, rule: RowSumRule | None,
) -> TilePlan:  # fmt: skip
    """Plan of everything laid out by position: bands, lists, and the residual."""
    bands = [part for part in parts if isinstance(part, BandMask)]
    lists = [part for part in parts if isinstance(part, ListMask)]
    band = _union_of_bands(bands)
    per_tile_sample = draw is not None and mask.is_causal
    tile_size = _common_tile(lists, mask.num_queries, band is not None or per_tile_sample)
    num_tiles = -(-mask.num_queries // tile_size)
    heads = max([key_heads] + [part.key_index.shape[1] for part in lists])
    shape = (mask.batch_size, heads, num_tiles)

    tiled = [part.retile(tile_size) for part in lists]
    sample = None
    if draw is not None:
        sample = draw(tile_ends(mask, tile_size) if per_tile_sample else None)
    if sample is not None and sample.summaries is not None:
        if ordered:
            raise UnsupportedError(_NO_SUMMARIES)
        return _summarised(mask, tiled, band, shape, tile_size, sample, sample.summaries, rule)
    if can_lay_out(mask.device) and num_tiles > 1 and _vary_by_tile(tiled, per_tile_sample):
        return _laid_out(mask, tiled, band, ordered, shape, tile_size, sample, rule)
    pieces = [(_int32(part.key_index), part.key_count) for part in tiled]
    if band is not None and band.num_sinks:
        pieces.insert(0, _sink_lists(band, num_tiles))
    index, count = concatenate_lists(pieces, shape, mask.device)
    band_count = None
    if band is not None:
        banded, band_count = _band_lists(band, tile_size, num_tiles)
        index, count = concatenate_lists([(banded, band_count), (index, count)], shape, mask.device)
        band_count = _int32(band_count.expand(shape))
    heavy_count, key_count, log_weight = count, count, None
    if sample is not None:
        drawn, weight = spread_heads(sample.index, heads), spread_heads(sample.log_weight, heads)
        if drawn.dim() == 3:
            drawn = drawn.unsqueeze(2).expand(-1, -1, num_tiles, -1)
            weight = weight.unsqueeze(2).expand(-1, -1, num_tiles, -1)
        index, log_weight, key_count = append_lists(index, heavy_count, drawn, weight)
    plan = TilePlan(
        key_index=_int32(index), key_count=_int32(key_count), heavy_count=_int32(heavy_count),
        tile_size=tile_size, num_query_heads=mask.num_query_heads,
        num_queries=mask.num_queries, num_keys=mask.num_keys, log_weight=log_weight,
        log_cap=rule.log_cap if rule else None, log_floor=rule.log_floor if rule else None,
        is_causal=mask.is_causal, query_offset=mask.query_offset,
        band=(band.left, band.right) if band else None,
        band_count=band_count, excluded=_excluded(ordered),
    )  # fmt: skip
    return plan.deduplicated()


_NO_SUMMARIES = (
    "centroid: a detector of hash blocks in orders of their own leaves other keys to the centroids "
    "for every row; take a detector that lists keys by tiles or holds bands, or another sampler"
)


def _summarised(
    mask: HeavyMask, lists: list[ListMask], band: BandMask | None, shape: tuple[int, int, int],
    tile_size: int, sample: KeySample, summaries: Summaries, rule: RowSumRule | None,
) -> TilePlan:  # fmt: skip
    """Plan of exact keys and of groups that count what the tile does not hold exactly.

    A group counts for a whole tile, so all rows of the tile hold what any of them does.
    """
    num_tiles, num_keys, device = shape[2], mask.num_keys, mask.device
    pieces = [(_int32(part.key_index), part.key_count) for part in lists]
    if band is not None:
        pieces += [_sink_lists(band, num_tiles), _band_lists(band, tile_size, num_tiles)]
    if summaries.unit is not None:
        # from where the groups stop to the end of the tile
        start = summaries.stop
        stop = tile_ends(mask, tile_size)
        longest = min(num_keys, tile_size + summaries.unit - 1)
        own = start.unsqueeze(-1) + torch.arange(longest, device=device)
        own = own.clamp(max=max(0, num_keys - 1)).int()
        pieces.append((own[None, None], (stop - start).clamp(min=0)[None, None]))
    index, count = concatenate_lists(pieces, shape, device)
    plan = TilePlan(
        key_index=_int32(index), key_count=_int32(count), heavy_count=_int32(count),
        tile_size=tile_size, num_query_heads=mask.num_query_heads, num_queries=mask.num_queries,
        num_keys=num_keys, is_causal=mask.is_causal, query_offset=mask.query_offset,
    ).deduplicated()  # fmt: skip
    assert plan.log_weight is not None
    used = torch.arange(index.shape[-1], device=device) < count.unsqueeze(-1)
    slot = summaries.slots_of(index)
    width = summaries.size.shape[-1]
    slot = torch.where(used & (plan.log_weight == 0) & (slot >= 0), slot, width)
    held = torch.zeros((*shape, width + 1), dtype=torch.int64, device=device)
    held.scatter_add_(-1, slot, torch.ones_like(slot))
    left = summaries.size - held[..., :-1]  # a group that is held whole counts nothing
    drawn = spread_heads(sample.index, shape[1])
    if drawn.dim() == 3:
        drawn = drawn.unsqueeze(2)
    joined, weights, key_count = append_lists(
        index, count, drawn.expand(left.shape), left.log().float(), summaries.count.expand(shape)
    )
    # -inf for a second copy of an exact key
    repeats = plan.log_weight.masked_fill(~used, 0.0)
    weights = weights + torch.nn.functional.pad(repeats, (0, width))
    return replace(
        plan, key_index=_int32(joined), key_count=_int32(key_count), log_weight=weights,
        summary_key=summaries.key, summary_value=summaries.value,
        log_cap=rule.log_cap if rule else None, log_floor=rule.log_floor if rule else None,
    )  # fmt: skip


def _vary_by_tile(lists: list[ListMask], per_tile_sample: bool) -> bool:
    """Return whether tiles have lists or samples of their own."""
    return per_tile_sample or any(part.key_index.stride(2) != 0 for part in lists)


def _laid_out(
    mask: HeavyMask, lists: list[ListMask], band: BandMask | None, ordered: list[RangeMask],
    shape: tuple[int, int, int], tile_size: int, sample: KeySample | None, rule: RowSumRule | None,
) -> TilePlan:  # fmt: skip
    """Plan of everything laid out by position, where tiles have lists of their own: one launch."""
    pieces = [(_int32(part.key_index), part.key_count) for part in lists]
    if not pieces:
        index, count = concatenate_lists(pieces, shape, mask.device)
    elif len(lists) == 1 and lists[0].is_ascending:
        index, count = pieces[0]
    else:
        joined, used = join_padded(pieces, shape, mask.num_keys)
        start, stop = 0, None
        if band is not None:
            start = min(band.num_sinks, mask.num_keys)
            if mask.is_causal:
                # from here on all rows of a tile that see a key hold it by the band
                last = torch.arange(1, shape[2] + 1, device=mask.device) * tile_size - 1
                stop = last + mask.position_offset - band.left
        index, count = best_distinct(
            joined, None, limit=mask.num_keys, k=max(1, joined.shape[-1]), count=used, start=start,
            stop=stop,
        )  # fmt: skip
    drawn, weight = None, None
    if sample is not None:
        drawn, weight = sample.index, sample.log_weight.float()
        if drawn.dim() == 3:
            drawn = drawn.unsqueeze(2).expand(-1, -1, shape[2], -1)
            weight = weight.unsqueeze(2).expand(-1, -1, shape[2], -1)
    found = tile_lists(
        index, count, drawn, weight,
        band=None if band is None else (band.left, band.right, band.num_sinks),
        tile_size=tile_size, num_queries=mask.num_queries, num_keys=mask.num_keys,
        offset=mask.position_offset, is_causal=mask.is_causal, heads=shape[1],
    )  # fmt: skip
    return TilePlan(
        key_index=found.key_index, key_count=found.key_count, heavy_count=found.heavy_count,
        tile_size=tile_size, num_query_heads=mask.num_query_heads, num_queries=mask.num_queries,
        num_keys=mask.num_keys, log_weight=found.log_weight,
        log_cap=rule.log_cap if rule else None, log_floor=rule.log_floor if rule else None,
        is_causal=mask.is_causal, query_offset=mask.query_offset,
        band=(band.left, band.right) if band else None,
        band_count=found.band_count if band else None, excluded=_excluded(ordered), disjoint=True,
    )  # fmt: skip


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert what is stored: `.int()` would write out a dimension of stride 0."""
    if tensor.shape[2] > 1 and tensor.stride(2) == 0:
        return tensor[:, :, :1].int().expand(tensor.shape)
    return tensor.int()


def _common_tile(lists: list[ListMask], num_queries: int, per_tile: bool) -> int:
    """Return a tile size that divides every list's own; all rows if nothing varies by tile."""
    size = 0
    for part in lists:
        if part.tile_size < num_queries:
            size = gcd(size, part.tile_size)
    if size:
        return size
    return min(POSITION_TILE, num_queries) if per_tile else num_queries


def tile_ends(mask: HeavyMask, tile_size: int) -> torch.Tensor:
    """Return how many keys the last row of each tile may see: int64 `[tiles]`."""
    num_tiles = -(-mask.num_queries // tile_size)
    last_row = torch.arange(1, num_tiles + 1, device=mask.device) * tile_size
    ends = last_row.clamp(max=mask.num_queries) + mask.position_offset
    return ends.clamp(min=0, max=mask.num_keys)


def _union_of_bands(bands: list[BandMask]) -> BandMask | None:
    """Return the bands of one problem as one: all of them hold the diagonal."""
    if not bands:
        return None
    return replace(
        bands[0],
        left=max(band.left for band in bands),
        right=max(band.right for band in bands),
        num_sinks=max(band.num_sinks for band in bands),
    )


def _sink_lists(band: BandMask, num_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First keys that all rows hold: `[1, 1, T, L]` and counts; stored once."""
    index = torch.arange(min(band.num_sinks, band.num_keys), dtype=torch.int32, device=band.device)
    count = torch.full((1, 1, 1), len(index), device=band.device)
    return index.expand(1, 1, num_tiles, -1), count


def _band_lists(
    band: BandMask, tile_size: int, num_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys in the band of any row of each tile, sinks left out: `[1, 1, T, L]` and counts."""
    first = torch.arange(num_tiles, device=band.device) * tile_size
    last = (first + tile_size).clamp(max=band.num_queries) - 1
    right = 0 if band.is_causal else band.right
    begin = (first + band.position_offset - band.left).clamp(min=band.num_sinks)
    end = (last + band.position_offset + right + 1).clamp(max=band.num_keys)
    count = (end - begin).clamp(min=0)
    longest = min(band.num_keys, tile_size + band.left + right)
    index = begin.unsqueeze(-1) + torch.arange(longest, device=band.device)
    return index.clamp(max=max(0, band.num_keys - 1)).int()[None, None], count[None, None]
