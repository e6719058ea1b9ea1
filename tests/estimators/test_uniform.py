"""The uniform estimator: D~ and the unnormalised numerator are unbiased.

Their ratio, the attention output, is not unbiased (its bias is O(1/m)), and nothing here or
anywhere else claims that it is.
"""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.estimators.uniform import Uniform
from hyperframe.testing import causal_mask, masked_attention

FALSE_ALARM = 1e-6
SAMPLES, COPIES, SCALE = 6, 1500, 0.8


def tensors(
    num_queries: int, num_keys: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, num_queries, 3, generator=g, dtype=torch.float64)
    key = torch.randn(1, 1, num_keys, 3, generator=g, dtype=torch.float64)
    return query, key, torch.randn(1, 1, num_keys, 2, generator=g, dtype=torch.float64)


def copies(x: torch.Tensor) -> torch.Tensor:
    """Every batch item has draws of its own."""
    return x.expand(COPIES, -1, -1, -1)


def radius(terms: torch.Tensor, checks: int) -> torch.Tensor:
    """Bernstein's bound for the mean over all draws of a term drawn uniformly from `terms`.

    Draws are independent, with variance s^2 and within b of their mean, so that their mean is off
    by more than sqrt(2 s^2 L / N) + b L / (3 N) with probability at most 2 exp(-L).
    """
    log_term = math.log(2 * checks / FALSE_ALARM)
    draws = SAMPLES * COPIES
    variance = terms.var(dim=-1, correction=0)
    reach = (terms - terms.mean(-1, keepdim=True)).abs().amax(-1)
    return (2 * variance * log_term / draws).sqrt() + reach * log_term / (3 * draws) + 1e-9


CASES = [
    ("oracle(budget=5)", False, 24, 24),
    ("sliding_window(width=6, num_sinks=2)", False, 24, 24),
    ("oracle(budget=5)", False, 10, 30),
    ("oracle(budget=5)", True, 24, 24),
    ("sliding_window(width=4, num_sinks=2)", True, 12, 24),
    # as many voters as rows: all rows vote, whatever the generator
    ("heavy_columns(num_columns=4, num_queries=24, tile_size=8)", True, 24, 24),
]


@pytest.mark.statistical
@pytest.mark.parametrize("spec, is_causal, num_queries, num_keys", CASES)
def test_row_sums_and_numerators_are_unbiased(
    spec: str, is_causal: bool, num_queries: int, num_keys: int
) -> None:
    query, key, value = tensors(num_queries, num_keys)
    detector = create(spec)
    mask = detector.find(query, key, scale=SCALE, is_causal=is_causal)
    dense = mask.to_dense()[0]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        visible = causal_mask(num_queries, num_keys)
    a = (SCALE * query @ key.transpose(-1, -2)).exp()[0].where(visible, 0)  # [H, n_q, n_k]

    mask = detector.find(copies(query), copies(key), scale=SCALE, is_causal=is_causal)
    g = torch.Generator().manual_seed(1)
    rows = Uniform().row_sums(
        copies(query), copies(key), mask, scale=SCALE, num_samples=SAMPLES, generator=g
    )
    attention = HyperAttention(detector=detector, num_samples=SAMPLES, min_seq_len=0)
    out, lse = attention(
        copies(query), copies(key), copies(value), scale=SCALE, is_causal=is_causal,
        return_lse=True, generator=g,
    )  # fmt: skip

    # a draw adds n_k (1 - M) A, or, under a causal mask, what is left of it in the tile's prefix
    tile = 8 if "heavy_columns" in spec else 1 if "oracle" in spec else num_queries
    checks = len(CASES) * 2 * num_queries * 4  # heads x rows x (two sums and two values)
    for row in range(num_queries):
        end = num_keys
        if is_causal:
            end = min(num_queries, (row // tile + 1) * tile) + num_keys - num_queries
        rest = a[:, row].masked_fill(dense[:, row], 0)[:, :end] * end
        exact = a[:, row].sum(-1)
        if end <= SAMPLES and is_causal:
            rest = torch.zeros_like(rest)  # short prefixes are taken whole
        bound = radius(rest, checks)
        for estimate in (rows.log_sum[:, :, row], lse[:, :, row]):
            assert ((estimate.exp().mean(0) - exact).abs() <= bound).all()
        for d in range(2):
            exact = (a[:, row] * value[0, 0, :, d]).sum(-1)
            bound = radius(rest * value[0, 0, :end, d], checks)
            numerator = (out[:, :, row, d] * lse[:, :, row].exp()).mean(0)
            assert ((numerator - exact).abs() <= bound).all()
    if not is_causal:  # and it is an estimate
        assert rows.log_sum.std(0).min() > 1e-3


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_samples_the_row_sum_is_that_of_the_mask(is_causal: bool) -> None:
    query, key, value = tensors(20, 24)
    mask = create("oracle(budget=4)").find(query, key, is_causal=is_causal)
    rows = Uniform().row_sums(query, key, mask, num_samples=0)
    expected = masked_attention(query, key, value, mask.to_dense()).lse
    torch.testing.assert_close(rows.log_sum, expected)


def test_a_row_without_keys_has_the_sum_0() -> None:
    query, key, _ = tensors(24, 20)
    mask = create("oracle(budget=4)").find(query, key, is_causal=True)
    log_sum = Uniform().row_sums(query, key, mask, num_samples=5).log_sum
    assert (log_sum[:, :, :4] == float("-inf")).all()
    assert log_sum[:, :, 4:].isfinite().all()


def test_row_sums_have_a_gradient_and_follow_the_generator() -> None:
    query, key, _ = (x.requires_grad_() for x in tensors(20, 24))
    mask = create("oracle(budget=4)").find(query, key)

    def log_sum(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return Uniform().row_sums(query, key, mask, num_samples=5, generator=g).log_sum

    assert torch.equal(log_sum(0), log_sum(0))
    assert not torch.equal(log_sum(0), log_sum(1))
    grads = torch.autograd.grad(log_sum(0).sum(), [query, key])
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)
