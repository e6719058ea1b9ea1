"""Block plans: what they mean, entry for entry, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.blockplan import BlockPlan
from hyperframe.errors import ArgumentError
from hyperframe.kernels import attend, attend_all
from hyperframe.testing import masked_attention
from hyperframe.testing.strategies import (
    AttentionInputs,
    Problem,
    attention_inputs,
    block_plans,
    problems,
)


def by_definition(plan: BlockPlan) -> torch.Tensor:
    """The weight matrix, one entry after another."""
    batch, heads, num_queries = plan.query_order.shape
    group = heads // plan.key_order.shape[1]
    weight = torch.zeros(batch, heads, num_queries, plan.num_keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            rows, keys = plan.query_order[b, h].tolist(), plan.key_order[b, h // group].tolist()
            for first, last, start, stop, rectangle in plan.tiles.tolist():
                for row in rows[first:last]:
                    for key in keys[start:stop]:
                        weight[b, h, row, key] += 1
                    for s in range(plan.num_samples):
                        assert plan.sample_index is not None
                        assert plan.sample_log_weight is not None
                        key = int(plan.sample_index[b, h // group, rectangle, s])
                        if not start <= keys.index(key) < stop:
                            log_weight = plan.sample_log_weight[b, h // group, rectangle, s]
                            weight[b, h, row, key] += log_weight.double().exp()
    return weight


@given(block_plans())
def test_the_lists_of_the_tiles_mean_what_the_plan_means(plan: BlockPlan) -> None:
    expected = by_definition(plan)
    tiles = plan.to_tile_plan().validate()
    torch.testing.assert_close(tiles.to_dense(), expected)
    torch.testing.assert_close(plan.to_dense(), expected)
    heavy, sampled = plan.to_dense(part="heavy"), plan.to_dense(part="sampled")
    assert set(heavy.unique().tolist()) <= {0.0, 1.0}
    assert (heavy * sampled == 0).all()  # nothing is held and sampled
    # a maker that vouches for disjoint lists has to be right, but for repeated samples
    assert torch.equal(replace(tiles, disjoint=False).to_dense(part="heavy"), heavy)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(inputs=attention_inputs(structures=["plain", "ties", "planted"]), plan=block_plans())
def test_backends_attend_by_the_meaning_and_its_gradient(
    backend: str, inputs: AttentionInputs, plan: BlockPlan
) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    state = attend(*leaves, plan, scale=0.7, backend=backend)
    expected = masked_attention(*leaves, by_definition(plan), scale=0.7)
    torch.testing.assert_close(state.out, expected.out)
    torch.testing.assert_close(state.lse, expected.lse)

    def gradients(state: Any) -> tuple[torch.Tensor, ...]:
        finite = torch.where(torch.isinf(state.lse), 0.0, state.lse)
        loss = (state.out * torch.linspace(-1, 1, state.out.shape[-1])).sum() + finite.sum()
        return torch.autograd.grad(loss, leaves)

    for found, wanted in zip(gradients(state), gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@given(problems(), st.data())
def test_plans_of_both_kinds_attend_together(problem: Problem, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(problem, structures=["plain"]))
    plan = data.draw(block_plans(problem))
    once = attend_all(*inputs, [plan], scale=1.0, backend="torch")
    twice = attend_all(*inputs, [plan, plan.to_tile_plan()], scale=1.0, backend="torch")
    torch.testing.assert_close(once.out, twice.out)
    torch.testing.assert_close(once.lse + torch.tensor(2.0).log(), twice.lse)


def plan() -> BlockPlan:
    """Two rectangles, four tiles; rows 0 and 5 are in none."""
    index = torch.tensor([[[[4, 4], [0, 1]]]], dtype=torch.int32)
    key_order = torch.tensor([[[1, 0, 4, 3, 2]]], dtype=torch.int32)
    return BlockPlan(
        query_order=torch.tensor([[[0, 2, 1, 3, 4, 5]] * 2], dtype=torch.int32),
        key_order=key_order,
        tiles=torch.tensor(
            [[1, 2, 2, 3, 0], [2, 3, 3, 4, 0], [3, 4, 0, 1, 1], [4, 5, 1, 2, 1]],
            dtype=torch.int32,
        ),
        max_rows=1, max_keys=1, tile_counts=(2, 2), rectangles=((1, 3, 2, 4), (3, 5, 0, 2)),
        num_query_heads=2, num_queries=6, num_keys=5, sample_index=index,
        sample_log_weight=torch.zeros(()).expand(1, 1, 2, 2),
        key_rank=key_order.argsort(-1).int(),
    )  # fmt: skip


def test_rows_in_no_tile_are_empty_and_repeated_samples_count_twice() -> None:
    made = plan().validate()
    assert made.num_samples == 2
    replace(made, samples_are_own=True).validate()
    shared = replace(made, rectangles=((1, 3, 2, 4), (3, 5, 0, 3)), samples_are_own=True)
    with pytest.raises(ArgumentError, match="samples_are_own: two rectangles share the keys from"):
        shared.validate()
    expected = [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 2],  # key 4 is sampled twice
        [0, 0, 0, 0, 1],  # row 2 holds key 4: its two samples count nothing
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert made.to_dense()[0, 1].tolist() == expected
    query, key = torch.randn(1, 2, 6, 3), torch.randn(1, 1, 5, 3)
    state = attend(query, key, key, made, scale=1.0)
    assert (state.out[:, :, [0, 5]] == 0).all()
    assert (state.lse[:, :, [0, 5]] == -torch.inf).all()


@pytest.mark.parametrize(
    "query, key, what",
    [
        ((2, 2, 6, 3), (2, 1, 5, 3), "batch size of 1"),
        ((1, 4, 6, 3), (1, 1, 5, 3), "number of query heads of 2"),
        ((1, 2, 7, 3), (1, 1, 5, 3), "number of queries of 6"),
        ((1, 2, 6, 3), (1, 1, 4, 3), "number of keys of 5"),
        ((1, 2, 6, 3), (1, 2, 5, 3), "1 key heads"),
    ],
)
def test_other_inputs_are_refused_with_the_size_that_differs(
    query: tuple[int, ...], key: tuple[int, ...], what: str
) -> None:
    with pytest.raises(ArgumentError, match=f"plan: it was made for .*{what}"):
        attend(torch.zeros(query), torch.zeros(key), torch.zeros(key), plan(), scale=1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_query_heads": 3}, "query_order: expected shape"),
        ({"key_order": torch.zeros(1, 3, 5)}, "key_order: its 3 heads do not divide the 2"),
        ({"num_keys": 6}, "key_order: expected shape"),
        ({"tiles": torch.zeros(4, 4)}, r"tiles: expected shape \(4, 5\)"),
        ({"key_rank": None}, "give all three or none"),
        ({"rectangles": ((0, 1, 0, 1),)}, "sample_index: expected shape"),
        ({"sample_log_weight": torch.zeros(1, 1, 2, 3)}, "sample_log_weight: expected shape"),
    ],
)
def test_tensors_of_other_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(plan(), **change)


def changed(tensor: torch.Tensor | None, at: tuple[int, ...], value: int) -> torch.Tensor:
    assert tensor is not None
    copy = tensor.clone()
    copy[at] = value
    return copy


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_order": changed(plan().query_order, (0, 1, 0), 3)}, "query_order: not a perm"),
        ({"key_order": changed(plan().key_order, (0, 0, 0), 7)}, "key_order: not a permutation"),
        ({"tiles": changed(plan().tiles, (0, 1), 3)}, "tiles: the query range 1..3"),
        ({"tiles": changed(plan().tiles, (1, 2), 2)}, "tiles: the key range"),
        ({"tiles": changed(plan().tiles, (1, 4), 1)}, "tile_counts: "),
        ({"tiles": changed(plan().tiles, (1, 4), 2)}, "tile_counts: "),
        ({"tile_counts": (1, 3)}, "tile_counts: "),
        ({"tiles": changed(plan().tiles, (0, 3), 2)}, "tiles: the key range 2..2 is empty"),
        ({"rectangles": ((0, 3, 2, 4), (3, 5, 0, 2))}, "hold 2 of its 3 rows"),
        ({"rectangles": ((1, 3, 2, 3), (3, 5, 0, 2))}, "lies outside of its rectangle"),
        ({"sample_index": changed(plan().sample_index, (0, 0, 0, 0), 5)}, "sample_index: keys out"),
        ({"sample_index": changed(plan().sample_index, (0, 0, 0, 0), -1)}, "sample_index: keys"),
        ({"key_rank": changed(plan().key_rank, (0, 0, 0), 9)}, "key_rank: not the place"),
        ({"key_rank": plan().key_order.flip(-1)}, "key_rank: not the place"),
        ({"covers_all_keys": True}, "covers_all_keys: the tiles hold 4 of the 5 keys"),
        (
            {
                "samples_are_own": True,
                "sample_index": changed(plan().sample_index, (0, 0, 0, 0), 1),
            },
            "samples_are_own: a rectangle samples a key outside",
        ),
    ],
)
def test_values_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(plan(), **change).validate()
