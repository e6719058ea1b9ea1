"""Laws of the merge: associative, commutative, the empty state neutral."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.state import AttentionState, empty_state, merge

# log normalisers of every size, equal ones, and rows without keys
normalisers = st.sampled_from([-math.inf, -1e4, -745.0, -20.0, 0.0, 1.0, 1.5, 20.0, 710.0, 1e4])


@st.composite
def states(draw: st.DrawFn, rows: int = 6) -> AttentionState:
    lse = torch.tensor(draw(st.lists(normalisers, min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    out = torch.randn(1, 1, rows, 3, generator=generator, dtype=torch.float64)
    lse = lse.double().view(1, 1, rows)
    return AttentionState(out.masked_fill(torch.isinf(lse).unsqueeze(-1), 0), lse)


def assert_same(a: AttentionState, b: AttentionState) -> None:
    torch.testing.assert_close(a.out, b.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-12, atol=1e-12)


@given(states(), states())
def test_merge_is_commutative(a: AttentionState, b: AttentionState) -> None:
    assert_same(merge(a, b), merge(b, a))


@given(states(), states(), states())
def test_merge_is_associative(a: AttentionState, b: AttentionState, c: AttentionState) -> None:
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(merge(a, b), c), merge(a, b, c))


@given(states())
def test_the_empty_state_is_neutral(a: AttentionState) -> None:
    empty = empty_state(torch.zeros(1, 1, 6, 2, dtype=torch.float64), a.out)
    assert_same(merge(a, empty), a)
    assert_same(merge(empty, a), a)


@given(states(), states(), st.integers(-50, 50))
def test_a_common_factor_of_all_normalisers_moves_only_the_normaliser(
    a: AttentionState, b: AttentionState, shift: int
) -> None:
    merged = merge(a, b)
    moved = merge(AttentionState(a.out, a.lse + shift), AttentionState(b.out, b.lse + shift))
    assert_same(moved, AttentionState(merged.out, merged.lse + shift))
