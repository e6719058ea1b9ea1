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

import torch

from .blockplan import BlockPlan
from .errors import UnsupportedError
from .masks import BlockMask, EntryMask, HeavyMask, RangeMask
from .plan import TilePlan
from .positional import NO_SUMMARIES, excluded_ranges, position_plan
from .ragged import append_lists, spread_heads
from .rectangles import Places
from .row_plans import row_lists, with_row_plans
from .rowsums import RowSumRule
from .samples import KeySample, SampleDraw

__all__ = ["build_level_plans", "build_plans"]


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
        consecutive rows. Lists of single rows, where there are other parts, get plans of their own
        behind that one (`row_plans`).
        A `BlockMask` that is the whole mask becomes a `BlockPlan`, if it is not
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
    if not needs_position:
        return plans
    has_floor = rule is not None and rule.log_floor is not None
    rows = [] if ordered or has_floor else row_lists(positional)
    if not rows:
        plans.append(position_plan(mask, positional, ordered, key_heads, draw, rule))
        return plans
    drawn: list[KeySample] = []

    def kept(prefixes: torch.Tensor | None) -> KeySample:
        assert draw is not None
        drawn.append(draw(prefixes))
        return drawn[-1]

    others = [part for part in positional if not any(part is row for row in rows)]
    tiles = position_plan(mask, others, [], key_heads, None if draw is None else kept, rule)
    return [*with_row_plans(mask, rows, tiles, drawn[-1] if drawn else None, rule)]


def _drawn(draw: SampleDraw | None) -> KeySample | None:
    """Draw for a plan in an order of its own."""
    sample = None if draw is None else draw(None)
    if sample is not None and sample.summaries is not None:
        raise UnsupportedError(NO_SUMMARIES)
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
        is_causal=mask.is_causal, query_offset=query_offset, excluded=excluded_ranges(earlier),
        disjoint=True,
    )  # fmt: skip
