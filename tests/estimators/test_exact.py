"""The exact estimator: D itself, and the attention normalised by it."""

from __future__ import annotations

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.estimators.exact import Exact
from hyperframe.testing import dense_attention, masked_attention

SHAPES = [(20, 20), (12, 20), (20, 12)]


def tensors(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_queries, 3, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 3, generator=g, dtype=torch.float64)
    return query, key, torch.randn(2, 2, num_keys, 5, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 2.0, -0.5])
def test_row_sums_are_exact_whatever_the_mask(
    shape: tuple[int, int], is_causal: bool, scale: float | None
) -> None:
    query, key, value = tensors(*shape)
    mask = create("oracle(budget=1)").find(query, key, is_causal=is_causal)
    rows = Exact().row_sums(query, key, mask, scale=scale, num_samples=0)
    expected = dense_attention(query, key, value, scale=scale, is_causal=is_causal)
    torch.testing.assert_close(rows.log_sum, expected.lse)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_attention_keeps_its_numerator_and_takes_the_exact_normaliser(
    shape: tuple[int, int], is_causal: bool
) -> None:
    query, key, value = tensors(*shape)
    attention = HyperAttention(
        detector="oracle(budget=3)", estimator="exact", num_samples=0, min_seq_len=0
    )
    out, lse = attention(query, key, value, is_causal=is_causal, return_lse=True)
    exact = dense_attention(query, key, value, is_causal=is_causal)
    mask = create("oracle(budget=3)").find(query, key, is_causal=is_causal)
    held = masked_attention(query, key, value, mask.to_dense())
    share = (held.lse - exact.lse).exp().nan_to_num(0).unsqueeze(-1)
    torch.testing.assert_close(lse, exact.lse)
    torch.testing.assert_close(out, held.out * share)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_finite_also_for_rows_without_keys(
    shape: tuple[int, int], causal: str
) -> None:
    inputs = [x.requires_grad_() for x in tensors(*shape)]
    attention = HyperAttention(
        detector="oracle(budget=3)", estimator="exact", num_samples=4, min_seq_len=0, causal=causal
    )
    out = attention(*inputs, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_gradient_goes_through_the_exact_normaliser(is_causal: bool) -> None:
    inputs = [x[:1, :, :7].requires_grad_() for x in tensors(20, 20)]
    mask = create("oracle(budget=3)").find(*inputs[:2], is_causal=is_causal).to_dense()
    attention = HyperAttention(
        detector="oracle(budget=3)", estimator="exact", num_samples=0, min_seq_len=0
    )

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        held = masked_attention(q, k, v, mask)
        exact = dense_attention(q, k, v, is_causal=is_causal)
        return held.out * (held.lse - exact.lse).exp().unsqueeze(-1)

    out = attention(*inputs, is_causal=is_causal)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    expected = torch.autograd.grad(dense(*inputs).square().sum(), inputs)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)
