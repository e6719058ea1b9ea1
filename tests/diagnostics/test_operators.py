"""Operator norms: the enclosure of the softmax matrix's, and those of narrow matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.diagnostics import softmax_norm
from hyperframe.diagnostics.operators import narrow_norms, weighted_norms
from hyperframe.diagnostics.scores import Scores
from hyperframe.errors import ArgumentError
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests.diagnostics import dense


@given(attention_inputs(), st.booleans(), st.sampled_from([None, 1.5, -0.5]))
def test_the_norm_is_found_and_enclosed(
    inputs: AttentionInputs, is_causal: bool, scale: float | None
) -> None:
    query, key, _ = inputs
    bounds = softmax_norm(query, key, scale=scale, is_causal=is_causal, tolerance=1e-9)
    expected = dense.operator_norm(dense.softmax(query, key, scale=scale, is_causal=is_causal))
    torch.testing.assert_close(bounds.lower, expected, rtol=1e-8, atol=1e-12)
    assert (bounds.upper >= expected * (1 - 1e-9)).all()
    assert (bounds.residual <= 1e-9).all()
    assert bounds.num_steps <= key.shape[2]


@given(attention_inputs(), st.integers(1, 3), st.booleans())
def test_even_one_step_encloses_the_norm(
    inputs: AttentionInputs, max_steps: int, is_causal: bool
) -> None:
    query, key, _ = inputs
    bounds = softmax_norm(query, key, is_causal=is_causal, tolerance=1e-9, max_steps=max_steps)
    expected = dense.operator_norm(dense.softmax(query, key, is_causal=is_causal))
    assert bounds.num_steps <= max_steps
    assert (bounds.lower <= expected * (1 + 1e-9)).all()
    assert (expected * (1 - 1e-9) <= bounds.upper).all()


@given(attention_inputs(), st.booleans(), st.integers(0, 2**16))
def test_weights_of_any_sign_multiply_the_rows(
    inputs: AttentionInputs, is_causal: bool, seed: int
) -> None:
    query, key, _ = inputs
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(*query.shape[:3], 3, generator=g).double()
    weight[..., 1] *= 1e100  # squares overflow unless they are scaled first
    weight[..., 2] = 0.0
    scores = Scores.of(query, key, scale=None, is_causal=is_causal, dtype=None)
    found = weighted_norms(scores, weight, tolerance=1e-9, max_steps=64)
    share = dense.softmax(query, key, is_causal=is_causal)
    for column in range(3):
        expected = dense.operator_norm(weight[..., column].unsqueeze(-1) * share)
        torch.testing.assert_close(found.lower[..., column], expected, rtol=1e-8, atol=1e-300)
    assert (found.upper[..., 2] == 0).all()


def test_the_leading_vector_is_not_missed_though_the_start_is_almost_another() -> None:
    # every query has a key of its own, but for two that share one: the norm is sqrt(2), and the
    # constant vector, where the iteration starts, is nearly left alone
    n = 300
    query = torch.eye(n).view(1, 1, n, n).double()[..., :256]
    query = 1000 * query[:, :, :256]
    key = query.clone()
    query[:, :, 1] = query[:, :, 0]
    bounds = softmax_norm(query, key, scale=1.0)
    assert bounds.lower.item() == pytest.approx(2**0.5)
    assert bounds.upper.item() == pytest.approx(2**0.5)


@pytest.mark.parametrize("leak", [1e-4, 1e-8, 1e-11, 0.0])
def test_a_start_that_is_nearly_an_eigenvector_does_no_harm(leak: float) -> None:
    # two queries on each of five keys, and a little of one on another: what is left after the
    # first step is that little, and after the last step nothing
    n = 5
    logits = 1e3 * torch.eye(n).double().repeat(2, 1) - 1e3
    logits[0, 1] = max(math.log(leak), -1e3) if leak else -1e3
    bounds = softmax_norm(
        logits.view(1, 1, 2 * n, n), torch.eye(n).view(1, 1, n, n).double(), scale=1.0,
        tolerance=1e-300,
    )  # fmt: skip
    expected = torch.linalg.matrix_norm(logits.softmax(dim=-1), ord=2)
    assert bounds.lower.item() == pytest.approx(expected.item(), rel=1e-12)
    assert bounds.upper.item() >= expected.item() * (1 - 1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_upper_bound_is_near(is_causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (2 * torch.randn(1, 4, 80, 8, generator=g).double() for _ in range(2))
    bounds = softmax_norm(query, key, is_causal=is_causal)
    assert (bounds.upper <= 1.001 * bounds.lower).all()


def test_known_matrices_have_known_norms() -> None:
    n = 16
    query = torch.eye(n).view(1, 1, n, n).double()
    same, sink = torch.ones_like(query), torch.zeros_like(query)
    sink[:, :, 0] = 1000.0
    assert softmax_norm(query, same).lower.item() == pytest.approx(1.0)
    assert softmax_norm(query, 1000 * query, scale=1.0).lower.item() == pytest.approx(1.0)
    assert softmax_norm(same, sink, scale=1.0).lower.item() == pytest.approx(4.0)


def test_the_tolerance_is_the_residual_at_which_it_stops() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (3 * torch.randn(1, 2, 60, 8, generator=g).double() for _ in range(2))
    steps = []
    for tolerance in (1e-1, 1e-3, 1e-6):
        bounds = softmax_norm(query, key, tolerance=tolerance)
        assert (bounds.residual <= tolerance).all()
        share = torch.linalg.svdvals(dense.softmax(query, key))
        # a singular value of the matrix is as near as the residual says
        nearest = (share.square() / bounds.lower.square().unsqueeze(-1) - 1).abs().amin(dim=-1)
        assert (nearest <= tolerance).all()
        steps.append(bounds.num_steps)
    assert steps[0] < steps[1] < steps[2]
    assert (softmax_norm(query, key, tolerance=1e-12, max_steps=3).residual > 1e-12).any()


def test_parameters_are_checked() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ArgumentError, match="tolerance=0"):
        softmax_norm(x, x, tolerance=0.0)
    with pytest.raises(ArgumentError, match="max_steps=0"):
        softmax_norm(x, x, max_steps=0)


@given(attention_inputs())
def test_norms_of_narrow_matrices_are_exact(inputs: AttentionInputs) -> None:
    for matrix in inputs:
        torch.testing.assert_close(
            narrow_norms(matrix), dense.operator_norm(matrix), rtol=1e-9, atol=1e-12
        )


def test_norms_of_narrow_matrices_hold_in_any_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperframe.diagnostics.operators._GRAM_ROWS", 3)
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 10, 4, generator=g).double()
    expected = dense.operator_norm(matrix)
    for size in (1e-200, 1.0, 1e200):
        torch.testing.assert_close(narrow_norms(size * matrix) / size, expected)
    assert narrow_norms(0 * matrix).tolist() == [0.0, 0.0]
    matrix[1, 2, 3] = torch.inf
    found = narrow_norms(matrix)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].isnan()
