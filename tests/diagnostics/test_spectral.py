"""Spectral errors and stable ranks against singular values of dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import create
from hyperframe.diagnostics import (
    alpha,
    normaliser_error,
    relative_error,
    softmax_stable_rank,
    spectral_error,
    stable_rank,
)  # fmt: skip
from hyperframe.errors import ArgumentError
from hyperframe.estimators import create as create_estimator
from hyperframe.ragged import spread_heads
from hyperframe.testing import dense_attention
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests.diagnostics import dense

SCALES = st.sampled_from([None, 1.5, -0.5])


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 20, 5, generator=g).double()
    key = torch.randn(2, 2, 24, 5, generator=g).double()
    return query, key, torch.randn(2, 2, 24, 3, generator=g).double()


@given(attention_inputs(), st.booleans(), SCALES, st.integers(0, 2**16))
def test_the_spectral_error_is_equation_1(
    inputs: AttentionInputs, is_causal: bool, scale: float | None, seed: int
) -> None:
    query, key, value = inputs
    options = {"scale": scale, "is_causal": is_causal}
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(*query.shape[:3], value.shape[-1], generator=g).double()
    found = spectral_error(query, key, value, out, tolerance=1e-9, **options)
    share = dense.softmax(query, key, **options)
    values = dense.operator_norm(spread_heads(value, query.shape[1]))
    wrong = dense.operator_norm(out - share @ spread_heads(value, query.shape[1]))
    expected = wrong / (dense.operator_norm(share) * values)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_exact_attention_has_no_error_and_scaled_attention_a_known_one() -> None:
    query, key, value = tensors()
    exact = dense_attention(query, key, value, is_causal=True).out
    assert spectral_error(query, key, value, exact, is_causal=True).max() < 1e-12
    nothing = spectral_error(query, key, value, torch.zeros_like(exact), is_causal=True)
    torch.testing.assert_close(
        spectral_error(query, key, value, 3 * exact, is_causal=True), 2 * nothing
    )
    # ||P V|| <= ||P|| ||V||
    assert (nothing <= 1.0).all()


def test_it_is_another_measure_than_the_relative_error() -> None:
    # an output of nearly 0, by cancellation: relatively all is wrong, absolutely nearly nothing
    query = key = torch.zeros(1, 1, 32, 2)
    value = torch.tensor([1.0, -1.0]).repeat(16).view(1, 1, 32, 1)
    value[0, 0, 0] += 0.01
    out = torch.zeros(1, 1, 32, 1)
    assert relative_error(query, key, value, out).item() == pytest.approx(1.0)
    assert spectral_error(query, key, value, out).item() < 1e-3


def test_a_default_tolerance_never_understates_and_is_near() -> None:
    query, key, value = tensors()
    out = torch.ones(2, 4, 20, 3).double()
    fast = spectral_error(5 * query, key, value, out)
    exact = spectral_error(5 * query, key, value, out, tolerance=1e-12)
    assert (fast >= exact * (1 - 1e-12)).all()
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=0)


def test_outputs_that_are_not_finite_and_values_of_zero() -> None:
    query, key, value = tensors()
    out = torch.zeros(2, 4, 20, 3).double()
    out[0, 1, 2, 0] = torch.nan
    found = spectral_error(query, key, value, out)
    assert found.isnan().nonzero().tolist() == [[0, 1]]
    out = out.nan_to_num(0.0)
    assert (spectral_error(query, key, 0 * value, out) == 0).all()
    assert (spectral_error(query, key, 0 * value, out + 1) == torch.inf).all()


def test_an_output_of_another_shape_is_refused() -> None:
    query, key, value = tensors()
    out = torch.zeros(2, 4, 20, 3).double()
    for wrong in (out[..., :1], out[:, :1], out[:1]):
        with pytest.raises(ArgumentError, match=r"out: shape .*\(2, 4, 20, 3\)"):
            spectral_error(query, key, value, wrong)
    with pytest.raises(ArgumentError, match=r"log_sum: shape \(2, 4, 19\) .*\(2, 4, 20\)"):
        normaliser_error(query, key, out[:, :, 1:, 0])


@given(attention_inputs(), st.booleans(), SCALES, st.integers(0, 2**16))
def test_the_normaliser_error_is_equation_2(
    inputs: AttentionInputs, is_causal: bool, scale: float | None, seed: int
) -> None:
    query, key, _ = inputs
    options = {"scale": scale, "is_causal": is_causal}
    exact = dense.logits(query, key, **options).logsumexp(dim=-1)
    g = torch.Generator().manual_seed(seed)
    log_sum = exact + torch.randn(exact.shape, generator=g).double()
    found = normaliser_error(query, key, log_sum, tolerance=1e-9, **options)
    share = dense.softmax(query, key, **options)
    # D~^-1 A, formed as exp(logits - log D~)
    estimated = (dense.logits(query, key, **options) - log_sum.unsqueeze(-1)).exp()
    wrong = dense.operator_norm(estimated.nan_to_num(0.0) - share)
    expected = (wrong / dense.operator_norm(share)).nan_to_num(0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    # and it is at most the largest error of a row
    worst = torch.expm1(exact - log_sum).nan_to_num(0.0).abs().amax(dim=-1)
    assert (found <= worst * (1 + 1e-6) + 1e-12).all()


def test_exact_row_sums_have_no_error_and_uniform_ones_some() -> None:
    query, key, _ = tensors()
    mask = create("oracle(budget=4)").find(query, key)
    exact = create_estimator("exact").row_sums(query, key, mask).log_sum
    assert normaliser_error(query, key, exact).max() < 1e-6
    g = torch.Generator().manual_seed(0)
    few, many = (
        create_estimator("uniform").row_sums(query, key, mask, num_samples=m, generator=g).log_sum
        for m in (2, 2000)
    )
    assert (normaliser_error(query, key, many) < normaliser_error(query, key, few)).all()
    # a factor common to all rows comes out as itself, whatever the matrix
    torch.testing.assert_close(
        normaliser_error(query, key, exact - math.log(3)), torch.full((2, 4), 2.0).double(),
        rtol=1e-5, atol=0,
    )  # fmt: skip


def test_row_sums_of_zero_and_nan_are_not_hidden() -> None:
    query, key, _ = tensors()
    sums = dense.logits(query, key).logsumexp(dim=-1)
    sums[0, 0, 3], sums[0, 1, 4], sums[1, 0, 5] = -torch.inf, torch.nan, torch.inf
    found = normaliser_error(query, key, sums)
    assert found[0, 0] == torch.inf
    assert found[0, 1].isnan()
    # an infinite sum removes its row
    assert 0 < found[1, 0] <= 1
    # a row without keys has no sum and no error
    exact = dense.logits(query, key[:, :, :18], is_causal=True).logsumexp(dim=-1)
    assert exact[0, 0, 0] == -torch.inf
    assert normaliser_error(query, key[:, :, :18], exact, is_causal=True).max() < 1e-12


@given(attention_inputs())
def test_stable_ranks_are_ratios_of_norms(inputs: AttentionInputs) -> None:
    for matrix in inputs:
        norm = dense.operator_norm(matrix)
        expected = matrix.square().sum(dim=(-2, -1)) / norm.square()
        torch.testing.assert_close(
            stable_rank(matrix), expected.nan_to_num(0.0), rtol=1e-8, atol=1e-12
        )


def test_known_matrices_have_known_stable_ranks() -> None:
    assert stable_rank(torch.ones(5, 3)).item() == pytest.approx(1.0)
    assert stable_rank(torch.eye(4)).item() == pytest.approx(4.0)
    assert stable_rank(torch.zeros(5, 3)).item() == 0.0
    assert stable_rank(torch.full((5, 3), torch.nan)).isnan()
    assert stable_rank(1e200 * torch.eye(4).double()).item() == pytest.approx(4.0)


@given(attention_inputs(), st.booleans(), SCALES)
def test_the_stable_rank_of_the_softmax_matrix(
    inputs: AttentionInputs, is_causal: bool, scale: float | None
) -> None:
    query, key, _ = inputs
    options = {"scale": scale, "is_causal": is_causal}
    found = softmax_stable_rank(query, key, tolerance=1e-9, **options)
    share = dense.softmax(query, key, **options)
    expected = share.square().sum(dim=(-2, -1)) / dense.operator_norm(share).square()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    if query.shape[2] == key.shape[2]:
        assert (found <= alpha(query, key, **options) * (1 + 1e-7)).all()
