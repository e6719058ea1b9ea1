"""For every mask, the plans' exact parts are the mask and the plans are disjoint."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.blockplan import BlockPlan
from hyperframe.builder import SampleDraw, build_plans
from hyperframe.masks import BlockMask, HeavyMask
from hyperframe.samples import KeySample
from hyperframe.testing.strategies import Problem, key_samples, masks, problems


def draw_of(sample: KeySample, drawn: list[torch.Tensor | None]) -> SampleDraw:
    """The same sample for every tile; notes what it was asked for."""

    def draw(prefixes: torch.Tensor | None) -> KeySample:
        drawn.append(prefixes)
        if prefixes is None:
            return sample
        shape = (-1, -1, len(prefixes), -1)
        return KeySample(
            index=sample.index.unsqueeze(2).expand(shape),
            log_weight=sample.log_weight.unsqueeze(2).expand(shape),
        )

    return draw


@pytest.mark.parametrize("with_sample", [False, True])
@given(problems(), st.data())
def test_the_exact_parts_of_the_plans_add_up_to_the_mask(
    with_sample: bool, problem: Problem, data: st.DataObject
) -> None:
    mask = data.draw(masks(problem))
    draw = draw_of(data.draw(key_samples(problem)), []) if with_sample else None
    plans = build_plans(mask, key_heads=problem.key_heads, draw=draw)
    for made in plans:
        made.validate()
        plan = made.to_tile_plan() if isinstance(made, BlockPlan) else made
        plan.validate()
        # a maker that vouches for disjoint lists has to be right
        again = plan.deduplicated().to_dense()
        object.__setattr__(plan, "disjoint", False)
        assert torch.equal(plan.to_dense(), again)
    heavy = torch.stack([plan.to_dense(part="heavy") for plan in plans]).sum(dim=0)
    assert torch.equal(heavy, mask.to_dense().double())


@given(problems(), st.data())
def test_the_sample_weighs_what_it_says_outside_the_mask_and_nothing_inside(
    problem: Problem, data: st.DataObject
) -> None:
    mask, sample = data.draw(masks(problem)), data.draw(key_samples(problem))
    drawn: list[torch.Tensor | None] = []
    plans = build_plans(mask, key_heads=problem.key_heads, draw=draw_of(sample, drawn))
    assert len(drawn) == 1  # one residual, in one plan
    sampled = torch.stack([plan.to_dense(part="sampled") for plan in plans]).sum(dim=0)
    weight = torch.zeros(problem.batch, problem.key_heads, problem.num_keys, dtype=torch.float64)
    weight.scatter_add_(-1, sample.index, sample.log_weight.double().exp())
    weight = weight.repeat_interleave(problem.query_heads // problem.key_heads, dim=1)
    expected = weight.unsqueeze(2) * ~mask.to_dense()
    if mask.is_causal:
        expected = expected.tril(problem.num_keys - problem.num_queries)
        (prefixes,) = drawn
        assert prefixes is not None
        assert ((prefixes >= 0) & (prefixes <= problem.num_keys)).all()
    torch.testing.assert_close(sampled, expected, rtol=1e-6, atol=1e-9)


@given(masks())
def test_plans_are_one_for_each_order_and_one_for_the_rest(mask: HeavyMask) -> None:
    orders = [part for part in mask.parts() if hasattr(part, "key_order")]
    others = [part for part in mask.parts() if not hasattr(part, "key_order")]
    plans = build_plans(mask, key_heads=mask.num_query_heads)
    assert len(plans) == len(orders) + bool(others)
    if isinstance(mask, BlockMask) and not mask.is_causal:
        assert isinstance(plans[0], BlockPlan)
        return
    for plan in plans:
        assert not isinstance(plan, BlockPlan)
        assert plan.is_causal == mask.is_causal


@given(problems(), st.booleans(), st.data())
def test_plans_of_several_orders_hold_no_entry_twice(
    problem: Problem, is_causal: bool, data: st.DataObject
) -> None:
    orders = masks(problem, forms=["range", "range_of_rows", "block"], is_causal=is_causal)
    mask = data.draw(orders) | data.draw(orders) | data.draw(masks(problem, is_causal=is_causal))
    plans = build_plans(mask, key_heads=problem.key_heads)
    heavy = torch.stack([plan.to_dense(part="heavy") for plan in plans]).sum(dim=0)
    assert torch.equal(heavy, mask.to_dense().double())
