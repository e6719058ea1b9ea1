"""The causal recursion (Algorithm 4): leaves and rectangles tile the triangle, and merge to it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.causal import Rectangle, attend_recursively
from hyperframe.detectors import create
from hyperframe.kernels import exact_attention
from hyperframe.rectangles import leaf_size
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
