"""Paired increases: what they cancel, and how often their limits hold."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from hyperframe.tuning.paired import Increase, paired_increase


def test_what_both_runs_share_cancels() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = [5 * torch.rand(300, dtype=torch.float64, generator=generator) for _ in range(2)]
    found = paired_increase([base + 0.01 for base in bases], bases)
    assert found.mean == pytest.approx(0.01)
    assert found.error < 1e-12
    assert found.percent == pytest.approx(100 * math.expm1(0.01))


def test_limit_is_the_normal_quantile() -> None:
    found = Increase(mean=0.01, error=0.002)
    assert found.upper(0.5) == pytest.approx(0.01)
    assert found.upper(0.99) == pytest.approx(0.01 + 0.002 * NormalDist().inv_cdf(0.99))
    assert found.percent_error == pytest.approx(0.2 * math.exp(0.01))


@pytest.mark.statistical
def test_upper_limit_holds_as_often_as_it_says_for_correlated_losses() -> None:
    """Differences with a correlation of 0.8 from token to token, two sequences of 1,024.

    Of 400 limits at 95 % some 20 are missed; 32 blocks instead of a normal law make it a little
    more, 22 to 26. More than 48 would be a rate of 12 %, which a binomial of 400 draws at 6.5 %
    exceeds with a probability below 1e-4; errors that take tokens as independent miss 28 %.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, 1200, dtype=torch.float64, generator=generator)
    for i in range(1, 1200):
        noise[..., i] = 0.8 * noise[..., i - 1] + 0.6 * noise[..., i]
    zero = torch.zeros(1024, dtype=torch.float64)
    missed = sum(
        paired_increase(list(runs[:, -1024:]), [zero, zero]).upper(0.95) < 0 for runs in noise
    )
    assert missed <= 48


def test_numbers_are_those_of_all_tokens() -> None:
    run, base = torch.arange(7.0), torch.zeros(7)
    found = paired_increase([run], [base])
    assert found.mean == pytest.approx(3.0)
    assert found.error == pytest.approx(float(run.std()) / math.sqrt(7))
