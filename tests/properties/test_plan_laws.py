"""Laws of the meaning of a plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given

from hyperframe.kernels import visible_keys
from hyperframe.plan import TilePlan
from hyperframe.ragged import spread_heads
from hyperframe.testing.strategies import PLAN_FEATURES, Problem, plans, problems


def meaning_by_hand(plan: TilePlan, *, for_values: bool = False) -> torch.Tensor:
    """The meaning of a plan once more, slot by slot in plain Python."""
    width = plan.num_keys + plan.num_summaries
    batch, heads, tiles, _ = plan.key_index.shape
    group = plan.num_query_heads // heads
    dense = torch.zeros(batch, plan.num_query_heads, plan.num_queries, width, dtype=torch.float64)
    weights = plan.log_weight
    if for_values and plan.value_log_weight is not None:
        weights = plan.value_log_weight
    rank = start = stop = None
    if plan.excluded is not None:
        rank = spread_heads(plan.excluded.key_rank, plan.num_query_heads)
        start, stop = plan.excluded.start, plan.excluded.stop
    for b in range(batch):
        for h in range(plan.num_query_heads):
            for t in range(tiles):
                place = (b, h // group, t)
                banded = int(plan.band_count[place]) if plan.band_count is not None else 0
                heavy, used = int(plan.heavy_count[place]), int(plan.key_count[place])
                keys = plan.key_index[place].tolist()
                for m in range(plan.tile_size):
                    slot_of_row = t * plan.tile_size + m
                    row = slot_of_row
                    if plan.query_order is not None:
                        row = int(plan.query_order[b, h // group, slot_of_row])
                    if not 0 <= row < plan.num_queries:
                        continue
                    position = row + plan.position_offset
                    held = set()
                    for slot in range(used):
                        key = keys[slot]
                        is_summary = key >= plan.num_keys
                        in_band = plan.band is not None and not is_summary and (
                            position - plan.band[0] <= key <= position + plan.band[1]
                        )  # fmt: skip
                        if slot < heavy:
                            if key in held or (slot < banded and not in_band):
                                continue
                            held.add(key)
                        elif key in held or in_band:
                            continue
                        if plan.is_causal and not is_summary and key > position:
                            continue
                        if rank is not None and not is_summary:
                            ranks = rank[b, h, :, key]
                            lows, highs = start[b, h, :, row], stop[b, h, :, row]
                            if bool(((lows <= ranks) & (ranks < highs)).any()):
                                continue
                        weight = 1.0 if weights is None else float(weights[place][slot].exp())
                        dense[b, h, row, key] += weight
    return dense


@given(plans())
def test_the_dense_meaning_is_what_the_fields_say(plan: TilePlan) -> None:
    plan.validate()
    for for_values in (False, True):
        torch.testing.assert_close(
            plan.to_dense(for_values=for_values), meaning_by_hand(plan, for_values=for_values)
        )


@given(plans())
def test_exact_and_sampled_parts_make_the_whole(plan: TilePlan) -> None:
    heavy, sampled = plan.to_dense(part="heavy"), plan.to_dense(part="sampled")
    torch.testing.assert_close(heavy + sampled, plan.to_dense())
    assert ((heavy == 0) | (heavy == 1)).all()
    if plan.band is None:
        # the factor 1 - M of Algorithm 2
        assert not ((heavy > 0) & (sampled > 0)).any()


@given(plans())
def test_deduplication_keeps_the_meaning(plan: TilePlan) -> None:
    once = plan.deduplicated()
    assert once.disjoint
    assert torch.equal(once.to_dense(), plan.to_dense())
    assert torch.equal(once.to_dense(for_values=True), plan.to_dense(for_values=True))


@given(plans())
def test_a_shared_list_means_the_same_as_its_copies(plan: TilePlan) -> None:
    def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)

    apart = replace(
        plan, key_index=copied(plan.key_index), key_count=copied(plan.key_count),
        heavy_count=copied(plan.heavy_count), band_count=copied(plan.band_count),
        log_weight=copied(plan.log_weight), value_log_weight=copied(plan.value_log_weight),
    )  # fmt: skip
    assert torch.equal(apart.to_dense(), plan.to_dense())


@given(problems(), plans(features=set(PLAN_FEATURES) - {"weights", "value_weights", "summaries"}))
def test_visible_keys_are_the_slots_that_count(problem: Problem, plan: TilePlan) -> None:
    # without weights every slot that counts adds one to its row
    counted = visible_keys(plan, key_heads=plan.key_index.shape[1])
    assert torch.equal(counted, plan.to_dense().sum(-1).long())
