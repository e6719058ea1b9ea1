"""Algorithm 4: causal attention from halves and rectangles, its calls and its depth, in numbers.

Any length, any leaf and every record: tests/estimators/test_causal_approx_d.py and
tests/test_causal.py. Here are the closed forms, and that exact calls leave nothing to approximate.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import HyperAttention
from hyperframe.estimators.causal_approx_d import causal_approx_d
from hyperframe.testing import dense_attention
from tests.theory.problems import generator


def tensors(n: int) -> list[torch.Tensor]:
    g = generator(n)
    return [torch.randn(1, 2, n, 4, generator=g, dtype=torch.float64) for _ in range(3)]


@given(st.integers(0, 6), st.integers(1, 5))
def test_a_power_of_two_of_leaves_has_that_depth_and_one_call_less_than_leaves(
    depth: int, leaf: int
) -> None:
    query, key, _ = tensors(leaf * 2**depth)
    sums, record = causal_approx_d(
        query, key, detector="sliding_window(width=1)", estimator="exact", longest_leaf=leaf,
        num_samples=1,
    )  # fmt: skip
    assert record.depth == depth
    assert len(record.leaves) == 2**depth
    assert record.num_calls == 2**depth - 1
    for level in range(depth):
        calls = [call for call in record.rectangles if call.depth == level]
        assert len(calls) == 2**level
        half = leaf * 2 ** (depth - 1 - level)
        for call in calls:
            rows, keys = call.places[:2], call.places[2:]
            assert rows[1] - rows[0] == keys[1] - keys[0] == half
    exact = dense_attention(query, key, key, is_causal=True).lse
    torch.testing.assert_close(sums.log_sum, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n, leaf", [(64, 8), (50, 7), (33, 16)])
def test_the_recursion_is_causal_attention_where_every_call_is_exact(n: int, leaf: int) -> None:
    query, key, value = tensors(n)
    # as many samples as keys: every key is taken once
    attention = HyperAttention(
        detector="sort_lsh(block_size=4)", sampler="uniform", num_samples=n, min_seq_len=leaf,
        causal="recursive", backend="torch",
    )  # fmt: skip
    out, lse = attention(query, key, value, is_causal=True, return_lse=True)
    exact = dense_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, exact.out, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, exact.lse, rtol=0, atol=1e-6)
