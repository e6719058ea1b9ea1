"""Tile plans of lists that single rows have for themselves, beside what their tiles hold.

A list for every row, joined with the lists of its tile, would make every row a tile that gathers
all of its keys by itself. So tiles keep their plan, and the rows' own keys become a second one,
which leaves out what the tile holds exactly for the row. The residual of the tile counts those keys
as well: of centroids, a third plan takes them out of the groups that they are in (the state that it
makes is removed, `hyperframe.state.merge`); of samples, the rows have them in the second plan.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .masks import HeavyMask, ListMask
from .plan import TilePlan
from .ragged import append_lists, concatenate_lists, spread_heads
from .rowsums import RowSumRule
from .samples import KeySample, Summaries

__all__ = ["row_lists", "with_row_plans"]

_NEG_INF = float("-inf")


def row_lists(parts: list[HeavyMask]) -> list[ListMask]:
    """Return the parts that are lists of single rows, where others are not."""
    rows = [part for part in parts if isinstance(part, ListMask) and _is_by_row(part)]
    return rows if len(rows) < len(parts) else []


def _is_by_row(part: ListMask) -> bool:
    return part.tile_size == 1 and part.num_queries > 1 and part.key_index.stride(2) != 0


def with_row_plans(
    mask: HeavyMask, rows: list[ListMask], tiles: TilePlan, sample: KeySample | None,
    rule: RowSumRule | None,
) -> list[TilePlan]:  # fmt: skip
    """Return a plan of tiles together with what single rows hold beside it.

    Args:
        mask: the whole mask.
        rows: the lists of single rows.
        tiles: the plan of everything else, the residual included; tiles of consecutive rows.
        sample: the residual in it, or None.
        rule: caps for the sampled part; no floor.

    Returns:
        Plans of disjoint support, but for one with `is_removed`, whose entries are in the first.
        Cost O(n_q R log(tile's list)) time for `R` keys of a row, memory O(n_q R).
    """
    heads = max([tiles.key_index.shape[1]] + [part.key_index.shape[1] for part in rows])
    shape = (mask.batch_size, heads, mask.num_queries)
    pieces = [(part.key_index.int(), part.key_count) for part in rows]
    index, count = concatenate_lists(pieces, shape, mask.device)
    index = index.clamp(0, max(0, mask.num_keys - 1))
    used = torch.arange(index.shape[-1], device=mask.device) < count.unsqueeze(-1)
    weight = torch.where(used & ~_is_held(tiles, index), 0.0, _NEG_INF)
    plan = TilePlan(
        key_index=index, key_count=count.int(), heavy_count=count.int(), tile_size=1,
        num_query_heads=mask.num_query_heads, num_queries=mask.num_queries,
        num_keys=mask.num_keys, log_weight=weight, is_causal=mask.is_causal,
        query_offset=mask.query_offset,
    ).deduplicated()  # fmt: skip
    if sample is None or sample.num_samples == 0:
        return [tiles, plan]
    if sample.summaries is None:
        # the samples of a tile, without those that it holds, are weighed for each row
        tiles = replace(
            tiles, key_count=tiles.heavy_count, log_cap=None, log_floor=None, log_weight=None,
            disjoint=False,
        ).deduplicated()  # fmt: skip
        return [tiles, _with_samples(plan, tiles, sample, rule)]
    return [tiles, plan, _taken_out(plan, tiles, sample, sample.summaries)]


def _by_tile(index: torch.Tensor, tiles: TilePlan) -> torch.Tensor:
    """Lay lists of rows `[B, H, n, R]` side by side in their tiles: `[B, H, T, M * R]`."""
    lacking = tiles.key_index.shape[2] * tiles.tile_size - index.shape[2]
    index = torch.nn.functional.pad(index, (0, 0, 0, lacking))
    laid: torch.Tensor = index.unflatten(2, (-1, tiles.tile_size)).flatten(3)
    return laid


def _by_row(values: torch.Tensor, tiles: TilePlan) -> torch.Tensor:
    """Undo `_by_tile`."""
    rows: torch.Tensor = values.unflatten(3, (tiles.tile_size, -1)).flatten(2, 3)
    return rows[:, :, : tiles.num_queries]


def _is_held(tiles: TilePlan, index: torch.Tensor) -> torch.Tensor:
    """Return whether rows hold keys exactly by their tile: bool, as `index` `[B, H, n, R]`."""
    slot = torch.arange(tiles.key_index.shape[-1], device=index.device)
    is_exact = slot < tiles.heavy_count.unsqueeze(-1)
    if tiles.band_count is not None:
        is_exact = is_exact & (slot >= tiles.band_count.unsqueeze(-1))
    held = torch.where(is_exact, tiles.key_index.int(), tiles.num_keys).sort(dim=-1).values
    held = torch.nn.functional.pad(held, (0, 1), value=tiles.num_keys)
    held = spread_heads(held, index.shape[1])
    asked = _by_tile(index, tiles).contiguous()
    place = torch.searchsorted(held.contiguous(), asked)
    found = _by_row(held.gather(-1, place) == asked, tiles)
    if tiles.band is not None:
        row = torch.arange(tiles.num_queries, device=index.device).unsqueeze(-1)
        offset = index - (row + tiles.position_offset)
        found = found | ((offset >= -tiles.band[0]) & (offset <= tiles.band[1]))
    return found


def _with_samples(
    plan: TilePlan, tiles: TilePlan, sample: KeySample, rule: RowSumRule | None
) -> TilePlan:
    """Append the samples of each tile to the lists of its rows, without what a row holds."""
    heads = plan.key_index.shape[1]
    drawn, weight = spread_heads(sample.index, heads), spread_heads(sample.log_weight, heads)
    if drawn.dim() == 3:
        drawn, weight = drawn.unsqueeze(2), weight.unsqueeze(2)
    else:
        tile = torch.arange(plan.num_queries, device=drawn.device) // tiles.tile_size
        drawn, weight = drawn[:, :, tile], weight[:, :, tile]
    drawn = drawn.int().expand(-1, -1, plan.num_queries, -1)
    weight = weight.float().masked_fill(_is_held(tiles, drawn), _NEG_INF)
    assert plan.log_weight is not None
    # a key that the tile holds has weight 0 in the row's list, and is left out of its samples, too
    exact = plan.log_weight
    index, weights, count = append_lists(plan.key_index, plan.heavy_count, drawn, weight)
    weights[..., : exact.shape[-1]] += torch.where(
        torch.arange(exact.shape[-1], device=exact.device) < plan.heavy_count.unsqueeze(-1),
        exact, 0.0,
    )  # fmt: skip
    return replace(
        plan, key_index=index, key_count=count.int(), log_weight=weights, disjoint=False,
        log_cap=rule.log_cap if rule else None, log_floor=rule.log_floor if rule else None,
    ).deduplicated()  # fmt: skip


def _taken_out(
    plan: TilePlan, tiles: TilePlan, sample: KeySample, summaries: Summaries
) -> TilePlan:
    """Return the plan of what the groups of a tile count of its rows' own keys, to be removed."""
    heads = plan.key_index.shape[1]
    asked = _by_tile(plan.key_index, tiles)
    slot = summaries.slots_of(asked)
    named = spread_heads(sample.index, heads)
    if named.dim() == 3:
        named = named.unsqueeze(2)
    named = named.expand(-1, -1, asked.shape[2], -1).gather(-1, slot.clamp(min=0))
    is_counted = _by_row(slot >= 0, tiles)
    assert plan.log_weight is not None
    return replace(
        plan, key_index=_by_row(named, tiles).int(), heavy_count=torch.zeros_like(plan.key_count),
        log_weight=plan.log_weight.masked_fill(~is_counted, _NEG_INF), log_cap=tiles.log_cap,
        summary_key=summaries.key, summary_value=summaries.value, is_removed=True,
    )  # fmt: skip
