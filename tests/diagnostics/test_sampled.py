"""Estimates from sampled rows: their limits hold, and all rows give the number itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hyperframe import diagnostics
from hyperframe.detectors import create
from hyperframe.diagnostics import (
    Estimate,
    sampled_alpha,
    sampled_entropy,
    sampled_log_kappa,
    sampled_mass,
)  # fmt: skip
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import HeavyMask
from hyperframe.randomness import Stream
from hyperframe.testing.strategies import AttentionInputs, attention_inputs, masks
from tests.diagnostics import dense


def head(n: int = 120, sink: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different entropies, and a key that some of them attend to."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, 4, generator=g).double() for _ in range(2))
    query = query * torch.linspace(0, 3, n).view(-1, 1).double()
    key[:, :, 5] = sink
    return query, key


def late_sink() -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of the queries attends to one key, the first only leans towards it."""
    query, key = (torch.zeros(1, 1, 120, 1).double() for _ in range(2))
    query[:, :, :60], query[:, :, 60:], key[:, :, 7] = 1e-3, 1.0, 1000.0
    return query, key


def draws(estimate: object, count: int) -> list[Estimate]:
    return [estimate(torch.Generator().manual_seed(seed)) for seed in range(count)]


def check_coverage(estimates: list[Estimate], truth: float, failure: float) -> None:
    """Each limit may be wrong with probability `failure`; the seeds are fixed.

    Were the limits only just as good as they say, this would fail by chance, for a new choice of
    seeds, with a probability below 1e-6 each.
    """
    most = stats.binom.ppf(1 - 1e-6, len(estimates), failure)
    assert sum(found.low.item() > truth + 1e-9 for found in estimates) <= most
    assert sum(found.high.item() < truth - 1e-9 for found in estimates) <= most


@given(attention_inputs(), masks(), st.integers(0, 3))
def test_all_rows_give_the_number_itself(
    inputs: AttentionInputs, mask: HeavyMask, more: int
) -> None:
    query, key, _ = inputs
    num_rows = max(2, query.shape[2] + more)
    causal = {"is_causal": mask.is_causal}
    quality = diagnostics.mask_quality(query, key, mask)
    pairs = [
        (sampled_alpha(query, key, num_rows=num_rows, **causal), dense.alpha(query, key, **causal)),
        (
            sampled_entropy(query, key, num_rows=num_rows, **causal),
            diagnostics.entropy(query, key, **causal).mean(dim=-1),
        ),
        (
            sampled_log_kappa(query, key, mask, num_rows=num_rows),
            dense.log_kappa(query, key, mask),
        ),
        (sampled_mass(query, key, mask, num_rows=num_rows), quality.mass),
    ]
    for found, expected in pairs:
        for part in (found.value, found.low, found.high):
            torch.testing.assert_close(part, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.statistical
@pytest.mark.parametrize("inputs", [head(sink=0.0), head(sink=30.0), late_sink()])
@pytest.mark.parametrize("num_rows", [5, 60])
def test_limits_of_alpha_hold(num_rows: int, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = inputs
    truth = diagnostics.alpha(query, key).item()
    found = draws(
        lambda g: sampled_alpha(query, key, num_rows=num_rows, confidence=0.9, generator=g), 40
    )
    check_coverage(found, truth, 0.05)
    assert all(one.low <= one.value <= one.high for one in found)


def test_limits_of_alpha_say_something() -> None:
    query, key = head(n=400, sink=30.0)
    truth = diagnostics.alpha(query, key).item()
    found = sampled_alpha(query, key, num_rows=200, generator=torch.Generator().manual_seed(0))
    assert 0.7 * truth < found.low.item() <= truth <= found.high.item() < 1.4 * truth


def test_a_maximum_over_few_rows_is_too_high_and_its_limit_is_not() -> None:
    # every query has a key of its own: alpha = n, but each sample has a column of norm 1
    n = 64
    query = 1000 * torch.eye(n).view(1, 1, n, n).double()
    for found in draws(lambda g: sampled_alpha(query, query, num_rows=16, generator=g), 20):
        assert found.value.item() == pytest.approx(n * n / 16)
        assert found.low.item() == pytest.approx(n)


def test_columns_can_be_left_out_of_the_estimate() -> None:
    query = torch.ones(1, 1, 50, 1).double()
    key = torch.zeros(1, 1, 50, 1).double()
    key[:, :, 0] = 1000.0
    sink = sampled_alpha(query, key, num_rows=20)
    assert sink.value.item() == pytest.approx(2500.0)
    assert sampled_alpha(query, key, num_rows=20, skip_first=1).value.item() == 0.0
    with pytest.raises(ArgumentError, match="skip_first=50"):
        sampled_alpha(query, key, num_rows=20, skip_first=50)


@pytest.mark.statistical
@pytest.mark.parametrize("num_rows", [1, 10, 100])
def test_limits_of_mean_entropy_and_mass_hold(num_rows: int) -> None:
    query, key = head()
    mask = create("sliding_window(width=30)").find(query, key, is_causal=True)
    truth = diagnostics.entropy(query, key, is_causal=True).mean().item()
    entropies = draws(
        lambda g: sampled_entropy(
            query, key, num_rows=num_rows, is_causal=True, confidence=0.5, generator=g
        ),
        40,
    )
    check_coverage(entropies, truth, 0.25)
    truth = diagnostics.mask_quality(query, key, mask).mass.item()
    masses = draws(
        lambda g: sampled_mass(query, key, mask, num_rows=num_rows, confidence=0.5, generator=g), 40
    )
    check_coverage(masses, truth, 0.25)
    for one in (*entropies, *masses):
        assert one.low <= one.value <= one.high
    assert all(one.low >= 0 and one.high <= 1 for one in masses)
    assert all(one.high <= math.log(120) + 1e-9 for one in entropies)


@pytest.mark.statistical
def test_the_mean_over_samples_is_the_mean_over_rows() -> None:
    query, key = head()
    rows = diagnostics.entropy(query, key)[0, 0]
    found = draws(lambda g: sampled_entropy(query, key, num_rows=10, generator=g), 100)
    mean = sum(one.value.item() for one in found) / 100
    # without replacement the deviation is smaller than this; 5 of them: one in 1e6
    assert abs(mean - rows.mean().item()) < 5 * rows.std().item() / math.sqrt(1000)


def test_the_sampled_kappa_is_never_above() -> None:
    query, key = head()
    mask = create("oracle(budget=10)").find(query, key)
    for centred in (False, True):
        truth = diagnostics.log_kappa(query, key, mask, centred=centred).item()
        found = [
            one.value.item()
            for one in draws(
                lambda g, centred=centred: sampled_log_kappa(
                    query, key, mask, num_rows=40, centred=centred, generator=g
                ),
                20,
            )
        ]
        assert max(found) <= truth + 1e-12
        assert min(found) > 0.3 * truth
    one = sampled_log_kappa(query, key, mask, num_rows=40)
    assert one.high.item() == torch.inf
    assert torch.equal(one.low, one.value)


def test_the_same_seed_draws_the_same_rows() -> None:
    query, key = head()

    def value(generator: torch.Generator | Stream) -> float:
        return sampled_entropy(query, key, num_rows=7, generator=generator).value.item()

    g = torch.Generator().manual_seed(3)
    first, second = value(g), value(g)
    assert first != second
    assert value(torch.Generator().manual_seed(3)) == first
    assert value(Stream(3)) == value(Stream(3))


def test_arguments_are_checked() -> None:
    query, key = head()
    mask = create("oracle(budget=10)").find(query, key)
    with pytest.raises(ArgumentError, match=r"num_rows=1: too few rows .* at least 2"):
        sampled_alpha(query, key, num_rows=1)
    for call in (
        lambda **options: sampled_alpha(query, key, **options),
        lambda **options: sampled_entropy(query, key, **options),
        lambda **options: sampled_log_kappa(query, key, mask, **options),
        lambda **options: sampled_mass(query, key, mask, **options),
    ):
        with pytest.raises(ArgumentError, match="num_rows=0"):
            call(num_rows=0)
        with pytest.raises(ArgumentTypeError, match=r"num_rows=2\.0: has type float"):
            call(num_rows=2.0)
        with pytest.raises(ArgumentError, match="confidence"):
            call(num_rows=5, confidence=1.0)
        with pytest.raises(ArgumentTypeError, match="generator=0"):
            call(num_rows=5, generator=0)
