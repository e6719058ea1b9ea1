"""The public strategies: they reach what they promise, and load only when they are used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hyperframe import testing
from hyperframe.blockplan import BlockPlan
from hyperframe.masks import (
    BandMask,
    BlockMask,
    EntryMask,
    HeavyMask,
    ListMask,
    RangeMask,
    UnionMask,
)
from hyperframe.plan import TilePlan
from hyperframe.samples import KeySample
from hyperframe.testing import strategies
from hyperframe.testing.strategies import (
    PLAN_FEATURES,
    STRUCTURES,
    AttentionInputs,
    Problem,
    attention_inputs,
    block_plans,
    key_samples,
    masks,
    plans,
    problems,
)


def some(strategy: st.SearchStrategy[Any], count: int = 200) -> list[Any]:
    """Examples of a strategy, the same in every run."""
    found: list[Any] = []

    @settings(
        max_examples=count, database=None, derandomize=True, phases=[Phase.generate],
        deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


PROBLEM = Problem(
    batch=2, query_heads=4, key_heads=2, num_queries=9, num_keys=12, head_dim=3, value_dim=5
)


PROBLEM_KINDS: dict[str, Callable[[Problem], bool]] = {
    "grouped heads": lambda p: p.query_heads > p.key_heads > 1,
    "one head": lambda p: p.query_heads == 1,
    "fewer queries": lambda p: 1 < p.num_queries < p.num_keys,
    "more queries": lambda p: p.num_queries > p.num_keys > 1,
    "one query": lambda p: p.num_queries == 1,
    "one key": lambda p: p.num_keys == 1,
    "other values": lambda p: p.value_dim != p.head_dim,
    "batch": lambda p: p.batch > 1,
}


@pytest.mark.hypothesis
def test_problems_come_in_every_kind() -> None:
    found = some(problems())
    missing = [name for name, is_kind in PROBLEM_KINDS.items() if not any(map(is_kind, found))]
    assert missing == []
    assert all(problem.query_heads % problem.key_heads == 0 for problem in found)
    assert all(
        problem.num_queries == problem.num_keys for problem in some(problems(is_square=True), 30)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.hypothesis
def test_inputs_have_the_structure_they_name(structure: str) -> None:
    def score(inputs: AttentionInputs) -> torch.Tensor:
        return inputs.query @ inputs.expanded_key().mT

    holds: dict[str, Callable[[AttentionInputs], bool]] = {
        "plain": lambda x: True,
        "ties": lambda x: any(len(row.unique()) < len(row) for row in score(x).flatten(0, 2)),
        "duplicates": lambda x: torch.equal(x.key[:, :, 0], x.key[:, :, 3]),
        "zero_rows": lambda x: all(bool((t == 0).all(-1).any()) for t in x),
        "huge_norms": lambda x: bool(score(x).abs().max() > 500),
        "planted": lambda x: bool((score(x).softmax(-1).amax(-1).median() > 0.5).all()),
        "constant": lambda x: bool((x.key == x.key[:, :, :1]).all()),
    }
    found = some(attention_inputs(PROBLEM, structures=[structure]), 20)
    assert sum(holds[structure](inputs) for inputs in found) >= 15
    for inputs in found:
        assert inputs.structure == structure
        assert all(torch.isfinite(tensor).all() for tensor in inputs)
    shapes = [tuple(tensor.shape) for tensor in found[0]]
    assert shapes == [(2, 4, 9, 3), (2, 2, 12, 3), (2, 2, 12, 5)]


@pytest.mark.hypothesis
def test_an_example_prints_its_shapes_and_seed_and_no_numbers() -> None:
    (inputs, *_) = some(attention_inputs(PROBLEM, dtype=torch.float16), 1)
    assert repr(inputs) == (
        "AttentionInputs(query=[2, 4, 9, 3], key=[2, 2, 12, 3], value=[2, 2, 12, 5], "
        f"torch.float16, {inputs.structure!r}, seed={inputs.seed})"
    )


@pytest.mark.hypothesis
def test_masks_come_in_every_form() -> None:
    found: list[HeavyMask] = some(masks(PROBLEM))
    for form in (BandMask, BlockMask, ListMask, RangeMask, UnionMask):
        assert any(isinstance(mask, form) for mask in found), form
    density = torch.tensor([mask.nnz().sum() / (8 * 9 * 12) for mask in found])
    assert (density == 0).any()
    assert (density == 1).any()
    lists = [mask for mask in found if isinstance(mask, ListMask)]
    assert {mask.tile_size == 1 for mask in lists} == {True, False}
    assert {mask.key_index.shape[1] for mask in lists} == {2, 4}
    assert any(mask.key_index.shape[2] > 1 and mask.key_index.stride(2) == 0 for mask in lists)
    assert {mask.is_causal for mask in found} == {True, False}
    assert all(mask.is_causal for mask in some(masks(PROBLEM, is_causal=True), 20))


@pytest.mark.hypothesis
def test_block_plans_come_in_every_kind() -> None:
    found: list[BlockPlan] = some(block_plans(PROBLEM), 100)
    for plan in found:
        plan.validate()
        assert plan.key_order.shape[1] == 2
    assert {plan.num_samples > 0 for plan in found} == {True, False}
    assert {len(plan.rectangles) for plan in found} == {1, 2, 3}
    assert any(len(plan.tiles) > len(plan.rectangles) for plan in found)
    whole = [bool((plan.to_dense(part="heavy").sum(-1) > 0).all()) for plan in found]
    assert set(whole) == {True, False}
    sampled = [plan for plan in found if plan.sample_log_weight is not None]
    assert any(bool((plan.sample_log_weight == -torch.inf).any()) for plan in sampled)


PLAN_HOLDS: dict[str, Callable[[TilePlan], bool]] = {
    "order": lambda p: p.query_order is not None and bool((p.query_order < 0).any()),
    "weights": lambda p: p.log_weight is not None,
    "value_weights": lambda p: p.value_log_weight is not None,
    "caps": lambda p: p.log_cap is not None,
    "floor": lambda p: p.log_floor is not None,
    "summaries": lambda p: p.num_summaries > 0,
    "causal": lambda p: p.is_causal,
    "band": lambda p: p.band_count is not None and bool(p.band_count.any()),
    "excluded": lambda p: p.excluded is not None,
    "grouped": lambda p: p.key_index.shape[1] == 2,
    "shared": lambda p: p.key_index.shape[2] > 1 and p.key_index.stride(2) == 0,
    "disjoint": lambda p: p.disjoint,
}


@pytest.mark.parametrize("feature", PLAN_FEATURES)
@pytest.mark.hypothesis
def test_plans_have_the_features_they_must_and_lack_those_they_may_not(feature: str) -> None:
    holds = PLAN_HOLDS[feature]
    required = some(plans(PROBLEM, features=(), required=[feature]), 20)
    assert any(map(holds, required))
    if feature not in ("order", "band", "shared"):
        assert all(map(holds, required))
    without = set(PLAN_FEATURES) - {feature}
    assert not any(map(holds, some(plans(PROBLEM, features=without), 60)))


@pytest.mark.hypothesis
def test_plans_are_valid_and_hold_repetitions_overlaps_and_empty_rows() -> None:
    found: list[TilePlan] = some(plans(PROBLEM))
    for plan in found:
        plan.validate()
        if plan.disjoint:
            object.__setattr__(plan, "disjoint", False)
            again = plan.deduplicated().to_dense()
            object.__setattr__(plan, "disjoint", True)
            assert torch.equal(plan.to_dense(), again)
    dropped = [plan.deduplicated().log_weight for plan in found if plan.log_weight is None]
    assert any(weight is not None and bool(torch.isinf(weight).any()) for weight in dropped)
    assert any(bool((plan.to_dense().sum(-1) == 0).any()) for plan in found)
    assert any(bool((plan.to_dense() > 1).any()) for plan in found)
    assert any(plan.key_index.shape[-1] == 0 for plan in found)
    assert {plan.key_index.dtype for plan in found} == {torch.int32, torch.int64}


@pytest.mark.hypothesis
def test_samples_repeat_keys_and_leave_slots_unused() -> None:
    found: list[KeySample] = some(key_samples(PROBLEM), 50)
    assert all(sample.index.shape == sample.log_weight.shape for sample in found)
    assert {sample.num_samples for sample in found} >= {0, 6}
    assert any(bool(torch.isinf(sample.log_weight).any()) for sample in found)
    assert any(
        len(row.unique()) < len(row) for sample in found for row in sample.index.flatten(0, 1)
    )


@given(attention_inputs(), masks(), plans(), key_samples())
def test_what_one_test_draws_is_about_one_problem(
    inputs: AttentionInputs, mask: HeavyMask, plan: TilePlan, sample: KeySample
) -> None:
    batch, heads, num_queries, _ = inputs.query.shape
    key_heads, num_keys = inputs.key.shape[1:3]
    assert mask.to_dense().shape == (batch, heads, num_queries, num_keys)
    shape = (batch, heads, num_queries, num_keys + plan.num_summaries)
    assert plan.to_dense().shape == shape
    assert sample.index.shape[:2] == (batch, key_heads)


WITHOUT = """
import sys

sys.modules["hypo" + "thesis"] = None  # as if it were not installed
import hyperframe.testing as testing
from hyperframe.errors import MissingDependencyError
testing.dense_attention
for use in (lambda: testing.plans, lambda: testing.strategies):
    try:
        use()
    except MissingDependencyError as error:
        print(error)
"""


def test_helpers_load_without_the_package_that_strategies_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.endswith("install it with: python -m pip install " + "hypo" + "thesis")


def test_strategies_are_reached_through_the_package() -> None:
    assert testing.plans is plans
    assert testing.strategies is strategies
    assert {"plans", "strategies", "dense_attention"} <= set(dir(testing))
    with pytest.raises(AttributeError, match="has no attribute 'plan'"):
        testing.plan  # noqa: B018


# ------------------------------------------------------------------------------------- from types

TYPES = [
    AttentionInputs, BandMask, BlockMask, BlockPlan, EntryMask, HeavyMask, KeySample, ListMask,
    Problem, RangeMask, TilePlan, UnionMask,
]  # fmt: skip


@pytest.mark.parametrize("cls", TYPES)
@pytest.mark.hypothesis
def test_types_of_the_library_are_drawn_by_their_name(cls: type[Any]) -> None:
    found = some(st.from_type(cls), 40)
    assert all(isinstance(example, cls) for example in found)
    if issubclass(cls, HeavyMask):
        kinds = {type(mask.validate()) for mask in found}
        assert len(kinds) > 3 if cls is HeavyMask else kinds == {cls}
        sizes = {int(mask.nnz().sum()) for mask in found}
        assert len(sizes) > 5


@given(st.from_type(EntryMask), st.from_type(ListMask), st.from_type(AttentionInputs))
def test_types_of_one_test_fit_together(
    entries: EntryMask, lists: ListMask, inputs: AttentionInputs
) -> None:
    assert entries.to_dense().shape == lists.to_dense().shape
    assert entries.to_dense().shape[-1] == inputs.key.shape[2]
    assert bool((entries.to_lists().to_dense() | ~entries.to_dense()).all())
