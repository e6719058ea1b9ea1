"""The causal recursion (Algorithm 4): leaves and rectangles tile the triangle, and merge to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe import pipeline
from hyperframe.attention import HyperAttention
from hyperframe.blockplan import BlockPlan
from hyperframe.causal import Rectangle, attend_recursively
from hyperframe.detectors import create
from hyperframe.detectors.sort_lsh import SortLSH
from hyperframe.kernels import exact_attention
from hyperframe.rectangles import causal_levels, leaf_size
from hyperframe.state import AttentionState
from hyperframe.testing import dense_attention, masked_attention

SCALE = 0.6
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(num_queries: int, num_keys: int, *, batch: int = 2, seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 4, num_queries, 3, generator=g, dtype=torch.float64)
    key = torch.randn(batch, 2, num_keys, 3, generator=g, dtype=torch.float64)
    return query, key, torch.randn(batch, 2, num_keys, 2, generator=g, dtype=torch.float64)


def exact_rectangle(part: Rectangle) -> AttentionState:
    return exact_attention(part.query, part.key, part.value, scale=SCALE)


def exact_leaf(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionState:
    return exact_attention(q, k, v, scale=SCALE, is_causal=True)


@given(
    num_queries=st.integers(1, 70),
    num_keys=st.integers(1, 70),
    longest_leaf=st.integers(1, 16),
    stacked=st.booleans(),
)
@example(num_queries=37, num_keys=37, longest_leaf=3, stacked=True)
@example(num_queries=37, num_keys=50, longest_leaf=4, stacked=False)
@example(num_queries=50, num_keys=37, longest_leaf=4, stacked=True)
def test_with_exact_parts_the_recursion_is_exact_attention(
    num_queries: int, num_keys: int, longest_leaf: int, stacked: bool
) -> None:
    inputs = tensors(num_queries, num_keys)
    state = attend_recursively(
        *inputs, longest_leaf=longest_leaf, solve=exact_rectangle, solve_leaf=exact_leaf,
        stacked=stacked,
    )  # fmt: skip
    expected = dense_attention(*inputs, scale=SCALE, is_causal=True)
    torch.testing.assert_close(state.out, expected.out)
    torch.testing.assert_close(state.lse, expected.lse)


@given(
    num_queries=st.integers(1, 60),
    num_keys=st.integers(1, 60),
    longest_leaf=st.integers(1, 16),
    stacked=st.booleans(),
)
@example(num_queries=37, num_keys=37, longest_leaf=3, stacked=True)
@example(num_queries=37, num_keys=50, longest_leaf=4, stacked=True)
@example(num_queries=50, num_keys=37, longest_leaf=4, stacked=False)
def test_every_visible_entry_is_in_one_leaf_or_rectangle_with_its_positions(
    num_queries: int, num_keys: int, longest_leaf: int, stacked: bool
) -> None:
    # positions travel as content: each query and key says where it stands
    row = torch.arange(num_queries).double().view(1, 1, -1, 1).expand(2, 1, -1, -1)
    column = torch.arange(num_keys).double().view(1, 1, -1, 1).expand(2, 1, -1, -1)
    seen = torch.zeros(num_queries, num_keys, dtype=torch.int64)
    offset = num_keys - num_queries

    def count(q: torch.Tensor, k: torch.Tensor, *, causal: bool) -> AttentionState:
        for rows, columns in zip(q[:, 0, :, 0].long(), k[:, 0, :, 0].long(), strict=True):
            block = torch.ones(len(rows), len(columns), dtype=torch.int64)
            seen[rows[:, None], columns] += block.tril() if causal else block
        return AttentionState(out=q * 0, lse=q[..., 0] * 0)

    def solve(part: Rectangle) -> AttentionState:
        rows, columns = part.query[0, 0, :, 0], part.key[0, 0, :, 0]
        assert part.first_row == rows[0]
        assert part.query_start == rows[0] + offset
        assert part.key_start == columns[0]
        assert (part.key == part.value).all()
        if part.earlier_query is not None:  # the queries at the positions of the keys
            assert torch.equal(part.earlier_query + offset, part.key)
        if not stacked:
            assert part.query.shape[0] == 2
        return count(part.query, part.key, causal=False)

    def solve_leaf(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionState:
        assert q.shape[2] == k.shape[2] <= longest_leaf
        return count(q, k, causal=True)

    attend_recursively(
        row, column, column, longest_leaf=longest_leaf, solve=solve, solve_leaf=solve_leaf,
        stacked=stacked,
    )  # fmt: skip
    # two batch items, each entry once
    assert torch.equal(seen, 2 * torch.ones_like(seen).tril(offset))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("longest_leaf", [1, 3, 8, 200])
def test_there_are_log2_levels_and_stacked_rectangles_of_a_level_are_one_call(
    length: int, longest_leaf: int
) -> None:
    calls = []

    def solve(part: Rectangle) -> AttentionState:
        calls.append(part.key.shape[2])
        return exact_rectangle(part)

    attend_recursively(
        *tensors(length, length), longest_leaf=longest_leaf, solve=solve, solve_leaf=exact_leaf
    )
    leaves = -(-length // leaf_size(length, longest_leaf))
    assert len(set(calls)) == math.ceil(math.log2(leaves))
    assert len(calls) <= 2 * len(set(calls))  # a stack and a cut rectangle on each level


@pytest.mark.parametrize("shape", [(50, 50), (37, 50), (50, 37)])
@pytest.mark.parametrize(
    "spec",
    [
        "sliding_window(width=11, num_sinks=3)",
        "block_list(blocks=((0,0),(3,0),(2,1),(4,1),(4,3)), block_size=9)",
        "block_list(blocks=((2,3,1),(4,1),(0,4,3)), block_size=9)",
        "sliding_window(width=4) | block_list(blocks=((3,0),), block_size=9)",
    ],
)
def test_positional_patterns_mean_the_same_in_the_recursion_as_in_one_pass(
    spec: str, shape: tuple[int, int]
) -> None:
    inputs = tensors(*shape)
    if shape[0] < 50 or shape[1] < 50:
        spec = spec.replace("(4,1)", "(3,1)").replace("(4,3)", "(3,3)")
    attention = HyperAttention(detector=spec, num_samples=0, min_seq_len=4, causal="recursive")
    state = attention(*inputs, is_causal=True, return_lse=True)
    mask = create(spec).find(*inputs[:2], is_causal=True).to_dense()
    # the recursion adds its leaves, which are exact
    length, offset = min(shape), shape[1] - shape[0]
    position = torch.arange(shape[0]) + offset
    first = max(0, offset)
    leaf = leaf_size(length, 4)
    group = torch.div(torch.arange(shape[1]) - first, leaf, rounding_mode="floor")
    own = torch.div(position - first, leaf, rounding_mode="floor")
    in_leaf = (own[:, None] == group) & (group >= 0) & (own >= 0)[:, None]
    mask = mask | (in_leaf & (torch.arange(shape[1]) <= position[:, None]))
    expected = masked_attention(*inputs, mask)
    torch.testing.assert_close(state[0], expected.out)
    torch.testing.assert_close(state[1], expected.lse)


def test_a_sequence_no_longer_than_a_leaf_has_no_rectangle() -> None:
    def refuse(part: Rectangle) -> AttentionState:
        raise AssertionError("no rectangle expected")

    inputs = tensors(20, 20)
    state = attend_recursively(*inputs, longest_leaf=20, solve=refuse, solve_leaf=exact_leaf)
    expected = dense_attention(*inputs, scale=SCALE, is_causal=True)
    torch.testing.assert_close(state.out, expected.out)


def test_stacked_rectangles_draw_samples_of_their_own() -> None:
    # every rectangle of a level has the same content, so equal outputs would mean equal draws
    query, key, value = (x.repeat(1, 1, 8, 1) for x in tensors(8, 8, batch=1))
    drawn = []

    def solve(part: Rectangle) -> AttentionState:
        mask = create("sort_lsh(block_size=4)").find(
            part.query, part.key, generator=torch.Generator().manual_seed(0)
        )
        drawn.extend(mask.to_dense().unbind(0))
        return exact_rectangle(part)

    attend_recursively(query, key, value, longest_leaf=8, solve=solve, solve_leaf=exact_leaf)
    same_size = [x for x in drawn if x.shape[-1] == 8]
    assert len(same_size) == 4
    assert not all(torch.equal(x, same_size[0]) for x in same_size[1:])


def graph_names(output: torch.Tensor) -> list[str]:
    """Names of the autograd nodes behind a tensor."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


@pytest.mark.parametrize("stacked", [False, True])
def test_the_backward_cuts_no_slice_a_run(stacked: bool) -> None:
    """The gradient of a slice is a tensor of all rows: one a run would be quadratic work."""

    def slices(length: int) -> int:
        inputs = [x.requires_grad_() for x in tensors(length, length)]
        state = attend_recursively(
            *inputs, longest_leaf=8, solve=exact_rectangle, solve_leaf=exact_leaf, stacked=stacked
        )
        names = graph_names(state.out)
        return sum(name.startswith(("Slice", "Select", "Unbind")) for name in names)

    short, long = slices(251), slices(8 * 251)
    # a few on each of the three more levels, whatever the number of runs (which is 8 times larger)
    assert long - short <= 3 * 20


def test_the_graph_of_a_stacked_recursion_grows_with_the_levels_not_with_the_runs() -> None:
    def nodes(length: int) -> int:
        inputs = [x.requires_grad_() for x in tensors(length, length)]
        state = attend_recursively(
            *inputs, longest_leaf=8, solve=exact_rectangle, solve_leaf=exact_leaf
        )
        return len(graph_names(state.out))

    assert nodes(8 * 256) <= 2 * nodes(256)


# ----------------------------------------------------------------------- all levels at once

SHAPES = [(64, 64), (61, 61), (37, 50), (50, 37)]


def recursive(**options: Any) -> HyperAttention:
    options = {
        "detector": "sort_lsh(block_size=5, num_projections=4)", "num_samples": 4,
        "min_seq_len": 4, "causal": "recursive", "backend": "torch", **options,
    }  # fmt: skip
    return HyperAttention(**options)


class Plans:
    """Keeps what the pipeline builds; the weight matrix of it all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.levels: list[BlockPlan] = []
        self.others: list[Any] = []
        for name, kept in (("build_level_plans", self.levels), ("build_plans", self.others)):
            monkeypatch.setattr(pipeline, name, self._keeping(getattr(pipeline, name), kept))

    @staticmethod
    def _keeping(build: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
        def building(*args: Any, **options: Any) -> Any:
            plans = build(*args, **options)
            kept.extend(plans or [])
            return plans

        return building

    def weight(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Sum of the levels, of the rectangle before the square, and of leaves of up to 4 rows."""
        square = min(num_queries, num_keys)
        first_row, first_key = num_queries - square, num_keys - square
        leaf = leaf_size(square, 4)
        run = torch.arange(square) // leaf
        in_leaf = (run[:, None] == run).tril().double()
        weight = torch.zeros(2, 4, num_queries, num_keys, dtype=torch.float64)
        weight[:, :, first_row:, first_key:] += in_leaf
        for plan in self.levels:
            weight[:, :, first_row:, first_key:] += plan.to_dense()
        for plan in self.others:
            weight[:, :, :, :first_key] += plan.to_dense()
        return weight


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_that_hold_everything_are_exact_attention(shape: tuple[int, int]) -> None:
    inputs = tensors(*shape)
    for options in (
        {"detector": "sort_lsh(block_size=64)"},
        {"detector": "sort_lsh(block_size=3)", "num_samples": 64},
    ):
        out, lse = recursive(**options)(*inputs, is_causal=True, scale=SCALE, return_lse=True)
        expected = dense_attention(*inputs, scale=SCALE, is_causal=True)
        torch.testing.assert_close(out, expected.out)
        torch.testing.assert_close(lse, expected.lse)


@pytest.mark.parametrize("num_samples", [0, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_levels_attend_by_their_plans_and_leaves_with_the_gradient_of_that(
    shape: tuple[int, int], num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = Plans(monkeypatch)
    inputs = [x.requires_grad_() for x in tensors(*shape)]
    attention = recursive(num_samples=num_samples)
    out, lse = attention(*inputs, is_causal=True, scale=SCALE, return_lse=True)
    square = min(shape)
    assert len(plans.levels) == len(causal_levels(square, leaf_size(square, 4)))
    assert len(plans.others) == (shape[1] > shape[0])
    weight = plans.weight(*shape)
    assert torch.equal(weight, weight.tril(shape[1] - shape[0]))  # nothing looks ahead
    if num_samples:  # all rows of a rectangle with more than one block have a residual
        assert (plans.levels[-1].to_dense(part="sampled").sum(-1) > 0).any(dim=-1).all()
    expected = masked_attention(*inputs, weight, scale=SCALE)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)
    seen = ~torch.isinf(lse)

    def gradients(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() + lse[seen].sum()
        return torch.autograd.grad(loss, inputs)

    found, wanted = gradients(out, lse), gradients(expected.out, expected.lse)
    for mine, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, its)


def test_levels_are_the_same_on_the_reference_backend() -> None:
    inputs = tensors(37, 37)
    states = [
        recursive(backend=name)(*inputs, is_causal=True, return_lse=True)
        for name in ("torch", "reference")
    ]
    for mine, its in zip(*states, strict=True):
        torch.testing.assert_close(mine, its)


@given(length=st.integers(2, 60), cut=st.integers(0, 59), seed=st.integers(0, 99))
@example(length=60, cut=30, seed=0)
@example(length=37, cut=20, seed=1)
def test_no_later_key_or_value_moves_a_row(length: int, cut: int, seed: int) -> None:
    cut = min(cut, length - 1)
    query, key, value = tensors(length, length, seed=seed)
    before = recursive()(query, key, value, is_causal=True)
    key[:, :, cut:] *= -3
    value[:, :, cut:] += 1
    after = recursive()(query, key, value, is_causal=True)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


def test_the_levels_are_hashed_and_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find = SortLSH.find_levels

    def counted(self: SortLSH, *args: Any, **options: Any) -> Any:
        calls.append(len(options["levels"]))
        return find(self, *args, **options)

    monkeypatch.setattr(SortLSH, "find_levels", counted)
    recursive()(*tensors(61, 61), is_causal=True)
    assert calls == [len(causal_levels(61, leaf_size(61, 4)))]
    plans = Plans(monkeypatch)
    recursive()(*tensors(61, 61), is_causal=True)
    # small levels are held entirely: no samples
    assert [plan.num_samples for plan in plans.levels] == [
        4 if level.size > 5 else 0 for level in causal_levels(61, leaf_size(61, 4))
    ]
    samples = [plan.sample_index for plan in plans.levels if plan.sample_index is not None]
    assert not torch.equal(samples[0][0, 0, 0] % 8, samples[0][0, 1, 0] % 8)


def test_one_run_of_leaves_has_no_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Plans(monkeypatch)
    recursive(min_seq_len=20)(*tensors(20, 30), is_causal=True)
    assert plans.levels == []
    assert len(plans.others) == 1


@dataclass(frozen=True, kw_only=True)
class Reversed(SortLSH):
    """Finds otherwise than its parent, which knows nothing of that."""

    def find(self, query: torch.Tensor, key: torch.Tensor, **options: Any) -> Any:
        return super().find(query.flip(1), key, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"strict_causal": True},
        {"sampler": "row_norm"},
        {"estimator": "exact"},
        {"detector": "sort_lsh(block_size=5, num_rounds=2)"},
        {"detector": "sort_lsh(block_size=5, centre_keys=True)"},
        {"detector": "heavy_columns(num_columns=4)"},
        {"detector": "sliding_window(width=4) | sort_lsh(block_size=5)"},
        {"detector": Reversed(block_size=5)},
    ],
    ids=str,
)
def test_where_a_part_looks_at_single_rectangles_each_is_solved_by_itself(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(61, 61)
    attention = recursive(**options)
    plans = Plans(monkeypatch)
    found = attention(*inputs, is_causal=True)
    assert plans.levels == []
    assert plans.others != []
    # and draws what it drew without the other way
    monkeypatch.setattr(pipeline.Pipeline, "_solve_square", lambda *args: None)
    assert torch.equal(found, attention(*inputs, is_causal=True))


def test_the_graph_of_all_levels_does_not_grow_with_their_rows() -> None:
    def nodes(length: int) -> int:
        inputs = [x.requires_grad_() for x in tensors(length, length)]
        return len(graph_names(recursive(min_seq_len=length // 8)(*inputs, is_causal=True)))

    assert nodes(512) <= nodes(64) + 8
