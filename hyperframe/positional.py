"""Tile plans of what is laid out by position: bands, lists of keys, and the residual of tiles.

One plan for all of it; `builder` says when. The lists of a tile are joined, keys that are there
twice get weight 0, and the residual is drawn from what the rows of the tile see. On a GPU one
launch lays out the lists (`kernels.layout`).
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch

from .errors import UnsupportedError
from .kernels.joined import side_by_side
from .kernels.layout import can_lay_out, tile_lists
from .kernels.lists import best_distinct
from .masks import BandMask, HeavyMask, ListMask, RangeMask
from .plan import RankRanges, TilePlan
from .ragged import append_lists, concatenate_lists, spread_heads
from .rowsums import RowSumRule
from .samples import KeySample, SampleDraw, Summaries
from .tables import spaced

__all__ = ["NO_SUMMARIES", "POSITION_TILE", "excluded_ranges", "position_plan", "tile_ends"]

POSITION_TILE = 64
"""Rows of a tile of a plan laid out by position, where the mask does not say."""

NO_SUMMARIES = (
    "centroid: a detector of hash blocks in orders of their own leaves other keys to the centroids "
    "for every row; take a detector that lists keys by tiles or holds bands, or another sampler"
)


def position_plan(
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
            raise UnsupportedError(NO_SUMMARIES)
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
        band_count=band_count, excluded=excluded_ranges(ordered),
    )  # fmt: skip
    return plan.deduplicated()


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
    if band is not None and mask.is_causal and band.left >= tile_size - 1:
        lists = [part for part in lists if not part.is_own]  # the band has these keys
    pieces = [(_int32(part.key_index), part.key_count) for part in lists]
    if not pieces:
        index, count = concatenate_lists(pieces, shape, mask.device)
    elif len(lists) == 1 and lists[0].is_ascending:
        index, count = pieces[0]
    else:
        joined, used = side_by_side(pieces, shape, fill=mask.num_keys)
        start, stop = 0, None
        if band is not None:
            start = min(band.num_sinks, mask.num_keys)
            if mask.is_causal:
                # from here on all rows of a tile that see a key hold it by the band
                from_here = tile_size - 1 + mask.position_offset - band.left
                stop = spaced(shape[2], tile_size, from_here, mask.device)
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
        band_count=found.band_count if band else None, excluded=excluded_ranges(ordered),
        disjoint=True,
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
    offset = mask.position_offset
    last = max(0, min(mask.num_queries + offset, mask.num_keys))
    return spaced(num_tiles, tile_size, tile_size + offset, mask.device, low=0, high=last)


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


def excluded_ranges(masks: list[RangeMask]) -> RankRanges | None:
    """Return what plans of these masks hold, for another plan to leave out."""
    if not masks:
        return None
    ranges = [mask.row_ranges() for mask in masks]
    return RankRanges(
        key_rank=torch.stack([mask.key_rank() for mask in masks], dim=2),
        start=torch.stack([start for start, _ in ranges], dim=2),
        stop=torch.stack([stop for _, stop in ranges], dim=2),
    )
