"""Confidence limits of means, their coverage computed exactly."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from hyperframe.diagnostics import Estimate
from hyperframe.diagnostics.intervals import mean_limits


def coverage(distribution: object, count: int, mean: float, failure: float) -> tuple[float, float]:
    """How often each limit holds, summed over all outcomes of `count` draws of 0 or 1."""
    hits = torch.arange(count + 1).double()
    low, high = mean_limits(hits / count, count, failure=failure)
    probability = torch.from_numpy(distribution.pmf(hits.numpy()))
    holds = (low <= mean + 1e-12, high >= mean - 1e-12)
    return tuple(probability[one].sum().item() for one in holds)


@pytest.mark.parametrize("failure", [0.25, 0.025, 1e-3])
@pytest.mark.parametrize("count", [1, 2, 17, 100])
def test_limits_of_coins_hold_as_often_as_they_say(count: int, failure: float) -> None:
    for mean in torch.linspace(0, 1, 21).tolist():
        held = coverage(stats.binom(count, mean), count, mean, failure)
        assert min(held) >= 1 - failure - 1e-9, mean


@pytest.mark.parametrize("failure", [0.25, 0.025])
def test_and_without_replacement(failure: float) -> None:
    population, count = 40, 15
    for hits in range(population + 1):
        held = coverage(stats.hypergeom(population, hits, count), count, hits / population, failure)
        assert min(held) >= 1 - failure - 1e-9, hits


def test_limits_are_not_wider_than_needed() -> None:
    # at a mean of 0 the upper limit is that of the exact test, 1 - failure^(1/m)
    low, high = mean_limits(torch.tensor([0.0, 1.0]).double(), 50, failure=0.05)
    torch.testing.assert_close(high[0].item(), 1 - 0.05 ** (1 / 50))
    torch.testing.assert_close(low[1].item(), 0.05 ** (1 / 50))
    assert (low[0], high[1]) == (0.0, 1.0)
    # in the middle they shrink like one over the root of m
    widths = []
    for count in (100, 10_000):
        low, high = mean_limits(torch.tensor(0.5).double(), count, failure=0.05)
        assert low < 0.5 < high
        widths.append((high - low).item())
    assert widths[0] / widths[1] == pytest.approx(10.0, rel=0.02)


def test_an_estimate_of_a_logarithm_becomes_one_of_the_number() -> None:
    zero = torch.zeros(1, 1).double()
    raised = Estimate(value=zero, low=zero - 1, high=zero + torch.inf, confidence=0.9).exp()
    assert raised.value.item() == 1.0
    assert raised.low.item() == pytest.approx(0.3679, abs=1e-4)
    assert raised.high.item() == torch.inf
    assert raised.confidence == 0.9
