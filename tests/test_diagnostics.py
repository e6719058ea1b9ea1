"""Diagnostics: errors against exact attention."""

from __future__ import annotations

import pytest
import torch

from hyperframe.diagnostics import relative_error
from hyperframe.errors import ArgumentError
from hyperframe.testing import dense_attention


def tensors(
    num_queries: int = 20, num_keys: int = 24, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_queries, 5, generator=g).to(dtype)
    key = torch.randn(2, 2, num_keys, 5, generator=g).to(dtype)
    value = torch.randn(2, 2, num_keys, 3, generator=g).to(dtype)
    return query, key, value, torch.randn(2, 4, num_queries, 3, generator=g).to(dtype)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 1.5, -1.0])
@pytest.mark.parametrize("shape", [(20, 24), (24, 24), (24, 20)])
def test_the_relative_error_is_a_ratio_of_frobenius_norms_for_every_head(
    shape: tuple[int, int], scale: float | None, is_causal: bool
) -> None:
    query, key, value, out = tensors(*shape)
    error = relative_error(query, key, value, out, scale=scale, is_causal=is_causal)
    exact = dense_attention(query, key, value, scale=scale, is_causal=is_causal).out
    expected = torch.linalg.matrix_norm(out - exact) / torch.linalg.matrix_norm(exact)
    assert error.shape == (2, 4)
    torch.testing.assert_close(error, expected)


def test_exact_attention_has_no_error_and_nothing_has_error_1() -> None:
    query, key, value, _ = tensors()
    exact = dense_attention(query, key, value).out
    assert relative_error(query, key, value, exact).max() < 1e-12
    nothing = relative_error(query, key, value, torch.zeros_like(exact))
    torch.testing.assert_close(nothing, torch.ones_like(nothing))
    torch.testing.assert_close(relative_error(query, key, value, 3 * exact), 2 * nothing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_judged_in_float32(dtype: torch.dtype) -> None:
    query, key, value, _ = tensors(dtype=dtype)
    exact = dense_attention(query, key, value).out
    assert relative_error(query, key, value, exact).dtype == torch.float32
    # the yardstick itself is not in low precision
    assert relative_error(query, key, value, exact).max() < 1e-5


def test_an_output_of_another_shape_is_refused_and_not_broadcast() -> None:
    query, key, value, out = tensors()
    for wrong in (out[..., :1], out[:, :1], out[:1], out[:, :, :1]):
        with pytest.raises(ArgumentError, match=r"out: shape .*\(2, 4, 20, 3\)"):
            relative_error(query, key, value, wrong)


def test_inputs_are_checked() -> None:
    query, key, value, out = tensors()
    with pytest.raises(ArgumentError, match="value"):
        relative_error(query, key, value[:, :, :-1], out)
    with pytest.raises(ArgumentError, match="scale=nan"):
        relative_error(query, key, value, out, scale=float("nan"))
